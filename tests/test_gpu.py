"""The script for a GPU's minutes, dry: the very stages on a CPU, with a tiny network."""
import json
import re
import subprocess
import tarfile
import zipfile

import pytest
import torch

from robust_jem.app.plan import notebook_path
from robust_jem.engine.pretrained import RobustJEM

SCRIPT = notebook_path("train").parent / "gpu.py"


@pytest.fixture
def gpu(run_command):
    "Run a stage of the script, dry, in the working directory; its output."
    def run(*argv):
        done = run_command(SCRIPT, *argv)
        assert done.code == 0, done.out[-1000:] + done.err[-1500:]
        assert "FAILED" not in done.out, done.out
        return done.out
    return run


def test_all_goes_on_with_what_is_missing_and_its_results_load(here, image_tree, gpu):
    image_tree("cifar10", classes=[f"c{i}" for i in range(4)], train=8, test=4, size=16)
    gpu("all", "out", "--dry", "--runs", "runs", "--systems", "robust_classifier")
    first = here / "runs/robust_classifier-s0/model.safetensors"
    before = first.stat().st_mtime_ns
    gpu("all", "out", "--dry", "--runs", "runs", "--systems", "robust_classifier", "robust_jem")
    assert first.stat().st_mtime_ns == before
    for system in ("robust_classifier", "robust_jem"):
        folder = here / "runs" / f"{system}-s0"
        config, summary = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "summary"))
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        # the schedule covers what was trained
        assert config["schedule"]["updates"] == summary["updates"] == rows[-1]["step"]
        assert rows[-1]["lr"] < 0.2 * config["optimizer"]["lr"]

    archive = here / "back.tar"
    archive.write_bytes(b"".join(p.read_bytes() for p in sorted((here / "out").glob("back.tar.*"))))
    with tarfile.open(archive) as opened:
        opened.extractall(here / "back", filter="data")
    jem = RobustJEM.from_pretrained(here / "back/robust_jem-s0/pretrained")
    assert jem.classify(torch.zeros(1, 3, 16, 16)).shape == (1,)
    assert {p.name for p in (here / "back/robust_jem-s0").glob("samples-*.json")} == {
        f"samples-{method}.json" for method in ("attack", "combined", "energy")}


@pytest.mark.long
def test_pilots_and_judge(here, image_tree, gpu, command):
    image_tree("cifar10", classes=[f"c{i}" for i in range(4)], train=8, test=4, size=16)
    judge = ("train --system wide_resnet --dataset cifar10 --preset cifar10-cpu --network.depth 10 --network.width 1 "
             "--optimizer.batch-size 16 "
             "--schedule.epochs 1 --schedule.warmup-steps 0 --device cpu --out judge").split()
    assert subprocess.run([*command.argv, *judge], cwd=here, env=command.env).returncode == 0
    gpu("pilots", "out", "--dry", "--pilots", "batch 128, lr 0.1", "--each", 1)
    (pilot,) = json.loads((here / "out/pilots.json").read_text())["pilots"]
    assert pilot["name"] == "batch 128, lr 0.1" and 0 <= pilot["pgd10"] <= pilot["accuracy"] <= 1
    gpu("all", "out", "--dry", "--runs", "runs", "--systems", "robust_jem", "jempp")
    gpu("judge", "out", "--dry", "--runs", "runs", "--extractor", "classifier:judge",
        "--systems", "robust_jem", "jempp")
    scores = {p.stem for p in (here / "runs/jempp-s0/scores").glob("*.json")}
    assert scores == {"classification", "held-out", "prior", "energy"}


@pytest.mark.long
def test_second_stages_and_equal_compute(here, image_tree, gpu, command):
    "The best second stage is taken up by `compute`, which trains what is missing; all is judged and brought back."
    image_tree("cifar10", classes=[f"c{i}" for i in range(4)], train=40, test=8, size=16)
    judge = ("train --system wide_resnet --dataset cifar10 --preset cifar10-cpu --network.depth 10 --network.width 1 "
             "--optimizer.batch-size 16 "
             "--schedule.epochs 1 --schedule.warmup-steps 0 --device cpu --out judge").split()
    assert subprocess.run([*command.argv, *judge], cwd=here, env=command.env).returncode == 0
    asked = ("--dry", "--runs", "runs", "--worth", 200, "--looked-at", 20, "--extractor", "classifier:judge")
    gpu("second", "out", *asked, "--second", "as the preset", "told apart, as in DAT")
    found = json.loads((here / "runs/second.json").read_text())
    assert [row["name"] for row in found["second"]] == ["as the preset", "told apart, as in DAT"]
    assert found["best"] in found["second"]
    gpu("compute", "out", *asked, "--systems", "robust_jem_fast", "sada_jem")
    fast = json.loads((here / "runs/robust_jem_fast-s0/config.json").read_text())
    density = found["best"]["changes"].get("objective", {}).get("density", "likelihood")
    assert fast["objective"]["density"] == density and fast["source"].endswith("first-stages/robust_jem_fast-s0")
    before = (here / "runs/sada_jem-s0/model.safetensors").stat().st_mtime_ns
    gpu("compute", "out", *asked, "--systems", "sada_jem", "dat")
    assert (here / "runs/sada_jem-s0/model.safetensors").stat().st_mtime_ns == before
    gpu("judge", "out", "--dry", "--runs", "runs", "--extractor", "classifier:judge", "--more", "--autoattacked", 2,
        "--systems", "robust_jem_fast", "dat")
    for system in ("robust_jem_fast", "dat"):
        kept = {p.stem for p in (here / f"runs/back/{system}-s0/comparison").glob("*.json")}
        assert kept == {"walks", "classifier", "autoattack-linf", "autoattack-l2"}


def test_trunk_is_made_for_an_older_pytorch(tmp_path, gpu):
    "Scripts of F.interpolate name an operator that PyTorch 2.11 lacks; the copy doesn't, and computes the same."
    class Resize(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.interpolate(x, size=[9, 9], mode="bilinear").flatten(1)

    def operators(path):
        with zipfile.ZipFile(path) as script:
            code = b"".join(script.read(name) for name in script.namelist() if name.endswith(".py"))
        return set(re.findall(rb"torch\.(_upsample_\w+)\(", code))

    torch.jit.script(Resize()).save(str(tmp_path / "resize.pt"))
    gpu("trunk", tmp_path / "out", tmp_path / "resize.pt")
    assert operators(tmp_path / "out/resize.pt") == operators(tmp_path / "resize.pt") - {b"_upsample_lanczos2d_aa"}
    x = torch.rand(2, 3, 4, 4)
    assert torch.equal(torch.jit.load(str(tmp_path / "out/resize.pt"))(x), Resize()(x))
