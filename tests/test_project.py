"""The repository agrees with itself: modules and README are what the notebooks make, and modules depend only downwards."""
import ast, json, os, re, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "robust_jem"
ORDER = ("data networks energy priors attacks samplers objectives configuration systems recovery distribution execution runs state "
         "trail training generation metrics diversity calibration detection evaluation suite reference scaling reporting plots card benchmark stages cli").split()
MODULES = sorted(p.stem for p in PACKAGE.glob("[!_]*.py"))
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
    made = {p.name: p.read_text(encoding="utf-8") for p in (tmp_path / "robust_jem").glob("*.py")}
    here = {p.name: p.read_text(encoding="utf-8") for p in PACKAGE.glob("*.py")}
    assert sorted(made) == sorted(here), "run `make prepare`"
    assert [name for name in made if made[name] != here[name]] == [], "differ from their notebooks: run `make prepare`"


def test_readme_matches_index():
    run("docs/readme.py", "--check")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_clean(path):
    nb = json.loads(path.read_text(encoding="utf-8"))
    code = [c for c in nb["cells"] if c["cell_type"] == "code"]
    assert not any(c["outputs"] or c["execution_count"] for c in code), "run `make prepare`"
    assert set(nb["metadata"]) <= {"kernelspec"} and all(set(c["metadata"]) <= {"tags"} for c in nb["cells"]), "run `make prepare`"
    ids = [c["id"] for c in nb["cells"]]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.parent.name == "replication"], ids=lambda p: p.stem)
def test_replication_notebook_has_parameters(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert sum("parameters" in c["metadata"].get("tags", []) for c in cells) == 1


def test_package_needs_neither_nbdev_nor_fastcore():
    imports = ", ".join(f"robust_jem.{m}" for m in MODULES)
    assert run("-c", f"import sys, {imports}; print(sorted({{'nbdev', 'fastcore', 'execnb'}} & set(sys.modules)))").strip() == "[]"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    above = set(ORDER[ORDER.index(module):])
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    used = set()
    for node in ast.walk(tree):                                               # inside functions too
        if isinstance(node, ast.Import): used |= {a.name.split(".")[1] for a in node.names if a.name.startswith("robust_jem.")}
        if isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            if node.level == 0 and parts[0] != "robust_jem": continue
            parts = parts[node.level == 0:]                                   # from .data import x · from robust_jem.data import x
            used |= {parts[0]} if parts and parts[0] else {a.name for a in node.names}      # from . import data
    assert not used & above


@pytest.mark.parametrize("module", MODULES)
def test_module_is_small(module):
    lines = (PACKAGE / f"{module}.py").read_text(encoding="utf-8").splitlines()
    assert sum(bool(line.strip()) and not re.match(r"# %%", line) for line in lines) <= 260
