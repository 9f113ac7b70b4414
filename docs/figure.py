"""The README's figure: one sample of each class on its way from the prior, by a committed network.

`python docs/figure.py` writes figures/readme.png, in about two minutes of one CPU core. No data set is needed: the
networks in data/pretrained carry where their chains start."""
import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from robust_jem.core.images import to_uint8
from robust_jem.core.random import stream
from robust_jem.engine.pretrained import RobustJEM
from robust_jem.report.run_figures import tiles

ROOT = Path(__file__).resolve().parent.parent
SHOWN = {
    "prior": "prior: a draw from\neach class's Gaussian",
    "attack": "attacked towards\nthe class",
    "last": "sample: then down\nthe energy",
}
BESIDE = 2                 # further chains of each class that share the batch, and so its batch-norm statistics


def stages(model: RobustJEM, seed: int) -> dict[str, torch.Tensor]:
    "uint8 images of combined inference, one a class, at the stages that are shown."
    y = torch.arange(len(model.classes)).repeat(1 + BESIDE)
    found = {}

    def keep(name: str, x: torch.Tensor):
        found[name if name in SHOWN else "last"] = to_uint8(x.detach())[:len(model.classes)]

    model.generate(y, "combined", generator=stream(seed, "figure"), on_stage=keep)
    return found


def draw(rows: dict[str, torch.Tensor], classes: tuple[str, ...]) -> Figure:
    "One row a stage, one column a class."
    images = torch.cat([rows[name] for name in SHOWN])
    picture = tiles(images, len(classes)).repeat(3, 0).repeat(3, 1)
    h, w = picture.shape[:2]
    left, top, dpi = 210, 40, 100
    fig = plt.figure(figsize=((w + left) / dpi, (h + top) / dpi), dpi=dpi)
    ax = fig.add_axes([left / (w + left), 0, w / (w + left), h / (h + top)])
    ax.imshow(picture, interpolation="nearest")
    ax.axis("off")
    for i, text in enumerate(SHOWN.values()):
        ax.text(-12, (i + 0.5) * h / len(SHOWN), text, ha="right", va="center", fontsize=13)
    for k, name in enumerate(classes):
        ax.text((k + 0.5) * w / len(classes), -8, name, ha="center", va="bottom", fontsize=12)
    return fig


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--model", default=str(ROOT / "data/pretrained/robust_jem-h100"), help="a folder of weights")
    ask.add_argument("--seed", type=int, default=0, help="of the prior's draws")
    ask.add_argument("--out", default=str(ROOT / "figures/readme.png"))
    asked = ask.parse_args()
    model = RobustJEM.from_pretrained(asked.model)
    fig = draw(stages(model, asked.seed), model.classes)
    fig.savefig(asked.out, facecolor="white", metadata={"Software": None})
    print(asked.out)


if __name__ == "__main__":
    main()
