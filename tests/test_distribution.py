"""Runs on two processes: the same gradient, the same samples, whole checkpoints when one is killed."""

import contextlib
import os
import random
import shutil
import signal
import socket
import time

import pytest
import torch
from conftest import Fresh

from robust_jem.core.files import read_tensors
from robust_jem.engine.runs import Run

OPTIONS = """
    --system robust_jem --dataset digits@0-4 --schedule.epochs 2 --attack.steps 2 --chain.outer-steps 2
    --replay.size 200 --schedule.warmup-steps 0 --optimizer.ema-decay 0.9 --threads 1 --device cpu --log-every 5
""".split()

GRADIENT = """
import gc, sys, torch
from robust_jem.core.images import load_images, to_unit
from robust_jem.engine.checkpoints import TrainState
from robust_jem.engine.runtime import executing
from robust_jem.systems import hybrid
from robust_jem.systems.catalog import TrainConfig, configure

build = hybrid.build_model

def build_in_float64(*args):
    return build(*args).double()

hybrid.build_model = build_in_float64
images = load_images("digits")

def settings(norm):
    return configure(TrainConfig, "robust_jem", network__norm=norm, optimizer__batch_size=16, replay__size=16,
                     device="cpu", precision="float32", objective=dict(clean_weight=0.5, energy_penalty=0.01))

def measure(norm, at):
    state = TrainState(settings(norm), images, at)
    system, network = state.system, state.system.network
    g = torch.Generator().manual_seed(0)
    x, y = to_unit(images.train_x[:16]).double(), images.train_y[:16]
    adv, sampled = (x + 0.1 * torch.randn(x.shape, generator=g, dtype=torch.float64) for _ in range(2))
    mine = slice(at.world.rank, None, at.world.size)
    network.train()
    loss, _ = system.hot_paths(state.stepper).loss(y[mine], x[mine], adv[mine], x[mine], sampled[mine])
    state.stepper.optimize("network", loss)
    gradient = torch.cat([p.grad.flatten() for p in network.parameters()])
    state.stepper.average(system.statistics())
    buffers = torch.cat([b.flatten().double() for b in network.buffers()]) if norm == "batch" else torch.zeros(1)
    torch.save({"gradient": gradient, "buffers": buffers, "y": y[mine]}, f"{norm}-{at.world.rank}of{at.world.size}.pt")
    at.world.wait()

with executing(settings("none"), 1) as at:
    for norm in sys.argv[1:]:
        measure(norm, at)
    gc.collect()          # nothing holds the process group when it is destroyed
"""

# The command line with a clock that runs out at the fourth look, however fast the machine is.
LATE = """
import sys
from robust_jem.app import cli
from robust_jem.engine.runtime import Deadline
looks = []

def fourth_look(self):
    looks.append(1)
    return len(looks) == 4

Deadline.reached = fourth_look
sys.exit(cli.main(sys.argv[1:] + ["--max-minutes", "1"]))
"""


def free_port():
    "Below the ports that the system gives to whoever asks for any."
    while True:
        with socket.socket() as s, contextlib.suppress(OSError):
            port = random.SystemRandom().randrange(20_000, 32_000)
            s.bind(("127.0.0.1", port))
            return port


@pytest.fixture
def torchrun(run_command):
    "Run a module or a script on two processes, as a user does."

    def call(*what, timeout=300):
        argv = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *what]
        return run_command(*argv, seconds=timeout)

    return call


@pytest.fixture
def ranks(here):
    "Start the command line or a script on `size` processes, without torchrun's own; they end with the test."
    started = []

    def start(*what, size=2):
        world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        mine = [Fresh(what, here, world | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(size)]
        started.extend(mine)
        return mine

    yield start
    for process in started:
        process.kill()
        process.wait()


def ended(processes, timeout=300):
    "Exit codes and what was said on stderr, of all."
    said = [p.communicate(timeout=timeout)[1] for p in processes]
    return [p.returncode for p in processes], "".join(said)


def succeeded(done):
    assert done.code == 0, done.out + done.err
    return done


def test_two_processes_compute_the_gradient_of_the_whole_batch(ranks, here):
    (here / "gradient.py").write_text(GRADIENT)
    for size in (2, 1):
        codes, said = ended(ranks("gradient.py", "none", "batch", size=size))
        assert codes == [0] * size, said
    for norm in ("none", "batch"):
        one, a, b = (torch.load(here / f"{norm}-{n}.pt", weights_only=True) for n in ("0of1", "0of2", "1of2"))
        assert sorted(torch.cat([a["y"], b["y"]]).tolist()) == sorted(one["y"].tolist())
        # all processes agree
        assert torch.equal(a["gradient"], b["gradient"]) and torch.equal(a["buffers"], b["buffers"])
        error = (a["gradient"] - one["gradient"]).abs().max() / one["gradient"].abs().max()
        if norm == "none":
            assert error < 1e-10
        else:
            assert 1e-6 < error  # each process normalises by its own images: another function of the batch


def test_two_processes_train_resume_and_generate(torchrun, ranks, here, cli):
    codes, said = ended(ranks("train", *OPTIONS, "--out", "whole"))
    assert codes == [0, 0], said
    whole = Run(here / "whole")
    assert (
        whole.summary["processes"] == 2
        and whole.summary["updates"] == 22
        and [r["step"] for r in whole.metrics()] == [5, 10, 11, 15, 20, 22]
    )
    tensors, meta = read_tensors(whole.checkpoints()[0])
    assert (
        meta["processes"] == 2 and tensors["system.replay_x"].shape[0] == 200 and len(tensors["generator.noise"]) == 2
    )
    assert not torch.equal(*tensors["generator.noise"]) and not torch.equal(*tensors["system.replay_x"].chunk(2))

    # in pieces, on two processes: the same bits
    (here / "late.py").write_text(LATE)
    codes, said = ended(ranks("late.py", "train", *OPTIONS, "--out", "pieces"))
    assert all(codes) and said.count("robust-jem: pieces: stopped at update 15 of 22") == 1, said
    shutil.copytree(here / "pieces", here / "alone")
    codes, said = ended(ranks("train", *OPTIONS, "--out", "pieces"))
    assert codes == [0, 0], said
    for file in (lambda run: run.path / "model.safetensors", lambda run: run.checkpoints()[0]):
        x, y = (read_tensors(file(Run(here / f)))[0] for f in ("whole", "pieces"))
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    assert whole.metrics() == Run(here / "pieces").metrics()

    # what two began, one goes on with, and says that the noise is another
    with pytest.warns(UserWarning, match="written by 2 process"):
        assert cli("train", *OPTIONS, "--out", "alone").code == 0
    alone = Run(here / "alone")
    assert (
        alone.summary["updates"] == 22
        and alone.summary["processes"] == 1
        and [r["step"] for r in alone.metrics()] == [r["step"] for r in whole.metrics()]
    )

    # samples don't depend on the number of processes
    options = ("--num-samples", 50, "--batch-size", 20, "--chain.outer-steps", 2, "--device", "cpu")
    succeeded(torchrun("-m", "robust_jem.app.cli", "generate", "whole", *options, "--name", "two"))
    assert cli("generate", "whole", *options, "--name", "one").code == 0
    (x, y, two), (a, b, _) = (whole.samples(n) for n in ("two", "one"))
    assert torch.equal(x, a) and torch.equal(y, b) and len(x) == 50 and two["processes"] == 2
    assert not list((here / "whole/samples").glob("*/parts-*"))


def test_killed_process_ends_the_job_and_leaves_a_whole_checkpoint(here, ranks):
    argv = ["train", *OPTIONS, "--schedule.epochs", "50", "--out", "run"]
    first, second = processes = ranks(*argv)
    end = time.monotonic() + 120
    while not list((here / "run").glob("checkpoints/step-*.safetensors")):
        assert first.poll() is None and second.poll() is None and time.monotonic() < end, ended(processes)
        time.sleep(0.02)
    time.sleep(0.5)
    second.send_signal(signal.SIGKILL)
    _, err = first.communicate(timeout=120)
    lines = [line for line in err.replace("\r", "\n").split("\n") if line.startswith("robust-jem: ")]
    assert (
        first.returncode == 1
        and len(lines) == 1
        and "another of the 2 processes has ended" in lines[0]
        and "Traceback" not in err
    ), err
    tensors, meta = read_tensors(Run(here / "run").checkpoints()[0])
    assert meta["step"] % 11 == 0 and all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())
    (here / "late.py").write_text(LATE.replace("== 4", "== 1"))
    _, said = ended(ranks("late.py", *argv))
    assert (
        "stopped at update" in said and read_tensors(Run(here / "run").checkpoints()[0])[1]["step"] > meta["step"]
    )  # it goes on from there


@pytest.mark.parametrize(
    "options, says",
    (
        ("--optimizer.batch-size 63", "optimizer.batch_size: 63 can't be divided among 2 processes"),
        pytest.param("--replay.size 201", "replay.size: 201 can't be divided", marks=pytest.mark.long),
    ),
)
def test_shares_that_are_not_whole_are_refused_once(torchrun, here, options, says):
    done = torchrun("-m", "robust_jem.app.cli", "train", *OPTIONS, *options.split(), "--out", "run")
    assert done.code != 0 and done.err.count(f"robust-jem: {says}") == 1 and not os.path.exists(here / "run")
    assert "InputError" not in done.err  # nor does the process that torchrun terminates add a traceback


def test_evaluation_is_not_for_several_processes(ranks, runs):
    codes, said = ended(ranks("evaluate", runs / "robust_jem", "--extractor", f"classifier:{runs / 'judge'}"))
    assert all(codes) and "start it without torchrun" in said
