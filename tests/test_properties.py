"""Properties that hold for any argument."""
import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robust_jem.app.replicate import ReplicateConfig
from robust_jem.core.config import folded, unfolded
from robust_jem.core.errors import InputError
from robust_jem.core.images import Batches, augment, to_uint8, to_unit
from robust_jem.core.inputs import trusted_inputs
from robust_jem.ebm.attacks import pgd
from robust_jem.ebm.energy import conditional_density, joint_energy, marginal_energy, predict, rank, score_of
from robust_jem.ebm.priors import GaussianMixturePrior
from robust_jem.ebm.replay import ReplayBuffer
from robust_jem.ebm.samplers import proximal_sgld, sgld
from robust_jem.judge.robustness import accuracy, autoattack_accuracy, robust_accuracy
from robust_jem.report.tables import ReportConfig
from robust_jem.systems.catalog import PRESETS, SYSTEMS, EvaluateConfig, GenerateConfig, TrainConfig, configure
from robust_jem.systems.hybrid_settings import HybridConfig

modest = settings(max_examples=30, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32)
norms = st.sampled_from(("linf", "l2"))

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(4 * 25, 3)).eval()


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


# Images

@modest
@given(seed=seeds, spread=st.floats(0, 5))
def test_quantising_twice_is_quantising_once(seed, spread):
    x = spread * normal(2, 3, 4, 4, seed=seed)
    once = to_uint8(x)
    assert torch.equal(to_uint8(to_unit(once)), once)
    assert (to_unit(once) - x.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6    # the nearest of 256 levels


@modest
@given(seed=seeds, pad=st.integers(0, 4), flip=st.booleans())
def test_augmented_images_are_windows_of_the_padded_ones(seed, pad, flip):
    x = torch.arange(3 * 2 * 25.).view(3, 2, 5, 5)                           # every pixel can be told from every other
    out = augment(x, pad, flip, generator(seed))
    padded = nn.functional.pad(x, (pad,) * 4, mode="reflect") if pad else x
    for image, source in zip(out, padded):
        windows = source.unfold(1, 5, 1).unfold(2, 5, 1).flatten(1, 2).transpose(0, 1)       # every crop [places,C,5,5]
        assert any(torch.equal(image, w) or flip and torch.equal(image, w.flip(-1)) for w in windows)
    assert torch.equal(out, augment(x, pad, flip, generator(seed)))


@modest
@given(n=st.integers(1, 40), data=st.data(), seed=seeds)
def test_an_epoch_shows_each_image_at_most_once_with_its_label(n, data, seed):
    size = data.draw(st.integers(1, n))
    x = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1)
    batches = Batches(x, torch.arange(n), size, seed)
    epoch = list(batches.epoch(3))
    shown = torch.cat([y for _, y in epoch])
    assert len(epoch) == len(batches) == n // size and all(len(y) == size for _, y in epoch)
    assert len(shown.unique()) == len(shown) and torch.equal(torch.cat([b for b, _ in epoch]).flatten().long(), shown)


# Energies

@modest
@given(seed=seeds, classes=st.integers(1, 12), scale=st.floats(0, 50), shift=st.floats(-100, 100))
def test_shifting_the_logits_shifts_the_energies_and_nothing_else(seed, classes, scale, shift):
    logits = scale * normal(4, classes, seed=seed, dtype=torch.float64)
    y = torch.randint(classes, (4,), generator=generator(seed))
    assert torch.allclose(marginal_energy(logits + shift), marginal_energy(logits) - shift)
    assert torch.allclose(joint_energy(logits + shift, y), joint_energy(logits, y) - shift)
    assert torch.allclose(conditional_density(logits + shift), conditional_density(logits), atol=1e-9)
    assert (marginal_energy(logits) <= joint_energy(logits, y) + 1e-9).all()      # a sum of densities is at least each
    assert torch.equal(joint_energy(logits, rank(logits)[:, 0]), joint_energy(logits, predict(logits)))


# Attacks and samplers

@modest
@given(seed=seeds, eps=st.floats(0, 3), steps=st.integers(0, 4), relative=st.none() | st.floats(1e-3, 10),
       bounds=st.sampled_from(((-1, 1), (-0.5, 0.25))), spread=st.floats(0, 3),
       choices=st.fixed_dictionaries(dict(norm=norms, targeted=st.booleans(), random_start=st.booleans())))
def test_pgd_never_leaves_ball_or_bounds(seed, eps, steps, relative, bounds, spread, choices):
    x, y = spread * normal(3, 2, 5, 5, seed=seed), torch.tensor([0, 1, 2])
    step_size = None if relative is None else relative * eps or None
    with trusted_inputs():                                               # else they are refused where they lie outside
        adv = pgd(MODEL, x, y, eps, steps, step_size, bounds=bounds, generator=generator(seed), **choices)
    moved = (adv - x.clamp(*bounds)).flatten(1)                         # the ball is about the start within the bounds
    size = moved.abs().amax(1) if choices["norm"] == "linf" else moved.norm(dim=1)
    assert (size <= eps * (1 + 1e-5) + 1e-6).all() and adv.min() >= bounds[0] and adv.max() <= bounds[1]


CHAINS = {
    "pgd": lambda x, y, g: pgd(MODEL, x, y, 0.3, 2, generator=g),
    "pgd l2": lambda x, y, g: pgd(MODEL, x, y, 0.3, 2, norm="l2", generator=g),
    "sgld": lambda x, y, g: sgld(score_of(MODEL, y), x, 2, 0.1, noise_std=0.1, generator=g),
    "proximal_sgld": lambda x, y, g: proximal_sgld(score_of(MODEL, y), x, 2, 3, 0.1, noise_std=0.1, generator=g),
}


@pytest.mark.parametrize("chain", CHAINS)
@settings(modest, max_examples=10)
@given(seed=seeds)
def test_a_generator_decides_everything(chain, seed):
    x, y = normal(3, 2, 5, 5, seed=seed).clamp(-1, 1), torch.tensor([0, 1, 2])
    def run(s):
        torch.manual_seed(s)                                                 # the global state must not matter …
        return CHAINS[chain](x, y, generator(seed))
    assert torch.equal(run(0), run(1))
    before = torch.get_rng_state()
    CHAINS[chain](x, y, generator(seed))
    assert torch.equal(torch.get_rng_state(), before)                        # … nor move
    assert not torch.equal(run(0), CHAINS[chain](x, y, generator(seed + 1)))


@modest
@given(seed=seeds, factor=st.floats(1e-3, 4), classes=st.integers(1, 4), each=st.integers(2, 6))
def test_prior_samples_stay_within_bounds(seed, factor, classes, each):
    # fewer images than dimensions: the covariance is singular but for the jitter
    x = (factor * normal(classes * each, 2, 3, 3, seed=seed)).clamp(-1, 1)
    prior = GaussianMixturePrior.fit(x, torch.arange(classes).repeat(each), classes)
    y = torch.arange(20) % classes
    sample = prior.sample(y, generator(seed))
    assert sample.shape == (20, 2, 3, 3) and sample.isfinite().all() and sample.abs().max() <= 1
    assert torch.equal(sample, prior.sample(y, generator(seed)))
    labels = prior.sample_labels(50, generator(seed))
    assert 0 <= labels.min() and labels.max() < classes


@modest
@given(seed=seeds, capacity=st.integers(1, 20), data=st.data())
def test_stored_chains_come_back_and_keep_their_labels(seed, capacity, data):
    n, g = data.draw(st.integers(1, capacity)), generator(seed)
    prior = GaussianMixturePrior.fit(normal(8, 1, 2, 2, seed=seed).clamp(-1, 1), torch.arange(2).repeat(4), 2)
    buffer = ReplayBuffer(capacity, prior, reinit_prob=0.0, generator=g)
    labels = buffer.y.clone()
    x, index = buffer.draw(n, g)
    assert len(index.unique()) == n and torch.equal(x, buffer.x[index])       # different chains, none restarted
    buffer.store(index, torch.full_like(x, 0.5))
    assert (buffer.x[index] == 0.5).all() and (buffer.x == 0.5).flatten(1).all(1).sum() == n
    assert torch.equal(buffer.y, labels)


# Configurations

KINDS = (TrainConfig, GenerateConfig, EvaluateConfig, ReportConfig, ReplicateConfig)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dataset", ("digits", "cifar10", "any-folder"))
@pytest.mark.parametrize("kind", (TrainConfig, GenerateConfig, EvaluateConfig))
def test_every_configuration_survives_json(kind, dataset, preset, system):
    config = configure(kind, system, dataset, preset)
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


@modest
@given(values=st.fixed_dictionaries({}, optional=dict(
    seed=st.integers(0, 2**63 - 1),
    attack__eps=st.floats(0, 1e3),
    attack__step_size=st.none() | st.floats(1e-9, 10),
    network__norm=st.sampled_from(("batch", "group", "none")),
    augment__flip=st.booleans(),
    schedule__milestones=st.lists(st.integers(0, 10**6)).map(tuple),
    replay__reinit_prob=st.floats(0, 1),
    out=st.text().filter(str.isprintable),
    schedule__epochs=st.integers(0, 10**9))))
def test_any_accepted_configuration_survives_json(values):
    config = HybridConfig.from_dict(unfolded(values))
    assert HybridConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert all(folded(config)[k.replace("__", ".")] == v for k, v in values.items())


@pytest.mark.parametrize("kind", KINDS)
@modest
@given(name=st.text(min_size=1))
def test_an_unknown_field_is_named(kind, name):
    names = [f.name for f in dataclasses.fields(kind)]
    if name in names:
        return
    with pytest.raises(InputError) as e:
        kind.from_dict({name: 1})
    assert str(e.value).startswith(f"{name}: unknown field") and all(n in str(e.value) for n in names)


@pytest.mark.parametrize("kind", KINDS)
def test_no_field_takes_a_value_of_another_type(kind):
    for f in dataclasses.fields(kind):
        with pytest.raises(InputError) as e:
            kind.from_dict({f.name: object()})
        assert str(e.value).startswith(f.name + ":") and "accepted" in str(e.value)


def test_every_number_has_a_range_that_is_kept():
    for kind in KINDS:
        for f in dataclasses.fields(kind):
            low, high = (f.metadata.get(k) for k in ("low", "high"))
            if isinstance(f.default, (int, float)) and not isinstance(f.default, bool):
                assert low is not None, f"{kind.__name__}.{f.name} takes any number"
            for bad in ([low - 1] if low is not None else []) + ([high + 1] if high is not None else []):
                value = (bad,) if isinstance(f.default, tuple) else bad
                with pytest.raises(InputError, match=rf"^{f.name}: "):
                    kind.from_dict({f.name: value})


# Labels

@pytest.mark.parametrize("labels", ([0, 1, 3], [0, -1, 1]), ids=("above", "below"))
@pytest.mark.parametrize("targeted", (False, True))
def test_attack_refuses_labels_outside_the_classes(labels, targeted):
    with pytest.raises(InputError, match=r"labels: -?\d\.\.\d are outside 0\.\.(2|K-1)"):
        pgd(MODEL, torch.zeros(3, 2, 5, 5), torch.tensor(labels), 0.1, 1, targeted=targeted)


@pytest.mark.parametrize("field", ("eps", "step_size"))
@pytest.mark.parametrize("value", (float("nan"), -1.0))
def test_attack_refuses_a_radius_or_step_that_is_no_length(field, value):
    with pytest.raises(InputError, match=f"^{field}: "):
        pgd(MODEL, torch.zeros(1, 2, 5, 5), torch.tensor([0]), **{"eps": 0.1, "steps": 1, field: value})


# Networks that can't be attacked, or don't classify

class NoGradient(nn.Module):
    "Classifies as MODEL does, but the gradient is 0/0: the root's slope at 0 is infinite, times 0."
    def forward(self, x):
        return MODEL(x) + (0 * x).sqrt().sum((1, 2, 3))[:, None]


@pytest.mark.parametrize("norm", ("linf", "l2"))
def test_gradients_that_are_no_numbers_never_pass_for_robustness(norm):
    x = to_uint8(normal(6, 2, 5, 5, seed=0))
    y = predict(MODEL(to_unit(x)))
    assert accuracy(NoGradient(), x, y) == 1
    assert pgd(NoGradient(), to_unit(x), y, 0.1, 2, norm=norm).isnan().all()
    with pytest.raises(InputError, match="logits of attacked images aren't finite"):
        robust_accuracy(NoGradient(), x, y, 0.1, 2, norm)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_broken_logits_have_no_accuracy(value):
    "The largest of several NaN is the first: class 0 would always be right."
    module = nn.Module()
    module.forward = lambda x: MODEL(x) * value
    x, y = to_uint8(normal(6, 2, 5, 5, seed=0)), torch.zeros(6, dtype=torch.long)
    for measure in (accuracy, lambda *a: robust_accuracy(*a, 0.1, 2), lambda *a: autoattack_accuracy(*a, 0.1)):
        with pytest.raises(InputError, match="logits aren't finite"):
            measure(module, x, y)
