"""Faults put in on purpose: processes killed at random moments, writes that fail, bytes that change, runs that diverge, inputs that make no sense. `python tests/faults.py` prints figures."""
import argparse
import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from conftest import make_runs, make_tree, snapshot

from robust_jem.app import cli, replicate
from robust_jem.bench.benchmark import BenchmarkConfig
from robust_jem.core import files, images as core_images
from robust_jem.core.errors import InputError
from robust_jem.core.files import read_tensors
from robust_jem.ebm import attacks, energy, objectives, replay, samplers
from robust_jem.ebm.priors import GaussianMixturePrior, UniformPrior
from robust_jem.engine import run_log, runtime, sample, train as engine_train
from robust_jem.engine.recovery import Diverged
from robust_jem.engine.runs import Run
from robust_jem.engine.sample import RobustJEM
from robust_jem.engine.train import train
from robust_jem.judge import calibration, diversity, evaluate as judge_evaluate, extractors, ood, robustness, sample_scores
from robust_jem.networks import wide_resnet
from robust_jem.report import tables
from robust_jem.systems.catalog import EvaluateConfig, GenerateConfig, TrainConfig, configure, sample_plan

REPO = Path(__file__).resolve().parent.parent
# Everything that has a state takes part, and checkpoints are also written in the middle of an epoch.
CONFIG = dict(epochs=3, batch_size=128, attack_steps=2, outer_steps=2, buffer_size=200, warmup_steps=10, ema_decay=0.9, flip=True, pad=1, noise_std=0.01, log_every=3,
              snapshot_every=8, checkpoint_minutes=0.004, seed=5, threads=1, device="cpu", precision="float32")
# A few updates of everything, for faults that are tried one after another.
SHORT = CONFIG | dict(epochs=2, batch_size=256, width=1, attack_steps=1, outer_steps=1, buffer_size=256, log_every=5, checkpoint_minutes=0.0)


def options(config):
    "A configuration's fields as the command's options."
    return [a for k, v in config.items() for a in ([f"--{'no-' * (v is False)}{k.replace('_', '-')}"] if isinstance(v, bool) else [f"--{k.replace('_', '-')}", str(v)])]


def digest(run):
    "What must be equal: the final weights, the last checkpoint's tensors, and the metrics as they lie in the file."
    def tensors(file):
        h = hashlib.sha256()
        for k, v in sorted(read_tensors(file)[0].items()): h.update(repr((k, str(v.dtype), tuple(v.shape))).encode() + v.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return h.hexdigest()[:16]
    return dict(weights=tensors(run.path / "model.safetensors"), checkpoint=tensors(run.checkpoints()[0]), name=run.checkpoints()[0].name,
                metrics=hashlib.sha256((run.path / "metrics.jsonl").read_bytes()).hexdigest()[:16], events=json.dumps(run.summary.get("events", [])))


def undisturbed(folder, system="robust_jem", config=CONFIG):
    "A whole run, in this process; its digest."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return digest(Run(train(configure(TrainConfig, **{"system": system} | config, out=str(folder)), progress=False)))


def parts(folder):
    "Files that a write left unfinished."
    return sorted(p.name for p in Path(folder).rglob("*part*") if p.is_file())


# Processes

def environment():
    "That of a process which runs this package and nothing of a surrounding test run."
    env = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "MPLBACKEND", "ROBUST_JEM_DATA")}
    return env | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, [str(REPO), env.get("PYTHONPATH")]))}


def start(folder, *more, system="robust_jem", config=CONFIG):
    "Start the training command in a process of its own; it ends with the `with` block."
    argv = [sys.executable, "-m", "robust_jem.app.cli", "train", "--system", system, *options(config), "--out", Path(folder).name, *map(str, more)]
    return subprocess.Popen(argv, cwd=Path(folder).parent, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@contextlib.contextmanager
def running(folder, *more, **kw):
    process = start(folder, *more, **kw)
    try: yield process
    finally:
        if process.poll() is None: process.kill()
        process.communicate()


def until(condition, process, seconds=120):
    "Poll until a condition holds or the process ends; whether it holds."
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None: return bool(condition())
        if time.monotonic() > end: raise AssertionError("took too long")
        time.sleep(0.002)
    return True


def holds(folder, process):
    "Whether a process has begun to train: the lock carries its number."
    def look():
        try: return f"process {process.pid} " in (Path(folder) / ".lock").read_text()
        except OSError: return False
    return look


def lines(folder):
    "The whole lines of metrics.jsonl, as objects."
    try: return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().split("\n")[:-1]]
    except (OSError, ValueError): return []


def kills(folder, n=30, seed=0, say=lambda *_: None, expected=None):
    "Kill a training `n` times at random moments, each time continuing; a run that ends before the kill must be the undisturbed one, and the next begins."
    rng, folder = random.Random(seed), Path(folder)
    expected = expected or undisturbed(folder / "whole")
    found = SimpleNamespace(kills=0, resumes=0, runs=0, lost=[], unequal=[], early=0, writing=0, between=0, part_files=0, took=0.0)
    life = None
    while found.kills < n or life is None:
        run = folder / f"run{found.runs}"
        while True:
            enough = life is None or found.kills >= n                  # the first run isn't killed: it shows how long a life is, and the last goes on to its end
            with running(run) as process:
                began = time.monotonic()
                until(holds(run, process), process)
                held = time.monotonic()
                if not enough:
                    with contextlib.suppress(subprocess.TimeoutExpired): process.wait(rng.uniform(0, 0.6 * life))
                    process.kill()                                     # SIGKILL; nothing where it has ended
                out, err = process.communicate(timeout=300)
                found.took += time.monotonic() - began
            if process.returncode == -signal.SIGKILL:
                found.kills += 1; found.resumes += 1                   # each is followed by one
                torn = (run / "metrics.jsonl").exists() and (text := (run / "metrics.jsonl").read_bytes()) and not text.endswith(b"\n")
                left = parts(run)
                if left or torn: found.writing += 1
                if not list((run / "checkpoints").glob("step-*.safetensors")): found.early += 1
                elif not left and not torn: found.between += 1
                continue
            if life is None: life = time.monotonic() - held
            break
        if process.returncode: found.lost.append(f"{run.name}: exit code {process.returncode}: {err.splitlines()[-1:]}")
        else:
            got = digest(Run(run))
            if got != expected: found.unequal.append(f"{run.name}: {', '.join(k for k in expected if got[k] != expected[k])}")
        found.part_files += len(parts(run))
        found.runs += 1
        say(found)
    return found


# Writes

class FullDisk:
    "The k-th operation that changes the disk fails as on a full disk; before it fails, a write leaves a half."
    def __init__(self, k): self.left, self.where = k, None

    def tick(self, where):
        self.left -= 1
        if self.left == 0:
            self.where = where
            raise OSError(errno.ENOSPC, "No space left on device")

    def __enter__(self):
        from torch.utils.tensorboard import SummaryWriter
        disk, self.undo = self, []
        class File:
            def __init__(self, file, name): self.file, self.name = file, name
            def __getattr__(self, k): return getattr(self.file, k)
            def __enter__(self): return self
            def __exit__(self, *_): self.file.close()
            def write(self, content):
                try: disk.tick(f"write {self.name}")
                except OSError: self.file.write(content[:len(content) // 2]); raise
                return self.file.write(content)
        def opened(path, mode="r", *a, **kw):
            if not set(mode) & set("wax+"): return open(path, mode, *a, **kw)
            name = Path(path).name.split(f".{os.getpid()}")[0]
            disk.tick(f"open {name}")
            return File(open(path, mode, *a, **kw), name)
        def counted(owner, name, where):
            real = getattr(owner, name)
            def call(*a, **kw): disk.tick(where(*a)); return real(*a, **kw)
            self.undo.append((owner, name, real)); setattr(owner, name, call)
        for module in (files, run_log): module.open = opened; self.undo.append((module, "open", None))
        counted(os, "fsync", lambda *_: "fsync")
        counted(os, "link", lambda a, b, *_: f"link {Path(b).name}")
        counted(Path, "replace", lambda a, b: f"replace {Path(b).name}")
        counted(SummaryWriter, "__init__", lambda *_: "begin TensorBoard's file")
        real = SummaryWriter.add_scalar
        def scalar(board, name, *a, **kw):
            if name == "loss": disk.tick("write to TensorBoard")       # one of a line's scalars stands for all
            return real(board, name, *a, **kw)
        SummaryWriter.add_scalar = scalar; self.undo.append((SummaryWriter, "add_scalar", real))
        return self

    def __exit__(self, *_):
        for owner, name, real in reversed(self.undo):
            if real is None: delattr(owner, name)
            else: setattr(owner, name, real)


def writes(folder, every=1, offset=0, say=lambda *_: None, expected=None):
    "Let each operation that changes the disk fail once; the failure must be one `InputError`, and the same training must then end as if nothing had been."
    folder, k = Path(folder), 1 + offset
    expected = expected or undisturbed(folder / "whole", config=SHORT)
    found = SimpleNamespace(positions=0, tolerated=[], other=[], unusable=[], part_files=[], where=[])
    while True:
        run = folder / f"run{k}"
        config = configure(TrainConfig, "robust_jem", **SHORT, out=str(run))
        with FullDisk(k) as disk, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try: train(config, progress=False); raised = None
            except Exception as e: raised = e
        if disk.where is None: return found                            # the training was over before its k-th operation
        found.positions += 1; found.where.append(disk.where)
        if raised is None: found.tolerated.append(disk.where)
        elif not isinstance(raised, InputError) or "\n" in str(raised) or not str(raised).strip(): found.other.append(f"{k} {disk.where}: {type(raised).__name__}: {raised}")
        found.part_files += [f"{k} {disk.where}: {p}" for p in parts(run)]
        try:
            got = digest(Run(train(config, progress=False)))
            if got != expected: found.unusable.append(f"{k} {disk.where}: differs in {', '.join(x for x in expected if got[x] != expected[x])}")
        except Exception as e: found.unusable.append(f"{k} {disk.where}: {type(e).__name__}: {e}")
        say(k, disk.where, raised)
        k += every


# Bytes

def corruptions(file, n=200, seed=0):
    "Change one byte of a file, `n` times: the first eight, the header, its padding and the tensors each have their share."
    rng, whole = random.Random(seed), file.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    padding = size - len(whole[8:8 + size].rstrip(b" "))
    places = [(0, 8), (8, 8 + size), (8 + size, len(whole))] + [(8 + size - padding, 8 + size)] * bool(padding)
    for i in range(n):
        low, high = places[i % len(places)]
        at = rng.randrange(low, high)
        yield f"byte {at} of {len(whole)}", whole[:at] + bytes([whole[at] ^ rng.randrange(1, 256)]) + whole[at + 1:]


def truncations(file, n=50, seed=0):
    "Cut a file off at random lengths, or add to it."
    rng, whole = random.Random(seed), file.read_bytes()
    for i in range(n):
        if i % 10 == 9: yield "longer", whole + rng.randbytes(rng.randrange(1, 100))
        else: yield f"cut to {(to := rng.randrange(0, 3 ** rng.randrange(1, 14)) % len(whole))}", whole[:to]


def bytes_changed(folder, n=200, seed=0, whole=None):
    "Damage a checkpoint again and again: reading it must be an `InputError`. `whole`: the folder of an undisturbed run of SHORT."
    folder = Path(folder)
    if whole is None: undisturbed(whole := folder / "whole", config=SHORT)
    source, file = Run(whole).checkpoints()[0], folder / "damaged.safetensors"
    found = SimpleNamespace(corruptions=n, truncations=max(1, n // 4), missed=[])
    for what, content in (*corruptions(source, n, seed), *truncations(source, found.truncations, seed)):
        file.write_bytes(content)
        try: read_tensors(file); found.missed.append(f"{what}: not noticed")
        except InputError: pass
        except Exception as e: found.missed.append(f"{what}: {type(e).__name__}: {e}")
    return found


# Divergence

DIVERGING = CONFIG | dict(epochs=4, attack_steps=1, warmup_steps=5, ema_decay=0.0, noise_std=0.0, pad=0, flip=False, log_every=2, checkpoint_minutes=0.0, seed=0)


@contextlib.contextmanager
def not_a_number(at):
    "Once, before the update after `at`, write NaN into a weight."
    real, done = engine_train.train_step, []
    def step(state, *a):
        if state.step == at and not done:
            done.append(1)
            with torch.no_grad(): next(state.model.parameters()).view(-1)[0] = float("nan")
        return real(state, *a)
    engine_train.train_step = step
    try: yield
    finally: engine_train.train_step = real


def diverge(folder, system="robust_jem", nan_at=None, **changes):
    "A training that goes wrong: how it ended, its events, and what is wrong with what it left."
    config = configure(TrainConfig, system, **DIVERGING | changes, out=str(folder))
    with warnings.catch_warnings(), not_a_number(nan_at) if nan_at is not None else contextlib.nullcontext():
        warnings.simplefilter("ignore")
        try: train(config, progress=False); said = ""
        except Diverged as e: said = str(e)
    run = Run(folder)
    rows, wrong = run.metrics(), []
    events = [r for r in rows if "event" in r]
    steps = [r["step"] for r in rows if "event" not in r]
    if steps != sorted(set(steps)): wrong.append(f"steps of metrics.jsonl: {steps}")
    if said:
        if "\n" in said or "diverged" not in said and "update" not in said: wrong.append(f"message: {said!r}")
        if run.trained: wrong.append("a diverged run has final weights")
        if len(events) != config.recoveries: wrong.append(f"{len(events)} event lines for {config.recoveries} recoveries")
    else:
        if not all(v.isfinite().all() for v in read_tensors(run.path / "model.safetensors")[0].values() if v.is_floating_point()): wrong.append("weights aren't finite")
        if run.summary["recoveries"] != len(events) or run.summary.get("events", []) != events: wrong.append(f"summary.json has {run.summary['recoveries']} recoveries, metrics.jsonl {len(events)}")
    return SimpleNamespace(said=said, events=events, wrong=wrong, run=run)


# Each must recover or say that it can't.
CASES = {"lr x50": dict(lr=5.0), "NaN in a weight": dict(nan_at=25), "sampler steps x2500": dict(system="jempp", sampler_step_size=100.0), "sampler steps x25000": dict(system="jempp", sampler_step_size=1000.0)}
# JEM at a learning rate that it can't bear: fails without recoveries, ends well with the default ones.
TOO_FAST = dict(system="jem", lr=0.03, outer_steps=4)
RECOVERING = DIVERGING | TOO_FAST | dict(epochs=2)


def divergence(folder, say=print):
    "All cases; what is wrong."
    wrong = []
    def one(name, **changes):
        r = diverge(Path(folder) / name.replace(" ", "-"), **changes)
        say(f"  {name}: " + (f"Diverged, {len(r.events)} recoveries: {r.said.split(': ', 1)[-1]}" if r.said else f"finished, {len(r.events)} recoveries"))
        for e in r.events: say(f"    update {e['at']} back to {e['back_to']}: {e['why']}")
        wrong.extend(f"{name}: {w}" for w in r.wrong)
        return r
    for name, changes in CASES.items():
        if not one(name, **changes).events: wrong.append(f"{name}: nothing happened")
    if not one("JEM without recoveries", **TOO_FAST, recoveries=0).said: wrong.append("JEM without recoveries: didn't diverge")
    r = one("JEM with recoveries", **TOO_FAST)
    if r.said or not r.events: wrong.append("JEM with recoveries: didn't finish after a recovery")
    return wrong


def recovered_then_killed(folder, after, system="robust_jem", expected=None, **changes):
    "SIGKILL a diverging training `after` updates past its first recovery, and continue it; the differences to the one that was left alone."
    config, folder = DIVERGING | changes, Path(folder)
    expected = expected or undisturbed(folder / "whole", system, config)
    run = folder / "run"
    def past():
        rows = lines(run)
        first = next((e for e in rows if "event" in e), None)
        return first and rows[-1]["step"] >= first["back_to"] + after
    with running(run, system=system, config=config) as process:
        until(past, process)
        process.kill(); process.communicate()
    if process.returncode != -signal.SIGKILL: return ["ended before it was killed"]
    got = undisturbed(run, system, config)                             # goes on
    events = [r for r in Run(run).metrics() if "event" in r]
    return [k for k in expected if got[k] != expected[k]] + [f"{len(events)} event lines, summary.json has {Run(run).summary['recoveries']}"] * (events != Run(run).summary.get("events", []))


# Inputs

def commands():
    "Bad command lines by what is bad about them, each with what it takes to prepare the folder: all that the tests of the command line have."
    import test_cli as usual, test_faults as hostile                   # which imports this module
    small, after = options(SHORT), usual.AFTER_TRAINING
    generate, pets = after["generate"], ["train", "--dataset", "pets", *small, "--batch-size", "2", "--pad", "0", "--out", "new"]
    found = {line: (None, line.split()) for line, _ in usual.OPTIONS}
    found |= {line: (None, ["train", *small, *["--out", "new"] * ("--out" not in line), *line.split(" ")]) for line, _ in hostile.OPTIONS}
    for name, (damage, _) in (usual.TREES | hostile.TREES).items(): found[f"image tree: {name}"] = lambda here, damage=damage: damage(here / "data/pets"), pets
    def rewrite(change):
        file = Path("runs/robust_jem/config.json")
        file.write_bytes(change(file.read_bytes()))
    for name, damage in usual.CONFIGS.items(): found[f"configuration: {name}"] = lambda _, damage=damage: rewrite(damage), generate
    for name, damage in hostile.CONFIGS.items(): found[f"configuration: {name}"] = lambda _, damage=damage: rewrite(lambda b: damage(json.loads(b))), after["evaluate"]
    evaluate = lambda spec: ["evaluate", "runs/robust_jem", "--extractor", spec, "--num-robust", "10", "--attack-steps", "1"]
    for spec, _ in usual.EXTRACTORS: found[f"extractor: {spec}"] = usual.write_extractors, evaluate(spec)
    for name, write in hostile.EXTRACTORS.items(): found[f"extractor: {name}"] = lambda here, write=write: write(here / "net.pt"), evaluate("net.pt")
    found["samples: no settings"] = lambda _: Path("runs/robust_jem/samples/energy/summary.json").write_text("{}"), evaluate("classifier:runs/judge")
    return found


RUN = dict(run="runs/robust_jem")
PARAMETERS = [
    ("train", dict(system="jem2")), ("train", dict(system=["jem"])), ("generate", dict(run=5)), ("train", dict(eps=-0.1)), ("train", dict(lr="0.1")), ("train", dict(dataset="../digits")), ("train", dict(milestones=["soon"])), ("train", dict(seed=2**63)),
    ("train", dict(out="runs/robust_jem", eps=0.3)), ("train", dict(out="runs")), ("train", dict(device="gpu", out="new")), ("train", dict(pad=8, out="new")),
    ("generate", dict(run="runs")), ("generate", RUN | dict(method="gan")), ("generate", RUN | dict(num_samples=30)), ("generate", RUN | dict(method="combined", contrast=1.5)), ("generate", RUN | dict(name="a/../../b")),
    ("evaluate", RUN | dict(extractor="missing.pt")), ("evaluate", RUN | dict(extractor="classifier:nowhere")), ("evaluate", RUN | dict(attack_eps=[0.1, None])), ("evaluate", RUN | dict(atack_eps=[0.1])),
    ("report", dict(runs="nowhere")), ("report", dict(runs="runs")), ("report", dict(figures=5)),
]


def notebooks():
    "Bad parameters of the replication notebooks, by what they are."
    from test_replication import REFUSED
    return {f"{notebook} {parameters}": (None, (notebook, parameters)) for notebook, parameters, *_ in (*REFUSED, *PARAMETERS)}


def calls(folder):
    "Bad calls from Python, by what they are made to, numbered from 0."
    import test_faults as hostile
    images, run = core_images.load_images("digits"), Run(folder / "robust_jem")
    jem = RobustJEM.from_run(run.path)
    m, prior, y, x8 = jem.model, jem.prior, images.test_y[:4], images.test_x[:4]
    x, nan, tensor = core_images.to_unit(x8), float("nan"), torch.tensor
    far, below, real = y.where(y != y[0], 10), y.where(y != y[0], -1), y.float()          # labels that none of ten classes has
    f, logits, broken = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), m(x).detach(), torch.nn.Conv2d(1, 2, 3)
    mean, covariance = sample_scores.moments(f)
    load, path = core_images.load_images, Path("runs/robust_jem")
    pgd = lambda eps=0.1, steps=1, y=y, **kw: attacks.pgd(m, x, y, eps, steps, **kw)
    sgld = lambda steps=1, step_size=1.0, noise_std=0.0, **kw: samplers.sgld(m, x, steps, step_size, noise_std, **kw)
    proximal = lambda outer_steps=1, inner_steps=1, step_size=0.1, **kw: samplers.proximal_sgld(m, x, outer_steps, inner_steps, step_size, **kw)
    buffer = lambda capacity=4, reinit_prob=0.05: replay.ReplayBuffer(capacity, prior, reinit_prob)
    fit = lambda y=tensor([0, 0, 1, 1]), **kw: GaussianMixturePrior.fit(x, y, 2, **kw)
    frechet = lambda mean, covariance: sample_scores.frechet_distance(*sample_scores.moments(f), mean, covariance)
    robust = lambda eps=0.1, y=y, **kw: robustness.robust_accuracy(m, x8, y, eps, **kw)
    unlike = (y[:, None], real, y == 0, torch.eye(10).long()[y], "digits", far, below)                   # no labels of these images
    unclear = ((x + 1) / 2, x8.int(), x * nan, 1.5 * x, x[0], x.permute(0, 2, 3, 1), "digits")           # neither grey levels nor floats in [-1,1]
    calibrate = lambda logits=logits, y=y, bins=15: calibration.calibration(logits, y, bins)
    generate = lambda *a, **kw: sample.generate(m, prior, y, *a, **kw)
    fitted = lambda **kw: train(configure(TrainConfig, **{"out": "new"} | kw), progress=False)
    draw = lambda **kw: sample.generate_samples(configure(GenerateConfig, **RUN | kw), progress=False)
    evaluate = lambda **kw: judge_evaluate.evaluate_run(configure(EvaluateConfig, **RUN | kw), progress=False)
    found = {
        "data": (lambda: load("../digits"), lambda: load("mnist"), lambda: load(""), lambda: load("a\0b"), lambda: load("digits@8-12"), lambda: load("cifar10", download=False), lambda: load(None), lambda: load("x" * 300)),
        "images": (lambda: core_images.to_unit(x), lambda: core_images.augment(x, pad=8), lambda: core_images.augment(x, pad=-1), lambda: core_images.Batches(x8, y, 0, 0), lambda: core_images.Batches(x8, y, 5, 0), lambda: core_images.Batches(x8, y[:3], 2, 0)),
        "configuration": (lambda: configure(TrainConfig, "jem2"), lambda: configure(TrainConfig, preset="tpu"), lambda: configure(TrainConfig, epocs=1), lambda: replicate.ReplicateConfig(seeds=(0, 0)),
                          lambda: replicate.ReplicateConfig(systems="jempp"), lambda: tables.ReportConfig(runs=5), lambda: BenchmarkConfig(policies=("float64/off",)), lambda: BenchmarkConfig(batches=(1,)),
                          lambda: configure(TrainConfig, ["jem"]), lambda: configure(TrainConfig, dataset=["digits"]), lambda: sample_plan("jem2", "digits", "cpu"), lambda: BenchmarkConfig(precision="float64")),
        "pgd": (lambda: pgd(-0.1), lambda: pgd(nan), lambda: pgd(steps=-1), lambda: pgd(step_size=0), lambda: pgd(norm="l1"), lambda: pgd(y=far), lambda: pgd(y=below), lambda: pgd(y=real), lambda: pgd(y=y[:3])),
        "sgld": (lambda: sgld(-1), lambda: sgld(step_size=-1.0), lambda: sgld(noise_std=-1.0), lambda: sgld(y=far), lambda: sgld(y=real), lambda: sgld(step_size=nan), lambda: sgld(noise_std=nan), lambda: sgld(y=y[:3])),
        "proximal sgld": (lambda: proximal(-1), lambda: proximal(1, -1), lambda: proximal(step_size=-0.1), lambda: proximal(noise_std=-1.0), lambda: proximal(clip=0), lambda: proximal(y=below), lambda: proximal(step_size=nan),
                          lambda: proximal(clip=nan), lambda: proximal(y=y[:3])),
        "buffer": (lambda: buffer(0), lambda: buffer(reinit_prob=1.1), lambda: buffer(reinit_prob=nan), lambda: buffer().draw(5), lambda: buffer().draw(0)),
        "prior": (lambda: fit(jitter=0.0), lambda: fit(tensor([0, 0, 1, 2])), lambda: fit(tensor([0, 0, 0, 1])), lambda: prior.sample(far), lambda: prior.sample(below), lambda: fit(jitter=nan), lambda: fit(y[:3]),
                  lambda: fit(real), lambda: GaussianMixturePrior.fit(x * nan, tensor([0, 0, 1, 1]), 2), lambda: prior.sample(real)),
        "metrics": (lambda: frechet(mean[:2], covariance[:2, :2]), lambda: frechet(mean * nan, covariance), lambda: sample_scores.inception_score(f.softmax(1), 0), lambda: sample_scores.inception_score(f.softmax(1), 21),
                    lambda: sample_scores.inception_score(f, 1), lambda: sample_scores.inception_score(f.exp(), 1), lambda: sample_scores.kernel_distance(f, f[:, :2]), lambda: sample_scores.kernel_distance(f * nan, f), lambda: sample_scores.kernel_distance(f, f, subsets=0), lambda: sample_scores.kernel_distance(f[:1], f)),
        "extractor": (lambda: extractors.feature_extractor("missing.pt"), lambda: extractors.feature_extractor("classifier:nowhere"), lambda: extractors.feature_extractor("runs")),
        "accuracy": (lambda: robustness.accuracy(m, 127.5 * (x + 1), y), lambda: robustness.accuracy(broken, x8, y), lambda: robust(-1.0), lambda: robust(norm="l1"), lambda: robust(steps=-1), lambda: robust(restarts=0),
                     lambda: robustness.accuracy(m, x8, y[:3]), lambda: robustness.accuracy(m, x8[:0], y[:0]), lambda: robust(batch_size=0),
                     *(lambda labels=labels: robustness.accuracy(m, x8, labels) for labels in unlike), *(lambda labels=labels: robust(y=labels) for labels in unlike),
                     *(lambda labels=labels: robustness.autoattack_accuracy(m, x8, labels, 0.1) for labels in unlike), *(lambda pixels=pixels: robustness.accuracy(m, pixels, y) for pixels in unclear),
                     lambda: robustness.accuracy(len, x8, y)),
        "energy": (lambda: energy.joint_energy(logits, far), lambda: energy.energy(m, x, below), lambda: energy.joint_energy(logits, real), lambda: energy.score(m, x, far), lambda: energy.untouched(m, "both").__enter__(),
                   lambda: energy.joint_energy(logits, y[:3])),
        "loss": (lambda: objectives.likelihood_loss(m, x, x, y), lambda: objectives.hybrid_loss(m, objectives.Terms(clean=1.0), y), lambda: objectives.hybrid_loss(m, objectives.Terms(likelihood=1.0), y, x_real=x),
                 lambda: objectives.classification_loss(m, x, far)),
        "calibration": (lambda: calibrate(y=y[:3]), lambda: calibrate(y=far), lambda: calibrate(logits * nan), lambda: calibrate(bins=0), lambda: calibrate(y=y[:, None]), lambda: calibrate(y=real), lambda: calibrate(logits.softmax(1)), lambda: calibrate(logits[:, :1])),
        "detection": (lambda: ood.ood_scores(broken, x8), lambda: ood.auroc(f[0], f[0, :0]), lambda: ood.auroc(f[0] * nan, f[0]), lambda: ood.ood_images("mnist", x8, 4),
                      lambda: ood.ood_scores(m, (x + 1) / 2), lambda: ood.ood_scores(m, x * nan), lambda: ood.ood_scores(m, x8[0]), lambda: ood.auroc(f, f)),
        "diversity": (lambda: diversity.precision_recall(f, f, 20), lambda: diversity.precision_recall(f, f[:, :2]), lambda: diversity.density_coverage(f, f / 0), lambda: diversity.density_coverage(x, x),
                      lambda: diversity.class_frechet(f, y, f, y, 10), lambda: diversity.nearest(f, f, 21), lambda: diversity.memorisation(f, f[:, :2], f), lambda: diversity.class_frechet(f[:4], far, f[:4], y, 10),
                      lambda: diversity.class_frechet(f[:4], y[:, None], f[:4], y, 10), lambda: diversity.nearest(x8, x), lambda: diversity.nearest(x * nan, x)),
        "network": (lambda: wide_resnet.WideResNet(11), lambda: wide_resnet.WideResNet(10, 0), lambda: wide_resnet.WideResNet(10, 1, norm="layer"), lambda: runtime.resolve_device("gpu"), lambda: runtime.resolve_device("cuda:99"),
                    lambda: runtime.choose_policy(torch.device("cpu"), "float64")),
        "generate": (lambda: generate("gan"), lambda: generate(contrast=0), lambda: generate("energy", outer_steps=-1), lambda: generate("attack", eps=-1.0), lambda: generate(attack_statistics="both")),
        "model": (lambda: jem.generate(far), lambda: jem.energy(x, far), lambda: RobustJEM.from_run("nowhere"), lambda: RobustJEM.from_pretrained("no/such/folder"), lambda: RobustJEM.from_pretrained(path),
                  lambda: RobustJEM(m, UniformPrior((1, 8, 8)), run.config, images.classes, (1, 8, 8)).save_pretrained("new"), lambda: jem.save_pretrained(path / "config.json"), lambda: jem.classify(x8),
                  lambda: jem.classify(x.expand(-1, 3, -1, -1)), lambda: jem.energy(x8)),
        "run": (lambda: Run("nowhere"), lambda: Run(path / "config.json"), lambda: Run("a\0b"), lambda: Run(path).samples("gan"), lambda: Run(path).strip(".."),
                lambda: Run.create(configure(TrainConfig, "jem", out=str(path))), lambda: Run.create(configure(TrainConfig, out="runs")), lambda: Run(5), lambda: Run("x" * 5000)),
        "file": (lambda: read_tensors(Path("nowhere")), lambda: read_tensors(path), lambda: read_tensors(path / "config.json"), lambda: files.read_json(path / "model.safetensors"), lambda: files.write_json(path / "config.json/x", {})),
        "stage": (lambda: fitted(batch_size=5000, buffer_size=5000), lambda: fitted(pad=8), lambda: fitted(dataset="mnist"), lambda: fitted(device="gpu"), lambda: draw(run="nowhere"), lambda: draw(num_samples=30),
                  lambda: draw(name="new", device="gpu"),
                  lambda: evaluate(run="nowhere"), lambda: evaluate(extractor="missing.pt"), lambda: tables.collect("nowhere"), lambda: tables.collect("runs")),
        "values": [lambda kind=kind, values=values: kind.from_dict(values) for kind, values in hostile.VALUES],
    }
    return {f"{name} {i}": (None, call) for name, some in found.items() for i, call in enumerate(some)}


def by_command(argv):
    "A command's one line as an error; else what it did instead."
    from conftest import one_line
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("default")                               # what a user sees
        try: code = cli.main([str(a) for a in argv])
        except SystemExit as e: code = e.code
    try: line = one_line(err.getvalue())
    except AssertionError: return f"said {err.getvalue()!r}"
    if code != 2 or out.getvalue(): return f"exit code {code} and {out.getvalue()!r}"
    raise InputError(line)


def by_notebook(what):
    "The error in an executed notebook, as it was raised there."
    from papermill import PapermillExecutionError, execute_notebook
    notebook, parameters = what
    try: execute_notebook(REPO / f"nbs/replication/{notebook}.ipynb", None, parameters, kernel_name="python3", progress_bar=False, extra_arguments=["--log-level=50"])
    except PapermillExecutionError as e:
        if e.ename == "InputError": raise InputError(e.evalue) from None
        raise


def refusals(folder, source, cases, attempt, every=1):
    "Try bad inputs beside copies of trained runs and an image tree: each must be an `InputError` of one line, and every file must stay as it was."
    found, back, here = SimpleNamespace(inputs=0, clear=0, tracebacks=[], other=[], changed=[]), Path.cwd(), None
    never = mock.Mock(side_effect=AssertionError("a notebook was started"))      # a replication that isn't refused fails here, not in ten minutes
    with mock.patch.dict(os.environ, environment(), clear=True), mock.patch.object(replicate, "notebook_path", never), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for name, (prepare, what) in list(cases.items())[::every]:
                if here is None:
                    here = Path(tempfile.mkdtemp(dir=folder))
                    shutil.copytree(source, here / "runs"); make_tree(here / "data"); os.chdir(here)
                if prepare: prepare(here)
                before, found.inputs = snapshot(here), found.inputs + 1
                try: found.other.append(f"{name}: {attempt(what) or 'accepted'}")
                except InputError as e:
                    if len(str(e).splitlines()) == 1 and str(e).strip(): found.clear += 1
                    else: found.other.append(f"{name}: {e}")
                except Exception as e: found.tracebacks.append(f"{name}: {type(e).__name__}: {str(e).strip().splitlines()[-1:]}")
                after = snapshot(here)
                found.changed += [f"{name}: {p}" for p in sorted(before.keys() | after.keys()) if before.get(p) != after.get(p)]
                if prepare or before != after: here = None             # the next one gets copies of its own
        finally: os.chdir(back)
    return found


def inputs(folder, source, every=1, notebooks_every=1):
    "Bad inputs by three routes, beside the runs in `source`."
    logging.getLogger("papermill").setLevel(logging.ERROR)             # it warns of parameters that a notebook doesn't name
    return {"command line": refusals(folder, source, commands(), by_command, every), "papermill": refusals(folder, source, notebooks(), by_notebook, notebooks_every),
            "Python": refusals(folder, source, calls(source), lambda call: call() and None)}


SECTIONS = ("kills", "inputs", "writes", "divergence", "bytes")       # the longest first


def side_by_side(sections, jobs, arguments):
    "Each section in a process of its own, `jobs` at a time; whether any failed."
    def one(section):
        argv = [sys.executable, __file__, "--only", section, *arguments]
        done = subprocess.run(argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout, end="", flush=True)
        return done.returncode
    with ThreadPoolExecutor(jobs) as pool:
        return any(pool.map(one, sections))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--bytes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--jobs", type=int, default=1, help="sections at a time")
    args = parser.parse_args()
    if args.jobs > 1 and len(args.only) > 1:
        return int(side_by_side(args.only, args.jobs, ["--kills", str(args.kills), "--bytes", str(args.bytes), "--seed", str(args.seed)]))
    torch.set_num_threads(1)
    failed = False
    def told(problems):
        nonlocal failed
        for p in problems: print(f"  FAILED {p}", flush=True)
        failed = failed or bool(problems)
    with tempfile.TemporaryDirectory() as root:
        folder = lambda name: (p := Path(root) / name).mkdir() or p
        if "kills" in args.only:
            r = kills(folder("kills"), args.kills, args.seed)
            print(f"kills: {r.kills} SIGKILLs ({r.early} before the first checkpoint, {r.writing} in a write, {r.between} between writes), {r.resumes} resumes, {r.runs} runs, {len(r.lost)} lost; "
                  f"weights, last checkpoint and metrics equal: {'no' if r.unequal else 'yes'}; {r.part_files} unfinished files left over ({r.took:.0f} s)", flush=True)
            told(r.lost + r.unequal)
        if "writes" in args.only:
            r = writes(folder("writes"))
            print(f"writes: {r.positions} positions failed, {len(r.tolerated)} of them did no harm, {len(r.unusable)} unusable run folders, {len(r.other)} not one InputError, {len(r.part_files)} unfinished files left over", flush=True)
            told(r.unusable + r.other + r.part_files)
        if "bytes" in args.only:
            r = bytes_changed(folder("bytes"), args.bytes, args.seed)
            missed = sum(m.startswith("byte ") for m in r.missed)
            print(f"bytes: {r.corruptions} corruptions, {r.corruptions - missed} detected; {r.truncations} truncations and additions, {r.truncations - len(r.missed) + missed} detected", flush=True)
            told(r.missed)
        if "divergence" in args.only:
            print("divergence:")
            wrong = divergence(folder("divergence"), lambda line: print(line, flush=True))
            for name, changes in (("robust_jem", dict(lr=5.0)), ("jem", dict(TOO_FAST))):
                for after in (0, 12):
                    different = recovered_then_killed(folder(f"again-{name}-{after}"), after, **changes)
                    print(f"  {name} killed {after} updates after its recovery, and continued: {'different: ' + ', '.join(different) if different else 'equal to the one left alone, events included'}", flush=True)
                    wrong += [f"{name} killed {after} updates after its recovery: {', '.join(different)}"] * bool(different)
            told(wrong)
        if "inputs" in args.only:
            for route, r in inputs(folder("inputs"), make_runs(folder("runs"))).items():
                print(f"inputs, {route}: {r.inputs} bad inputs, {r.clear} clear one-line errors, {len(r.tracebacks)} tracebacks, {len(r.other)} accepted or unclear, {len(r.changed)} changed files", flush=True)
                told(r.tracebacks + r.other + r.changed)
    return int(failed)


if __name__ == "__main__": sys.exit(main())
