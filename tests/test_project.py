"""The repository agrees with itself: modules and README are what the notebooks make, and rooms depend only downwards."""
import ast, json, os, re, shutil, subprocess, sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "robust_jem"
ROOMS = "app report bench judge engine systems ebm networks core".split()     # a room imports from the rooms after it
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
MODULES = [".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in FILES]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def run(*args, cwd=ROOT):
    "Run a command without what a surrounding test run set; fail with what it printed."
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"PYTHONPATH": str(cwd)}
    done = subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_modules_match_notebooks(tmp_path):
    shutil.copy(ROOT / "settings.ini", tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    (tmp_path / "robust_jem").mkdir()
    shutil.copy(PACKAGE / "__init__.py", tmp_path / "robust_jem")             # by hand, but for the version
    run("-c", "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()", cwd=tmp_path)
    made, here = ({p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in folder.rglob("*.py")} for folder in (tmp_path / "robust_jem", PACKAGE))
    assert sorted(made) == sorted(here), "run `make prepare`"
    assert [name for name in made if made[name] != here[name]] == [], "differ from their notebooks: run `make prepare`"


def test_readme_matches_index():
    run("docs/readme.py", "--check")


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
    assert set(nb["metadata"]) <= {"kernelspec"} and all(set(c["metadata"]) <= {"tags"} for c in nb["cells"]), "run `make prepare`"
    ids = [c["id"] for c in nb["cells"]]
    assert len(ids) == len(set(ids))
    exports = re.findall(r"^#\| *default_exp +(\S+)", "\n".join("".join(c["source"]) for c in code), re.M)
    assert exports == ([f"{path.parent.name}.{path.stem.split('_', 1)[1]}"] if path.parent.name in ROOMS else []), "a notebook is named as its module"


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.parent.name == "replication"], ids=lambda p: p.stem)
def test_replication_notebook_has_parameters(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert sum("parameters" in c["metadata"].get("tags", []) for c in cells) == 1


def test_package_needs_neither_nbdev_nor_fastcore():
    imports = ", ".join(f"robust_jem.{m}" for m in MODULES)
    assert run("-c", f"import sys, {imports}; print(sorted({{'nbdev', 'fastcore', 'execnb'}} & set(sys.modules)))").strip() == "[]"


def imported(path: Path) -> set[str]:
    "Modules (`room.module`, or a room alone) of the package that a file imports, inside functions too."
    here, used = ("robust_jem", *path.relative_to(PACKAGE).parent.parts), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*here[:len(here) - node.level + 1]] if node.level else []          # from ..core.images import x · from . import runs
            names = [".".join([*base, *filter(None, [node.module]), a.name]) for a in node.names]
        else: continue
        used |= {".".join(parts[1:3]) for name in names if (parts := name.split("."))[0] == "robust_jem" and len(parts) > 1}
    return {u if u in MODULES else u.split(".")[0] for u in used}


@pytest.mark.parametrize("path", FILES, ids=MODULES)
def test_imports_point_down(path):
    room = path.relative_to(PACKAGE).parts[0]
    used = {u.split(".")[0] for u in imported(path)}
    assert used <= {*ROOMS[ROOMS.index(room):], "__version__"}


def test_no_circles():
    TopologicalSorter({m: imported(p) - {m} for m, p in zip(MODULES, FILES)}).prepare()


def test_wheel_holds_every_room(tmp_path):
    for folder in ("robust_jem", "nbs/replication"): shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for file in ("setup.py", "settings.ini", "README.md", "LICENSE"): shutil.copy(ROOT / file, tmp_path)
    run("setup.py", "-q", "build_py", "--build-lib", "lib", cwd=tmp_path)
    built, here = ({p.relative_to(folder).as_posix() for p in folder.rglob("*.py")} for folder in (tmp_path / "lib/robust_jem", PACKAGE))
    assert built == here
    assert {p.name for p in (tmp_path / "lib/robust_jem/replication").glob("*.ipynb")} == {p.name for p in (ROOT / "nbs/replication").glob("*.ipynb")}


@pytest.mark.parametrize("path", FILES, ids=MODULES)
def test_module_is_small(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert sum(bool(line.strip()) and not re.match(r"# %%", line) for line in lines) <= 260
