"""Faults put in on purpose: processes killed at random moments, writes that fail, bytes that change, runs that diverge,
inputs that make no sense. `python tests/faults.py` prints figures."""
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
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from conftest import Fresh, make_runs, make_tree, snapshot

from robust_jem.app import cli, plan
from robust_jem.bench.benchmark import BenchmarkConfig
from robust_jem.core import files, images as core_images
from robust_jem.core.errors import InputError
from robust_jem.core.files import read_tensors
from robust_jem.ebm import attacks, energy, objectives, replay, samplers
from robust_jem.ebm.priors import GaussianMixturePrior, UniformPrior
from robust_jem.engine import run_log, runtime, sample
from robust_jem.engine.checkpoints import TrainState
from robust_jem.engine.recovery import Diverged
from robust_jem.engine.runs import Run
from robust_jem.engine.pretrained import RobustJEM
from robust_jem.engine.train import train
from robust_jem.judge import calibration, diversity, extractors, likelihood, ood, robustness, sample_scores
from robust_jem.judge import evaluate as judge_evaluate
from robust_jem.networks import wide_resnet
from robust_jem.report import tables
from robust_jem.systems import hybrid_sampling
from robust_jem.systems.catalog import EvaluateConfig, GenerateConfig, TrainConfig, configure, sample_plan

REPO = Path(__file__).resolve().parent.parent
# Everything that has a state takes part, and checkpoints are also written in the middle of an epoch. Of four classes,
# 576 images: twelve updates an epoch.
CONFIG = dict(
    dataset="digits@0-3", schedule__epochs=3, schedule__warmup_steps=10, optimizer__batch_size=48,
    optimizer__ema_decay=0.9,
    attack__steps=2, chain__outer_steps=2, chain__noise_std=0.01, replay__size=200, augment__flip=True, augment__pad=1,
    recovery__snapshot_every=8, log_every=3, checkpoint_minutes=0.004, seed=5, threads=1, device="cpu",
    precision="float32")
# A few updates of everything, for faults that are tried one after another.
SHORT = CONFIG | dict(
    schedule__epochs=2, optimizer__batch_size=96, network__width=1, attack__steps=1, chain__outer_steps=1,
    replay__size=96, log_every=5, checkpoint_minutes=0.0)


def options(config):
    "A configuration's fields as the command's options."
    argv = []
    for field, value in config.items():
        name = field.replace("__", ".").replace("_", "-")
        if isinstance(value, bool):
            place, dot, last = name.rpartition(".")
            argv.append(f"--{name}" if value else f"--{place}{dot}no-{last}")
        else:
            argv += [f"--{name}", str(value)]
    return argv


def tensors_digest(file):
    "A hash of all names, types, shapes and bits in a safetensors file."
    h = hashlib.sha256()
    for name, tensor in sorted(read_tensors(file)[0].items()):
        h.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        h.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()[:16]


def digest(run):
    "What must be equal: the final weights, the last checkpoint's tensors, and the metrics as they lie in the file."
    newest = run.checkpoints()[0]
    return {
        "weights": tensors_digest(run.path / "model.safetensors"),
        "checkpoint": tensors_digest(newest),
        "name": newest.name,
        "metrics": hashlib.sha256((run.path / "metrics.jsonl").read_bytes()).hexdigest()[:16],
        "events": json.dumps(run.summary.get("events", [])),
    }


def trained(config):
    "Train in this process, without bars and warnings."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Run(train(config, progress=False))


def undisturbed(folder, system="robust_jem", config=CONFIG):
    "A whole run, in this process; its digest."
    settings = {"system": system} | config
    return digest(trained(configure(TrainConfig, **settings, out=str(folder))))


def differences(got, expected):
    "The names of what two digests don't share."
    return [name for name in expected if got[name] != expected[name]]


def parts(folder):
    "Files that a write left unfinished."
    return sorted(p.name for p in Path(folder).rglob("*part*") if p.is_file())


# Processes

def environment():
    "That of a process which runs this package and nothing of a surrounding test run."
    env = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "MPLBACKEND", "ROBUST_JEM_DATA")}
    path = os.pathsep.join(filter(None, [str(REPO), env.get("PYTHONPATH")]))
    return env | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def start(folder, *more, system="robust_jem", config=CONFIG):
    "Start the training command in a process of its own; it ends with the `with` block."
    argv = ["train", "--system", system, *options(config), "--out", Path(folder).name, *more]
    return Fresh(argv, Path(folder).parent)


@contextlib.contextmanager
def running(folder, *more, **kw):
    process = start(folder, *more, **kw)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def until(condition, process, seconds=120):
    "Poll until a condition holds or the process ends; whether it holds."
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return bool(condition())
        if time.monotonic() > end:
            raise AssertionError("took too long")
        time.sleep(0.002)
    return True


def holds(folder, process):
    "Whether a process has begun to train: the lock carries its number."
    def look():
        try:
            return f"process {process.pid} " in (Path(folder) / ".lock").read_text()
        except OSError:
            return False
    return look


def lines(folder):
    "The whole lines of metrics.jsonl, as objects."
    try:
        return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().split("\n")[:-1]]
    except (OSError, ValueError):
        return []


def has_torn_line(run):
    "Whether the last line of metrics.jsonl lacks its end."
    file = run / "metrics.jsonl"
    text = file.read_bytes() if file.exists() else b""
    return bool(text) and not text.endswith(b"\n")


def lived(run, kill_after=None):
    "Start or continue a training, and kill it so many seconds after it began; its process, its errors, its seconds."
    with running(run) as process:
        began = time.monotonic()
        until(holds(run, process), process)
        held = time.monotonic()
        if kill_after is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(kill_after)
            process.kill()                                             # SIGKILL; nothing where it has ended
        _, errors = process.communicate(timeout=300)
        ended = time.monotonic()
    return SimpleNamespace(code=process.returncode, errors=errors, took=ended - began, life=ended - held)


def count_kill(found, run):
    "Where a kill hit."
    found.kills += 1
    found.resumes += 1                                                 # each is followed by one
    in_a_write = bool(parts(run)) or has_torn_line(run)
    if in_a_write:
        found.writing += 1
    if not list((run / "checkpoints").glob("step-*.safetensors")):
        found.early += 1
    elif not in_a_write:
        found.between += 1


def kills(folder, n=30, seed=0, say=lambda *_: None, expected=None, life=None):
    """Kill a training `n` times at random moments, each time continuing; a run that ends before the kill must be the
    undisturbed one, and the next begins. `life`: how many seconds one takes; None: the first, which isn't killed,
    shows it."""
    rng, folder = random.Random(seed), Path(folder)
    expected = expected or undisturbed(folder / "whole")
    found = SimpleNamespace(kills=0, resumes=0, runs=0, lost=[], unequal=[], early=0, writing=0, between=0,
                            part_files=0, took=0.0)
    while found.kills < n or life is None:
        run = folder / f"run{found.runs}"
        while True:
            spared = life is None or found.kills >= n                  # the last goes on to its end
            end = lived(run, None if spared else rng.uniform(0, 0.6 * life))
            found.took += end.took
            if end.code != -signal.SIGKILL:
                break
            count_kill(found, run)
        if life is None:
            life = end.life
        if end.code:
            found.lost.append(f"{run.name}: exit code {end.code}: {end.errors.splitlines()[-1:]}")
        elif different := differences(digest(Run(run)), expected):
            found.unequal.append(f"{run.name}: {', '.join(different)}")
        found.part_files += len(parts(run))
        found.runs += 1
        say(found)
    return found


# Writes

class CountedFile:
    "A file whose writes are counted."

    def __init__(self, file, name, disk):
        self.file, self.name, self.disk = file, name, disk

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content):
        try:
            self.disk.tick(f"write {self.name}")
        except OSError:
            self.file.write(content[:len(content) // 2])
            raise
        return self.file.write(content)


class FullDisk:
    "The k-th operation that changes the disk fails as on a full disk; before it fails, a write leaves a half."

    def __init__(self, k):
        self.left, self.where, self.undo = k, None, []

    def tick(self, where):
        self.left -= 1
        if self.left == 0:
            self.where = where
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(self, path, mode="r", *a, **kw):
        "In place of `open`."
        if not set(mode) & set("wax+"):
            return open(path, mode, *a, **kw)
        name = Path(path).name.split(f".{os.getpid()}")[0]
        self.tick(f"open {name}")
        return CountedFile(open(path, mode, *a, **kw), name, self)

    def replace(self, owner, name, new):
        "Put a function in place of another, until the end."
        self.undo.append((owner, name, getattr(owner, name, None)))
        setattr(owner, name, new)

    def count(self, owner, name, where):
        "Count the calls of a function; `where` says from its arguments what it does."
        real = getattr(owner, name)

        def call(*a, **kw):
            self.tick(where(*a))
            return real(*a, **kw)

        self.replace(owner, name, call)

    def __enter__(self):
        from torch.utils.tensorboard import SummaryWriter
        for module in (files, run_log):
            self.replace(module, "open", self.opened)
        self.count(os, "fsync", lambda *_: "fsync")
        self.count(os, "link", lambda a, b, *_: f"link {Path(b).name}")
        self.count(Path, "replace", lambda a, b: f"replace {Path(b).name}")
        self.count(SummaryWriter, "__init__", lambda *_: "begin TensorBoard's file")
        real = SummaryWriter.add_scalar

        def scalar(board, name, *a, **kw):
            if name == "loss":                                         # one of a line's scalars stands for all
                self.tick("write to TensorBoard")
            return real(board, name, *a, **kw)

        self.replace(SummaryWriter, "add_scalar", scalar)
        return self

    def __exit__(self, *_):
        for owner, name, real in reversed(self.undo):
            if real is None:
                delattr(owner, name)
            else:
                setattr(owner, name, real)


def caught(work):
    "What a call raises, or None."
    try:
        work()
    except Exception as e:
        return e


def is_one_clear_line(error):
    return isinstance(error, InputError) and len(str(error).splitlines()) == 1 and bool(str(error).strip())


def writes(folder, every=1, offset=0, say=lambda *_: None, expected=None):
    """Let each operation that changes the disk fail once; the failure must be one `InputError`, and the same training
    must then end as if nothing had been."""
    folder, k = Path(folder), 1 + offset
    expected = expected or undisturbed(folder / "whole", config=SHORT)
    found = SimpleNamespace(positions=0, tolerated=[], other=[], unusable=[], part_files=[], where=[])
    while True:
        run = folder / f"run{k}"
        config = configure(TrainConfig, "robust_jem", **SHORT, out=str(run))
        with FullDisk(k) as disk:
            raised = caught(lambda: trained(config))
        if disk.where is None:
            return found                                               # the training was over before its k-th operation
        position = f"{k} {disk.where}"
        found.positions += 1
        found.where.append(disk.where)
        if raised is None:
            found.tolerated.append(disk.where)
        elif not is_one_clear_line(raised):
            found.other.append(f"{position}: {type(raised).__name__}: {raised}")
        found.part_files += [f"{position}: {p}" for p in parts(run)]
        try:
            if different := differences(digest(trained(config)), expected):
                found.unusable.append(f"{position}: differs in {', '.join(different)}")
        except Exception as e:
            found.unusable.append(f"{position}: {type(e).__name__}: {e}")
        say(k, disk.where, raised)
        k += every


# Bytes

def corruptions(file, n=200, seed=0):
    "Change one byte of a file, `n` times: the first eight, the header, its padding and the tensors have equal shares."
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
        if i % 10 == 9:
            yield "longer", whole + rng.randbytes(rng.randrange(1, 100))
        else:
            length = rng.randrange(0, 3 ** rng.randrange(1, 14)) % len(whole)
            yield f"cut to {length}", whole[:length]


def bytes_changed(folder, n=200, seed=0, whole=None):
    "Damage a checkpoint again and again: reading it must be an `InputError`. `whole`: an undisturbed run of SHORT."
    folder = Path(folder)
    if whole is None:
        whole = folder / "whole"
        undisturbed(whole, config=SHORT)
    source, file = Run(whole).checkpoints()[0], folder / "damaged.safetensors"
    found = SimpleNamespace(corruptions=n, truncations=max(1, n // 4), missed=[])
    for what, content in (*corruptions(source, n, seed), *truncations(source, found.truncations, seed)):
        file.write_bytes(content)
        raised = caught(lambda: read_tensors(file))
        if raised is None:
            found.missed.append(f"{what}: not noticed")
        elif not isinstance(raised, InputError):
            found.missed.append(f"{what}: {type(raised).__name__}: {raised}")
    return found


# Divergence

DIVERGING = CONFIG | dict(
    schedule__epochs=4, schedule__warmup_steps=5, attack__steps=1, optimizer__ema_decay=0.0, chain__noise_std=0.0,
    augment__pad=0, augment__flip=False, log_every=2, checkpoint_minutes=0.0, seed=0)


@contextlib.contextmanager
def not_a_number(at):
    "Once, before the update after `at`, write NaN into a weight."
    real, done = TrainState.update, []

    def update(state, *a):
        if state.step == at and not done:
            done.append(1)
            with torch.no_grad():
                next(state.system.parameters()).view(-1)[0] = float("nan")
        real(state, *a)

    with mock.patch.object(TrainState, "update", update):
        yield


def wrong_with_failed(run, said, events, config):
    "What a run that gave up must be like, and isn't."
    wrong = []
    if "\n" in said or "diverged" not in said and "update" not in said:
        wrong.append(f"message: {said!r}")
    if run.trained:
        wrong.append("a diverged run has final weights")
    if len(events) != config.recovery.times:
        wrong.append(f"{len(events)} event lines for {config.recovery.times} recoveries")
    return wrong


def wrong_with_finished(run, events):
    "What a run that ended well must be like, and isn't."
    wrong = []
    weights = read_tensors(run.path / "model.safetensors")[0].values()
    if not all(v.isfinite().all() for v in weights if v.is_floating_point()):
        wrong.append("weights aren't finite")
    if run.summary["recoveries"] != len(events) or run.summary.get("events", []) != events:
        wrong.append(f"summary.json has {run.summary['recoveries']} recoveries, metrics.jsonl {len(events)}")
    return wrong


def diverge(folder, system="robust_jem", nan_at=None, **changes):
    "A training that goes wrong: how it ended, its events, and what is wrong with what it left."
    config = configure(TrainConfig, system, **DIVERGING | changes, out=str(folder))
    said = ""
    with not_a_number(nan_at) if nan_at is not None else contextlib.nullcontext():
        try:
            trained(config)
        except Diverged as e:
            said = str(e)
    run = Run(folder)
    rows, wrong = run.metrics(), []
    events = [r for r in rows if "event" in r]
    steps = [r["step"] for r in rows if "event" not in r]
    if steps != sorted(set(steps)):
        wrong.append(f"steps of metrics.jsonl: {steps}")
    wrong += wrong_with_failed(run, said, events, config) if said else wrong_with_finished(run, events)
    return SimpleNamespace(said=said, events=events, wrong=wrong, run=run)


# Each must recover or say that it can't.
CASES = {
    "lr x50": dict(optimizer__lr=5.0),
    "NaN in a weight": dict(nan_at=25),
    "sampler steps x2500": dict(system="jempp", chain__step_size=100.0),
    "sampler steps x25000": dict(system="jempp", chain__step_size=1000.0),
}
# JEM at a learning rate that it can't bear: fails without recoveries, ends well with the default ones.
TOO_FAST = dict(
    system="jem", optimizer__lr=0.03, chain__outer_steps=4, chain__step_size=0.2, chain__bounds=False,
    replay__reinit_prob=0.05)
RECOVERING = DIVERGING | TOO_FAST | dict(schedule__epochs=2)


def divergence(folder, say=print):
    "All cases; what is wrong."
    wrong = []

    def one(name, **changes):
        r = diverge(Path(folder) / name.replace(" ", "-"), **changes)
        end = f"Diverged, {len(r.events)} recoveries: {r.said.split(': ', 1)[-1]}"
        say(f"  {name}: " + (end if r.said else f"finished, {len(r.events)} recoveries"))
        for e in r.events:
            say(f"    update {e['at']} back to {e['back_to']}: {e['why']}")
        wrong.extend(f"{name}: {w}" for w in r.wrong)
        return r

    for name, changes in CASES.items():
        if not one(name, **changes).events:
            wrong.append(f"{name}: nothing happened")
    if not one("JEM without recoveries", **TOO_FAST, recovery__times=0).said:
        wrong.append("JEM without recoveries: didn't diverge")
    r = one("JEM with recoveries", **TOO_FAST)
    if r.said or not r.events:
        wrong.append("JEM with recoveries: didn't finish after a recovery")
    return wrong


def recovered_then_killed(folder, after, system="robust_jem", expected=None, **changes):
    """SIGKILL a diverging training `after` updates past its first recovery, and continue it; the differences to the one
    that was left alone."""
    config, folder = DIVERGING | changes, Path(folder)
    expected = expected or undisturbed(folder / "whole", system, config)
    run = folder / "run"

    def past():
        rows = lines(run)
        first = next((e for e in rows if "event" in e), None)
        return first and rows[-1]["step"] >= first["back_to"] + after

    with running(run, system=system, config=config) as process:
        until(past, process)
        process.kill()
        process.communicate()
    if process.returncode != -signal.SIGKILL:
        return ["ended before it was killed"]
    different = differences(undisturbed(run, system, config), expected)      # goes on
    events, summary = [r for r in Run(run).metrics() if "event" in r], Run(run).summary
    if events != summary.get("events", []):
        different.append(f"{len(events)} event lines, summary.json has {summary['recoveries']}")
    return different


# Inputs: each case is a way to prepare the folder, or None, and what to try there

def rewrite(change):
    "Change the bytes of a run's configuration."
    file = Path("runs/robust_jem/config.json")
    file.write_bytes(change(file.read_bytes()))


def rewrite_fields(change, _):
    "Change a run's configuration, given as a dictionary; the result is bytes."
    rewrite(lambda content: change(json.loads(content)))


def evaluate_with(extractor):
    return ["evaluate", "runs/robust_jem", "--extractor", extractor, "--num-robust", "10", "--attack-steps", "1"]


def commands():
    "Bad command lines by what is bad about them: all that the tests of the command line have."
    import test_cli as usual                                           # which import this module
    import test_faults as hostile
    small, after = options(SHORT), usual.AFTER_TRAINING
    pets = ["train", *small, "--dataset", "pets", "--optimizer.batch-size", "2", "--augment.pad", "0", "--out", "new"]
    found = {line: (None, line.split()) for line, _ in usual.OPTIONS}
    for line, _ in hostile.OPTIONS:
        out = [] if "--out" in line else ["--out", "new"]
        found[line] = None, ["train", *small, *out, *line.split(" ")]
    for name, (damage, _) in (usual.TREES | hostile.TREES).items():
        found[f"image tree: {name}"] = lambda here, damage=damage: damage(here / "data/pets"), pets
    for name, damage in usual.CONFIGS.items():
        found[f"configuration: {name}"] = lambda _, damage=damage: rewrite(damage), after["generate"]
    newer = partial(rewrite_fields, lambda values: json.dumps(values | {"colour": "blue"}).encode())
    found["configuration: of a newer version"] = newer, after["generate"]
    for name, damage in hostile.CONFIGS.items():
        found[f"configuration: {name}"] = partial(rewrite_fields, damage), after["evaluate"]
    for spec, _ in usual.EXTRACTORS:
        found[f"extractor: {spec}"] = usual.write_extractors, evaluate_with(spec)
    for name, write in hostile.EXTRACTORS.items():
        found[f"extractor: {name}"] = lambda here, write=write: write(here / "net.pt"), evaluate_with("net.pt")
    no_settings = Path("runs/robust_jem/samples/energy/summary.json")
    found |= models_from_elsewhere() | later_commands(small)
    nowhere = ["evaluate", "--run", "runs/pets", "--root", "nowhere", "--device", "cpu"]
    found["data that moved"] = data_that_moved, nowhere
    found["samples: no settings"] = lambda _: no_settings.write_text("{}"), evaluate_with("classifier:runs/judge")
    return found


LATER = (
    "sample", "sample nowhere", "sample runs/robust_jem", "sample pretrained --classes 10",
    "sample pretrained --per-class 101", "sample pretrained --out sheet.txt", "sample pretrained --animate sheet.png",
    "sample pretrained --device gpu", "sample pretrained --out pretrained/config.json/sheet.png",
    "export", "export nowhere", "export runs", "export runs/judge", "export runs/robust_jem --name gan",
    "export runs/robust_jem --to jpg", "export runs/robust_jem --name a/b", "export runs/robust_jem/samples",
    "export runs/robust_jem --out runs/robust_jem/config.json", "doctor --device gpu", "doctor nowhere",
    "export runs/robust_jem/samples/energy --name gan", "report runs/robust_jem", "report nowhere",
    "report --runs runs/robust_jem/samples", "tune --out runs/robust_jem/config.json",
    "benchmark --out runs/robust_jem/config.json/below", "generate runs/robust_jem --attack.eps 8/255",
    *(f"evaluate --model-data digits --device cpu --out judged --model {model}" for model in (
        "timm:", "torchvision:", "robustbench:", "torchvision:nosuch", "torchvision:resnet18",
        "torchvision:resnet18@nowhere.pt", "torchvision:resnet18@runs")),
)
PRETRAINED = {"cut off": lambda b: b[:60], "empty": lambda b: b"", "a list": lambda b: b"[1]"}


def with_pretrained(here, file="", damage=None):
    "A pretrained folder beside the runs, one file of which is damaged."
    RobustJEM.from_run("runs/robust_jem").save_pretrained("pretrained")
    if file:
        path = here / "pretrained" / file
        path.write_bytes(damage(path.read_bytes()))


def later_commands(small):
    "Those of `sample`, `export` and `doctor`, of models from other libraries, and of later systems."
    found = {line: (with_pretrained if "pretrained" in line else None, line.split()) for line in LATER}
    for system in ("sada_jem", "m_ebm", "l2_robust_classifier", "dat", "robust_jem_fast"):
        for wrong in ("--attack.eps nan", "--augment.pad 8", "--optimizer.batch-size 5000"):
            argv = ["train", *small, "--system", system, "--out", "new", *wrong.split()]
            found[f"{system} {wrong}"] = None, argv
    found["growth below chance"] = None, ["train", *small, "--system", "dat", "--out", "new", "--chain.growth", "0.3"]
    for file in ("config.json", "model.safetensors", "prior.safetensors"):
        for name, damage in PRETRAINED.items():
            prepare = partial(with_pretrained, file=file, damage=damage)
            found[f"pretrained {file}: {name}"] = prepare, ["sample", "pretrained", "--device", "cpu"]
    return found


RUN = dict(run="runs/robust_jem")
PARAMETERS = [
    ("train", dict(system="jem2")),
    ("train", dict(system=["jem"])),
    ("generate", dict(run=5)),
    ("train", dict(attack__eps=-0.1)),
    ("train", dict(optimizer__lr="0.1")),
    ("train", dict(dataset="../digits")),
    ("train", dict(milestones=["soon"])),
    ("train", dict(seed=2**63)),
    ("train", dict(out="runs/robust_jem", attack__eps=0.3)),
    ("train", dict(out="runs")),
    ("train", dict(device="gpu", out="new")),
    ("train", dict(augment__pad=8, out="new")),
    ("generate", dict(run="runs")),
    ("generate", RUN | dict(method="gan")),
    ("generate", RUN | dict(num_samples=30)),
    ("generate", RUN | dict(method="combined", contrast=1.5)),
    ("generate", RUN | dict(name="a/../../b")),
    ("evaluate", RUN | dict(extractor="missing.pt")),
    ("evaluate", RUN | dict(extractor="classifier:nowhere")),
    ("evaluate", RUN | dict(attack_eps=[0.1, None])),
    ("evaluate", RUN | dict(atack_eps=[0.1])),
    ("report", dict(runs="nowhere")),
    ("report", dict(runs="runs")),
    ("report", dict(figures=5)),
]


def notebooks():
    "Bad parameters of the replication notebooks, by what they are."
    from test_replication import REFUSED
    cases = [(notebook, parameters) for notebook, parameters, *_ in (*REFUSED, *PARAMETERS)]
    return {f"{notebook} {parameters}": (None, (notebook, parameters)) for notebook, parameters in cases}


def good_things(folder):
    "What the calls below would accept, and single things that are wrong."
    images, run = core_images.load_images("digits"), Run(folder / "robust_jem")
    jem = RobustJEM.from_run(run.path)
    y, raw = images.test_y[:4], images.test_x[:4]
    x = core_images.to_unit(raw)
    return SimpleNamespace(
        images=images, run=run, jem=jem, model=jem.model, prior=jem.prior, y=y, raw=raw, x=x,
        features=torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), logits=jem.model(x).detach(),
        path=Path("runs/robust_jem"), nan=float("nan"), broken=torch.nn.Conv2d(1, 2, 3),
        # labels that none of ten classes has, and labels that aren't whole numbers
        far=y.where(y != y[0], 10), below=y.where(y != y[0], -1), real=y.float())


def calls_of_core(t):
    load, write_json = core_images.load_images, files.write_json
    return {
        "data": (
            partial(load, "../digits"), partial(load, "mnist"), partial(load, ""), partial(load, "a\0b"),
            partial(load, "digits@8-12"), partial(load, "cifar10", download=False), partial(load, None),
            partial(load, "x" * 300)),
        "images": (
            partial(core_images.to_unit, t.x), partial(core_images.augment, t.x, pad=8),
            partial(core_images.augment, t.x, pad=-1), partial(core_images.Batches, t.raw, t.y, 0, 0),
            partial(core_images.Batches, t.raw, t.y, 5, 0), partial(core_images.Batches, t.raw, t.y[:3], 2, 0)),
        "configuration": (
            partial(configure, TrainConfig, "jem2"), partial(configure, TrainConfig, preset="tpu"),
            partial(configure, TrainConfig, epocs=1), partial(plan.ReplicateConfig, seeds=(0, 0)),
            partial(plan.ReplicateConfig, systems="jempp"), partial(tables.ReportConfig, runs=5),
            partial(BenchmarkConfig, policies=("float64/off",)), partial(BenchmarkConfig, batches=(1,)),
            partial(configure, TrainConfig, ["jem"]), partial(configure, TrainConfig, dataset=["digits"]),
            partial(sample_plan, "jem2", "digits", "cpu"), partial(BenchmarkConfig, precision="float64")),
        "file": (
            partial(read_tensors, Path("nowhere")), partial(read_tensors, t.path),
            partial(read_tensors, t.path / "config.json"), partial(files.read_json, t.path / "model.safetensors"),
            partial(write_json, t.path / "config.json/x", {})),
    }


def calls_of_ebm(t):
    m, x, y, nan = t.model, t.x, t.y, t.nan
    two = torch.tensor([0, 0, 1, 1])

    def pgd(eps=0.1, steps=1, y=y, **kw):
        return attacks.pgd(m, x, y, eps, steps, **kw)

    def sgld(steps=1, step_size=1.0, noise_std=0.0, y=None, **kw):
        return samplers.sgld(energy.score_of(m, y), x, steps, step_size, noise_std=noise_std, **kw)

    def proximal(outer_steps=1, inner_steps=1, step_size=0.1, y=None, **kw):
        return samplers.proximal_sgld(energy.score_of(m, y), x, outer_steps, inner_steps, step_size, **kw)

    def buffer(capacity=4, reinit_prob=0.05):
        return replay.ReplayBuffer(capacity, t.prior, reinit_prob)

    def fit(y=two, x=x, **kw):
        return GaussianMixturePrior.fit(x, y, 2, **kw)

    def enter_untouched():
        energy.untouched(m, "both").__enter__()

    hybrid_loss, Terms = objectives.hybrid_loss, objectives.Terms
    return {
        "pgd": (
            partial(pgd, -0.1), partial(pgd, nan), partial(pgd, steps=-1), partial(pgd, step_size=0),
            partial(pgd, norm="l1"), partial(pgd, y=t.far), partial(pgd, y=t.below), partial(pgd, y=t.real),
            partial(pgd, y=y[:3])),
        "sgld": (
            partial(sgld, -1), partial(sgld, step_size=-1.0), partial(sgld, noise_std=-1.0), partial(sgld, y=t.far),
            partial(sgld, y=t.real), partial(sgld, step_size=nan), partial(sgld, noise_std=nan),
            partial(sgld, y=y[:3])),
        "proximal sgld": (
            partial(proximal, -1), partial(proximal, 1, -1), partial(proximal, step_size=-0.1),
            partial(proximal, noise_std=-1.0), partial(proximal, clip=0), partial(proximal, y=t.below),
            partial(proximal, step_size=nan), partial(proximal, clip=nan), partial(proximal, y=y[:3])),
        "buffer": (
            partial(buffer, 0), partial(buffer, reinit_prob=1.1), partial(buffer, reinit_prob=nan),
            partial(buffer().draw, 5), partial(buffer().draw, 0)),
        "prior": (
            partial(fit, jitter=0.0), partial(fit, torch.tensor([0, 0, 1, 2])),
            partial(fit, torch.tensor([0, 0, 0, 1])), partial(t.prior.sample, t.far),
            partial(t.prior.sample, t.below), partial(fit, jitter=nan), partial(fit, y[:3]), partial(fit, t.real),
            partial(fit, x=x * nan), partial(t.prior.sample, t.real)),
        "energy": (
            partial(energy.joint_energy, t.logits, t.far), partial(energy.energy, m, x, t.below),
            partial(energy.joint_energy, t.logits, t.real), partial(energy.score, m, x, t.far), enter_untouched,
            partial(energy.joint_energy, t.logits, y[:3])),
        "loss": (
            partial(objectives.likelihood_loss, m, x, x, y), partial(hybrid_loss, m, Terms(clean=1.0), y),
            partial(hybrid_loss, m, Terms(likelihood=1.0), y, x_real=x),
            partial(objectives.classification_loss, m, x, t.far)),
        "network": (
            partial(wide_resnet.WideResNet, 11), partial(wide_resnet.WideResNet, 10, 0),
            partial(wide_resnet.WideResNet, 10, 1, norm="layer"), partial(runtime.resolve_device, "gpu"),
            partial(runtime.resolve_device, "cuda:99"),
            partial(runtime.choose_policy, torch.device("cpu"), "float64")),
    }


def calls_of_judge(t):
    f, nan, x, y, raw = t.features, t.nan, t.x, t.y, t.raw
    probabilities = f.softmax(1)
    mean, covariance = sample_scores.moments(f)
    inception, kernel = sample_scores.inception_score, sample_scores.kernel_distance

    def frechet(mean, covariance):
        return sample_scores.frechet_distance(*sample_scores.moments(f), mean, covariance)

    def robust(eps=0.1, **kw):
        return robustness.robust_accuracy(t.model, raw, y, eps, **kw)

    def calibrate(logits=t.logits, y=y, bins=15):
        return calibration.calibration(logits, y, bins)

    return {
        "likelihood": (
            partial(likelihood.bits_per_dim, t.model, raw), partial(likelihood.bits_per_dim, t.model, raw[0]),
            partial(likelihood.gmm_bits_per_dim, raw, raw), partial(core_images.bits_per_dim, f, (0, 8, 8))),
        "references": (
            partial(frechet, mean, -covariance), partial(sample_scores.quality, None, raw, {}),
            partial(sample_scores.reference_statistics, t.model, t.images),
            partial(sample_scores.draw_test_images, raw, 3)),
        "devices": (
            partial(calibration.all_logits, t.model, raw, "gpu"), partial(t.prior.to, "cuda:99"),
            partial(UniformPrior, (1, 8, 8), 10, "gpu"), partial(t.run.model, "gpu")),
        "metrics": (
            partial(frechet, mean[:2], covariance[:2, :2]), partial(frechet, mean * nan, covariance),
            partial(inception, probabilities, 0), partial(inception, probabilities, 21), partial(inception, f, 1),
            partial(kernel, f, f[:, :2]), partial(kernel, f * nan, f), partial(kernel, f, f, subsets=0),
            partial(kernel, f[:1], f)),
        "extractor": (
            partial(extractors.feature_extractor, "missing.pt"),
            partial(extractors.feature_extractor, "classifier:nowhere"), partial(extractors.feature_extractor, "runs")),
        "accuracy": (
            partial(robustness.accuracy, t.model, 127.5 * (x + 1), y), partial(robustness.accuracy, t.broken, raw, y),
            partial(robust, -1.0), partial(robust, norm="l1"), partial(robust, steps=-1), partial(robust, restarts=0),
            partial(robustness.accuracy, t.model, raw, y[:3]), partial(robustness.accuracy, t.model, raw[:0], y[:0]),
            partial(robust, batch_size=0)),
        "calibration": (
            partial(calibrate, y=y[:3]), partial(calibrate, y=t.far), partial(calibrate, t.logits * nan),
            partial(calibrate, bins=0)),
        "detection": (
            partial(ood.ood_scores, t.broken, raw), partial(ood.auroc, f[0], f[0, :0]),
            partial(ood.auroc, f[0] * nan, f[0]), partial(ood.ood_images, "mnist", raw, 4)),
        "diversity": (
            partial(diversity.precision_recall, f, f, 20), partial(diversity.precision_recall, f, f[:, :2]),
            partial(diversity.density_coverage, f, f / 0), partial(diversity.density_coverage, x, x),
            partial(diversity.class_frechet, f, y, f, y, 10), partial(diversity.nearest, f, f, 21),
            partial(diversity.memorisation, f, f[:, :2], f),
            partial(diversity.class_frechet, f[:4], t.far, f[:4], y, 10)),
    }


def calls_of_inputs(t):
    "Labels that aren't these images', and pixels that are neither grey levels nor floats in [-1, 1]."
    m, f, x, y, raw, nan = t.model, t.features, t.x, t.y, t.raw, t.nan
    labels = (y[:, None], t.real, y == 0, torch.eye(10).long()[y], "digits", t.far, t.below)
    pixels = ((x + 1) / 2, raw.int(), x * nan, 1.5 * x, x[0], x.permute(0, 2, 3, 1), "digits")
    return {
        "labels": (
            *(partial(robustness.accuracy, m, raw, wrong) for wrong in labels),
            *(partial(robustness.robust_accuracy, m, raw, wrong, 0.1) for wrong in labels),
            *(partial(robustness.autoattack_accuracy, m, raw, wrong, 0.1) for wrong in labels),
            partial(robustness.accuracy, m, raw, y.to("meta")), partial(robustness.robust_accuracy, m, raw, y, 0.1,
                                                                        seed="a"),
            partial(calibration.calibration, t.logits, y[:, None]), partial(calibration.calibration, t.logits, t.real),
            partial(diversity.class_frechet, f[:4], y[:, None], f[:4], y, 10)),
        "pixels": (
            *(partial(robustness.accuracy, m, wrong, y) for wrong in pixels), partial(robustness.accuracy, len, raw, y),
            partial(ood.ood_scores, m, (x + 1) / 2), partial(ood.ood_scores, m, x * nan),
            partial(ood.ood_scores, m, raw[0]), partial(ood.auroc, f, f), partial(diversity.nearest, raw, x),
            partial(diversity.nearest, x * nan, x)),
    } | calls_of_forms(t, labels, pixels)


class Odd(torch.nn.Module):
    "A model whose answer is something else than logits, or comes without a gradient."

    def __init__(self, model, answer):
        super().__init__()
        self.model, self.answer = model, answer

    def forward(self, x):
        return self.answer(self.model, x)


def raises(model, x):
    raise ValueError("only on\nSundays")


def without_gradients(model, x):
    with torch.no_grad():
        return model(x)


ANSWERS = {
    "raises": raises, "no gradient": without_gradients, "tuple": lambda model, x: (model(x), x),
    "one number": lambda model, x: model(x)[:, 0], "probabilities": lambda model, x: model(x).softmax(1),
}


def calls_of_forms(t, labels, pixels):
    "The same, and models that aren't classifiers, of attacks, chains, energies and losses."
    m, x, y = t.model, t.x, t.y
    prior = t.prior

    def with_all(model=m, x=x, y=y):
        return (
            partial(attacks.pgd, model, x, y, 0.1, 1), partial(attacks.distal, model, x, y, max_steps=1),
            partial(energy.score, model, x, y),
            lambda: samplers.sgld(energy.score_of(model, y), x, 1, 0.1),
            lambda: samplers.proximal_sgld(energy.score_of(model, y), x, 1, 1, 0.1))

    far_away = (t.raw.float(), (x + 1) / 2)
    return {
        "labels of attacks and chains": [call for wrong in labels for call in with_all(y=wrong)],
        # a chain without bounds may begin anywhere near
        "pixels of attacks and chains": [
            call for wrong in pixels for call in with_all(x=wrong)
            if not (isinstance(wrong, torch.Tensor) and 1 < wrong.abs().max() < 2)],
        "models of attacks and chains": [
            call for name in ANSWERS for call in with_all(model=Odd(m, ANSWERS[name]))],
        "energies": [
            *(partial(energy.energy, m, wrong, y) for wrong in (*far_away, x * t.nan, t.raw.int(), "digits")),
            *(partial(energy.energy, m, x, wrong) for wrong in labels),
            partial(energy.energy, torch.nn.Sequential(m, torch.nn.LogSoftmax(1)), x),
            partial(energy.energy, len, x), partial(energy.score, len, x),
            partial(energy.joint_energy, t.logits, "three")],
        "losses": [
            *(partial(objectives.classification_loss, m, x, wrong) for wrong in labels),
            *(partial(objectives.classification_loss, m, wrong, y) for wrong in far_away),
            partial(objectives.likelihood_loss, m, x, t.raw.float()),
            partial(objectives.classification_loss, m, x[:0], [])],
        "priors": [
            *(partial(prior.sample, wrong) for wrong in labels),
            *(partial(UniformPrior((1, 8, 8)).sample, wrong) for wrong in labels),
            *(partial(GaussianMixturePrior.fit, wrong, y, 10) for wrong in pixels), partial(prior.sample, y, 0)],
        "settings": [
            partial(attacks.pgd, m, x, y, "0.1", 1), partial(attacks.pgd, m, x, y, 0.1, 1.5),
            partial(attacks.pgd, m, x, y, 0.1, 1, generator=0), partial(attacks.pgd, m, x, y, 0.1, 1, bounds=(1, -1)),
            partial(attacks.pgd, m, t.raw.float(), y, 8, 1), partial(attacks.pgd, m, 2 * x, y, 0.1, 1),
            partial(samplers.proximal_sgld, energy.score_of(m), 2 * x, 1, 1, 0.1),
            partial(samplers.sgld, lambda x: x.sum(1), x, 1, 0.1), partial(core_images.to_unit, t.raw.numpy()),
            partial(core_images.to_uint8, t.raw), partial(core_images.add_noise, t.raw, 0.1)],
    }


FACTORIES = {
    "raises in its forward pass": "def forward(self, x): raise ValueError('only on Sundays')",
    "runs under no_grad": "def forward(self, x):\n  with torch.no_grad(): return self.net(x)",
    "runs under inference_mode": "def forward(self, x):\n  with torch.inference_mode(): return self.net(x)",
    "detaches": "def forward(self, x): return self.net(x).detach()",
    "gives a tuple": "def forward(self, x): return self.net(x), x",
    "gives a dictionary": "def forward(self, x): return {'logits': self.net(x)}",
    "gives nothing": "def forward(self, x): self.net(x)",
    "gives one number": "def forward(self, x): return self.net(x)[:, 0]",
    "gives other classes": "def forward(self, x): return self.net(x)[:, :7]",
    "gives probabilities": "def forward(self, x): return self.net(x).softmax(1)",
    "gives NaN": "def forward(self, x): return self.net(x) * float('nan')",
    "takes three channels": "def forward(self, x): return self.net(x[:, [0, 1, 2]])",
    "takes other arguments": "def forward(self, x, y): return self.net(x)",
    "says nothing": "def forward(self, x): raise RuntimeError",
}
FACTORY = """import torch
class Odd(torch.nn.Module):
 def __init__(self):
  super().__init__()
  self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
 {}
"""
MAKERS = {
    "is no module": "def Odd(): return 5", "raises": "def Odd(): raise RuntimeError('no weights')",
    "wants an argument": "def Odd(weights): return weights", "isn't there": "x = 1", "doesn't parse": "def Odd(: pass",
    "fails when it is imported": "1 / 0", "exits when it is imported": "import sys; sys.exit(3)",
    "exits": "import sys\ndef Odd(): sys.exit(3)", "imports what isn't there": "import no_such_package",
}


def models_from_elsewhere():
    "Command lines that judge a model which can't be judged."
    found = {}
    sources = {name: FACTORY.format(code.replace("\n", "\n ")) for name, code in FACTORIES.items()} | MAKERS
    for i, (name, source) in enumerate(sources.items()):
        def write(here, module=f"odd_{os.getpid()}_{i}", source=source):
            (here / f"{module}.py").write_text(source)
        argv = ["evaluate", "--model", f"odd_{os.getpid()}_{i}:Odd", "--model-data", "digits", "--suite", "calibration",
                "--out", "judged", "--device", "cpu"]
        found[f"model that {name}"] = write, argv
    return found


SMALL = dict(optimizer__batch_size=2, augment__pad=0, schedule__epochs=1, threads=1, device="cpu", precision="float32")


def data_that_moved(here):
    "A run on an image tree that lies elsewhere now."
    config = configure(TrainConfig, "wide_resnet", dataset="pets", root="data", out="runs/pets", **SMALL)
    train(config, progress=False)
    (here / "data").rename(here / "elsewhere")


def calls_of_runs(t):
    "Those that look at the working directory are made when they are tried."
    import test_faults as hostile
    jem, path, three_channels = t.jem, t.path, t.x.expand(-1, 3, -1, -1)
    other = RobustJEM(t.model, UniformPrior((1, 8, 8)), t.run.config, t.images.classes, (1, 8, 8))

    def generate(*a, **kw):
        return hybrid_sampling.generate(t.model, t.prior, t.y, *a, **kw)

    def fit(**kw):
        return train(configure(TrainConfig, **{"out": "new"} | kw), progress=False)

    def draw(**kw):
        return sample.generate_samples(configure(GenerateConfig, **RUN | kw), progress=False)

    def evaluate(**kw):
        return judge_evaluate.evaluate_run(configure(EvaluateConfig, **RUN | kw), progress=False)

    return {
        "generate": (
            partial(generate, "gan"), partial(generate, contrast=0), partial(generate, "energy", chain__outer_steps=-1),
            partial(generate, "attack", attack__eps=-1.0), partial(generate, attack__statistics="both")),
        "model": (
            partial(jem.generate, t.far), partial(jem.energy, t.x, t.far), partial(RobustJEM.from_run, "nowhere"),
            partial(RobustJEM.from_pretrained, "no/such/folder"), partial(RobustJEM.from_pretrained, path),
            partial(other.save_pretrained, "new"), partial(jem.save_pretrained, path / "config.json"),
            partial(jem.classify, t.raw.float()), partial(jem.classify, three_channels),
            partial(jem.energy, (t.x + 1) / 2), partial(jem.energy, t.x, t.y[:, None]),
            partial(jem.classify, t.x * t.nan)),
        "run": (
            partial(Run, "nowhere"), partial(Run, path / "config.json"), partial(Run, "a\0b"),
            lambda: Run(path).samples("gan"), lambda: Run(path).strip(".."),
            lambda: Run.create(configure(TrainConfig, "jem", out=str(path))),
            lambda: Run.create(configure(TrainConfig, out="runs")), partial(Run, 5), partial(Run, "x" * 5000)),
        "stage": (
            partial(fit, optimizer__batch_size=5000, replay__size=5000), partial(fit, augment__pad=8),
            partial(fit, dataset="mnist"),
            partial(fit, device="gpu"), partial(draw, run="nowhere"), partial(draw, num_samples=30),
            partial(draw, name="new", device="gpu"), partial(evaluate, run="nowhere"),
            partial(evaluate, extractor="missing.pt"), partial(tables.collect, "nowhere"),
            partial(tables.collect, "runs")),
        "values": [partial(kind.from_dict, values) for kind, values in hostile.VALUES],
    }


def calls(folder):
    "Bad calls from Python, by what they are made to, numbered from 0."
    t = good_things(folder)
    found = calls_of_core(t) | calls_of_ebm(t) | calls_of_judge(t) | calls_of_inputs(t) | calls_of_runs(t)
    return {f"{name} {i}": (None, call) for name, some in found.items() for i, call in enumerate(some)}


def by_command(argv):
    "A command's one line as an error; else what it did instead."
    from conftest import one_line
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("default")                               # what a user sees
        try:
            code = cli.main([str(a) for a in argv])
        except SystemExit as e:
            code = e.code
    try:
        line = one_line(err.getvalue())
    except AssertionError:
        return f"said {err.getvalue()!r}"
    if code != 2 or out.getvalue():
        return f"exit code {code} and {out.getvalue()!r}"
    raise InputError(line)


def by_notebook(what):
    "The error in an executed notebook, as it was raised there."
    from papermill import PapermillExecutionError, execute_notebook
    notebook, parameters = what
    try:
        execute_notebook(REPO / f"nbs/replication/{notebook}.ipynb", None, parameters, kernel_name="python3",
                         progress_bar=False, extra_arguments=["--log-level=50"])
    except PapermillExecutionError as e:
        if e.ename == "InputError":
            raise InputError(e.evalue) from None
        raise


def by_call(call):
    call()


def judged(found, name, attempt, what):
    "Try one bad input, and count what it led to."
    found.inputs += 1
    try:
        found.other.append(f"{name}: {attempt(what) or 'accepted'}")
    except InputError as e:
        if is_one_clear_line(e):
            found.clear += 1
        else:
            found.other.append(f"{name}: {e}")
    except Exception as e:
        found.tracebacks.append(f"{name}: {type(e).__name__}: {str(e).strip().splitlines()[-1:]}")


def fresh_copies(folder, source):
    "A working directory with copies of trained runs, and an image tree."
    here = Path(tempfile.mkdtemp(dir=folder))
    shutil.copytree(source, here / "runs")
    make_tree(here / "data")
    os.chdir(here)
    return here


@contextlib.contextmanager
def unaffected():
    "The environment of a process of its own, no warnings, and the working directory as before at the end."
    back = Path.cwd()
    # a replication that isn't refused fails here, not in ten minutes
    never = mock.Mock(side_effect=AssertionError("a notebook was started"))
    # imported modules leave no files behind
    bytecode = mock.patch.object(sys, "dont_write_bytecode", True)
    notebooks = mock.patch.object(plan, "notebook_path", never)
    with mock.patch.dict(os.environ, environment(), clear=True), notebooks, bytecode:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                yield
            finally:
                os.chdir(back)


def refusals(folder, source, cases, attempt, every=1):
    """Try bad inputs beside copies of trained runs and an image tree: each must be an `InputError` of one line, and
    every file must stay as it was."""
    found = SimpleNamespace(inputs=0, clear=0, tracebacks=[], other=[], changed=[])
    here = None
    with unaffected():
        for name, (prepare, what) in list(cases.items())[::every]:
            here = here or fresh_copies(folder, source)
            if prepare:
                prepare(here)
            before = snapshot(here)
            judged(found, name, attempt, what)
            after = snapshot(here)
            changed = [p for p in sorted(before.keys() | after.keys()) if before.get(p) != after.get(p)]
            found.changed += [f"{name}: {p}" for p in changed]
            if prepare or changed:
                here = None                                            # the next one gets copies of its own
    return found


def inputs(folder, source, every=1, notebooks_every=1):
    "Bad inputs by three routes, beside the runs in `source`."
    logging.getLogger("papermill").setLevel(logging.ERROR)         # it warns of parameters that a notebook doesn't name
    return {
        "command line": refusals(folder, source, commands(), by_command, every),
        "papermill": refusals(folder, source, notebooks(), by_notebook, notebooks_every),
        "Python": refusals(folder, source, calls(source), by_call),
    }


# The sections, each a generator of lines to print and lists of what failed

def report_kills(folder, args):
    r = kills(folder, args.kills, args.seed)
    yield (f"kills: {r.kills} SIGKILLs ({r.early} before the first checkpoint, {r.writing} in a write, {r.between} "
           f"between writes), {r.resumes} resumes, {r.runs} runs, {len(r.lost)} lost; weights, last checkpoint and "
           f"metrics equal: {'no' if r.unequal else 'yes'}; {r.part_files} unfinished files left over ({r.took:.0f} s)",
           r.lost + r.unequal)


def report_writes(folder, args):
    r = writes(folder)
    yield (f"writes: {r.positions} positions failed, {len(r.tolerated)} of them did no harm, {len(r.unusable)} "
           f"unusable run folders, {len(r.other)} not one InputError, {len(r.part_files)} unfinished files left over",
           r.unusable + r.other + r.part_files)


def report_bytes(folder, args):
    r = bytes_changed(folder, args.bytes, args.seed)
    missed = sum(m.startswith("byte ") for m in r.missed)
    cut = r.truncations - len(r.missed) + missed
    yield (f"bytes: {r.corruptions} corruptions, {r.corruptions - missed} detected; {r.truncations} truncations and "
           f"additions, {cut} detected", r.missed)


def report_divergence(folder, args):
    yield "divergence:", []
    yield None, divergence(folder, lambda line: print(line, flush=True))
    for name, changes in (("robust_jem", dict(optimizer__lr=5.0)), ("jem", dict(TOO_FAST))):
        for after in (0, 12):
            different = recovered_then_killed(folder / f"again-{name}-{after}", after, **changes)
            what = f"{name} killed {after} updates after its recovery"
            said = f"different: {', '.join(different)}" if different else "equal to the one left alone, events included"
            yield f"  {what}, and continued: {said}", [f"{what}: {', '.join(different)}"] if different else []


def report_inputs(folder, args):
    for route, r in inputs(folder, make_runs(folder / "made")).items():
        yield (f"inputs, {route}: {r.inputs} bad inputs, {r.clear} clear one-line errors, {len(r.tracebacks)} "
               f"tracebacks, {len(r.other)} accepted or unclear, {len(r.changed)} changed files",
               r.tracebacks + r.other + r.changed)


SECTIONS = {                                                           # the longest first
    "kills": report_kills,
    "inputs": report_inputs,
    "writes": report_writes,
    "divergence": report_divergence,
    "bytes": report_bytes,
}


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
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--jobs", type=int, default=1, help="sections at a time")
    args = parser.parse_args()
    if args.jobs > 1 and len(args.only) > 1:
        counts = ["--kills", str(args.kills), "--bytes", str(args.bytes), "--seed", str(args.seed)]
        return int(side_by_side(args.only, args.jobs, counts))
    torch.set_num_threads(1)
    failed = False
    with tempfile.TemporaryDirectory() as root:
        for section in args.only:
            folder = Path(root) / section
            folder.mkdir()
            for line, problems in SECTIONS[section](folder, args):
                if line:
                    print(line, flush=True)
                for problem in problems:
                    print(f"  FAILED {problem}", flush=True)
                failed = failed or bool(problems)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
