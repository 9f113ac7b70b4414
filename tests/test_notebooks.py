"""Every notebook runs from top to bottom, each in a process of its own."""
import pytest
from conftest import REPO, Fresh

FOLDER = REPO / "nbs"
NOTEBOOKS = sorted(p for p in FOLDER.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: "/".join(p.relative_to(FOLDER).with_suffix("").parts))
def test_notebook_runs(path):
    "What its cells assert, and that each does what the text says; without those that are slow or need a GPU."
    process = Fresh([path], FOLDER, {"MPLBACKEND": "Agg"})
    try:
        out, err = process.communicate(600)
    finally:
        process.kill()
    assert process.returncode == 0, out[-2000:] + err[-5000:]
