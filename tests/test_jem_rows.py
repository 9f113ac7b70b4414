"""JEM, its factored form and IGEBM with the digits preset: what they are, and that their chains work."""

import dataclasses

import pytest
import torch

from robust_jem.core.files import read_tensors
from robust_jem.core.images import to_unit
from robust_jem.ebm.energy import energy
from robust_jem.engine.runs import Run
from robust_jem.engine.sample import generate_samples
from robust_jem.engine.train import train
from robust_jem.systems.catalog import GenerateConfig, TrainConfig, configure
from robust_jem.systems.hybrid_sampling import generate

ROWS = ("jem", "jem_factored", "igebm")
UPDATES = dict(jem=50, jem_factored=120, igebm=120)     # of the class-conditional rows each takes twice as long


@pytest.fixture(scope="module", params=["jem", *(pytest.param(row, marks=pytest.mark.long) for row in ROWS[1:])])
def run(request, made_once):
    "A training that is broken off early: its schedule is that of a whole one's beginning."

    def make(folder):
        schedule = dict(kind="constant", updates=UPDATES[request.param])
        train(configure(TrainConfig, request.param, schedule=schedule, device="cpu", out=str(folder)), progress=False)

    return Run(made_once(f"row-{request.param}", make))


@pytest.mark.parametrize("system", ROWS)
def test_the_preset_changes_numbers_not_the_system(system):
    "Uniform starts, Langevin steps with noise, no normalisation; published settings stay those of the catalog."
    digits, paper = (configure(TrainConfig, system, d, p) for d, p in (("digits", "cpu"), ("cifar10", "paper")))
    for c in (digits, paper):
        assert (c.replay.prior, c.chain.sampler, c.network.norm) == ("uniform", "sgld", "none")
        assert c.chain.noise_std > 0 and not c.objective.adversarial_weight and c.objective.likelihood_weight == 1
        assert c.objective.clean_weight == (system == "jem") and c.objective.conditional == (system != "jem")
    chain, replay, optimizer = paper.chain, paper.replay, paper.optimizer
    assert (optimizer.kind, optimizer.lr, chain.noise_std, chain.step_size) == ("adam", 1e-4, 0.01, 2.0)
    assert (replay.reinit_prob, replay.size, chain.bounds) == (0.05, 10_000, False)
    longest = (60, 1.0) if system == "igebm" else (20, 0.0)
    assert (chain.outer_steps, paper.objective.energy_penalty) == longest


def test_it_trains_without_a_recovery(run):
    rows = run.metrics()
    assert run.summary["recoveries"] == 0 and rows[-1]["step"] == UPDATES[run.config.system]
    assert max(abs(r["energy_gap"]) for r in rows[len(rows) // 2:]) < 5             # of the gap_limit of 50
    assert rows[-1]["sampled_std"] > 0.1


def test_the_buffer_leaves_the_noise_within_bounds(run):
    "Chains end between the black and the white that images have, and are no uniform noise any more."
    tensors, _ = read_tensors(run.checkpoints()[0])
    x = next(v for k, v in tensors.items() if k.endswith("replay_x")).float()
    real = to_unit(run.images().train_x)
    assert x.abs().max() <= 1
    mean_noise, mean_chain = ((real.mean(0) - other).abs().mean() for other in (torch.zeros(1, 8, 8), x.mean(0)))
    assert mean_chain < 0.7 * mean_noise


def test_chains_from_noise_go_down_to_the_energy_of_images(run):
    c, model, images = run.config, run.model(), run.images()
    how = configure(GenerateConfig, c.system)
    y = torch.arange(60) % 10
    generator = torch.Generator().manual_seed(0)
    states = {}
    generate(
        model, run.prior(), y, how, trained=c.chain, generator=generator, on_stage=states.__setitem__,
    )
    labels = y if c.objective.conditional else None
    with torch.no_grad():
        start, end = (energy(model, states[k], labels).mean() for k in ("prior", f"step {how.chain.outer_steps}"))
        real = energy(model, to_unit(images.train_x), images.train_y if c.objective.conditional else None).mean()
    assert end < start and end < real + 0.5 * (start - real)


def test_samples_stay_in_bounds_and_are_the_same_again(run):
    how = configure(GenerateConfig, run.config.system, run=str(run.path), device="cpu", num_samples=20, name="few")
    generate_samples(how, progress=False)
    x, y, summary = run.samples("few")
    assert summary["share_outside"] == 0 and x.float().std(0).mean() > 10
    generate_samples(dataclasses.replace(how, name="again"), progress=False)
    assert torch.equal(x, run.samples("again")[0]) and torch.equal(y, torch.arange(20) % 10)
