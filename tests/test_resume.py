"""Runs that are killed: what is left continues to the same bits."""

import json
import shutil
import signal

import pytest
import torch
from faults import CONFIG, digest, lines, options, running, until

from robust_jem.core.files import read_tensors
from robust_jem.core.images import load_images
from robust_jem.engine.runs import Run

OPTIONS = options(CONFIG)
PER_EPOCH = len(load_images(CONFIG["dataset"]).train_x) // CONFIG["optimizer__batch_size"]


@pytest.fixture
def uninterrupted(whole):
    return Run(whole.path)


@pytest.fixture
def interrupted(here):
    """Start a training in another process and send it a signal in the middle of the second epoch.

    Gives exit code, stdout and stderr.
    """

    def start(how, *more):
        with running(here / "run", *more) as process:
            assert until(lambda: (rows := lines(here / "run")) and rows[-1]["step"] > PER_EPOCH, process), (
                process.communicate()
            )
            process.send_signal(how)
            out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    return start


def assert_same_run(a, b):
    for file in (
        lambda run: run.path / "model.safetensors",
        lambda run: run.checkpoints()[0],
        lambda run: run.path / "checkpoints/best.safetensors",
    ):
        x, y = (read_tensors(file(r))[0] for r in (a, b))
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x), file(a)
    assert digest(a) == digest(b)
    assert all(a.summary[k] == b.summary[k] for k in ("updates", "images_seen", "fingerprint", "parameters"))


def test_killed_training_continues_to_the_same_bits(interrupted, uninterrupted, here, cli):
    code, out, _ = interrupted(signal.SIGKILL)
    run = Run(here / "run")
    assert code == -signal.SIGKILL and out == "" and not run.trained and run.checkpoints()
    again = cli("train", "--system", "robust_jem", *OPTIONS, "--out", "run")
    assert again.code == 0 and again.out == "run\n"
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize(
    "how, code", ((signal.SIGTERM, 143), (signal.SIGINT, 130)), ids=lambda s: getattr(s, "name", "")
)
def test_signal_saves_this_very_update(interrupted, uninterrupted, here, cli, how, code):
    "No checkpoint is due for minutes; the signal alone makes one."
    returned, out, err = interrupted(how, "--checkpoint-minutes", 0)
    assert returned == code and out == "" and "Traceback" not in err
    (said,) = [line for line in err.replace("\r", "\n").split("\n") if line.startswith("robust-jem: ")]
    run = Run(here / "run")
    step = read_tensors(run.checkpoints()[0])[1]["step"]
    of = CONFIG["schedule__epochs"] * PER_EPOCH
    assert said == (
        f"robust-jem: run: interrupted at update {step} of {of} and saved; the same command goes on from there"
    )
    assert step > PER_EPOCH and not run.trained and not (run.path / ".lock").exists()
    assert cli("train", "--system", "robust_jem", *OPTIONS, "--out", "run").code == 0
    assert_same_run(run, uninterrupted)


def test_finished_run_returns_at_once(uninterrupted, here, cli, monkeypatch):
    shutil.copytree(uninterrupted.path, here / "run")

    def files():
        return {p: p.stat().st_mtime_ns for p in (here / "run").rglob("*")}

    before = files()
    monkeypatch.setattr("robust_jem.engine.train.load_images", lambda *_: pytest.fail("loaded the data"))
    result = cli("train", "--system", "robust_jem", *OPTIONS, "--out", "run")
    assert result.code == 0 and result.out == "run\n" and files() == before


def test_kill_between_the_last_checkpoint_and_the_result(uninterrupted, here, cli):
    "Nothing is left to train; the result is written from the checkpoint."
    shutil.copytree(uninterrupted.path, here / "run")
    for name in ("model.safetensors", "summary.json"):
        (here / "run" / name).unlink()
    assert cli("train", "--system", "robust_jem", *OPTIONS, "--out", "run").code == 0
    assert_same_run(Run(here / "run"), uninterrupted)


def test_kill_before_the_first_checkpoint_starts_afresh(uninterrupted, here, cli):
    "A configuration, and metrics that stop in the middle of a line."
    (here / "run").mkdir()
    config = json.loads((uninterrupted.path / "config.json").read_text()) | {"out": "run"}
    (here / "run/config.json").write_text(json.dumps(config))
    (here / "run/metrics.jsonl").write_text((uninterrupted.path / "metrics.jsonl").read_text()[:300])
    assert cli("train", "--system", "robust_jem", *OPTIONS, "--out", "run").code == 0
    assert_same_run(Run(here / "run"), uninterrupted)
