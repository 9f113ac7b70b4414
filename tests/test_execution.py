"""Precision, compilation, memory and time limits: what they may change, and what not."""

import copy
import os
import platform
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from robust_jem.bench import benchmark
from robust_jem.core.errors import InputError
from robust_jem.core.files import read_json, write_json
from robust_jem.core.images import load_images, to_unit
from robust_jem.ebm.attacks import pgd
from robust_jem.ebm.energy import input_gradient, marginal_energy, score_of, untouched
from robust_jem.ebm.samplers import proximal_sgld
from robust_jem.engine import runtime, sample
from robust_jem.engine.runs import Run
from robust_jem.engine.runtime import Accelerated, at_a_size_that_fits, choose_policy, resolve_device
from robust_jem.engine.train import train
from robust_jem.judge.robustness import accuracy, robust_accuracy
from robust_jem.networks.wide_resnet import WideResNet
from robust_jem.report.card import write_pretrained
from robust_jem.systems.catalog import GenerateConfig, TrainConfig, configure

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    return load_images("digits")


@pytest.fixture
def trained(session_runs):
    "A Robust JEM after two epochs, in float32."
    return Run(session_runs / "robust_jem")


def gradients(network, x, precision, statistics):
    fast, exact = choose_policy(CPU, precision).accelerate(copy.deepcopy(network)), copy.deepcopy(network).double()

    def value(logits):
        return -marginal_energy(logits)

    with untouched(fast, statistics):
        a = input_gradient(fast, x, value)
    with untouched(exact, statistics):
        b = input_gradient(exact, x.double(), value)
    return a.double(), b


# What each precision reaches, with room for other machines; bfloat16 stays below 0.999 where batch norm uses the batch.
BOUNDS = {
    ("float32", "running"): 0.99999,
    ("float32", "batch"): 0.9999,
    ("float16", "running"): 0.9995,
    ("float16", "batch"): 0.995,
    ("bfloat16", "running"): 0.995,
    ("bfloat16", "batch"): 0.96,
}
TRAINED = {("bfloat16", "running"): 0.999, ("bfloat16", "batch"): 0.995, ("float16", "batch"): 0.999}


@pytest.mark.parametrize("precision, statistics", BOUNDS)
def test_fast_gradient_points_where_float64_does(digits, trained, precision, statistics):
    x = to_unit(digits.test_x[:64])
    torch.manual_seed(0)
    for network, bounds in ((WideResNet(10, 1, in_channels=1), BOUNDS), (trained.model(), BOUNDS | TRAINED)):
        a, b = gradients(network, x, precision, statistics)
        assert F.cosine_similarity(a.flatten(), b.flatten(), 0) >= bounds[precision, statistics]
        assert 0.98 < a.norm() / b.norm() < 1.02  # float16's inner scale is taken out again


@pytest.mark.parametrize("precision", ("float32", "bfloat16", "float16"))
def test_accelerated_network_is_a_classifier_like_any_other(digits, precision):
    torch.manual_seed(0)
    network, x = WideResNet(10, 1, in_channels=1), to_unit(digits.test_x[:8])
    fast, before = choose_policy(CPU, precision).accelerate(network), copy.deepcopy(network.state_dict())
    y = torch.arange(8)
    adv = pgd(fast, x, y, 0.1, 3, generator=torch.Generator().manual_seed(0))
    chain = proximal_sgld(score_of(fast), x, 3, 5, 0.04)
    assert adv.dtype == chain.dtype == torch.float32 and (adv - x).abs().max() <= 0.1 + 1e-6
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items()) and all(
        p.requires_grad and p.grad is None for p in network.parameters()
    )
    F.cross_entropy(fast.for_update(x), y).backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in network.parameters()
    )


def test_network_without_a_stem_runs_under_a_policy():
    import torchvision

    network, x = torchvision.models.resnet18(num_classes=10), torch.rand(4, 3, 32, 32) * 2 - 1
    fast = choose_policy(CPU, "bfloat16").accelerate(network)
    assert fast(x).dtype == torch.float32 and proximal_sgld(score_of(fast), x, 1, 5, 0.1).shape == x.shape


class Shallow(nn.Module):
    "A stem and a trunk as a Wide-ResNet has them, compiled in seconds."

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.trunk = nn.Sequential(
            nn.BatchNorm2d(8),
            nn.LeakyReLU(0.2),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 10),
        )

    def forward(self, x):
        return self.trunk(self.stem(x))


@pytest.mark.parametrize(
    "make, norm",
    (
        (Shallow, "trunk.0"),
        pytest.param(lambda: WideResNet(10, 1, in_channels=1), "trunk.0.residual.0", marks=pytest.mark.long),
    ),
    ids=("shallow", "Wide-ResNet"),
)
def test_compiled_network_computes_the_same(digits, make, norm):
    "On the CPU; on a GPU the same code is compiled."
    torch.manual_seed(0)
    network, x = make(), to_unit(digits.test_x[:16])
    eager, compiled = (choose_policy(CPU, "float32", c).accelerate(network) for c in ("off", "default"))
    for statistics in ("running", "batch"):
        with untouched(eager, statistics), untouched(compiled, statistics):
            a, b = (input_gradient(f, x, marginal_energy) for f in (eager, compiled))
        assert torch.allclose(a, b, atol=1e-5 * a.abs().max().item(), rtol=1e-3)
    grads = []
    for f in (eager, compiled):
        network.zero_grad()
        copied = copy.deepcopy(network.state_dict())
        F.cross_entropy(f.for_update(x), digits.test_y[:16]).backward()
        grads.append(torch.cat([p.grad.flatten().clone() for p in network.parameters()]))
        after = copy.deepcopy(network.state_dict())
        network.load_state_dict(copied)
    assert torch.allclose(*grads, atol=1e-5 * grads[0].abs().max().item(), rtol=1e-3)
    assert not torch.equal(
        after[f"{norm}.running_mean"], copied[f"{norm}.running_mean"]
    )  # the compiled pass moves the averages too


@pytest.mark.parametrize("device, precision, compile", (("cpu", "float32", "off"), ("cpu", "bfloat16", "default")))
def test_policy_is_recorded(here, device, precision, compile, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **kw: f)  # what is recorded doesn't need the compiler
    config = configure(
        TrainConfig,
        "jempp",
        dataset="digits@0-1",
        schedule__epochs=1,
        chain__outer_steps=1,
        replay__size=144,
        optimizer__batch_size=144,
        precision=precision,
        compile=compile,
        device=device,
        out="run",
    )
    summary = Run(train(config, progress=False)).summary
    assert summary["precision"] == precision and summary["compile"] == compile


@pytest.mark.parametrize(
    "float32, bfloat16, precision", ((2.0, 1.0, "bfloat16"), (1.0, 1.0, "float32"), (1.0, 2.0, "float32"))
)
def test_auto_follows_the_device(monkeypatch, float32, bfloat16, precision):
    seconds = {torch.float32: float32, torch.bfloat16: bfloat16}
    monkeypatch.setattr(runtime, "_convolution_seconds", seconds.__getitem__)
    assert choose_policy(CPU).precision == precision and choose_policy(CPU).compile == "off"


@pytest.mark.parametrize("fits", (True, False))
def test_auto_compiles_on_a_gpu_as_it_was_tuned(here, monkeypatch, fits):
    "With the file of this GPU by its choice, else fused where that fits the network; on a CPU never."
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setattr(runtime, "can_fuse", lambda model, device: None if fits else "it knows others only")
    monkeypatch.setattr(torch, "compile", lambda f, **kw: f)
    policy, network = choose_policy(torch.device("cuda"), "float32"), WideResNet(10, 1)
    guess = "fused" if fits else "default"
    assert policy.compile == "auto" and policy.settled(network, "10-1/8").compile == guess

    choice = {"10-1/8": "off", "10-1/16": "reduce-overhead", "10-1/32": "fused", "10-1/64": "fast"}
    write_json(Path("runtime.tuned.json"), {"device": "a GPU", "torch": torch.__version__, "choice": choice})
    for name, chosen in (("10-1/8", "off"), ("10-1/16", "reduce-overhead"), ("10-1/32", guess), (None, guess)):
        at = runtime.Execution(runtime.World(), torch.device("cuda"), policy, runtime.Deadline(0))
        assert at.accelerate(network, name).policy.compile == at.policy.compile == chosen
        assert at.records == (chosen == "fused")
    with pytest.raises(InputError, match=r"runtime.tuned.json: 'fast' for 10-1/64 is not accepted; accepted: off, "):
        policy.settled(network, "10-1/64")
    assert choose_policy(CPU, "float32").settled(network, "10-1/16").compile == "off"
    assert choose_policy(torch.device("cuda"), "float32", "default").settled(network, "10-1/8").compile == "default"

    write_json(Path("runtime.tuned.json"), {"device": "another GPU", "choice": choice})
    assert policy.settled(network, "10-1/8").compile == guess


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="ONEDNN_MAX_CPU_ISA limits x86 processors only"
)
def test_processor_without_bfloat16_is_asked_at_little_cost():
    "oneDNN imitates such a processor, whatever this one claims to have."
    ask = "\n".join(
        [
            "import time, torch",
            "from robust_jem.engine.runtime import fast_bfloat16",
            "began = time.perf_counter()",
            "print(fast_bfloat16(torch.device('cpu')), time.perf_counter() - began)",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", ask],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    fast, took = done.stdout.split()
    assert fast == "False" and float(took) < 2  # a tenth of a second on an idle core


@pytest.mark.parametrize("fast", (True, False))
def test_benchmark_says_that_it_leaves_bfloat16_out(monkeypatch, fast):
    monkeypatch.setattr(benchmark, "fast_bfloat16", lambda device: fast)
    monkeypatch.setattr(benchmark, "peak_rate", lambda device, dtype: 1e12)
    rates = benchmark.peak_rates(CPU)
    assert set(rates) == ({"float32", "bfloat16"} if fast else {"float32"})
    out = {
        "network": "net",
        "parameters": 1,
        "gflop an image": {"forward": 1},
        "device": "a CPU",
        "torch": "2",
        "commit": "c",
        "config": {"repeats": 1},
        "peak tflops": rates,
        "tables": {},
    }
    assert ("bfloat16 isn't measured" in benchmark.markdown(out)) == (not fast)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts Linux's page faults")
def test_freed_memory_serves_again():
    count = """
import resource, torch
from robust_jem.engine.runtime import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
keep_freed_memory()
faults()
faults()
print(given_back, faults())
"""
    done = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    given_back, kept = map(int, done.stdout.split())
    assert kept * 3 < given_back  # a small block in the wrong place can cost one array of the four, not all


def test_threads_are_at_most_one_a_core(runs, cli):
    "A run may have been trained on a larger machine than the one that samples or measures it."
    run = runs / "robust_jem"
    write_json(run / "config.json", read_json(run / "config.json") | {"threads": 4096})
    for given, used in ((0, os.cpu_count()), (1, 1)):
        assert (
            cli(
                "generate",
                run,
                "--num-samples",
                10,
                "--chain.outer-steps",
                1,
                "--name",
                f"t{given}",
                "--threads",
                given,
                "--device",
                "cpu",
            ).code
            == 0
        )
        assert read_json(run / f"samples/t{given}/summary.json")["device"].endswith(
            f"CPU, {used} thread{'s' * (used > 1)}"
        )


def test_progress_moves_within_a_batch(runs, monkeypatch):
    "On a large network one batch takes half an hour: each gradient of it counts, and a batch's surplus doesn't."
    shown = []

    class Recorded(tqdm):
        def update(self, n=1):
            assert n >= 0
            super().update(n)
            shown.append(self.n)

    monkeypatch.setattr(sample, "progress_bar", Recorded)

    def draw(method, **kw):
        sample.generate_samples(
            configure(
                GenerateConfig,
                "robust_jem",
                run=str(runs / "robust_jem"),
                method=method,
                name=method + "-shown",
                batch_size=10,
                attack__steps=2,
                device="cpu",
                **kw,
            )
        )

    draw("combined", num_samples=15, chain__outer_steps=3)
    assert shown == [
        0,
        4,
        4,
        6,
        8,
        10,
        10,
        10,
        14,
        14,
        15,
        15,
        15,
        15,
    ]  # prior, attack (2 of 5), contrast, three steps, the batch
    shown.clear()
    draw("attack", num_samples=10)
    assert shown == [0, 10, 10]


@pytest.mark.parametrize(
    "change, says",
    (
        ({"precision": "float8"}, "precision: 'float8' is not accepted; accepted: auto, float32, bfloat16, float16"),
        ({"compile": "fast"}, "compile: 'fast' is not accepted"),
        ({"max_minutes": -1}, "max_minutes: -1.0 is outside 0..∞"),
    ),
)
def test_execution_options_are_checked(change, says):
    with pytest.raises(InputError) as e:
        configure(TrainConfig, "jempp", **change)
    assert says in str(e.value)


def out_of_memory_above(limit, forward):
    def call(self, x):
        if len(x) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")
        return forward(self, x)

    return call


def test_scores_do_not_depend_on_the_memory(digits, trained, monkeypatch):
    network, x, y = trained.model(), digits.test_x[:200], digits.test_y[:200]
    whole = accuracy(network, x, y, 200), robust_accuracy(network, x, y, 0.2, steps=3, batch_size=50, seed=3)
    monkeypatch.setattr(WideResNet, "forward", out_of_memory_above(60, WideResNet.forward))
    with pytest.warns(UserWarning, match="going on with batches of 50"):
        assert (
            accuracy(network, x, y, 200),
            robust_accuracy(network, x, y, 0.2, steps=3, batch_size=200, seed=3),
        ) == whole
    assert not network.training


def test_samples_shrink_their_batch_and_say_so(runs, monkeypatch, cli):
    monkeypatch.setattr(Accelerated, "forward", out_of_memory_above(12, Accelerated.forward))
    with pytest.warns(UserWarning, match="going on with batches of 10"):
        assert (
            cli(
                "generate",
                runs / "robust_jem",
                "--num-samples",
                30,
                "--batch-size",
                20,
                "--chain.outer-steps",
                1,
                "--device",
                "cpu",
                "--name",
                "small",
            ).code
            == 0
        )
    x, y, summary = Run(runs / "robust_jem").samples("small")
    assert len(x) == 30 and summary["batch_size"] == 10 and summary["config"]["batch_size"] == 20


def test_not_even_one_image_fits_is_one_line():
    def work(size):
        raise MemoryError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputError, match="not even one image fits"):
            at_a_size_that_fits(work, 8)


def test_other_errors_are_not_taken_for_memory():
    def work(size):
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        at_a_size_that_fits(work, 8)


def slow_down(monkeypatch, network, seconds):
    "Let every pass of a kind of network take some seconds more."
    forward = network.forward

    def slowly(self, x):
        time.sleep(seconds)
        return forward(self, x)

    monkeypatch.setattr(network, "forward", slowly)


def test_time_limit_of_generation_goes_on_to_the_same_samples(runs, cli, monkeypatch):
    options = ["--num-samples", 60, "--batch-size", 10, "--chain.outer-steps", 2, "--device", "cpu"]
    assert cli("generate", runs / "robust_jem", *options, "--name", "whole").code == 0
    slow_down(monkeypatch, Accelerated, 0.1)                # slow enough to be stopped
    codes = []
    while not codes or codes[-1]:
        result = cli("generate", runs / "robust_jem", *options, "--name", "pieces", "--max-minutes", 0.015)
        codes.append(result.code)
        assert (
            result.code == 0
            or result.code == 3
            and "the same command goes on from there" in result.err
            and len(codes) < 20
        )
    assert len(codes) > 1
    a, b = (Run(runs / "robust_jem").samples(n) for n in ("whole", "pieces"))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2]["share_outside"] == b[2]["share_outside"]
    assert sorted(p.name for p in (runs / "robust_jem/samples/pieces").iterdir()) == [
        "images.safetensors",
        "summary.json",
    ]


def test_time_limit_of_evaluation_goes_on_to_the_same_scores(runs, cli, monkeypatch):
    options = [
        "--extractor",
        f"classifier:{runs / 'judge'}",
        "--attack-steps",
        2,
        "--attack-eps",
        "0.1",
        "0.2",
        "0.3",
        "--device",
        "cpu",
    ]
    assert cli("evaluate", runs / "robust_jem", *options).code == 0
    run = Run(runs / "robust_jem")
    whole = run.scores()
    for file in (run.path / "scores").iterdir():
        file.unlink()
    slow_down(monkeypatch, WideResNet, 0.15)
    codes = []
    while not codes or codes[-1]:
        codes.append(cli("evaluate", runs / "robust_jem", *options, "--max-minutes", 0.02).code)
        assert codes[-1] in (0, 3) and len(codes) < 20
    assert len(codes) > 1
    classification = run.path / "scores/classification.json"
    finished = classification.read_bytes()
    write_json(
        classification, {k: v for k, v in read_json(classification).items() if k != "accuracy"}
    )  # what an interrupted one leaves
    with pytest.raises(InputError, match="classification.json: isn't finished"):
        write_pretrained(run.path, "card")
    assert not Path("card").exists()
    classification.write_bytes(finished)

    def same(scores):
        "But for the time that they took."
        return {n: {k: v for k, v in part.items() if k not in ("seconds", "finished")} for n, part in scores.items()}

    assert same(run.scores()) == same(whole)


def test_time_limit_of_training_has_its_own_exit_code(here, cli):
    options = [
        "--system",
        "jempp",
        "--schedule.epochs",
        40,
        "--chain.outer-steps",
        2,
        "--replay.size",
        100,
        "--threads",
        1,
        "--device",
        "cpu",
        "--out",
        "run",
    ]
    began = time.monotonic()
    result = cli("train", *options, "--max-minutes", 0.05)
    assert (
        result.code == 3
        and time.monotonic() - began < 60
        and "stopped at update" in result.err
        and not Run("run").trained
    )
    before = Run("run").metrics()
    assert cli("train", *options, "--max-minutes", 0.05).code == 3 and Run("run").metrics()[: len(before)] == before


def test_absent_device_names_what_is_accepted():
    with pytest.raises(InputError, match="accepted: auto, cpu, cuda, cuda:N"):
        resolve_device("tpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("compile", ("off", "default", "reduce-overhead"))
def test_training_and_sampling_on_a_gpu(here, cli, compile):
    options = [
        "--system",
        "robust_jem",
        "--schedule.epochs",
        2,
        "--chain.outer-steps",
        2,
        "--attack.steps",
        2,
        "--device",
        "cuda",
        "--compile",
        compile,
        "--out",
        "run",
    ]
    assert cli("train", *options).code == 0
    assert cli("generate", "run", "--chain.outer-steps", 2, "--compile", compile).code == 0
    rows = Run("run").metrics()
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("optimizer", ("sgd", "adam"))
def test_training_on_a_gpu_goes_on_from_its_checkpoint(here, cli, optimizer):
    "Fused optimizers insist on the layout of what they are given."
    options = [
        "--system",
        "robust_jem",
        "--schedule.epochs",
        20,
        "--chain.outer-steps",
        2,
        "--attack.steps",
        2,
        "--device",
        "cuda",
        "--optimizer.kind",
        optimizer,
        "--optimizer.lr",
        0.01,
        "--out",
        "run",
    ]
    assert cli("train", *options, "--max-minutes", 0.3).code == 3
    step = Run("run").metrics()[-1]["step"]
    assert cli("train", *options, "--max-minutes", 0.3).code in (0, 3) and Run("run").metrics()[-1]["step"] > step
