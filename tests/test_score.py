"""NCSN: its loss and its score against closed forms, annealed Langevin with a known score, and the loop around it."""

import copy
import resource
import time

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal
from torch.utils.flop_counter import FlopCounterMode

from robust_jem.core.config import merged
from robust_jem.core.errors import InputError
from robust_jem.core.images import Images, augment, to_uint8, to_unit
from robust_jem.engine.runs import Run
from robust_jem.engine.runtime import as_written
from robust_jem.engine.sample import generate_samples
from robust_jem.engine.train import train
from robust_jem.systems.base import Batch, GenerateConfig, Step, TrainConfig
from robust_jem.systems.catalog import build_system, configure
from robust_jem.systems.score import Ncsn, annealed_langevin, denoising_loss, dequantized

TINY = dict(network="dense", channels=16, stages=1, levels=5, sigma_max=2.0, sigma_min=0.02)
DIES_AT = 30  # an update in the middle of the second epoch


def settings(out, **changes):
    how = dict(
        schedule=dict(updates=0, epochs=3),
        optimizer=dict(batch_size=64, ema_decay=0.9),
        log_every=4,
        threads=1,
        device="cpu",
        precision="float32",
        checkpoint_minutes=0.001,
        score=TINY,
        out=str(out),
    )
    return configure(TrainConfig, "ncsn", **merged(how, changes))


def images_of(x):
    "A data set of these images, all of two classes."
    y = torch.arange(len(x)) % 2
    return Images("made", x, y, x, y, ("a", "b"))


def in_training(system, images, seed=0, **changes):
    "A system at its beginning, and its surroundings."
    config = configure(TrainConfig, system, seed=seed, device="cpu", precision="float32", **changes)
    generators = {name: torch.Generator().manual_seed(seed) for name in ("noise", "choices")}
    made = build_system(config, images, as_written("cpu"), generators["noise"])
    return made, Step(made.optimizers(), generators, made.runtime.world)


def test_the_loss_is_the_definition_in_float64():
    "½ λ(σ) E‖s(x̃) + (x̃ - x)/σ²‖² with λ = σ², a pixel: Song and Ermon 2019, eq. 5 and 6, in NumPy."
    rng = np.random.default_rng(0)
    x, z, a = rng.normal(size=(6, 2, 3, 3)), rng.normal(size=(6, 2, 3, 3)), rng.normal(size=(18, 18))
    sigma = np.array([2.0, 1.0, 0.5, 0.2, 0.1, 0.02])
    total = 0.0
    for one, noise, s in zip(x, z, sigma):
        noisy = one + s * noise
        error = (a @ noisy.ravel()).reshape(one.shape) + (noisy - one) / s**2
        total += 0.5 * s**2 * np.sum(error**2) / one.size

    def score(t):
        return (t.flatten(1) @ torch.tensor(a).T).view_as(t)

    ours = denoising_loss(score, torch.tensor(x), torch.tensor(sigma), torch.tensor(z))
    assert abs(float(ours) - total / len(x)) < 1e-10 * total
    single = denoising_loss(lambda t: score(t.double()).float(), *(torch.tensor(v).float() for v in (x, sigma, z)))
    assert abs(float(single) - total / len(x)) < 1e-4 * total


@pytest.mark.parametrize("form", [dict(scaled=False), dict(scaled=True), dict(scaled=False, sigma_data=0.6)])
@pytest.mark.parametrize("network", ["dense", "gated", "refinenet"])
def test_an_update_minimises_that_loss(network, form):
    "The metric of an update, again from its random numbers, by a float64 copy of the network."
    rng = torch.Generator().manual_seed(1)
    images = images_of(torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8, generator=rng))
    score = TINY | dict(network=network, stages=2, conditional=True) | form
    system, step = in_training("ncsn_conditional", images, score=score, augment__flip=True)
    net = copy.deepcopy(system.network).double()
    state = step.generators["noise"].get_state()
    step.begin(0, 1e-3)
    batch = Batch(images.train_x, images.train_y)
    row = system.update(batch, step)

    again = torch.Generator()
    again.set_state(state)
    x = dequantized(augment(to_unit(batch.x), 0, True, again), again)
    level = torch.randint(5, (8,), generator=again)
    z = torch.randn(x.shape, generator=again).double()
    sigmas = 2.0 * (0.02 / 2.0) ** (torch.arange(5).double() / 4)
    assert torch.allclose(system.sigmas.double(), sigmas, rtol=1e-6)
    sigma = system.sigmas.double()[level].view(-1, 1, 1, 1)
    noisy = x.double() + sigma * z
    weight, condition = sigma**2, 2 * level + batch.y
    with torch.no_grad():
        if "sigma_data" in form:                    # the denoiser of Karras et al. 2022, eq. 7, 8 and table 1
            both = sigma**2 + 0.36
            clean = 0.36 / both * noisy + sigma * 0.6 / both.sqrt() * net(noisy / both.sqrt(), condition)
            s = (clean - noisy) / sigma**2
            weight = both / (sigma * 0.6) ** 2 * sigma**4       # of the denoiser's error, as one of the score's
        elif form["scaled"]:
            s = net(noisy / (1 + sigma**2).sqrt(), condition) / sigma
        else:
            s = net(noisy, condition)
    expected = (0.5 * weight * (s + (noisy - x.double()) / sigma**2) ** 2).mean()
    assert abs(float(row["loss"]) - float(expected)) < 1e-4 * float(expected)


@pytest.mark.parametrize("form", [dict(scaled=True, sigma_data=0.0), dict(scaled=False, sigma_data=0.2)])
def test_the_learned_score_of_a_gaussian_is_the_closed_form(form):
    "Images are Gaussian, so with noise they are too: s(x) = -(Σ + σ²I)⁻¹(x - μ)."
    pixels = 4
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(pixels, pixels, generator=generator)).Q
    factor = rotation * torch.tensor([0.2, 0.16, 0.1, 0.06])
    mean = torch.tensor([0.1, -0.1, 0.05, 0.0])

    def draw(n):
        return (mean + torch.randn(n, pixels, generator=generator) @ factor.T).view(n, 1, 2, 2)

    score = dict(network="dense", channels=64, stages=1, levels=5, sigma_max=1.0, sigma_min=0.05,
                 dequantize=False) | form
    updates = 1400
    system, step = in_training("ncsn", images_of(to_uint8(draw(100))), score=score, optimizer__ema_decay=0.99)
    labels = torch.zeros(256, dtype=torch.int64)
    for number in range(updates):
        step.begin(number, 3e-3 * 0.5 * (1 + np.cos(np.pi * number / updates)))
        system.update(Batch(to_uint8(draw(256)), labels), step)
    system.load_weights(system.weights())
    covariance = (factor @ factor.T).double()
    for level, sigma in enumerate(system.sigmas.tolist()):
        x = draw(4000)
        x = x + sigma * torch.randn(x.shape, generator=generator)
        exact = -torch.linalg.solve(covariance + sigma**2 * torch.eye(pixels), (x.flatten(1) - mean).double().T).T
        with torch.no_grad():
            learned = system.score(torch.full((len(x),), level), x).flatten(1).double()
        error = float((learned - exact).norm() / exact.norm())
        print(f"σ {sigma:.3f}: relative error {error:.3f}")
        assert error < 0.05, (sigma, error)


def test_annealed_langevin_finds_a_mixture_with_its_weights():
    "Three Gaussians far apart, their exact score at each noise level: weights, means and covariances come out."
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    means = torch.tensor([[-4.0, 0.0], [4.0, 1.0], [0.0, 5.0]], dtype=torch.float64)
    covariances = torch.tensor(
        [[[0.30, 0.10], [0.10, 0.20]], [[0.2, 0.0], [0.0, 0.4]], [[0.3, -0.1], [-0.1, 0.3]]], dtype=torch.float64
    )
    sigmas = torch.logspace(1, -1, 20, dtype=torch.float64).tolist()

    def noisy(sigma):
        wide = covariances + sigma**2 * torch.eye(2, dtype=torch.float64)
        return MixtureSameFamily(Categorical(weights), MultivariateNormal(means, wide), validate_args=False)

    levels = [noisy(sigma) for sigma in sigmas]

    def score(level, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(levels[level].log_prob(x).sum(), x)[0]

    generator, seen = torch.Generator().manual_seed(0), []
    start = torch.rand(5000, 2, generator=generator, dtype=torch.float64) * 2 - 1
    x = annealed_langevin(score, start, sigmas, 100, 0.2, generator=generator, on_level=lambda i, x: seen.append(i))
    assert seen == list(range(20))
    mode = torch.cdist(x, means).argmin(1)
    share = torch.bincount(mode, minlength=3) / len(x)
    assert (share - weights).abs().max() < 0.03, share
    for k in range(3):
        mine = x[mode == k]
        wanted = covariances[k] + sigmas[-1] ** 2 * torch.eye(2)
        assert (mine.mean(0) - means[k]).abs().max() < 0.08
        assert (mine.T.cov() - wanted).abs().max() < 0.06, mine.T.cov()

    # Without a step, what is left is Tweedie's formula.
    clean = annealed_langevin(score, x, sigmas[:1], 0, 0.2, denoise=True)
    assert torch.allclose(clean, x + sigmas[0] ** 2 * score(0, x))


def test_it_is_killed_and_goes_on_to_the_same_bits(killed_and_resumed):
    whole, checkpoint = killed_and_resumed(settings, Ncsn, DIES_AT)
    assert {"system.average.n_averaged", "optimizer.network.network.first.weight.exp_avg"} <= checkpoint.keys()
    averaged = whole.system().network.first.weight
    assert torch.equal(averaged, checkpoint["system.average.module.first.weight"])


def test_a_training_that_diverges_is_taken_back(here, monkeypatch):
    update, poisoned = Ncsn.update, []

    def poison(self, batch, step):
        if step.number == 25 and not poisoned:
            poisoned.append(1)
            with torch.no_grad():
                self.network.first.weight[0] = float("nan")
        return update(self, batch, step)

    monkeypatch.setattr(Ncsn, "update", poison)
    with pytest.warns(UserWarning, match=r"recovery 1 of 3: back to update 22, optimizer\.lr 0\.0005$"):
        run = Run(train(settings("run", optimizer=dict(lr=1e-3), recovery=dict(snapshot_every=5)), progress=False))
    (event,) = run.summary["events"]
    assert event["settings"] == {"optimizer.lr": 0.0005} and event["back_to"] == 22
    assert all(v.isfinite().all() for v in run.system().state_dict().values())


def test_a_loss_worse_than_silence_is_unhealthy():
    images = images_of(torch.zeros(4, 1, 4, 4, dtype=torch.uint8))
    system, _ = in_training("ncsn", images, score=TINY)
    assert system.unhealthy({"loss": 0.5}) is None
    assert "a score of zero has 0.5" in system.unhealthy({"loss": 1000.0})


def test_it_is_sampled_by_level_and_repeats(here):
    train(settings("run", schedule=dict(epochs=1)), progress=False)
    how = dict(run="run", num_samples=30, batch_size=20, level_steps=3, denoise=True, device="cpu")
    for name in ("annealed", "again"):
        generate_samples(configure(GenerateConfig, "ncsn", name="" if name == "annealed" else name, **how),
                         progress=False)
    run = Run("run")
    (x, _, _), (again, _, _) = run.samples("annealed"), run.samples("again")
    assert torch.equal(x, again) and x.shape == (30, 1, 8, 8)
    stages, strip = run.strip("annealed")
    assert stages == ["start", *(f"level {i}" for i in range(1, 6)), "denoised"]
    assert torch.equal(strip[-1], x[:10]) and strip[0].float().std() > 60
    system, config = run.system(), configure(GenerateConfig, "ncsn", **how)
    assert [system.share_done(config, s) for s in stages] == [0, 0.2, 0.4, 0.6, 0.8, 1, 1]
    assert system.capabilities == {"sample"} and not config.conditional
    with pytest.raises(InputError, match="no density; it has: sample"):
        system.log_density(torch.zeros(1, 1, 8, 8))


def test_classes_are_asked_for_or_drawn(here):
    brief = dict(score=TINY, schedule=dict(epochs=1, updates=0), device="cpu", precision="float32")
    run = Run(train(configure(TrainConfig, "ncsn_conditional", out="run", **brief), progress=False))
    system, y = run.system(), torch.tensor([3, 7])
    assert configure(GenerateConfig, "ncsn_conditional").conditional
    x = torch.zeros(2, 1, 8, 8)
    a, b = (system.score(torch.tensor([4, 4]), x, labels) for labels in (y, y.flip(0)))
    assert torch.equal(a, b.flip(0)) and not torch.equal(a[0], a[1])

    def drawn(conditional, y):
        how = configure(GenerateConfig, "ncsn_conditional", conditional=conditional, level_steps=1)
        return system.sample(y, how, torch.Generator().manual_seed(0))

    assert not torch.equal(drawn(True, y), drawn(True, y + 1))
    assert torch.equal(drawn(False, y), drawn(False, y + 1))        # the labels asked for don't count

    plain, _ = in_training("ncsn", run.images(), score=TINY)
    with pytest.raises(InputError, match="this network was trained without classes"):
        plain.sample(y, configure(GenerateConfig, "ncsn", conditional=True), torch.Generator())


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--score.sigma-min", "6"], ["sigma_min: 6 isn't below sigma_max 5"]),
        (["--score.sigma-max", "0"], ["sigma_max: 0.0 is outside"]),
        (["--score.levels", "0"], ["levels: 0 is outside"]),
        (["--score.network", "refinenet", "--score.stages", "5"], ["stages: 5 is outside 1..4"]),
        (["--score.norm", "batch"], ["norm", "instance", "none"]),
        (["--score.sigma-data", "0.5", "--score.scaled"], ["sigma_data: 0.5", "scaled"]),
    ],
)
def test_bad_settings_are_one_line(refused, argv, says):
    refused("train", "--system", "ncsn", "--dataset", "digits", "--preset", "cpu", *argv, says=says)


@pytest.mark.long
def test_the_published_model_is_built_trained_and_sampled():
    "NCSN's hyperparameters on images of CIFAR-10's size, three updates, and a few steps of its annealing."
    generator = torch.Generator().manual_seed(0)
    images = images_of(torch.randint(0, 256, (128, 3, 32, 32), dtype=torch.uint8, generator=generator))
    config = configure(TrainConfig, "ncsn", "cifar10", "paper", device="cpu", precision="float32")
    c = config.score
    assert (config.schedule.updates, config.schedule.kind) == (200_000, "constant")
    assert (config.optimizer.kind, config.optimizer.batch_size, config.optimizer.lr) == ("adam", 128, 1e-3)
    assert (c.sigma_max, c.sigma_min, c.levels, c.channels, c.network) == (2.0, 0.02, 10, 128, "refinenet")
    generators = {name: torch.Generator().manual_seed(0) for name in ("noise", "choices")}
    system = build_system(config, images, as_written("cpu"), generators["noise"])
    step = Step(system.optimizers(), generators, system.runtime.world)
    began = time.perf_counter()
    losses = []
    for number in range(3):
        step.begin(number, config.optimizer.lr)
        losses.append(float(system.update(Batch(images.train_x, images.train_y), step)["loss"]))
    seconds = (time.perf_counter() - began) / 3
    how = configure(GenerateConfig, "ncsn", "cifar10", "paper", level_steps=1)
    assert configure(GenerateConfig, "ncsn", "cifar10", "paper").level_steps == 100
    x = system.sample(torch.zeros(2, dtype=torch.int64), how, generators["noise"])
    assert x.shape == (2, 3, 32, 32) and x.isfinite().all() and all(np.isfinite(losses))
    n = sum(p.numel() for p in system.network.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        system.score(torch.zeros(1, dtype=torch.int64), x[:1])
    forward = counter.get_total_flops()
    hours = [work * forward / 1e14 / 3600 for work in (3 * 128 * 200_000, 10 * 100 * 50_000)]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{n:,} parameters, {forward / 1e9:.1f} GFLOP a pass and image; {seconds:.1f} s an update of 128 images and "
          f"{memory:.1f} GiB at most on this CPU; at 100 TFLOP/s, training takes {hours[0]:.1f} hours and 50,000 "
          f"samples {hours[1]:.1f}; losses {losses}")
    assert n == 30_117_635
