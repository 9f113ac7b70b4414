"""CIFAR-10 on a GPU that is there for minutes: measure, train, draw, judge, each within a time that is given.

    python gpu.py measure OUT --seconds 110              times the variants of the hot paths; writes runtime.tuned.json
    python gpu.py all OUT --seconds 480                  three systems for an equal time each, then 10,000 samples a row
    python gpu.py judge OUT --extractor FILE.pt          accuracy, PGD-20 and sample scores of what `all` left
    python gpu.py all OUT --dry                          the same on a CPU, in minutes: a tiny network and few images

RUNS (--runs) keeps run folders while the machine is held; OUT is what is brought back. A system that is finished is not
trained again, so a later occasion goes on with what is missing. $ROBUST_JEM_DATA holds cifar10/{train,test}/<class>/*.
"""
import argparse
import json
import shutil
import statistics
import time
import traceback
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from robust_jem.bench.naive import Reference, flops, step_flops
from robust_jem.bench.scaling import one_update
from robust_jem.core.files import write_json, write_tensors
from robust_jem.core.images import Batches, Images, load_images
from robust_jem.core.random import stream
from robust_jem.ebm.energy import marginal_energy, untouched, input_gradient
from robust_jem.engine import pretrained
from robust_jem.engine.checkpoints import TrainState
from robust_jem.engine.distributed import World
from robust_jem.engine.graphs import Captured
from robust_jem.engine.recovery import Diverged, Health
from robust_jem.engine.runs import Run, provenance
from robust_jem.engine.runtime import Deadline, Execution, choose_policy, executing
from robust_jem.engine.pretrained import RobustJEM
from robust_jem.engine.sample import generate_samples
from robust_jem.engine.train import lr_factor
from robust_jem.judge.evaluate import evaluate_run
from robust_jem.judge.robustness import accuracy, robust_accuracy
from robust_jem.networks.fused import can_fuse
from robust_jem.networks.wide_resnet import WideResNet
from robust_jem.systems import hybrid
from robust_jem.systems.catalog import EvaluateConfig, GenerateConfig, TrainConfig, configure

BEGAN = time.perf_counter()
SYSTEMS = ("robust_jem", "jempp", "robust_classifier")
ROWS = {"robust_jem": ("combined", "energy", "attack"), "jempp": ("energy",), "robust_classifier": ("attack",)}
DRY = dict(depth=10, width=1, batch_size=16, buffer_size=200, attack_steps=1, outer_steps=1, warmup_steps=2, eps_warmup=2, threads=1)


def say(*words):
    print(f"[{time.perf_counter() - BEGAN:6.1f} s]", *words, flush=True)


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------------------------------------------- measure

def timed(work, device, repeats=5, warmups=4):
    "Median seconds of a call, after warm-ups (which record the graphs)."
    for _ in range(warmups):
        work()
    seconds = []
    for _ in range(repeats):
        sync(device)
        began = time.perf_counter()
        work()
        sync(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def random_set(n=2000):
    x = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(n) % 10
    return Images("random", x, y, x[:20], y[:20], tuple(map(str, range(10))))


def peak(device):
    "Operations a second of a large bfloat16 product."
    n = 8192 if device.type == "cuda" else 256
    a = torch.randn(n, n, device=device).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    return 2 * n**3 / timed(lambda: a @ a, device, 10)


def gradient(net, x):
    with untouched(net):
        return input_gradient(net, x, lambda logits: -marginal_energy(logits))


def agreement(depth, width, compile, device):
    "How far logits and input gradient are from float64, relative to their size."
    torch.manual_seed(0)
    net = WideResNet(depth, width).to(device).train()
    x = torch.rand(16, 3, 32, 32, device=device) * 2 - 1
    exact = gradient(net.double(), x.double())
    logits = net(x.double())
    net.float()
    fast = choose_policy(device, "bfloat16" if device.type == "cuda" else "float32", compile).accelerate(net)
    near = gradient(fast, x)
    with torch.no_grad(), untouched(net):
        out = fast(x)
    relative = lambda a, b: float((a.double() - b).norm() / b.norm())
    return {"logits": relative(out, logits), "gradient": relative(near, exact)}


def workloads(depth, width, batch, compile, device, changes):
    "The hot paths of one variant on the real shapes, and the work in each: name → (call, images, FLOPs an image)."
    config = configure(TrainConfig, "robust_jem", "cifar10", "h100", depth=depth, width=width, batch_size=batch, buffer_size=4 * batch, compile=compile, eps_warmup=0, **changes)
    policy = choose_policy(device, "bfloat16" if device.type == "cuda" else "float32", compile)
    at = Execution(World(), device, policy, Deadline(0))
    images = random_set(max(2000, batch))
    state = TrainState(config, images, at)
    system = state.system
    system.network.train()
    hot = system.hot_paths(state.stepper)
    x = images.train_x[:batch].to(device).float() / 127.5 - 1
    raw, y = images.train_x[:batch].to(device), images.train_y[:batch].to(device)
    f = flops(WideResNet(depth, width), (3, 32, 32))
    single = (lambda x: gradient(system.fast, x))
    single = Captured(single) if hot.captures else single
    system.fast.prepare()
    long = replace(config, attack_steps=15, outer_steps=10)
    out = {
        "gradient": (lambda: single(x), f["gradient"]),
        "chain": (lambda: hot.chain(x, None), config.outer_steps * f["gradient"]),
        "attack": (lambda: hot.attack(x, y, 0.0627), config.attack_steps * f["gradient"]),
        "update": (lambda: hot.update(y, None, x, x, x, None, None), 3 * f["update"]),
        "train step": (lambda: one_update(state, raw, y), step_flops(config, f)),
    }
    def whole():
        system.config = long
        one_update(state, raw, y)
    def paper():
        system.back_off(0)          # records anew
        system.config = long
    return out, (paper, whole, step_flops(long, f)), state


def profile(work, device, file):
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded
    with recorded(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU] if device.type == "cuda" else [ProfilerActivity.CPU]) as p:
        for _ in range(3):
            work()
        sync(device)
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = sorted(p.key_averages(), key=lambda e: -getattr(e, key.replace("cuda", "device"), 0))[:40]
    time_of = lambda e: getattr(e, key.replace("cuda", "device"), 0)
    total = sum(time_of(e) for e in p.key_averages())
    lines = [f"{time_of(e) / 3e3:9.3f} ms  {100 * time_of(e) / max(total, 1e-9):5.1f} %  {e.count // 3:5d} calls  {e.key[:140]}" for e in rows]
    Path(file).write_text(f"total {total / 3e3:.3f} ms a call\n" + "\n".join(lines) + "\n")
    say(f"profile {Path(file).name}: {total / 3e3:.3f} ms a call")
    for line in lines[:14]:
        print("   ", line)


def measure(args):
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    end = time.perf_counter() + args.seconds
    late = lambda reserve=0: time.perf_counter() + reserve > end
    with executing(TrainConfig(device="cpu" if args.dry else "auto")) as at:
        device = at.device
        found = {"peak TFLOP/s": peak(device) / 1e12, **provenance(device), "agreement": {}, "networks": {}, "failed": {}}
        say("peak", round(found["peak TFLOP/s"], 1), "TFLOP/s on", found["device"])
        fused = ["fused"] if device.type == "cuda" else []
        small = (10, 1, 16)
        plan = [((28, 4, 256), ["off", *fused], {}), ((28, 4, 128), fused, {}), ((28, 4, 256), fused, {"attack_statistics": "running"}), ((28, 10, 64), fused, {}),
                ((28, 10, 256), fused, {}), ((28, 4, 512), fused, {}), ((28, 10, 64), ["off"], {}), ((28, 4, 256), ["default"], {}), ((28, 4, 256), ["max-autotune"], {})]
        if args.dry:
            plan = [(small, ["off"], {}), (small, ["off"], {"attack_statistics": "running"}), (small, ["default"], {})]
        for compile in ("off", *fused):
            try:
                found["agreement"][compile] = agreement(*(small[:2] if args.dry else (28, 4)), compile, device)
                say("agreement with float64:", compile, found["agreement"][compile])
            except Exception:
                found["failed"][f"agreement {compile}"] = traceback.format_exc()
                say("FAILED agreement", compile, traceback.format_exc()[-1500:])
        profiled = set()
        for (depth, width, batch), variants, changes in plan:
            for compile in variants:
                name = f"WRN-{depth}-{width}, batch {batch}"
                variant = compile + "".join(f", {k} {v}" for k, v in changes.items())
                if late(45 if compile == "default" else 200 if compile == "max-autotune" else 8):
                    say("no time for", name, variant)
                    continue
                try:
                    row, state = {}, None
                    works, (to_paper, whole, paper_flops), state = workloads(depth, width, batch, compile, device, changes)
                    for what, (work, ops) in works.items():
                        seconds = timed(work, device)
                        row[what] = {"ms": 1e3 * seconds, "images/s": batch / seconds, "TFLOP/s": batch * ops / seconds / 1e12, "share of peak": batch * ops / seconds / 1e12 / found["peak TFLOP/s"]}
                    if device.type == "cuda":
                        row["peak GiB"] = torch.cuda.max_memory_allocated(device) / 2**30
                    if (width, compile) not in profiled and (width, compile) in {(4, "off"), (4, "fused"), (10, "fused")} or args.dry and not profiled:
                        profiled.add((width, compile))
                        for what in ("gradient", "update"):
                            profile(works[what][0], device, out / f"profile-wrn-{depth}-{width}-{compile}-{what}.txt")
                    if not late(10):
                        to_paper()
                        seconds = timed(whole, device, 3)
                        row["train step, PGD-15 and 10 chain steps"] = {"ms": 1e3 * seconds, "images/s": batch / seconds, "TFLOP/s": batch * paper_flops / seconds / 1e12,
                                                                       "share of peak": batch * paper_flops / seconds / 1e12 / found["peak TFLOP/s"]}
                    found["networks"].setdefault(name, {})[variant] = row
                    say(name, variant, {k: {a: round(b, 3 if a == "share of peak" else 1) for a, b in v.items()} if isinstance(v, dict) else round(v, 2) for k, v in row.items()})
                except Exception:
                    found["failed"][f"{name} {variant}"] = traceback.format_exc()
                    say("FAILED", name, variant, traceback.format_exc()[-2500:])
                finally:
                    works = state = None
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                write_json(out / "measure.json", found)
        if not args.dry and not late(12):
            try:
                config = configure(TrainConfig, "robust_jem", "cifar10", "paper", depth=28, width=10, batch_size=64)
                reference = Reference(config, device, torch.zeros(10, 3072), torch.eye(3072).expand(10, -1, -1))
                x, y = torch.rand(64, 3, 32, 32, device=device) * 2 - 1, torch.arange(64, device=device) % 10
                seconds = timed(lambda: reference.update(x, y, x), device, 2, 1)
                found["reference WRN-28-10, batch 64, PGD-15 and 10 chain steps"] = {"ms": 1e3 * seconds, "images/s": 64 / seconds}
                say("reference", found["reference WRN-28-10, batch 64, PGD-15 and 10 chain steps"])
            except Exception:
                found["failed"]["reference"] = traceback.format_exc()
        tuned = {}
        for name, variants in found["networks"].items():
            plain = {v: r for v, r in variants.items() if "," not in v and "train step" in r}
            if plain:
                tuned[name] = max(plain, key=lambda v: plain[v]["train step"]["images/s"])
        found["tuned"] = tuned
        write_json(out / "measure.json", found)
        for folder in (out, Path(args.runs)):
            write_json(folder / "runtime.tuned.json", {"device": found["device"], "torch": found["torch"], "choice": tuned})
        say("tuned:", tuned)


# ------------------------------------------------------------------------------------------------------- pilots

PILOTS = {
    "batch 256, lr 0.1": dict(batch_size=256, lr=0.1),
    "batch 128, lr 0.1": dict(),
    "batch 128, lr 0.2": dict(lr=0.2),
    "attack by running statistics": dict(attack_statistics="running"),
    "3 chain steps": dict(outer_steps=3),
    "likelihood without augmentation": dict(likelihood_augment=False),
}


def pilots(args):
    "Short trainings of the real network, judged on training images that were kept aside: never on the test set."
    out, end = Path(args.out), BEGAN + args.seconds
    out.mkdir(parents=True, exist_ok=True)
    args.compile = tuned(args)
    share_prior()
    images = dry_images() if args.dry else load_images("cifar10", download=False)
    order = torch.randperm(len(images.train_x), generator=torch.Generator().manual_seed(0))
    few = min(1000, len(order) // 5)
    aside, kept = order[:few], order[few:]
    images = replace(images, train_x=images.train_x[kept], train_y=images.train_y[kept], test_x=images.train_x[aside], test_y=images.train_y[aside], fingerprint="")
    say("images:", images)
    found = []
    names = args.pilots or list(PILOTS)
    for name in names:
        if time.perf_counter() + args.each + (0 if args.dry else 4) > end:
            say("no time for pilot:", name)
            break
        try:
            args.settings = json.dumps(dict(warmup_steps=100) | PILOTS[name])
            config = settings("robust_jem", args)
            with executing(config, config.threads) as at:
                state, rows = train_for(config, images, at, 3 if args.dry else args.each, end)
                n = 20 if args.dry else 1000
                scores = dict(accuracy=accuracy(state.system.fast, images.test_x[:n], images.test_y[:n]), pgd10=robust_accuracy(state.system.fast, images.test_x[:n], images.test_y[:n], 0.0627, 10))
                found.append(dict(name=name, **scores, updates=state.step, seconds=round(state.seconds, 1), images_per_second=round(state.step * config.batch_size / state.seconds), recoveries=len(state.events), last=rows[-1], changes=PILOTS[name]))
                say("pilot:", {k: v for k, v in found[-1].items() if k not in ("last", "changes")}, {k: round(rows[-1][k], 3) for k in ("loss", "energy_gap", "gradient_norm", "sampled_std") if k in rows[-1]})
                del state
            if at.device.type == "cuda":
                torch.cuda.empty_cache()
        except Exception:
            say("FAILED pilot", name, traceback.format_exc()[-2500:])
            found.append(dict(name=name, failed=traceback.format_exc()))
        for folder in (out, Path(args.runs)):
            write_json(folder / "pilots.json", {"pilots": found, **provenance(at.device)})


# ------------------------------------------------------------------------------------------------------- train and draw

RECIPE = dict(width=4, batch_size=128, lr=0.1, eps=0.0627, attack_steps=3, outer_steps=5, warmup_steps=400, eps_warmup=0, schedule="cosine", track_sampled=False, ema_decay=0.0, log_every=100)


def settings(system, args):
    recipe = RECIPE | getattr(args, "chosen", {}) | json.loads(args.settings or "{}")
    recipe |= json.loads(args.system_settings or "{}").get(system, {})
    return configure(TrainConfig, system, "cifar10", "h100", seed=args.seed, out=str(Path(args.runs) / f"{system}-s{args.seed}"), device="cpu" if args.dry else "auto", compile=args.compile,
                     **(recipe | (DRY if args.dry else {})))


def train_for(config, images, at, seconds, guard):
    "Train for a time: its pace is measured after the first updates, then the schedule covers exactly the updates that fit."
    began = time.perf_counter()
    state = TrainState(config, images, at)
    batches = Batches(images.train_x, images.train_y, config.batch_size, config.seed, at.device)
    health, rows = Health(state.system), []
    total, marks, first = None, {}, 10 if config.device == "cpu" else 60
    def flush(lr):
        row = {k: torch.stack([p[k].float() for p in state.pending]).mean().item() for k in state.pending[0]}
        state.pending.clear()
        row |= dict(step=state.step, epoch=state.step // len(batches) + 1, lr=lr, seconds=round(time.perf_counter() - began, 2))
        rows.append(row)
        return row
    while total is None or state.step < total:
        for x, y in batches.epoch(state.step // len(batches), state.step % len(batches)):
            lr = state.config.lr * lr_factor(state.config, state.step, len(batches))
            state.update(x, y, lr)
            if state.step in (first // 2, first) and total is None:
                sync(at.device)
                marks[state.step] = time.perf_counter()
                if state.step == first:
                    pace = (marks[first] - marks[first // 2]) / (first - first // 2)
                    total = first + max(1, int(0.985 * seconds / pace))         # what the first updates take is warming up, not training
                    state.system.asked = replace(state.system.asked, updates=total)
                    state.system.config = replace(state.config, updates=total)
                    say(f"{config.system}: {1e3 * pace:.2f} ms an update, {config.batch_size / pace:.0f} images/s, {total} updates, {total / len(batches):.1f} epochs")
            if state.step % config.log_every == 0 or state.step == total:
                row = flush(lr)
                if state.step % (10 * config.log_every) == 0:
                    say(config.system, {k: round(v, 3) for k, v in row.items()})
                if why := health.check(row):
                    if len(state.events) >= config.recoveries:
                        raise Diverged(why)
                    say(config.system, "recovers:", why)
                    state.recover(*state.snapshot, {"step": state.step, "why": why, "back_to": state.snapshot[0]})
                    rows[:] = [r for r in rows if r["step"] <= state.step]
                    health.recall(rows, config)
                    break
                state.snapshot = state.copy()
                if time.perf_counter() > guard:
                    say(config.system, "stopped by the guard at", state.step, "of", total)
                    total = state.step
            if state.step == total:
                break
    sync(at.device)
    state.seconds = time.perf_counter() - began
    return state, rows


def save_run(state, rows, config, images, at):
    config = replace(config, updates=state.system.asked.updates)
    folder = Path(config.folder)
    write_json(folder / "config.json", config.to_dict())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    seen = state.step * config.batch_size
    events = {"events": state.events} if state.events else {}
    write_json(folder / "summary.json", dict(system=config.system, dataset=config.dataset, fingerprint=images.fingerprint, updates=state.step, images_seen=seen, seconds=round(state.seconds, 2), processes=1,
               images_per_second=round(seen / state.seconds, 1), parameters=sum(p.numel() for p in state.system.network.parameters()), recoveries=len(state.events), **events, **provenance(at.device, at.policy)))
    rounded = {k: v.to(torch.bfloat16).to(v.dtype) if v.is_floating_point() else v for k, v in state.system.weights().items()}     # the weights that are kept are the weights that are judged
    write_tensors(folder / "model.safetensors", rounded)
    return Run(folder)


def bring_back(run, out):
    "Weights in two bytes each, records, scores, and a few images of each sample set."
    target = Path(out) / run.path.name
    target.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "summary.json", "metrics.jsonl"):
        shutil.copy(run.path / file, target / file)
    model = RobustJEM.from_run(run.path)
    model.save_pretrained(target / "pretrained", torch.bfloat16, prior=False)
    shutil.move(target / "pretrained" / "model.safetensors", target / "weights.safetensors")
    shutil.rmtree(target / "pretrained")
    for name in run.sample_names():
        tensors, summary = run._sample_set(name)
        write_tensors(target / f"samples-{name}.safetensors", {"x": tensors["x"][:1000], "y": tensors["y"][:1000], "strip": tensors["strip"]})
        write_json(target / f"samples-{name}.json", summary)
    if (run.path / "scores").exists():
        shutil.copytree(run.path / "scores", target / "scores", dirs_exist_ok=True)


def packed(folder, out):
    "One archive of a folder in pieces of 15 MiB: few files come back, none of them large. `cat back.tar.* | tar x`"
    archive = Path(shutil.make_archive(str(folder), "tar", folder))
    limit, data = 15 * 2**20, archive.read_bytes()
    out.mkdir(parents=True, exist_ok=True)
    for i in range(0, len(data), limit):
        (out / f"back.tar.{i // limit}").write_bytes(data[i:i + limit])
    archive.unlink()


def tuned(args):
    "The variant that `measure` found fastest for a WRN-28-4; where it hasn't run: plain PyTorch."
    if args.compile != "tuned":
        return args.compile
    file = Path(args.runs) / "runtime.tuned.json"
    choice = json.loads(file.read_text())["choice"] if file.exists() else {}
    return next((choice[k] for k in ("WRN-28-4, batch 128", "WRN-28-4, batch 256") if k in choice), "off")


def chosen(args):
    """The pilots' verdict: of the batch sizes and rates, the best by accuracy plus PGD accuracy; of the other changes, each that
    is more than a point better than the base."""
    file = Path(args.runs) / "pilots.json"
    if not file.exists():
        return {}
    scores = {p["name"]: p["accuracy"] + p["pgd10"] for p in json.loads(file.read_text())["pilots"] if "accuracy" in p and not p["recoveries"]}
    base = scores.get("batch 128, lr 0.1", 0)
    pace = max((name for name in scores if name.startswith("batch")), key=scores.get, default=None)
    out = dict(PILOTS[pace]) if pace else {}
    for name, score in scores.items():
        if not name.startswith("batch") and score > base + 0.01:
            out |= PILOTS[name]
    say("chosen by the pilots:", out)
    return out


def draw(run, args, guard):
    changes = dict(num_samples=40, batch_size=20, outer_steps=2, target_steps=2) if args.dry else dict(num_samples=args.samples, batch_size=500)
    for method in ROWS[run.config.system]:
        if time.perf_counter() > guard:
            say("no time to draw", run.config.system, method)
            return
        config = configure(GenerateConfig, run.config.system, "cifar10", "h100", method=method, run=str(run.path), compile=args.compile, device="cpu" if args.dry else "auto",
                           **(json.loads(args.draw_settings or "{}").get(method, {}) | changes))
        generate_samples(config, progress=False)
        say("drawn:", run.config.system, method)


def share_prior():
    "Fit the class Gaussians once: every system of a data set starts its chains from the same."
    fitted, fit = {}, hybrid.build_prior
    def build_prior(config, images, device="cpu"):
        key = (images.fingerprint, config.prior)
        if key not in fitted:
            fitted[key] = fit(config, images, "cuda" if torch.cuda.is_available() else "cpu")
        return fitted[key].to(device)
    hybrid.build_prior = pretrained.build_prior = build_prior


def all_systems(args):
    out, end = Path(args.out), BEGAN + args.seconds
    args.compile, args.chosen = tuned(args), chosen(args)
    share_prior()
    images = dry_images() if args.dry else load_images("cifar10")
    say("images:", images)
    todo = [s for s in args.systems if not (Path(args.runs) / f"{s}-s{args.seed}" / "model.safetensors").exists()]
    for s in args.systems:
        if s not in todo:
            say(s, "is there already")
    draw_each = 0.1 if args.dry else args.draw_seconds
    for i, system in enumerate(todo):
        config = settings(system, args)
        rows_left = sum(len(ROWS[s]) for s in todo[i:])
        left = end - time.perf_counter() - draw_each * rows_left - args.reserve
        budget = left / (len(todo) - i)
        budget -= 0 if args.dry else args.warmup_seconds
        if budget < (1 if args.dry else 20):
            say("no time for", system)
            break
        try:
            with executing(config, config.threads) as at:
                state, rows = train_for(config, images, at, budget, time.perf_counter() + 1.1 * budget + 2 * args.warmup_seconds)
                run = save_run(state, rows, config, images, at)
                say(f"{system}: trained {state.step} updates in {state.seconds:.1f} s, {len(state.events)} recoveries", {k: round(v, 3) for k, v in rows[-1].items()})
                del state
            if at.device.type == "cuda":
                torch.cuda.empty_cache()
            draw(run, args, end - args.reserve)
            bring_back(run, Path(args.runs) / "back")
            packed(Path(args.runs) / "back", out)
        except Exception:
            say("FAILED", system, traceback.format_exc()[-3000:])
    say("done")


def dry_images():
    "Some CIFAR-10 where it is, else noise: a dry run needs nothing."
    try:
        return load_images("cifar10", download=False)
    except ValueError:
        return replace(random_set(), name="cifar10", fingerprint="")


def judge(args):
    out = Path(args.out)
    args.compile = tuned(args)
    share_prior()
    first = None
    for system in args.systems:
        path = Path(args.runs) / f"{system}-s{args.seed}"
        if not (path / "model.safetensors").exists():
            say(system, "isn't there")
            continue
        try:
            if first is not None:                  # the same images for every run
                (path / "scores").mkdir(exist_ok=True)
                for name in ("held-out", "prior"):
                    if (first / "scores" / f"{name}.json").exists():
                        shutil.copy(first / "scores" / f"{name}.json", path / "scores")
            small = dict(num_robust=20, attack_steps=1) if args.dry else dict(num_robust=10_000)
            config = configure(EvaluateConfig, system, "cifar10", "h100", run=str(path), extractor=args.extractor, attack_eps=(0.0627,), by_class=False, batch_size=500 if not args.dry else 20,
                               splits=10 if not args.dry else 1, device="cpu" if args.dry else "auto", precision="float32" if args.dry else "bfloat16", compile="off" if args.dry else args.compile, **small)
            scores = evaluate_run(config, progress=False)
            say(system, json.dumps({k: {a: b for a, b in v.items() if isinstance(b, (float, dict)) and a != "diversity"} for k, v in scores.items()})[:1500])
            first = path
            bring_back(Run(path), Path(args.runs) / "back")
            packed(Path(args.runs) / "back", out)
        except Exception:
            say("FAILED", system, traceback.format_exc()[-3000:])
    say("judged")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["measure", "pilots", "all", "judge"])
    parser.add_argument("out")
    parser.add_argument("--seconds", type=float, default=110, help="wall-clock time for the stage, its start included")
    parser.add_argument("--runs", default="runs/gpu")
    parser.add_argument("--systems", nargs="+", default=SYSTEMS, choices=SYSTEMS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", default="tuned", help="as for train; tuned: what `measure` found fastest")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--draw-seconds", type=float, default=9, help="kept for each row of samples")
    parser.add_argument("--warmup-seconds", type=float, default=7, help="kept for each system's first updates")
    parser.add_argument("--reserve", type=float, default=10, help="kept for writing")
    parser.add_argument("--settings", help="JSON: fields of TrainConfig for all systems")
    parser.add_argument("--system-settings", help="JSON: fields of TrainConfig by system")
    parser.add_argument("--draw-settings", help="JSON: fields of GenerateConfig by method")
    parser.add_argument("--extractor", default="inception")
    parser.add_argument("--each", type=float, default=12, help="seconds of a pilot")
    parser.add_argument("--pilots", nargs="+", choices=PILOTS, help="these alone")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with a tiny network")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    {"measure": measure, "pilots": pilots, "all": all_systems, "judge": judge}[arguments.stage](arguments)
