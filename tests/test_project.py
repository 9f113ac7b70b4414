"""The repository agrees with itself: modules and README are what the notebooks make, rooms depend only downwards, and
the code is readable by the rules in pyproject.toml."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "docs"))
from counts import MODULES, PACKAGE, ROOMS, ROOT, ruff

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def run(*args, cwd=ROOT):
    "Run a command without what a surrounding test run set; fail with what it printed."
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"PYTHONPATH": str(cwd)}
    done = subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def texts(folder):
    "The Python files below a folder."
    return {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in folder.rglob("*.py")}


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def test_modules_match_notebooks(tmp_path):
    shutil.copy(ROOT / "settings.ini", tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    (tmp_path / "robust_jem").mkdir()
    shutil.copy(PACKAGE / "__init__.py", tmp_path / "robust_jem")             # by hand, but for the version
    run("-c", "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()", cwd=tmp_path)
    made, here = texts(tmp_path / "robust_jem"), texts(PACKAGE)
    assert sorted(made) == sorted(here), "run `make prepare`"
    differing = [name for name in made if made[name] != here[name]]
    assert differing == [], "differ from their notebooks: run `make prepare`"


def test_readme_matches_index():
    run("docs/readme.py", "--check")


def test_oldest_versions_are_the_lower_bounds():
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    bounds = set(re.findall(r"(\S+)>=(\S+)", settings))
    assert {tuple(line.split("==")) for line in run("docs/oldest.py").splitlines()} == bounds


def test_every_module_is_in_a_room_and_every_room_is_a_package():
    assert {m.split(".")[0] for m in MODULES} == set(ROOMS) and all(m.count(".") == 1 for m in MODULES)
    assert all((PACKAGE / room / "__init__.py").read_text(encoding="utf-8").strip() == "" for room in ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_notebooks_of_a_room_are_numbered(room):
    numbers = [p.stem.split("_", 1)[0] for p in NOTEBOOKS if p.parent.name == room]
    assert numbers == [f"{i:02}" for i in range(len(numbers))]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: "/".join(p.relative_to(ROOT / "nbs").with_suffix("").parts))
def test_notebook_is_clean(path):
    nb = json.loads(path.read_text(encoding="utf-8"))
    code = [c for c in nb["cells"] if c["cell_type"] == "code"]
    assert not any(c["outputs"] or c["execution_count"] for c in code), "run `make prepare`"
    assert set(nb["metadata"]) <= {"kernelspec"}, "run `make prepare`"
    assert all(set(c["metadata"]) <= {"tags"} for c in nb["cells"]), "run `make prepare`"
    ids = [c["id"] for c in nb["cells"]]
    assert len(ids) == len(set(ids))
    source = "\n".join("".join(c["source"]) for c in code)
    exports = re.findall(r"^#\| *default_exp +(\S+)", source, re.M)
    module = f"{path.parent.name}.{path.stem.split('_', 1)[-1]}"
    assert exports == ([module] if path.parent.name in ROOMS else []), "a notebook is named as its module"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: "/".join(p.relative_to(ROOT / "nbs").with_suffix("").parts))
def test_links_lead_somewhere(path):
    text = "\n".join("".join(c["source"]) for c in cells(path) if c["cell_type"] == "markdown")
    links = [link for link in re.findall(r"\]\(([^)\s#]+)", text) if not re.match(r"[a-z]+:", link)]
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("room", ROOMS)
def test_readme_names_the_modules_of_each_room(room):
    row = re.search(rf"^\| `{room}` \|.*\| (.*) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert sorted(re.findall(r"`(\w+)`", row[1])) == sorted(m.split(".")[1] for m in MODULES if m.split(".")[0] == room)


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.parent.name == "replication"], ids=lambda p: p.stem)
def test_replication_notebook_has_parameters(path):
    assert sum("parameters" in c["metadata"].get("tags", []) for c in cells(path)) == 1


def test_package_needs_neither_nbdev_nor_fastcore():
    imports = ", ".join(f"robust_jem.{m}" for m in MODULES)
    found = "sorted({'nbdev', 'fastcore', 'execnb'} & set(sys.modules))"
    assert run("-c", f"import sys, {imports}; print({found})").strip() == "[]"


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_imports_point_down(module):
    assert module.upward_imports == []


def test_no_circles():
    TopologicalSorter({name: module.imports for name, module in MODULES.items()}).prepare()


def test_wheel_holds_every_room(tmp_path):
    unwanted = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for folder in ("robust_jem", "nbs/replication"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=unwanted)
    for file in ("setup.py", "settings.ini", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path)
    run("setup.py", "-q", "build_py", "--build-lib", "lib", cwd=tmp_path)
    built = tmp_path / "lib/robust_jem"
    here = {*texts(PACKAGE), *(f"replication/{name}" for name in texts(ROOT / "nbs/replication"))}
    assert set(texts(built)) == here
    in_wheel, in_repository = built / "replication", ROOT / "nbs/replication"
    assert {p.name for p in in_wheel.glob("*.ipynb")} == {p.name for p in in_repository.glob("*.ipynb")}


# Readability


@pytest.mark.parametrize("folder", ("robust_jem", "tests", "nbs", "docs", "setup.py"))
def test_ruff_has_nothing_to_say(folder):
    found = [f"{Path(f['filename']).name}:{f['location']['row']}: {f['code']} {f['message']}" for f in ruff(folder)]
    assert found == []


def statements_sharing_a_line(source):
    "Lines on which more than one statement begins, but for those that nbdev makes and magics."
    source = re.sub(r"^\s*[%!].*$", "", source, flags=re.M)
    starts = Counter(node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt))
    return sorted(line for line, n in starts.items() if n > 1)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: "/".join(p.relative_to(ROOT / "nbs").with_suffix("").parts))
def test_notebook_is_readable(path):
    "What ruff holds for modules, for the cells that aren't exported too: width, and one statement a line."
    found = []
    for number, cell in enumerate(cells(path)):
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or "nbdev.nbdev_export()" in source:
            continue
        lines = source.splitlines()
        crowded = statements_sharing_a_line(source)
        found += [f"cell {number}, line {i}: {len(line)} columns" for i, line in enumerate(lines, 1) if len(line) > 120]
        found += [f"cell {number}, line {i}: several statements: {lines[i - 1]}" for i in crowded]
    assert found == [], f"{path.relative_to(ROOT)}: {found}"


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_private_names_stay_in_their_module(module):
    assert module.private_imports == []


# A system is one class, and the interface that it implements is long.
SYSTEMS = {"systems.base.System", "systems.hybrid.EnergyClassifier", "systems.flow.FlowSystem", "systems.gan.Sngan",
           "systems.latent.Ddls", "systems.score.Ncsn"}


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_cells_say_one_thing(module):
    assert {name: lines for name, lines in module.cells.items() if lines > 100 and name not in SYSTEMS} == {}


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_modules_know_few_others(module):
    assert len(module.imports) <= 10, sorted(module.imports)
