"""The README's result, from the committed record: `python docs/results.py` writes figures/readme.md, a table of five
rows and three columns, and figures/readme-figure.md, what the figure shows. `make prepare` calls it; `--check` only
says whether both are up to date."""
import json
import sys
from pathlib import Path

from robust_jem.report.tables import grid_markdown

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "figures"
RECORD = "figures/cifar10/table1.json"
CLASSIFIERS = {                              # a row of the README: the record's row
    "JEM++, by energy": "JEM++, energy-step-0.4",
    "Single robust classifier, by attack": "Single Robust Classifier",
    "**Robust JEM, by energy**": "Robust JEM, energy-step-0.4",
    "**Robust JEM, attack and energy combined**": "Robust JEM, combined-step-0.4",
}
PRIOR, REAL = "bare prior samples", "held-out real images"
ATTACKED, DISTANCE = "PGD accuracy, ε = 0.0627", "FID-768"
HEAD = ["on CIFAR-10", "accuracy %", "under attack %", "distance of samples"]


def distance(row: dict) -> str:
    "A Fréchet distance, with its spread where the record has one."
    mean, std = row[DISTANCE]["mean"], row[DISTANCE]["std"]
    return f"{mean:.3f} ± {std:.3f}" if std else f"{mean:.3f}"


def table(record: dict) -> str:
    "The README's table and the line below it."
    rows = {r["model"]: r for r in record["rows"]}
    shown = []
    for title, name in CLASSIFIERS.items():
        r = rows[name]
        accuracies = [f"{100 * r[column]['mean']:.1f}" for column in ("accuracy", ATTACKED)]
        shown.append([title, *accuracies, distance(r)])
    shown.append(["Where chains start: draws of the prior", "–", "–", distance(rows[PRIOR])])
    how = (f"Attack: PGD-20, ε = 8/255 of [0, 1] images. Distance: {DISTANCE} of 10,000 samples to the 50,000 training "
           f"images; lower is nearer, real test images have {distance(rows[REAL])}; ± is over sampling seeds. It is "
           "*not* the papers' FID: compare rows with each other only.")
    return f"{grid_markdown([HEAD, *shown])}\n\n{how}\n"


def caption(folder: Path) -> str:
    "What the figure shows, from the record of the network that drew it."
    config, summary = (json.loads((folder / f"run/{name}.json").read_text("utf-8")) for name in ("config", "summary"))
    size = f"Wide-ResNet-{config['depth']}-{config['width']}, {summary['parameters'] / 1e6:.1f} million parameters"
    return (f"*The first draw of each class, none picked, by a {size}, after {summary['seconds'] / 60:.1f} minutes of "
            f"training on one {summary['device'].removeprefix('NVIDIA ')} (`python docs/figure.py`).*\n")


def main() -> None:
    made = {
        "readme.md": table(json.loads((ROOT / RECORD).read_text("utf-8"))),
        "readme-figure.md": caption(ROOT / "data/pretrained/robust_jem-h100"),
    }
    stale = [name for name, text in made.items()
             if not (FIGURES / name).is_file() or (FIGURES / name).read_text("utf-8") != text]
    if "--check" in sys.argv[1:]:
        sys.exit(f"figures/{', '.join(stale)}: run `python docs/results.py`" if stale else None)
    for name in stale:
        (FIGURES / name).write_text(made[name], encoding="utf-8")


if __name__ == "__main__":
    main()
