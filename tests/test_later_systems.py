"""SADA-JEM, M-EBM, DAT and the fast Robust JEM, against formulas written out, and through the real loop."""

import copy
import shutil

import pandas as pd
import pytest
import torch
from conftest import executed_here
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from robust_jem.app.plan import notebook_path
from robust_jem.bench.compute import budget_of, spent, trainings, update_flops
from robust_jem.core.config import merged
from robust_jem.core.errors import InputError
from robust_jem.core.images import load_images
from robust_jem.ebm.energy import batch_norms
from robust_jem.ebm.growth import GrowingLength
from robust_jem.engine.runs import Run
from robust_jem.engine.runtime import as_written
from robust_jem.engine.train import train
from robust_jem.systems.base import Batch, Step, TrainConfig
from robust_jem.systems.catalog import SYSTEMS, configure, system_class
from robust_jem.systems.hybrid import Hybrid

LATER = ("sada_jem", "m_ebm", "l2_robust_classifier", "dat", "robust_jem_fast")
DIES_AT = 26  # an update in the middle of the second epoch, and of a window of the growing chains
SMALL = dict(
    attack=dict(steps=2),
    chain=dict(outer_steps=3, growth_window=96),
    replay=dict(size=128),
    optimizer=dict(batch_size=64, lr=0.01),
    schedule=dict(updates=30, epochs=2, warmup_steps=0),
    log_every=4,
    threads=1,
    device="cpu",
    precision="float32",
    checkpoint_minutes=0.001,
)


def settings(system, out, **changes):
    source = dict(source="source") if SYSTEMS[system].source_system else {}
    return configure(TrainConfig, system, out=str(out), **merged(SMALL, source, changes))


@pytest.fixture
def source(made_once, here):
    "A finished classifier in the folder `source`: the network of all, a stride of attacks behind it."
    def make(folder):
        train(settings("robust_classifier", folder / "run"), progress=False)
    made = made_once("first-stage", make)
    return Run(shutil.copytree(made / "run", here / "source"))


def in_training(system, **changes):
    "A system that is about to train, and its surroundings."
    config = settings(system, "out", **changes)
    generators = {name: torch.Generator().manual_seed(3) for name in ("noise", "choices")}
    made = Hybrid(config, load_images("digits"), as_written("cpu"), generators["noise"])
    step = Step(made.optimizers(), generators, made.runtime.world)
    step.begin(0, 0.01)
    return made, step


def a_batch(n=64):
    images = load_images("digits")
    return Batch(images.train_x[:n], images.train_y[:n])


# The losses and the steps, written out


def test_sam_is_the_two_pass_formula():
    system, step = in_training("sada_jem", objective=dict(sharpness=0.3), chain=dict(outer_steps=0))
    start = copy.deepcopy(system.network).double().train()
    images = []
    hot = system.hot_paths(step)
    loss = hot.loss
    hot.loss = lambda y, *x, energies=None: images.append((y, x)) or loss(y, *x, energies=energies)
    system.update(a_batch(), step)
    (y, (clean, _, real, sampled, *_)), again = images
    assert torch.equal(again[1][0], clean)

    def total(network):
        def log_p(x):
            return network(x.double()).logsumexp(1).mean()
        return F.cross_entropy(network(clean.double()), y) - log_p(real) + log_p(sampled)

    weights = list(start.parameters())
    g = torch.autograd.grad(total(start), weights)
    length = torch.stack([(w.detach().abs() * v).square().sum() for w, v in zip(weights, g)]).sum().sqrt()
    climbed = copy.deepcopy(start)
    with torch.no_grad():
        for w, v in zip(climbed.parameters(), g):
            w += 0.3 * w.square() * v / length
    worst = torch.autograd.grad(total(climbed), list(climbed.parameters()))
    decay = system.config.optimizer.weight_decay
    for w, v, now in zip(weights, worst, system.network.parameters()):
        expected = w - 0.01 * (v + decay * w)
        assert torch.allclose(now.double(), expected, atol=2e-5), (now.double() - expected).abs().max()


def test_sams_second_pass_leaves_the_running_statistics_of_the_first():
    with_sam, step = in_training("sada_jem", objective=dict(sharpness=0.3))
    without, other = in_training("sada_jem", objective=dict(sharpness=0.0))
    with_sam.update(a_batch(), step)
    without.update(a_batch(), other)
    pairs = list(zip(with_sam.statistics(), without.statistics()))
    assert len(pairs) > 10 and all(torch.equal(a, b) for a, b in pairs)


def test_sada_jem_sees_fewer_images_in_the_likelihood_and_none_of_them_augmented():
    system, step = in_training("sada_jem", augment=dict(pad=2, flip=True), replay=dict(batch_size=24))
    seen = []
    hot = system.hot_paths(step)
    loss = hot.loss
    hot.loss = lambda y, *x, energies=None: seen.append(x) or loss(y, *x, energies=energies)
    system.update(a_batch(), step)
    clean, adversarial, real, sampled, *labels = seen[0]
    assert len(clean) == 64 and len(real) == len(sampled) == 24 and adversarial is None and labels == [None, None]
    raw = a_batch().x[:24].float() / 127.5 - 1
    assert torch.allclose(real, raw) and not torch.allclose(clean[:24], raw, atol=0.2)


def test_m_ebms_penalty():
    system, step = in_training("m_ebm")
    x, z, y = torch.randn(5, 1, 8, 8).clamp(-1, 1), torch.randn(5, 1, 8, 8).clamp(-1, 1), torch.arange(5)
    system.network.eval()
    network = copy.deepcopy(system.network).double()
    loss, _ = system.hot_paths(step).loss(y, x, None, x, z)
    real, sampled = (network(v.double()).logsumexp(1) for v in (x, z))
    expected = F.cross_entropy(network(x.double()), y) - real.mean() + sampled.mean()
    expected += 0.5 * (real.square().mean() + sampled.square().mean())
    assert abs(loss.item() - expected.item()) < 1e-4


def test_dats_loss_and_negatives():
    system, step = in_training("dat", chain=dict(step_size=0.1))
    system.train_network()
    network = copy.deepcopy(system.network).double().eval()
    x, y = torch.rand(6, 1, 8, 8) * 2 - 1, torch.arange(6)
    system.growing.length = 3
    negatives = system.hot_paths(step).chain(x, y)
    z = x.double()
    for _ in range(3):
        z = z.requires_grad_()
        g, = torch.autograd.grad(network(z)[range(6), y].sum(), z)
        z = (z + 0.1 * g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).detach().clamp(-1, 1)
    assert torch.allclose(negatives.double(), z, atol=1e-4)
    system.growing.length = 0
    assert torch.equal(system.hot_paths(step).chain(x, y), x)

    loss, _ = system.hot_paths(step).loss(y, None, x, -x, negatives)
    real, sampled = network(-x.double()).logsumexp(1), network(negatives.double()).logsumexp(1)
    told_apart = F.binary_cross_entropy_with_logits(real, torch.ones_like(real))
    told_apart += F.binary_cross_entropy_with_logits(sampled, torch.zeros_like(sampled))
    assert abs(loss.item() - (F.cross_entropy(network(x.double()), y) + told_apart).item()) < 1e-4


def test_chains_that_have_grown_are_the_chains_of_that_length():
    growing, step = in_training("dat")
    whole, _ = in_training("dat", chain=dict(growth=0.0, outer_steps=3))
    x, y = torch.rand(6, 1, 8, 8) * 2 - 1, torch.arange(6)
    growing.growing.length = 3
    assert torch.equal(growing.hot_paths(step).chain(x, y), whole.hot_paths(step).chain(x, y))


def test_a_scripted_sequence_of_areas_grows_the_chain_as_dat_says():
    growing = GrowingLength(0.8, longest=2, window=4)
    outcome = []
    for wrong in (0, 3, 4, 0, 0):               # of 16 pairs: areas 1, 0.8125, 0.75, 1, 1
        real = torch.full((4,), 1.0)
        sampled = torch.zeros(4)
        if wrong:
            real[0] = -1.0
            sampled = torch.tensor([0.0] * wrong + [-2.0] * (4 - wrong))
        growing.observe(real, sampled)
        outcome.append((round(float(growing.area), 4), growing.length))
    assert outcome == [(1.0, 1), (0.8125, 2), (0.75, 2), (1.0, 2), (1.0, 2)]


# Through the loop


def test_frozen_statistics_stay_as_they_were_to_the_bit(source):
    run = Run(train(settings("dat", "out", schedule=dict(updates=8)), progress=False))
    before, after = source.system().network, run.system().network
    assert len(batch_norms(after)) > 5
    for a, b in zip(batch_norms(before), batch_norms(after)):
        assert torch.equal(a.running_mean, b.running_mean) and torch.equal(a.running_var, b.running_var)
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))


@pytest.mark.parametrize("system", LATER)
def test_killed_and_resumed_to_the_same_bits(system, source, killed_and_resumed):
    run, tensors = killed_and_resumed(lambda folder: settings(system, folder), system_class(system), DIES_AT)
    assert run.summary["recoveries"] == 0
    if run.config.chain.growth:
        steps = [row["chain_steps"] for row in run.metrics()]
        assert steps == sorted(steps) and any(key.endswith("growing.steps") for key in tensors)


def test_it_starts_from_the_sources_weights_and_refuses_others(source, here, refused):
    begun = Run(train(settings("dat", "begun", optimizer=dict(lr=0.0, ema_decay=0.0)), progress=False))
    for a, b in zip(source.system().network.parameters(), begun.system().network.parameters()):
        assert torch.equal(a, b)
    with pytest.raises(InputError, match="network.width is 1, here it is 2; give the source's network"):
        train(settings("dat", "wider", network=dict(width=2)), progress=False)
    refused("train", "--system", "dat", "--dataset", "digits", "--preset", "cpu",
            says="source: dat starts from a finished run of l2_robust_classifier; give its folder")


@pytest.mark.parametrize("growth", [0.2, 1.5])
def test_an_area_that_cannot_be(growth):
    with pytest.raises(InputError, match="growth"):
        settings("dat", "out", chain=dict(growth=growth))


# Equal compute


class Operations(TorchDispatchMode):
    "PyTorch's count of what runs: its own mode can't follow `autograd.grad` through modules."
    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("system", ["wide_resnet", "robust_classifier", "robust_jem", *LATER])
def test_operations_are_those_that_pytorch_counts(system):
    made, step = in_training(system)
    if made.growing is not None:
        made.growing.length = 2
    batch = a_batch()
    with Operations() as counted:
        made.update(batch, step)
    assert update_flops(made.config, (1, 8, 8), 10, 2 if made.growing is not None else None) == pytest.approx(
        counted.total, rel=0.01)


def test_a_budget_is_spent_and_shared(source, here):
    changes = merged(SMALL, dict(schedule=dict(updates=0)))
    budget = budget_of(1500, "digits", "cpu", (1, 8, 8), **changes)
    first, second = trainings("dat", "digits", "cpu", budget, (1, 8, 8), "runs", **changes)
    assert (first.system, second.system, second.source) == ("l2_robust_classifier", "dat", first.folder)
    for config in (first, second):
        train(config, progress=False)
    run = Run(second.folder)
    grown, total = [row["chain_steps"] for row in run.metrics()], spent(run)
    each = {steps: update_flops(second, (1, 8, 8), 10, steps) for steps in set(grown)}
    assert 0.5 * budget < total <= budget
    assert total == pytest.approx(
        first.schedule.updates * update_flops(first, (1, 8, 8)) + sum(4 * each[steps] for steps in grown), rel=0.05)
    with pytest.raises(InputError, match="less than one update of robust_jem"):
        trainings("robust_jem", "digits", "cpu", 1.0, (1, 8, 8), "runs", **changes)


@pytest.mark.filterwarnings("ignore:FD-digits of 120 images")
def test_the_study_runs_and_goes_on(runs, here):
    "The notebook on digits with a tiny budget; what is there is not made again, and an unknown parameter is refused."
    small = merged(SMALL, dict(schedule=dict(updates=0), optimizer=dict(batch_size=32), log_every=1))
    device = small.pop("device")
    asked = dict(worth=250, systems=["robust_classifier", "dat"], runs="study", figures="figures", num_samples=120,
                 looked_at=40, attacked=20, device=device, extractor=f"classifier:{runs / 'judge'}",
                 settings=small)
    executed_here(notebook_path("equal_compute"), asked)
    table = pd.read_csv("figures/table.csv").set_index("name")
    assert set(table.index) == {"robust_classifier", "dat"} and (table["PFLOP"] > 0).all()
    assert table.filter(like="FD").notna().all(axis=None) and table["PGD-20, l2 1"].between(0, 1).all()
    assert {p.name for p in (here / "figures").iterdir()} == {"table.csv", "curves.png", "trade.png"}
    trained = {p: p.stat().st_mtime_ns for p in (here / "study").rglob("model.safetensors")}
    assert len(trained) == 3                    # the first stage of DAT among them
    executed_here(notebook_path("equal_compute"), asked)
    assert trained == {p: p.stat().st_mtime_ns for p in (here / "study").rglob("model.safetensors")}
    assert pd.read_csv("figures/table.csv").set_index("name").equals(table)
    with pytest.raises(InputError, match="wrth: unknown parameter"):
        executed_here(notebook_path("equal_compute"), {"wrth": 1})


def test_settings_of_every_preset():
    "Every later system is built at its published size, with its published hyperparameters."
    paper = {name: configure(TrainConfig, name, "cifar10", "paper") for name in LATER}
    sada, dat = paper["sada_jem"], paper["dat"]
    assert (sada.objective.sharpness, sada.replay.batch_size, sada.optimizer.batch_size) == (2.0, 64, 128)
    assert sada.schedule.milestones == (60, 120, 180) and not sada.augment.likelihood and sada.augment.noise == 0
    assert paper["m_ebm"].objective.energy_penalty == 0.5 and paper["m_ebm"].chain.outer_steps == 5
    assert (dat.attack.norm, dat.attack.eps, dat.attack.steps, dat.attack.step_size) == ("l2", 1.0, 10, 0.2)
    assert (dat.chain.sampler, dat.chain.growth, dat.chain.outer_steps) == ("ascent", 0.8, 40)
    assert dat.network.frozen_statistics and dat.optimizer.kind == "nesterov" and dat.replay.reinit_prob == 1
    for preset in ("paper", "h100", "cifar10-cpu"):
        source = configure(TrainConfig, "l2_robust_classifier", "cifar10", preset).network
        second = configure(TrainConfig, "dat", "cifar10", preset).network
        assert (source.depth, source.width, source.norm) == (second.depth, second.width, second.norm)


def test_nesterov_is_pytorchs():
    system, step = in_training("dat", optimizer=dict(ema_decay=0.0))
    group = step.optimizers["network"].param_groups[0]
    assert isinstance(step.optimizers["network"], torch.optim.SGD) and group["nesterov"] and group["momentum"] == 0.9
    assert isinstance(system.network, nn.Module)
