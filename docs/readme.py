"""Make README.md from nbs/index.ipynb: `python docs/readme.py`, or `--check` to only say whether it is up to date.

nbdev_readme would do this with Quarto, a program that pip can't install. Links in the notebook are relative to nbs/, so
that they work in Jupyter; here they become relative to the repository's root."""
import json
import posixpath
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = re.compile(r"^<!-- include: (\S+)(?: \| (.*))? -->\n?", re.M)
MODULES = re.compile(r"<!-- modules: (\w+) -->")
HEADER = "<!-- Made from nbs/index.ipynb by `make prepare`: edit the notebook. -->\n\n"


def expand_includes(text: str, root: Path = ROOT, folder: str = "nbs", linked: bool = False) -> str:
    """Replace `<!-- include: path | alt -->`, path from the root: an image becomes a link from `folder`, any other file
    its text, whose headings go below that of the section they come into. A file that isn't there (no run yet) leaves
    nothing behind. `<!-- modules: room -->` names a room's, each `linked` to its notebook where that is asked for."""
    def expand(m):
        path = root / m[1]
        if not path.exists():
            return ""
        if path.suffix in (".png", ".svg"):
            return f"![{m[2] or ''}]({posixpath.relpath(m[1], folder)})\n"
        text = path.read_text(encoding="utf-8").strip() + "\n"
        return re.sub(r"^##", "###", text, flags=re.M)
    def modules(m):
        notebooks = sorted((root / "nbs" / m[1]).glob("*.ipynb"))
        names = [(f"`{path.stem.split('_', 1)[1]}`", path.relative_to(root).as_posix()) for path in notebooks]
        return " ".join(f"[{name}]({posixpath.relpath(path, folder)})" if linked else name for name, path in names)
    return MODULES.sub(modules, INCLUDE.sub(expand, text))


def from_root(text: str) -> str:
    "Markdown links relative to nbs/ made relative to the root: `../data/` → `data/`, `ebm/x` → `nbs/ebm/x`."
    def fix(m):
        target = m[2]
        if re.match(r"[a-z]+:|#|/", target):
            return m[0]
        return f"{m[1]}({target[3:] if target.startswith('../') else 'nbs/' + target}"
    return re.sub(r"(\])\(([^)\s]+)", fix, text)


def readme(root: Path = ROOT) -> str:
    "The README's text."
    parts = []
    for cell in json.loads((root / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(from_root(expand_includes(source, root)).strip())
        elif cell["cell_type"] == "code" and not re.search(r"^#\| *(hide|default_exp)", source, re.M):
            parts.append("```python\n" + re.sub(r"^#\|.*\n", "", source, flags=re.M).strip() + "\n```")
    return HEADER + "\n\n".join(filter(None, parts)) + "\n"


if __name__ == "__main__":
    path, text = ROOT / "README.md", readme()
    current = path.exists() and path.read_text(encoding="utf-8") == text
    if "--check" in sys.argv[1:]:
        sys.exit(None if current else "README.md differs from nbs/index.ipynb: run `make prepare`")
    if not current:
        path.write_text(text, encoding="utf-8")
