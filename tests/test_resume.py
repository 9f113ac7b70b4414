"""Runs that are killed: what is left continues to the same bits."""
import json
import shutil
import signal
import subprocess
import time

import pytest
import torch

from robust_jem.runs import Run, read_tensors
from robust_jem.systems import TrainConfig, configure
from robust_jem.training import train

# Long enough to be hit in its second epoch; everything that has a state takes part.
CONFIG = dict(epochs=2, attack_steps=5, outer_steps=5, buffer_size=200, warmup_steps=10, ema_decay=0.9, flip=True, pad=1, noise_std=0.01, log_every=3, seed=5, threads=1, device="cpu")
OPTIONS = [a for k, v in CONFIG.items() for a in ([f"--{k.replace('_', '-')}"] if v is True else [f"--{k.replace('_', '-')}", str(v)])]
PER_EPOCH = 1437 // 64


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    torch.set_num_threads(1)
    return Run(train(configure(TrainConfig, "robust_jem", **CONFIG, out=str(tmp_path_factory.mktemp("whole") / "run")), progress=False))


def wait_for(condition, process, seconds=120):
    "Poll until a condition holds; the process must be running all the while."
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended too early: {process.communicate()}"
        assert time.monotonic() < end, "took too long"
        time.sleep(0.005)


def last_step(folder):
    file = folder / "metrics.jsonl"
    lines = [line for line in file.read_text().split("\n")[:-1] if line] if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


@pytest.fixture
def interrupted(here, command):
    "Start a training in another process and send it a signal in the middle of the second epoch."
    processes = []
    def start(how):
        argv = [*command.argv, "train", "--system", "robust_jem", *OPTIONS, "--out", "run"]
        processes.append(process := subprocess.Popen(argv, cwd=here, env=command.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        wait_for(lambda: last_step(here / "run") > PER_EPOCH, process)
        process.send_signal(how)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err
    yield start
    for p in processes:
        if p.poll() is None: p.kill()


def assert_same_run(a, b):
    for file in (lambda run: run.path / "model.safetensors", lambda run: run.checkpoints()[0], lambda run: run.path / "checkpoints/best.safetensors"):
        x, y = (read_tensors(file(r))[0] for r in (a, b))
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x), file(a)
    assert a.metrics() == b.metrics()
    assert all(a.summary[k] == b.summary[k] for k in ("updates", "images_seen", "fingerprint", "parameters"))


@pytest.mark.parametrize("how", (signal.SIGKILL, signal.SIGINT), ids=lambda s: s.name)
def test_interrupted_training_continues_to_the_same_bits(interrupted, uninterrupted, here, cli, how):
    code, out, err = interrupted(how)
    run = Run(here / "run")
    assert not run.trained and run.checkpoints() and out == ""
    if how == signal.SIGINT:
        assert code == 130 and "Traceback" not in err
        said, = [line for line in err.replace("\r", "\n").split("\n") if line.startswith("robust-jem: ")]
        step = read_tensors(run.checkpoints()[0])[1]["step"]
        assert said == f"robust-jem: run: interrupted at update {step} of {2 * PER_EPOCH} and saved; the same command goes on from there" and step > PER_EPOCH
    else: assert code == -how
    again = cli("train", "--system", "robust_jem", *OPTIONS, "--out", "run")
    assert again.code == 0 and again.out == "run\n"
    assert_same_run(run, uninterrupted)


def test_finished_run_returns_at_once(uninterrupted, here, cli, monkeypatch):
    shutil.copytree(uninterrupted.path, here / "run")
    files = lambda: {p: p.stat().st_mtime_ns for p in (here / "run").rglob("*")}
    before = files()
    monkeypatch.setattr("robust_jem.training.load_images", lambda *_: pytest.fail("loaded the data"))
    result = cli("train", "--system", "robust_jem", *OPTIONS, "--out", "run")
    assert result.code == 0 and result.out == "run\n" and files() == before


def test_kill_between_the_last_checkpoint_and_the_result(uninterrupted, here, cli):
    "Nothing is left to train; the result is written from the checkpoint."
    shutil.copytree(uninterrupted.path, here / "run")
    for name in ("model.safetensors", "summary.json"): (here / "run" / name).unlink()
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
