"""Build the site: `python docs/build.py`, after `make replicate` or `make record`. Reads nbs/, robust_jem/, figures/ and
executed notebooks of the record, else of the replication; writes _docs/.

    nbs/**.ipynb →  _build/executed   run, unless neither the notebook nor the package changed since
                 →  _proc             nbdev: exported cells become documentation, hidden ones go
                 →  _build/source     what Quarto would have understood becomes what MyST understands
                 →  _docs             Sphinx, with warnings as errors
"""
import json, os, posixpath, re, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import groupby
from pathlib import Path

import nbformat
import yaml
from nbclient import NotebookClient
from nbdev.config import get_config
from nbdev.serve import proc_nbs

from api import document, line_number, target
from readme import expand_includes

ROOT = Path(__file__).resolve().parent.parent
RECORDS = [ROOT / "runs" / name for name in ("record", "digits-cpu")]          # where `make record` and `make replicate` leave */notebooks/*.ipynb
RECORD = next((p for p in RECORDS if (p / "notebooks/report.ipynb").exists()), RECORDS[-1])
STAGES = ("train", "generate", "evaluate", "chains")   # the order of a run's notebooks in the navigation
ROOMS = {"core": "What everything stands on", "networks": "Networks", "ebm": "The method", "systems": "Systems", "engine": "Training and sampling", "judge": "Evaluation",
         "bench": "Speed", "report": "Reports", "app": "Commands"}      # in reading order
NBS = ROOT / "nbs"
BUILD = ROOT / "_build"
EXECUTED, SOURCE, SITE = BUILD / "executed", BUILD / "source", ROOT / "_docs"

DIRECTIVE = re.compile(r"^#\| *([\w-]+):? *(.*)\n?", re.M)
SKIP = "skip-execution"
SHOW_DOC = re.compile(r"^show_doc\(([\w.]+)", re.M)


# 1. Run the notebooks ------------------------------------------------------------------------------------------------

def execute(path: Path, package: str) -> None:
    "Run one notebook into `EXECUTED`, cells with a directive that tests skip left out."
    out = EXECUTED / path.relative_to(NBS)
    key = sha256(path.read_bytes() + package.encode()).hexdigest()
    if out.exists() and json.loads(out.read_text(encoding="utf-8"))["metadata"].get("made_from") == key: return
    nb = nbformat.read(path, as_version=4)
    flags = set(get_config().tst_flags.split())
    for cell in nb.cells:
        d = dict(DIRECTIVE.findall(cell.source))
        if d.get("eval") == "false" or d.keys() & flags or "nbdev_export(" in cell.source:
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), SKIP]
    print("running", path.relative_to(NBS), flush=True)
    where = {"metadata": {"path": str(path.parent)}}   # the working directory, as under nbdev_test
    NotebookClient(nb, timeout=1800, kernel_name="python3", resources=where, skip_cells_with_tag=SKIP).execute()
    nb.metadata["made_from"] = key
    split_title(nb)
    out.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, out)


def split_title(nb) -> None:
    "nbdev reads title and summary from the title's cell and drops the rest of it: give the rest a cell of its own."
    first = nb.cells[0]
    m = re.match(r"(# [^\n]*\n*(?:>[^\n]*\n*)*)(.*)", first.source, re.S)
    if m and m[2].strip():
        first.source = m[1].strip()
        nb.cells.insert(1, nbformat.v4.new_markdown_cell(m[2].strip()))


def execute_all() -> list[Path]:
    "Run what changed, two notebooks at a time; returns nbs/'s notebooks in reading order."
    rooms = ["", "guide", *ROOMS]
    notebooks = sorted((p for room in rooms for p in (NBS / room).glob("*.ipynb")), key=lambda p: (rooms.index(p.parent.name if p.parent != NBS else ""), p.name))
    package = sha256(b"".join(p.read_bytes() for p in sorted((ROOT / "robust_jem").rglob("*.py")))).hexdigest()
    EXECUTED.mkdir(parents=True, exist_ok=True)
    for stale in {p.relative_to(EXECUTED) for p in EXECUTED.rglob("*.ipynb")} - {p.relative_to(NBS) for p in notebooks}: (EXECUTED / stale).unlink()
    os.environ.pop("MPLBACKEND", None)                 # a headless backend would leave no figures in the cells
    with ThreadPoolExecutor(2) as pool: list(pool.map(lambda p: execute(p, package), notebooks))
    return notebooks


# 2. nbdev ------------------------------------------------------------------------------------------------------------

def process() -> Path:
    """nbdev's processing, called from here: its command would first install Quarto. It would also run every cell that imports
    something, to document objects that the package already holds, and link names to addresses that only `Links` knows."""
    get_config()["skip_procs"] = "exec_show_docs,add_links"
    return proc_nbs(EXECUTED.relative_to(ROOT), n_workers=0, force=True)


# 3. From Quarto's dialect to MyST's ------------------------------------------------------------------------------------

def page_name(notebook: Path) -> str:
    "A page is named as its module: nbs/ebm/00_energy.ipynb → ebm/energy."
    return (notebook.relative_to(NBS).parent / re.sub(r"^\d+_", "", notebook.stem)).as_posix()


def module_name(notebook: Path) -> str: return page_name(notebook).replace("/", ".")


def outside_code(text: str, change) -> str:
    "Apply `change` to the parts of Markdown text that aren't fenced code."
    parts = re.split(r"(^(`{3,}).*?^\2`*[ \t]*$)", text, flags=re.M | re.S)
    return "".join(p if i % 3 == 1 else change(p) for i, p in enumerate(parts) if i % 3 != 2)


class Links:
    "Where names and notebooks lead on this site."

    def __init__(self, pages: dict[str, str], labels: dict[str, str]):
        self.pages, self.labels = pages, labels        # a notebook's path from the root, without its ending, → its page; a name, alone or after its module, → the label of its documentation

    def label(self, name: str) -> str | None:
        "A name's label; a method's is its class's."
        name = name.removesuffix("()")
        return self.labels.get(name) or self.labels.get(name.rpartition(".")[0])

    def symbols(self, text: str) -> str:
        "`score` becomes a link to its documentation; headings and existing links stay."
        def link(m):
            label = self.label(m[1])
            return f"[`{m[1]}`](#{label})" if label else m[0]
        name = r"(?<![`\[\\])`([A-Za-z_][\w.]*(?:\(\))?)`(?![`\]])"
        return "\n".join(line if line.startswith(("#", "(api-")) else re.sub(name, link, line) for line in text.split("\n"))

    def files(self, text: str, folder: str) -> str:
        "Links (from `folder`) between notebooks lead to pages, images to their copies, any other file of the repository to its host."
        cfg = get_config()
        def fix(m):
            url, _, fragment = m[2].partition("#")
            if not url or re.match(r"[a-z]+:", url): return m[0]
            path = posixpath.normpath(posixpath.join(folder, url))
            if re.match(r"figures/.*\.(png|svg)$", path): return f"{m[1]}(/{path}"
            if page := self.pages.get(re.sub(r"\.(ipynb|html|qmd)$", "", path)):
                label = self.label(fragment) if fragment else None
                return f"{m[1]}({'#' + label if label else f'/{page}.ipynb'}"
            if path == "CONTRIBUTING.md": return f"{m[1]}(/contributing.md"
            if (stage := re.fullmatch(r"nbs/replication/(\w+)\.ipynb", path)) and (page := record_page(stage[1])): return f"{m[1]}({page}"
            return f"{m[1]}({cfg['git_url']}/blob/{cfg['branch']}/{path}{'#' + fragment if fragment else ''}"
        return re.sub(r"(\])\(([^)\s]+)", fix, text)

    def __call__(self, text: str, folder: str = "nbs") -> str: return outside_code(text, lambda t: fix_callouts(self.files(self.symbols(t), folder)))


def fix_callouts(text: str) -> str:
    return re.sub(r"^:::\s*\{\.callout-(\w+).*\}", r":::{\1}", text, flags=re.M)


def adapt(nb, links: Links, module: str = "", title: str | None = None, folder: str = "nbs/replication"):
    "One notebook that nbdev processed, or that papermill ran, as MyST-NB reads it."
    cells = []
    for cell in in_source_order(nb.cells, module):
        cell.pop("attachments", None)
        if cell.cell_type == "raw" and (front := re.match(r"---\s*\n(.*)\n---", cell.source.strip(), re.S)):
            cell = nbformat.v4.new_markdown_cell(front_matter(front[1]))
        elif cell.cell_type == "code":
            cell = adapt_code(cell, module)
        if cell is None or not cell.source.strip(): continue
        if cell.cell_type == "markdown":
            cell.source = expand_includes(cell.source.replace("<!-- WARNING: THIS FILE WAS AUTOGENERATED! DO NOT EDIT! -->", ""), folder=folder)
            cell.source = links(cell.source, folder)
            if title and re.match("# ", cell.source): cell.source, title = re.sub(r"# .*", lambda _: f"# {title}", cell.source, count=1), None
        cells.append(cell)
    if title: cells.insert(0, nbformat.v4.new_markdown_cell(f"# {title}"))
    nb.cells = cells
    return nb


def documented(cell) -> str | None:
    "The name that a `show_doc` cell documents."
    return (m := SHOW_DOC.search(cell.source)) and m[1] if cell.cell_type == "code" else None


def in_source_order(cells, module: str):
    "nbdev documents the names of one cell last to first: turn each row of `show_doc` cells round."
    for is_documentation, group in groupby(cells, key=lambda cell: documented(cell) is not None):
        yield from sorted(group, key=lambda cell: line_number(module, documented(cell))) if is_documentation else group


def front_matter(yaml_text: str) -> str:
    front = yaml.safe_load(yaml_text) or {}
    summary = f"\n\n{{.lead}}\n{front['description']}" if front.get("description") else ""
    return f"# {front['title']}{summary}" if front.get("title") else ""


def adapt_code(cell, module: str):
    "Directives become MyST-NB's tags; `show_doc` becomes a section of the page, with its heading in the contents."
    d = dict(DIRECTIVE.findall(cell.source))
    if d.get("include") == "false" or "hide" in d: return None
    cell.source = DIRECTIVE.sub("", cell.source)
    if m := SHOW_DOC.match(cell.source): return nbformat.v4.new_markdown_cell(document(module, m[1]))
    tags = {t for t in cell.metadata.get("tags", []) if t != SKIP}
    if d.get("echo") == "false": tags.add("remove-input")
    if d.get("output") == "false": tags.add("remove-output")
    if "code-fold" in d or "parameters" in tags: tags.add("hide-input")        # what papermill set is in the next cell
    cell.metadata["tags"] = sorted(tags)
    cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]      # progress bars
    return cell


# The pages, in the order of the navigation ---------------------------------------------------------------------------

def toctree(caption: str, entries: list[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *entries, "```"]) if entries else ""


def record_notebooks() -> dict[str, list[Path]]:
    "The last replication's executed notebooks, by run."
    runs = {}
    for path in sorted(RECORD.glob("**/notebooks/*.ipynb")):
        if (run := path.parent.parent) != RECORD: runs.setdefault("-".join(run.relative_to(RECORD).parts), []).append(path)
    order = {stage: i for i, stage in enumerate(STAGES)}
    return {run: sorted(paths, key=lambda p: order.get(p.stem, 99)) for run, paths in runs.items()}


def record_page(stage: str) -> str | None:
    "A page of the record that shows a stage: of Robust JEM where it has one."
    if (RECORD / "notebooks" / f"{stage}.ipynb").exists(): return f"/record/{stage}.ipynb"
    runs = [run for run, paths in record_notebooks().items() if stage in {p.stem for p in paths}]
    return f"/record/{min(runs, key=lambda r: (not r.startswith('robust_jem'), r))}-{stage}.ipynb" if runs else None


def write_record(links: Links) -> list[str]:
    "One page for each notebook that the replication ran, and a page that lists them; returns the navigation's entries."
    folder = SOURCE / "record"
    folder.mkdir()
    entries, rows = [], []
    for run, paths in record_notebooks().items():
        for path in paths:
            nbformat.write(adapt(nbformat.read(path, as_version=4), links, title=f"{path.stem}: {run}"), folder / f"{run}-{path.stem}.ipynb")
            entries.append(f"{path.stem}: {run} <record/{run}-{path.stem}>")
        rows.append(f"| {run} | " + " · ".join(f"[{p.stem}](record/{run}-{p.stem}.ipynb)" for p in paths) + " |")
    for path in sorted((RECORD / "notebooks").glob("*.ipynb")):
        nbformat.write(adapt(nbformat.read(path, as_version=4), links, title=f"{path.stem.capitalize()} of the replication"), folder / path.name)
        rows.insert(0, f"| all systems | [{path.stem}](record/{path.stem}.ipynb) |")
        entries.insert(0, f"{path.stem.capitalize()} <record/{path.stem}>")
    if not rows: return []
    (SOURCE / "record.md").write_text("\n".join([
        "# The executed record", "", "{.lead}", "Every notebook that the last replication ran, with what it printed.", "",
        f"Folder: `{RECORD.relative_to(ROOT)}`. Each starts with the parameters that papermill set; commit, device and versions are in each run's summary, printed by its training notebook.", "",
        "| run | notebooks |", "|---|---|", *rows, "", "```{toctree}", ":hidden:", "", *entries, "```", ""]), encoding="utf-8")
    return ["record"]


def write_source(notebooks: list[Path], processed: Path) -> None:
    shutil.rmtree(SOURCE, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    for image in (ROOT / "figures").rglob("*.[ps][nv]g"):
        copy = SOURCE / image.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True); shutil.copy(image, copy)
    pages = {p.relative_to(ROOT).with_suffix("").as_posix(): page_name(p) for p in notebooks}
    guide = lambda *names: [f"guide/{n}" for n in names if f"guide/{n}" in pages.values()]
    documents = {p: nbformat.read(processed / p.relative_to(NBS), as_version=4) for p in notebooks}
    labels = {}
    for path in notebooks:
        for name in filter(None, map(documented, documents[path].cells)):
            label = target(module_name(path), name)
            labels[f"{module_name(path)}.{name}"] = labels[f"{module_name(path).split('.')[-1]}.{name}"] = label
            labels.setdefault(name, label)             # a bare name that two modules share means the earlier one
    links = Links(pages, labels)
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (SOURCE / "contributing.md").write_text(links(contributing, "."), encoding="utf-8")
    navigation = [toctree("Start", ["Home <self>", "contributing"]), toctree("Guide", guide("method", "open_choices", "judging", "speed", "cifar10", "gallery")),
                  *(toctree(title, [page_name(p) for p in notebooks if p.parent.name == room]) for room, title in ROOMS.items()), toctree("Replication", write_record(links))]
    for path in notebooks:
        nb = adapt(documents[path], links, module=module_name(path), folder=path.parent.relative_to(ROOT).as_posix())
        if path.name == "index.ipynb": nb.cells.append(nbformat.v4.new_markdown_cell("\n\n".join(filter(None, navigation))))
        page = SOURCE / f"{page_name(path)}.ipynb"
        page.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, page)


# 4. Sphinx -----------------------------------------------------------------------------------------------------------

def main() -> None:
    os.chdir(ROOT)                                     # nbdev skips paths with a hidden folder in them: relative ones have none
    notebooks = execute_all()
    write_source(notebooks, process())
    html = BUILD / "html"
    shutil.rmtree(html, ignore_errors=True)
    done = subprocess.run([sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", "-c", str(ROOT / "docs"),
                           "-d", str(BUILD / "doctrees"), str(SOURCE), str(html)])
    if done.returncode: sys.exit("Sphinx warned (above); the last site stays as it was")
    (html / ".nojekyll").touch()                       # GitHub Pages would drop folders that start with an underscore
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(html, SITE)
    print(f"{SITE.relative_to(ROOT)}/index.html")


if __name__ == "__main__":
    main()
