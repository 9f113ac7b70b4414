"""A system of another kind: one class, one entry of the catalog, and it is trained, killed, resumed and sampled."""

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from robust_jem.core.errors import InputError
from robust_jem.core.files import read_json
from robust_jem.core.images import to_unit
from robust_jem.engine.runs import Run
from robust_jem.engine.sample import generate_samples
from robust_jem.engine.train import train
from robust_jem.systems.base import System
from robust_jem.systems.catalog import SYSTEMS, Entry, GenerateConfig, TrainConfig, configure, register


class Gaussian(System):
    "Images are Gaussian: their mean and their covariance are learned in turns. It classifies nothing."

    capabilities = frozenset({"log_density", "normalised", "sample"})
    watched = {}

    def __init__(self, config, images, runtime, rng=None):
        super().__init__(config)
        self.shape, pixels = images.shape, math.prod(images.shape)
        self.mean, self.factor = nn.Parameter(torch.zeros(pixels)), nn.Parameter(torch.eye(pixels))
        self._optimizers = {
            "mean": torch.optim.SGD([self.mean], config.optimizer.lr, momentum=0.9),
            "covariance": torch.optim.Adam([self.factor], config.optimizer.lr),
        }

    def optimizers(self):
        return self._optimizers

    def update(self, batch, step):
        x = to_unit(batch.x)
        x = x + 0.1 * torch.randn(x.shape, generator=step.generators["noise"])
        loss = -self.log_density(x).mean()
        norm = step.optimize(("mean", "covariance")[step.number % 2], loss)
        return {"loss": loss.detach(), "gradient_norm": norm}

    def distribution(self):
        factor = self.factor.tril(-1) + self.factor.diag().abs().diag()
        return MultivariateNormal(self.mean, scale_tril=factor, validate_args=False)

    def log_density(self, x, y=None):
        return self.distribution().log_prob(x.flatten(1))

    @torch.no_grad()
    def sample(self, y, how, rng, on_stage=None):
        z = torch.randn(len(y), len(self.mean), generator=rng)
        return (self.mean + z @ self.distribution().scale_tril.T).view(-1, *self.shape)


ENTRY = Entry("Gaussian", "Gauss 1809", dict(optimizer=dict(lr=0.01)), ("energy",), Gaussian)
DIES_AT = 30  # an update in the middle of the second epoch, whose turn is the mean's


def settings(out, **changes):
    return configure(
        TrainConfig,
        "gaussian",
        schedule__epochs=3,
        schedule__warmup_steps=0,
        log_every=4,
        threads=1,
        device="cpu",
        precision="float32",
        checkpoint_minutes=0.001,
        out=str(out),
        **changes,
    )


@pytest.fixture
def gaussian():
    "The toy system, in the catalog for one test."
    register("gaussian", ENTRY)
    yield
    del SYSTEMS["gaussian"]


def test_it_is_killed_and_goes_on_to_the_same_bits(gaussian, killed_and_resumed):
    whole, checkpoint = killed_and_resumed(settings, Gaussian, DIES_AT, ENTRY)
    rows = whole.metrics()
    assert rows[-1]["step"] == 66 and rows[-1]["loss"] < rows[0]["loss"] - 10
    assert whole.summary["parameters"] == 64 + 64 * 64 and whole.summary["recoveries"] == 0
    kept = {"optimizer.mean.mean.momentum_buffer", "optimizer.covariance.factor.exp_avg", "system.factor"}
    assert kept <= checkpoint.keys()


def test_it_is_sampled_and_its_density_is_normalised(gaussian, here):
    run = Run(train(settings("run"), progress=False))
    made = [
        generate_samples(
            configure(GenerateConfig, "gaussian", run="run", num_samples=50, batch_size=20, device="cpu", name=name),
            progress=False,
        )
        for name in ("one", "two")
    ]
    assert [p.name for p in made] == run.sample_names() == ["one", "two"]
    (x, y, summary), (again, _, _) = run.samples("one"), run.samples("two")
    assert (
        torch.equal(x, again)
        and x.shape == (50, 1, 8, 8)
        and y[:11].tolist() == [*range(10), 0]
        and summary["batch_size"] == 20
    )
    stages, strip = run.strip("one")
    assert stages == ["sample"] and torch.equal(strip[0], x[:10])

    system = run.system()
    assert not system.training and "normalised" in system.capabilities and "logits" not in system.capabilities
    real, noise = to_unit(run.images().test_x[:100]), torch.rand(100, 1, 8, 8) * 2 - 1
    assert system.log_density(real).mean() > system.log_density(noise).mean()
    with pytest.raises(InputError, match="Gaussian, has no logits"):
        system(real)
    with pytest.raises(InputError, match="accepted: a system that classifies"):
        run.model()


def test_it_is_evaluated_and_reported(gaussian, here, cli):
    "Its row has what it is capable of; the report says why the rest is empty."
    short = dict(network=dict(width=1), schedule=dict(epochs=1), device="cpu", out="judge")
    judge = train(configure(TrainConfig, "wide_resnet", **short), progress=False)
    train(settings("runs/gauss"), progress=False)
    how = dict(run="runs/gauss", num_samples=50, batch_size=20, device="cpu", name="energy")
    generate_samples(configure(GenerateConfig, "gaussian", **how), progress=False)
    how = ["--extractor", f"classifier:{judge}", "--suite", "full", "--device", "cpu"]
    evaluated = cli("evaluate", "runs/gauss", *how)
    assert evaluated.code == 0, evaluated.err
    assert Run("runs/gauss").scores().keys() == {"density", "energy", "held-out"}

    card = Path("runs/gauss/suite/MODEL_CARD.md").read_text(encoding="utf-8")
    assert "> A system that is capable of: log_density, normalised, sample." in card and "WRN" not in card
    assert "| Gaussian | energy | 50 |" in card and "classif" not in card.split("## Use it for")[0]

    result = cli("report", "--runs", "runs")
    assert result.code == 0 and "| Gaussian |" in result.out, result
    notes = result.out.split("Ours:")[1]
    assert "preset cpu; 3 epochs; training seeds [0]" in notes
    assert not any(other in notes for other in ("WRN", "attacks while training", "averaged"))
    assert "Gaussian, energy: 50 samples in batches of 20, sampling seed 0.\n" in notes
    row = next(r for r in read_json(Path("runs/figures/table1.json"))["rows"] if r["model"] == "Gaussian")
    stored = Run("runs/gauss").scores()["energy"]
    assert row["runs"] == 1 and row["n"] == 50 and row["FD-digits"]["mean"] == stored["FD-digits"]
    assert "accuracy" not in row and not any(k.startswith("PGD") for k in row)
    found = Path("runs/figures/found.md").read_text(encoding="utf-8")
    assert "| Gaussian | accuracy | Gaussian doesn't classify |" in found
    assert "| Gaussian starts from no prior |" in found
    results = pd.read_csv("runs/figures/results.csv", keep_default_na=False)
    assert set(results["system"]) == {"gaussian"} and set(results["sample_set"]) == {"", "energy", "held-out"}
    bits = results[results["sample_set"] == ""].set_index("metric")["value"]
    assert 0 < bits["bits/dim"] and 0 < bits["bits/dim, GMM"] and len(bits) == 2
    assert not Path("runs/figures/robustness.png").exists() and Path("runs/figures/curves.png").exists()


def test_a_turn_that_diverges_is_taken_back(gaussian, here, monkeypatch):
    update, poisoned = Gaussian.update, []

    def poison(self, batch, step):
        if step.number == 25 and not poisoned:
            poisoned.append(1)
            with torch.no_grad():
                self.mean[0] = float("nan")
        return update(self, batch, step)

    monkeypatch.setattr(Gaussian, "update", poison)
    with pytest.warns(UserWarning, match=r"recovery 1 of 3: back to update 22, optimizer\.lr 0\.005$"):
        run = Run(train(settings("run", recovery__snapshot_every=5), progress=False))
    (event,) = run.summary["events"]
    assert event["settings"] == {"optimizer.lr": 0.005} and event["back_to"] == 22
    assert all(v.isfinite().all() for v in run.system().state_dict().values())


def test_a_name_is_taken_once(gaussian):
    register("gaussian", ENTRY)  # the same again changes nothing
    with pytest.raises(InputError, match="'robust_jem' is in the catalog already"):
        register("robust_jem", ENTRY)
