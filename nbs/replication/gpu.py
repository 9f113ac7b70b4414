"""CIFAR-10 on a GPU that is there for minutes; each stage takes the time that it is given.

    python gpu.py measure OUT --seconds 105     times the variants of the hot paths; choice in RUNS/runtime.tuned.json
    python gpu.py pilots OUT --seconds 95       short trainings, judged on training images that were kept aside
    python gpu.py all OUT --seconds 440         three systems for an equal time each, and 10,000 samples a row
    python gpu.py second OUT --extractor FILE   short second stages of robust_jem_fast; choice in RUNS/second.json
    python gpu.py compute OUT --extractor FILE  every hybrid for equal operations, its best walk, and 10,000 samples
    python gpu.py judge OUT --extractor FILE    accuracy, PGD-20 and sample scores of what `all` or `compute` left
    python gpu.py trunk OUT FILE                a copy of a TorchScript file for a PyTorch that lacks an operator
    python gpu.py all OUT --dry                 the same on a CPU in a minute: a tiny network, few images

RUNS (--runs) keeps run folders while the machine is held; OUT is what is brought back, in pieces of at most
15 MiB. A system that is finished isn't trained again, so a later occasion goes on with what is missing; a cut
loses at most the system in work. $ROBUST_JEM_DATA holds cifar10/{train,test}/<class>/*.
"""
import argparse
import json
import os
import shutil
import sys
import time
import traceback
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import torch

from robust_jem.bench.compute import budget_of, trainings
from robust_jem.bench.scaling import random_images
from robust_jem.bench.tune import TuneConfig, markdown, tune
from robust_jem.core.config import merged, unfolded
from robust_jem.core.files import read_json, write_bytes, write_json, write_tensors
from robust_jem.core.images import Batches, Images, data_root, load_images
from robust_jem.engine import runs
from robust_jem.engine.checkpoints import TrainState
from robust_jem.engine.pretrained import RobustJEM
from robust_jem.engine.recovery import Diverged, Health
from robust_jem.engine.runs import Run, provenance
from robust_jem.engine.runtime import executing
from robust_jem.engine.sample import generate_samples
from robust_jem.engine.train import lr_factor
from robust_jem.bench.comparison import Nearness, choose_walk, measure_autoattack, measure_classifier
from robust_jem.judge.evaluate import evaluate_run
from robust_jem.judge.extractors import feature_extractor
from robust_jem.judge.robustness import accuracy, robust_accuracy
from robust_jem.judge.sweep import WALKS, walk_config
from robust_jem.systems import hybrid
from robust_jem.systems.catalog import TOLD_APART, EvaluateConfig, GenerateConfig, TrainConfig, configure

BEGAN = time.perf_counter()
ROWS = {
    "robust_jem": ("combined", "energy", "attack"),
    "jempp": ("energy",),
    "robust_classifier": ("attack",),
}
COMPARED = (
    "robust_jem", "robust_classifier", "robust_jem_fast", "jempp", "l2_robust_classifier", "dat", "sada_jem", "m_ebm",
)
# Second stages of robust_jem_fast, each without an ingredient or with another strength of it.
_TOLD_APART = merged(TOLD_APART, dict(chain=dict(outer_steps=12, step_size=0.4)))
SECOND = {
    "as the preset": dict(),
    "told apart, as in DAT": merged(_TOLD_APART, dict(optimizer=dict(lr=0.01))),
    "higher rate": dict(optimizer=dict(lr=0.1)),
    "half as many chains": dict(replay=dict(batch_size=128)),
    "batch norm frozen": dict(
        network=dict(frozen_statistics=True), attack=dict(statistics="running"), chain=dict(statistics="running"),
    ),
    "density of augmented images": dict(augment=dict(likelihood=True)),
    "told apart, higher rate": merged(_TOLD_APART, dict(optimizer=dict(lr=0.03))),
    "longer chains": dict(chain=dict(outer_steps=10)),
    "last weights": dict(optimizer=dict(ema_decay=0.0)),
}
DRY = dict(
    network=dict(depth=10, width=1),
    optimizer=dict(batch_size=16),
    replay=dict(size=200),
    attack=dict(steps=1),
    chain=dict(outer_steps=1),
    schedule=dict(warmup_steps=2),
    threads=1,
)
SMALLER = dict(batch_size=128, lr=0.1)
PILOTS = {
    "batch 256, lr 0.1": dict(optimizer=dict(batch_size=256, lr=0.1)),
    "batch 128, lr 0.1": dict(optimizer=SMALLER),
    "batch 128, lr 0.2": dict(optimizer=dict(batch_size=128, lr=0.2)),
    "attack by running statistics": dict(optimizer=SMALLER, attack=dict(statistics="running")),
    "3 chain steps": dict(optimizer=SMALLER, chain=dict(outer_steps=3)),
    "likelihood without augmentation": dict(optimizer=SMALLER, augment=dict(likelihood=False)),
}


def say(*words):
    "A line with the seconds since the start."
    print(f"[{time.perf_counter() - BEGAN:6.1f} s]", *words, flush=True)


def rounded(row: dict) -> dict:
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}


# Measuring --------------------------------------------------------------------------------------------------

def measure(args):
    "Time the variants and keep the choice where `all` looks for it."
    networks = ("10-1/8",) if args.dry else ("28-4/256", "28-4/128", "28-10/64", "28-10/256", "28-4/512")
    repeats = 1 if args.dry else 5
    config = TuneConfig(networks=networks, seconds=args.seconds, out=args.out, device=device(args), repeats=repeats)
    found = tune(config)
    print(markdown(found))
    Path(args.runs).mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(args.out) / "runtime.tuned.json", args.runs)


def device(args) -> str:
    return "cpu" if args.dry else "auto"


def tuned(args) -> str:
    "The variant that `measure` found fastest for a WRN-28-4; where it hasn't run, what a GPU gets by default."
    file = Path(args.runs) / "runtime.tuned.json"
    if args.compile != "tuned" or not file.exists():
        return "auto" if args.compile == "tuned" else args.compile
    choice = read_json(file)["choice"]
    return next((v for k, v in choice.items() if k.startswith("28-4/")), "auto")


# Training for a time ----------------------------------------------------------------------------------------

def settings(system: str, args, **changes) -> TrainConfig:
    "The preset h100, what the command line changes, and for a dry run a tiny network."
    own = dict(out=str(Path(args.runs) / f"{system}-s{args.seed}"), log_every=100)
    return configure(TrainConfig, system, "cifar10", "h100", **merged(unfolded(changes), common_settings(args), own))


class TimedTraining:
    """Train for a number of seconds, or of updates where the settings say how many.

    The pace is measured after the first updates, which compile, search and record; then the schedule covers exactly
    the updates that fit.
    """

    def __init__(self, config: TrainConfig, images: Images, runtime, seconds: float, guard: float):
        self.config, self.seconds, self.guard = config, seconds, guard
        source = Run(config.source).system(runtime=runtime) if config.source else None
        self.state = TrainState(config, images, runtime, source)
        self.batches = Batches(images.train_x, images.train_y, config.optimizer.batch_size, config.seed, runtime.device)
        self.health = Health(self.state.system)
        self.rows: list[dict] = []
        self.total: int | None = config.schedule.updates or None
        self.first = 60 if runtime.device.type == "cuda" else 10

    def run(self) -> "TimedTraining":
        self.began = time.perf_counter()
        while self.total is None or self.state.step < self.total:
            for x, y in self.batches.epoch(*divmod(self.state.step, len(self.batches))):
                schedule, rate = self.state.config.schedule, self.state.config.optimizer.lr
                lr = rate * lr_factor(schedule, self.state.step, len(self.batches))
                self.state.update(x, y, lr)
                self.find_pace()
                if self.judge(lr) or self.state.step == self.total:
                    break
        self.wait()
        self.state.seconds = time.perf_counter() - self.began
        return self

    def wait(self):
        if self.state.device.type == "cuda":
            torch.cuda.synchronize()

    def find_pace(self):
        "Time the second half of the first updates; from then on the number of updates is known."
        step = self.state.step
        if self.total is not None or step not in (self.first // 2, self.first):
            return
        self.wait()
        if step < self.first:
            self.mark = time.perf_counter()
            return
        pace = (time.perf_counter() - self.mark) / (self.first - self.first // 2)
        self.total = self.first + max(1, int(0.985 * self.seconds / pace))
        system = self.state.system
        system.asked = self.with_updates(system.asked)
        system.config = self.with_updates(system.config)
        size = self.config.optimizer.batch_size
        say(f"{self.config.system}: {1e3 * pace:.2f} ms an update, {size / pace:.0f} images/s,",
            f"{self.total} updates, {self.total / len(self.batches):.1f} epochs")

    def with_updates(self, config: TrainConfig) -> TrainConfig:
        "The same, for the updates that fit."
        return replace(config, schedule=replace(config.schedule, updates=self.total))

    def judge(self, lr: float) -> bool:
        "Every log_every updates: a line of metrics. True where the run went back to an earlier update."
        state = self.state
        if state.step % self.config.log_every and state.step != self.total:
            return False
        row = {k: torch.stack([p[k].float() for p in state.pending]).mean().item() for k in state.pending[0]}
        state.pending.clear()
        seconds = round(time.perf_counter() - self.began, 2)
        row |= dict(step=state.step, epoch=(state.step - 1) // len(self.batches) + 1, lr=lr, seconds=seconds)
        self.rows.append(row)
        if len(self.rows) % 10 == 0:
            say(self.config.system, rounded(row))
        why = self.health.check(row)
        if why:
            self.recover(why)
            return True
        state.snapshot = state.copy()
        if time.perf_counter() > self.guard:
            say(self.config.system, "stopped by the guard at", state.step, "of", self.total)
            self.total = state.step
        return False

    def recover(self, why: str):
        state = self.state
        if len(state.events) >= self.config.recovery.times:
            raise Diverged(why)
        say(self.config.system, "recovers:", why)
        state.recover(*state.snapshot, {"step": state.step, "why": why, "back_to": state.snapshot[0]})
        self.rows = [r for r in self.rows if r["step"] <= state.step]
        self.health.recall(self.rows)

    def save(self, images: Images, runtime) -> Run:
        "A run folder as `train` leaves one, with weights in bfloat16: those that are kept are those that are judged."
        state, config = self.state, self.with_updates(self.config)
        folder, seen = Path(config.folder), state.step * config.optimizer.batch_size
        write_json(folder / "config.json", config.to_dict())
        write_bytes(folder / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in self.rows).encode())
        summary = dict(system=config.system, dataset=config.dataset, fingerprint=images.fingerprint, updates=state.step,
                       images_seen=seen, seconds=round(state.seconds, 2), processes=1,
                       images_per_second=round(seen / state.seconds, 1),
                       parameters=sum(p.numel() for p in state.system.parameters()), recoveries=len(state.events))
        if state.events:
            summary["events"] = state.events
        write_json(folder / "summary.json", summary | provenance(runtime.device, runtime.policy))
        write_tensors(folder / "model.safetensors", {k: in_two_bytes(v) for k, v in state.system.weights().items()})
        return Run(folder)


def in_two_bytes(v: torch.Tensor) -> torch.Tensor:
    return v.to(torch.bfloat16).to(v.dtype) if v.is_floating_point() else v


# Equal compute ----------------------------------------------------------------------------------------------

def nearness_to(images: Images, args) -> Nearness:
    "The distance by which walks are chosen."
    precision = "float32" if args.dry else "bfloat16"
    return Nearness(feature_extractor(args.extractor, precision=precision), images, on_device(), data_root() / ".cache")


def compute(args):
    "Every system that isn't there yet, for the same operations; packed after each."
    share_prior()
    images = the_images(args)
    nearness, budget = nearness_to(images, args), the_budget(images, args)
    chosen = Path(args.runs) / "second.json"
    fast = unfolded(read_json(chosen)["best"]["changes"]) if chosen.exists() else {}
    for system in args.systems:
        if not args.dry and time.perf_counter() > BEGAN + args.seconds - args.reserve - args.least:
            say("no time for", system)
            return
        try:
            compared(system, images, budget, nearness, fast if system == "robust_jem_fast" else {}, args)
        except Exception:           # the next system may still be trained
            say("FAILED", system, traceback.format_exc())
    say("done")


def common_settings(args) -> dict:
    "What all trainings of a stage share."
    asked = merged(unfolded(json.loads(args.settings or "{}")), DRY if args.dry else {})
    where = dict(seed=args.seed, device=device(args), compile=tuned(args), log_every=2 if args.dry else 20)
    return merged(asked, where)


def the_budget(images: Images, args) -> float:
    budget = budget_of(args.worth, "cifar10", "h100", images.shape, **common_settings(args))
    say(images, f"budget {budget:.4g} operations, {args.worth:,} images of Robust JEM")
    return budget


def compared(system: str, images: Images, budget: float, nearness: Nearness, fast: dict, args):
    "Train a system's stages, choose its walk, draw its samples."
    folder = Path(args.runs) / f"{system}-s{args.seed}"
    stages = trainings(system, "cifar10", "h100", budget, images.shape, args.runs, **common_settings(args))
    if fast:
        last = trainings(system, "cifar10", "h100", budget, images.shape, args.runs,
                         **merged(common_settings(args), fast))[-1]
        stages[-1] = last
    for config in stages:
        if not (Path(config.folder) / "model.safetensors").exists():
            train_updates(config, images, args)
    run = Run(folder)
    draw_best(run, best_walk(run, nearness, args), args)
    bring_back(run, args)


def second(args):
    "Short second stages from one first stage; the nearest samples whose network has kept its robustness win."
    share_prior()
    images = served(kept_aside(the_images(args)))
    nearness, budget = nearness_to(images, args), the_budget(images, args)
    folder, found = Path(args.runs) / "second", []
    first = None
    for i, name in enumerate(args.second or SECOND):
        if not args.dry and i and time.perf_counter() + args.each > BEGAN + args.seconds:
            say("no time for:", name)
            break
        changes = merged(common_settings(args), SECOND[name])
        begin, last = trainings("robust_jem_fast", "cifar10", "h100", budget, images.shape, folder, **changes)
        if first is None:
            first = begin
            train_updates(first, images, args)
        last = replace(last, source=first.folder, out=str(folder / str(i)))
        try:
            train_updates(last, images, args)
            found.append(second_judged(Run(last.folder), name, images, nearness, args))
        except Exception:
            say("FAILED", name, traceback.format_exc())
            continue
        kept = max(row["pgd10"] for row in found) - 0.02
        best = min((row for row in found if row["pgd10"] >= kept), key=lambda row: row["distance"])
        write_json(Path(args.out) / "second.json", {"second": found, "best": best})
        write_json(Path(args.runs) / "second.json", {"second": found, "best": best})
    say("done")


def second_judged(run: Run, name: str, images: Images, nearness: Nearness, args) -> dict:
    best = best_walk(run, nearness, args)
    n = 20 if args.dry else 1000
    test = images.test_x[:n], images.test_y[:n]
    with executing(run.config, run.config.threads) as runtime:
        model = run.system(runtime=runtime)
        scores = dict(accuracy=accuracy(model, *test), pgd10=robust_accuracy(model, *test, 0.0627, 10))
    last = run.metrics()[-1]
    row = dict(name=name, changes=SECOND[name], updates=last["step"], **scores, **best, last=rounded(last))
    say("second stage:", rounded({k: v for k, v in row.items() if k not in ("changes", "last")}))
    return row


def train_updates(config: TrainConfig, images: Images, args):
    "As many updates as the settings say, unless the time of the stage is over."
    guard = float("inf") if args.dry else BEGAN + args.seconds - args.reserve
    with executing(config, config.threads) as runtime:
        training = TimedTraining(config, images, runtime, 0.0, guard).run()
        training.save(images, runtime)
        state, last = training.state, rounded(training.rows[-1])
        pace = state.step * config.optimizer.batch_size / state.seconds
        say(f"{config.system}: {state.step} updates in {state.seconds:.1f} s, {pace:.0f} images/s,",
            f"{len(state.events)} recoveries", last)


def best_walk(run: Run, nearness: Nearness, args) -> dict:
    "The length of walk that suits a system."
    walks = (("ascent", 0.4, (1, 2)), ("energy", 0.2, (1,))) if args.dry else WALKS
    with executing(run.config, run.config.threads) as runtime:
        best = choose_walk(run, nearness, runtime, walks, args.looked_at)
    rows = read_json(run.path / "comparison/walks.json")["rows"]
    say("walks:", run.config.system, [(r["method"], r["step_size"], r["steps"], round(r["distance"], 3)) for r in rows])
    return best


def draw_best(run: Run, best: dict, args):
    "The reported samples, by the walk that was chosen."
    changes = dict(num_samples=40, batch_size=20) if args.dry else dict(num_samples=args.samples, batch_size=500)
    config = walk_config(run.config.system, "cifar10", "h100", best["method"], best["step_size"], best["steps"],
                         run=str(run.path), compile=run.config.compile, device=device(args), **changes)
    generate_samples(config, progress=False)
    say("drawn:", run.config.system, best)


def share_prior():
    "Fit the class Gaussians once: every system of a data set starts its chains from the same."
    fitted, fit = {}, hybrid.build_prior

    def build_prior(config, images, device="cpu"):
        key = (images.fingerprint, config.replay.prior)
        if key not in fitted:
            fitted[key] = fit(config, images, "cuda" if torch.cuda.is_available() else "cpu")
        return fitted[key].to(device)

    hybrid.build_prior = build_prior


def the_images(args) -> Images:
    "CIFAR-10, loaded once for all runs; a dry run takes noise where it isn't there."
    try:
        images = load_images("cifar10", download=not args.dry)
    except ValueError:
        if not args.dry:
            raise
        return replace(random_images(300), name="cifar10", fingerprint="")
    return served(images)


def served(images: Images) -> Images:
    "The images that every run of this process finds."
    runs.load_images = lambda *_, **__: images
    return images


# Pilots -----------------------------------------------------------------------------------------------------

def kept_aside(images: Images) -> Images:
    "The same with some training images in the test set's place: settings are never chosen on test images."
    order = torch.randperm(len(images.train_x), generator=torch.Generator().manual_seed(0))
    few = min(1000, len(order) // 5)
    aside, kept = order[:few], order[few:]
    return replace(images, train_x=images.train_x[kept], train_y=images.train_y[kept], test_x=images.train_x[aside],
                   test_y=images.train_y[aside], fingerprint="")


def pilots(args):
    "Train each setting for a moment; accuracy and PGD accuracy on the images kept aside."
    share_prior()
    images = kept_aside(the_images(args))
    found = []
    for name in args.pilots or PILOTS:
        if not args.dry and time.perf_counter() + args.each > BEGAN + args.seconds:
            say("no time for pilot:", name)
            break
        config = settings("robust_jem", args, **merged(dict(schedule=dict(warmup_steps=100)), PILOTS[name]))
        with executing(config, config.threads) as runtime:
            guard = float("inf") if args.dry else BEGAN + args.seconds
            training = TimedTraining(config, images, runtime, args.each, guard).run()
            n = 20 if args.dry else 1000
            test = images.test_x[:n], images.test_y[:n]
            scores = dict(accuracy=accuracy(training.state.system, *test))
            scores["pgd10"] = robust_accuracy(training.state.system, *test, 0.0627, 10)
            found.append(dict(name=name, **scores, updates=training.state.step, changes=PILOTS[name],
                              seconds=round(training.state.seconds, 1), last=training.rows[-1]))
        say("pilot:", name, scores)
        write_json(Path(args.out) / "pilots.json", {"pilots": found, **provenance(runtime.device)})


# All systems ------------------------------------------------------------------------------------------------

def all_systems(args):
    "An equal time for each system that isn't there yet, then its samples; packed after each."
    share_prior()
    images = the_images(args)
    say("images:", images)
    todo = [s for s in args.systems if not (Path(args.runs) / f"{s}-s{args.seed}" / "model.safetensors").exists()]
    for i, system in enumerate(todo):
        budget = seconds_for(todo[i:], args)
        if not args.dry and budget < args.least:
            say("no time for", system)
            break
        try:
            one_system(system, images, budget, args)
        except Exception:           # the next system may still be trained
            say("FAILED", system, traceback.format_exc())
    say("done")


def seconds_for(todo: list[str], args) -> float:
    "Of training, for each of the systems that are left; a dry run takes a second, however slow the machine."
    if args.dry:
        return 1.0
    rows = sum(len(ROWS[s]) for s in todo)
    left = BEGAN + args.seconds - args.reserve - time.perf_counter() - args.draw_seconds * rows
    return left / len(todo) - args.warmup_seconds


def one_system(system: str, images: Images, budget: float, args):
    config = settings(system, args)
    with executing(config, config.threads) as runtime:
        guard = float("inf") if args.dry else time.perf_counter() + 1.1 * budget + 2 * args.warmup_seconds
        training = TimedTraining(config, images, runtime, budget, guard).run()
        run = training.save(images, runtime)
        say(f"{system}: {training.state.step} updates in {training.state.seconds:.1f} s,",
            f"{len(training.state.events)} recoveries", rounded(training.rows[-1]))
        del training
    draw(run, args)
    bring_back(run, args)


def draw(run: Run, args):
    "The sample sets of a system's rows, while there is time."
    changes = dict(num_samples=args.samples)
    if args.dry:
        changes = dict(num_samples=40, batch_size=20, chain=dict(outer_steps=2), attack=dict(steps=2))
    by_method = json.loads(args.draw_settings or "{}")
    for method in ROWS[run.config.system]:
        if not args.dry and time.perf_counter() > BEGAN + args.seconds - args.reserve:
            say("no time to draw", run.config.system, method)
            return
        config = configure(GenerateConfig, run.config.system, "cifar10", "h100", method=method, run=str(run.path),
                           compile=run.config.compile, device=device(args), **(by_method.get(method, {}) | changes))
        generate_samples(config, progress=False)
        say("drawn:", run.config.system, method)


def bring_back(run: Run, args):
    "Pack weights in two bytes each, records, scores, and the first images of each sample set, with what is there."
    folder = Path(args.runs) / "back"
    target = folder / run.path.name
    target.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "summary.json", "metrics.jsonl"):
        if (run.path / file).exists():
            shutil.copy(run.path / file, target / file)
    if run.config.system in args.weights:
        RobustJEM.from_run(run.path).save_pretrained(target / "pretrained", torch.bfloat16, prior=False)
    for name in run.sample_names():
        x, y, summary = run.samples(name)
        images = {"x": x[:args.kept], "y": y[:args.kept], "strip": run.strip(name)[1]}
        write_tensors(target / f"samples-{name}.safetensors", images)
        write_json(target / f"samples-{name}.json", summary)
    for name in ("scores", "comparison"):
        if (run.path / name).exists():
            shutil.copytree(run.path / name, target / name, dirs_exist_ok=True)
    pack(folder, Path(args.out))


def pack(folder: Path, out: Path):
    "One archive in pieces of 15 MiB: `cat back.tar.* | tar x` opens it."
    archive = Path(shutil.make_archive(str(folder), "tar", folder))
    limit, data = 15 * 2**20, archive.read_bytes()
    for i in range(0, len(data), limit):
        write_bytes(out / f"back.tar.{i // limit:02}", data[i:i + limit])
    archive.unlink()


# Judging ----------------------------------------------------------------------------------------------------

def judge(args):
    "Score what `all` left; test images and prior draws are the same for every run, and scored once."
    share_prior()
    first = None
    for system in args.systems:
        run = Path(args.runs) / f"{system}-s{args.seed}"
        if not (run / "model.safetensors").exists():
            say(system, "isn't there")
            continue
        if first is not None:
            (run / "scores").mkdir(exist_ok=True)
            for name in ("held-out", "prior"):
                shutil.copy(first / "scores" / f"{name}.json", run / "scores")
        how = dict(num_robust=args.attacked, precision="bfloat16", extractor_precision="bfloat16", compile=tuned(args))
        if args.dry:
            how = dict(num_robust=20, attack_steps=1, batch_size=20, splits=1)
        config = configure(EvaluateConfig, system, "cifar10", "h100", run=str(run), extractor=args.extractor,
                           attack_eps=(0.0627,), by_class=False, device=device(args), **how)
        scores = evaluate_run(config, progress=False)
        say(system, {name: [k for k in part] for name, part in scores.items()})
        if args.more:
            judge_more(Run(run), args)
        first = first or run
        bring_back(Run(run), args)
    for system in args.systems if args.more and args.autoattacked else ():
        run = Path(args.runs) / f"{system}-s{args.seed}"
        in_time = args.dry or time.perf_counter() < BEGAN + args.seconds - args.each
        if in_time and (run / "comparison/classifier.json").exists():
            autoattacked(Run(run), args)
            bring_back(Run(run), args)
    say("judged")


def on_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def judge_more(run: Run, args):
    "What the comparison has beside Table 1: attacks in both norms, calibration, other images."
    number = 20 if args.dry else args.attacked
    with executing(run.config, run.config.threads) as at:
        found = measure_classifier(run, at, 0.0627, 1.0, number)
    say(run.config.system, {k: v for k, v in found.items() if k.startswith(("PGD", "ECE", "AUROC"))})


def autoattacked(run: Run, args):
    "The standard attacks, in both norms, on some test images."
    with executing(run.config, run.config.threads) as at:
        say(run.config.system, measure_autoattack(run, at, 0.0627, 1.0, args.autoattacked))


def trunk(args):
    """Rename an operator that PyTorch 2.11 lacks.

    It stands in Inception's branch for Lanczos interpolation, which is never taken: the network resizes bilinearly.
    """
    source, target = Path(args.file), Path(args.out) / Path(args.file).name
    if os.path.realpath(source) == os.path.realpath(target):
        sys.exit(f"gpu.py trunk: OUT is the folder of {source}, which would be overwritten; name another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    old, new = b"torch._upsample_lanczos2d_aa(", b"torch._upsample_bicubic2d_aa("
    found = 0
    with zipfile.ZipFile(source) as given, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as made:
        for name in given.namelist():
            data = given.read(name)
            if name.endswith(".py"):
                found += data.count(old)
                data = data.replace(old, new)
            made.writestr(name, data)
    print(f"{target}: {found} calls replaced")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("out", help="what is brought back")
    parser.add_argument("file", nargs="?", help="of trunk")
    parser.add_argument("--seconds", type=float, default=110, help="for the stage, its start included")
    parser.add_argument("--runs", default="runs/gpu")
    parser.add_argument("--systems", nargs="+", choices=COMPARED, help="default: all of the stage")
    parser.add_argument("--worth", type=int, default=200_000, help="images of Robust JEM that a budget of compute buys")
    parser.add_argument("--looked-at", type=int, default=500, help="samples on which the length of a walk is chosen")
    parser.add_argument("--more", action="store_true", help="judge: also L2, AutoAttack, calibration and other images")
    parser.add_argument("--attacked", type=int, default=10_000, help="judge: test images attacked by PGD")
    parser.add_argument("--autoattacked", type=int, default=200, help="test images for AutoAttack; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", default="tuned", help="as for train; tuned: what `measure` found fastest")
    parser.add_argument("--settings", help="JSON: settings of the training by name, such as {\"attack.eps\": 0.1}")
    parser.add_argument("--draw-settings", help="JSON: settings of the drawing by method")
    parser.add_argument("--samples", type=int, default=10_000, help="of each row")
    parser.add_argument("--kept", type=int, default=1000, help="images of each row that are brought back")
    parser.add_argument("--draw-seconds", type=float, default=15, help="kept for each row")
    parser.add_argument("--warmup-seconds", type=float, default=7, help="kept for each system's first updates")
    parser.add_argument("--least", type=float, default=20, help="seconds that a training is worth")
    parser.add_argument("--reserve", type=float, default=10, help="seconds kept for writing")
    parser.add_argument("--each", type=float, default=9, help="seconds of a pilot")
    parser.add_argument("--second", nargs="+", choices=SECOND, help="these second stages alone")
    parser.add_argument("--weights", nargs="+", default=list(COMPARED), choices=COMPARED, help="brought back, of these")
    parser.add_argument("--pilots", nargs="+", choices=PILOTS, help="these alone")
    parser.add_argument("--extractor", default="inception", help="of judge")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with a tiny network")
    args = parser.parse_args()
    args.systems = args.systems or list(COMPARED if args.stage == "compute" else ROWS)
    return args


STAGES = {
    "measure": measure, "pilots": pilots, "all": all_systems, "second": second, "compute": compute, "judge": judge,
    "trunk": trunk,
}

if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning)
    given = arguments()
    STAGES[given.stage](given)
