"""The site's interactive page, from figures/explore: `python docs/explore.py FOLDER` writes it alone, to test it.

`nbs/replication/explore.ipynb` draws the sheets and the logits; here they go beside widget/explore.{html,js,css}. The
data become a script: a page that was opened from a disk may not read files, but may run them."""
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "figures" / "explore"
PARTS = Path(__file__).resolve().parent / "widget"
PAGE = """# Explore the chains

{{.lead}}
{finding}

Choose a system, a class and a step; the arrow keys move along the chain.

```{{raw}} html
{body}
```

## What is shown

Each image starts as a draw from the class-conditional Gaussian prior (step *prior*). A targeted *attack* follows the
gradient of the cross-entropy, with batch norm by running averages; a chain's *steps* follow the gradient of $E(x, y)$,
with batch norm by the images that are drawn together. Nothing is selected: these are the first {chains} chains of each
class.

All numbers come from the ten logits that the network gives to the image above:
$E(x, y) = -f(x)[y]$, $E(x) = -\\log \\sum_y \\exp f(x)[y]$, and $p(y \\mid x) = \\exp(E(x) - E(x, y))$
([method](guide/method.ipynb)). Energies are known up to a constant of their own for each network, so compare them
along a chain and with the dotted line, the mean over {real} test images, and not between systems. The shares at the
top are each network's own opinion of its finished samples, with running averages: no independent network was asked
([that is another page](guide/cifar10.ipynb)).

Images are {size}×{size} pixels, compressed as WebP. Drawn from the networks in `data/pretrained` by `make explore`
(notebook `nbs/replication/explore.ipynb`, seed {seed}, commit {commit}).
"""


def read(figures: Path = FIGURES) -> dict | None:
    "What was drawn; none where nothing was."
    path = figures / "explore.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def body(address: str) -> str:
    "The page's own HTML: styles, the widget, its data and its script, which lie at `address`."
    widget = (PARTS / "explore.html").read_text(encoding="utf-8").strip()
    scripts = "\n".join(f'<script src="{address}/{name}"></script>' for name in ("data.js", "explore.js"))
    return f'<link rel="stylesheet" href="{address}/explore.css">\n{widget}\n{scripts}'


def write_assets(folder: Path, address: str, figures: Path = FIGURES) -> None:
    "Sheets, data, script and styles, to be found at `address` from the page."
    folder.mkdir(parents=True, exist_ok=True)
    data = read(figures) | {"folder": address}
    for entry in data["rows"]:
        shutil.copy(figures / entry["sheet"], folder)
    for name in ("explore.js", "explore.css"):
        shutil.copy(PARTS / name, folder)
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    (folder / "data.js").write_text(f"window.EXPLORE = {text};\n", encoding="utf-8")


def sure(data: dict) -> list[float]:
    "For each row, the share of samples that the network takes for the class that was asked for."
    labels = [y for y in range(len(data["classes"])) for _ in range(data["chains"])]
    ends = [entry["logits"]["running"][-1] for entry in data["rows"]]
    return [sum(max(range(len(f)), key=f.__getitem__) == y for f, y in zip(end, labels)) / len(labels) for end in ends]


def markdown(address: str, figures: Path = FIGURES) -> str:
    "The page's source, as Sphinx takes it."
    data = read(figures)
    shares = "; ".join(f"{entry['title']} {share:.0%}" for entry, share in zip(data["rows"], sure(data)))
    number = len(data["classes"]) * data["chains"]
    finding = ("Watch noise become an image, and what the network makes of it on the way. Of each system's "
               f"{number} finished samples, its own network recognises as the class that was asked for: {shares}.")
    return PAGE.format(finding=finding, body=body(address), chains=data["chains"], size=data["size"], seed=data["seed"],
                       commit=data["commit"], real=data["real_images"])


ALONE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Explore the chains</title>
<style>
:root {{
  color-scheme: light dark; --color-brand-content: #1a5a96; --color-foreground-primary: #000;
  --color-foreground-secondary: #5a5c63; --color-foreground-muted: #6b6f76; --color-background-primary: #fff;
  --color-background-secondary: #f8f9fb;
}}
@media (prefers-color-scheme: dark) {{ :root {{
  --color-brand-content: #8ec1f0; --color-foreground-primary: #cfd0d0; --color-foreground-secondary: #9ca0a5;
  --color-foreground-muted: #81868d; --color-background-primary: #131416; --color-background-secondary: #1a1c1e;
}} }}
body {{
  margin: 0 auto; padding: 0 1rem; max-width: 46rem; font: 16px/1.5 system-ui, sans-serif;
  color: var(--color-foreground-primary); background: var(--color-background-primary);
}}
</style>
</head>
<body>
<main>
<h1>Explore the chains</h1>
{body}
</main>
</body>
</html>
"""


def write_alone(folder: Path, figures: Path = FIGURES) -> Path:
    "The page without a site around it; returns its file."
    write_assets(folder / "explore", "explore", figures)
    page = folder / "index.html"
    page.write_text(ALONE.format(body=body("explore")), encoding="utf-8")
    return page


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/explore.py FOLDER")
    if read() is None:
        sys.exit("figures/explore/explore.json is missing: run `make explore`")
    print(write_alone(Path(sys.argv[1])))
