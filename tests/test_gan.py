"""SNGAN and DDLS against closed forms, and through the real loop: killed, resumed, poisoned, refused."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import MultivariateNormal
from torch.nn import functional as F

from robust_jem.app.plan import ReplicateConfig, plan
from robust_jem.core.config import merged
from robust_jem.core.errors import InputError
from robust_jem.core.images import Images
from robust_jem.ebm.samplers import mala
from robust_jem.engine.runs import Run
from robust_jem.engine.sample import generate_samples
from robust_jem.engine.train import lr_factor, train
from robust_jem.networks.sngan import ClassBatchNorm, Critic, doublings
from robust_jem.systems.base import Batch, GenerateConfig, Step, TrainConfig
from robust_jem.systems.catalog import SYSTEMS, configure, system_class
from robust_jem.systems.gan import Sngan, critic_hinge
from robust_jem.systems.latent import Ddls, latent_chain, latent_energy

SIZES = dict(latent=4, generator_width=8, critic_width=8, critic_steps=2)
DIES_AT = 27  # an update in the middle of the second epoch, after a generator's turn


def settings(system, out, **changes):
    small = dict(
        gan=SIZES,
        schedule=dict(updates=44, warmup_steps=0),
        log_every=4,
        threads=1,
        device="cpu",
        precision="float32",
        checkpoint_minutes=0.001,
        out=str(out),
    )
    if SYSTEMS[system].source_system:
        small["source"] = "source"
    return configure(TrainConfig, system, **merged(small, changes))


def trained(system, out, **changes):
    return Run(train(settings(system, out, **changes), progress=False))


@pytest.fixture
def source(made_once, here):
    "A finished SNGAN in the folder `source`, free to damage."
    made = made_once("sngan", lambda folder: trained("sngan", folder / "run", optimizer=dict(ema_decay=0.9)))
    return Run(shutil.copytree(made / "run", here / "source"))


# Networks


def normalised_layers(network):
    return [m for m in network.modules() if hasattr(m, "parametrizations")]


def spectral_norms(network):
    "By SVD, of the weights as they are used."
    return torch.stack(
        [torch.linalg.svdvals(m.weight.detach().double().flatten(1))[0] for m in normalised_layers(network)]
    )


def test_every_layer_of_a_trained_critic_has_spectral_norm_one(source, here):
    for run in (source, trained("sngan_conditional", "conditional")):
        critic = run.system().critic
        kinds = torch.nn.Conv2d | torch.nn.Linear | torch.nn.Embedding
        weighted = [m for m in critic.modules() if isinstance(m, kinds)]
        assert weighted == normalised_layers(critic) and len(weighted) == 6 + (critic.embedding is not None)
        norms = spectral_norms(critic)
        assert norms.max() <= 1.01 and norms.min() > 0.99, norms


def test_the_projection_critic_is_its_formula():
    "With weights divided by their largest singular value, found by SVD in float64."
    torch.manual_seed(0)
    critic = Critic((1, 8, 8), width=6, num_classes=10).double()
    x, y = torch.rand(12, 1, 8, 8).double() * 2 - 1, torch.arange(12) % 10
    with torch.no_grad():
        for _ in range(300):
            critic(x, y)
    critic.eval()

    def by_svd(layer):
        raw = layer.parametrizations.weight.original.detach()
        return raw / torch.linalg.svdvals(raw.flatten(1))[0]

    def convolved(layer, h, padding):
        return F.conv2d(h, by_svd(layer), layer.bias, padding=padding)

    one, two = critic.blocks
    h = F.avg_pool2d(convolved(one.conv2, convolved(one.conv1, x, 1).relu(), 1), 2)
    h = h + F.avg_pool2d(convolved(one.shortcut, x, 0), 2)
    h = h + convolved(two.conv2, convolved(two.conv1, h.relu(), 1).relu(), 1)
    phi = h.relu().sum((2, 3))
    formula = phi @ by_svd(critic.linear)[0] + critic.linear.bias + (by_svd(critic.embedding)[y] * phi).sum(1)
    assert torch.allclose(critic(x, y), formula, atol=1e-6)


def test_class_batch_norm_is_batch_norm_with_the_gain_of_the_class():
    torch.manual_seed(0)
    norm = ClassBatchNorm(3, 4)
    torch.nn.init.normal_(norm.gain.weight)
    torch.nn.init.normal_(norm.bias.weight)
    x, y = torch.randn(8, 3, 5, 5), torch.arange(8) % 4
    for k in range(4):
        of_class = F.batch_norm(x, None, None, norm.gain.weight[k], norm.bias.weight[k], training=True)
        assert torch.allclose(norm(x, y)[y == k], of_class[y == k], atol=1e-5)


@pytest.mark.parametrize("size, times", [(8, 1), (28, 2), (32, 3), (48, 3), (64, 4)])
def test_sizes(size, times):
    assert doublings(size) == times


@pytest.mark.parametrize("size", [4, 7, 9, 22])
def test_other_sizes_are_refused(size):
    with pytest.raises(InputError, match="accepted: 4, 5, 6 or 7 times 2, 4, 8"):
        doublings(size)


def test_hinge_and_linear_schedule():
    assert critic_hinge(torch.tensor([0.5, 3.0]), torch.tensor([0.0, -4.0])) == 0.25 + 0.5
    schedule = settings("sngan", "x", schedule=dict(updates=10)).schedule
    assert [round(lr_factor(schedule, i, 22), 3) for i in (0, 5, 10)] == [1, 0.5, 0]


# Chains whose law is known

A, OFFSET = torch.tensor([[1.0, 0.3], [0.0, 0.7]]).double(), torch.tensor([0.5, 0.0]).double()
MADE = MultivariateNormal(OFFSET, A @ A.T)  # the law of a linear generator
DATA = MultivariateNormal(
    torch.tensor([-0.3, 0.6]).double(), torch.tensor([[0.5, -0.2], [-0.2, 0.4]], dtype=torch.float64)
)
CHAINS = 40_000


def gaussian_energy(z):
    "The critic is the optimal one: the difference of the log densities."
    return latent_energy(lambda z: z @ A.T + OFFSET, lambda x: DATA.log_prob(x) - MADE.log_prob(x), z)


def assert_law(x, mean, covariance):
    "Mean and covariance within four standard errors."
    error = (covariance.diag() / len(x)).sqrt()
    assert ((x.mean(0) - mean).abs() < 4 * error).all()
    spread = (covariance.square() + covariance.diag().outer(covariance.diag())) / len(x)
    assert ((x.T.cov() - covariance).abs() < 4 * spread.sqrt()).all()


def latent_ends(**how):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(CHAINS, 2, generator=g, dtype=torch.float64)
    return latent_chain(gaussian_energy, z, generator=g, **how)


def test_langevin_in_z_has_the_law_of_the_data():
    """Acceptance-free, with a small step.

    A step α on the energy of precision P has the stationary covariance (P - α P²/4)⁻¹: P⁻¹ up to O(α).
    """
    alpha = 0.05
    z, accepted = latent_ends(steps=300, step_size=alpha)
    precision = A.T @ DATA.precision_matrix @ A
    stationary = A @ (precision - alpha / 4 * precision @ precision).inverse() @ A.T
    assert (stationary - DATA.covariance_matrix).abs().max() < 0.02 and accepted == 1
    assert_law(z @ A.T + OFFSET, DATA.mean, stationary)


def test_adjusted_langevin_in_z_has_exactly_the_law_of_the_data():
    z, accepted = latent_ends(steps=120, step_size=0.4, adjusted=True)
    assert 0.6 < accepted < 0.95
    assert_law(z @ A.T + OFFSET, DATA.mean, DATA.covariance_matrix)


def test_mala_on_a_law_that_is_no_gaussian():
    "p(x) ∝ exp(-(x² - 1)²): moments by quadrature."

    def log_density(x):
        return -((x.square() - 1).square()).sum(1)

    steps = []
    g = torch.Generator().manual_seed(0)
    x = 2 * torch.rand(CHAINS, 1, generator=g, dtype=torch.float64) - 1  # in steep tails, proposals are all refused
    ends, share = mala(log_density, x, 150, 0.2, generator=g, on_step=lambda i, x: steps.append(i))
    grid = torch.linspace(-4, 4, 20_001, dtype=torch.float64)[:, None]
    weight = log_density(grid).softmax(0)[:, None]
    for power in (1, 2, 4):
        exact, square = ((grid ** (k * power) * weight).sum() for k in (1, 2))
        error = ((square - exact**2) / CHAINS).sqrt()
        assert abs((ends**power).mean() - exact) < 4 * error
    assert steps == list(range(150)) and share.shape == (CHAINS,) and 0 < share.min() <= share.max() <= 1


# Through the loop


@pytest.mark.parametrize("system", ["sngan", "ddls"])
def test_it_is_killed_and_goes_on_to_the_same_bits(system, source, killed_and_resumed):
    def of(out):
        return settings(system, out, optimizer=dict(ema_decay=0.9 * (system == "sngan")))

    def source_is_gone():
        shutil.rmtree("source")         # once a run has begun, everything is in its checkpoints

    _, checkpoint = killed_and_resumed(of, system_class(system), DIES_AT, meanwhile=source_is_gone)
    assert "system.generator.conv.weight" in checkpoint
    assert ("optimizer.critic" in str(list(checkpoint))) == (system == "sngan")


@pytest.mark.parametrize("system", ["sngan", "ddls"])
def test_a_turn_that_diverges_is_taken_back(system, source, here, monkeypatch):
    kind, poisoned = system_class(system), []
    update = kind.update

    def poison(self, batch, step):
        if step.number == 25 and not poisoned:
            poisoned.append(1)
            with torch.no_grad():
                next(p for p in self.parameters() if p.requires_grad).fill_(float("nan"))
        return update(self, batch, step)

    monkeypatch.setattr(kind, "update", poison)
    with pytest.warns(UserWarning, match=r"recovery 1 of 3: back to update \d+, optimizer.lr"):
        run = trained(system, "run", recovery=dict(snapshot_every=5))
    (event,) = run.summary["events"]
    assert event["back_to"] <= 25 < event["at"]
    assert all(v.isfinite().all() for v in run.system().state_dict().values())


def test_a_recovery_to_the_beginning_starts_from_the_source_again(source, here, monkeypatch):
    update, poisoned = Ddls.update, []

    def poison(self, batch, step):
        if step.number == 2 and len(poisoned) < 2:
            poisoned.append(step.number)
            with torch.no_grad():
                self.head[0].weight.fill_(float("nan"))
        return update(self, batch, step)

    monkeypatch.setattr(Ddls, "update", poison)
    with pytest.warns(UserWarning, match="recovery 2 of 3: back to update 0"):
        run = trained("ddls", "run")
    assert torch.equal(run.system().generator.conv.weight, source.system().generator.conv.weight)


def test_what_divergence_means_for_a_gan():
    system = Sngan.__new__(Sngan)
    healthy = {"step": 4, "loss": 0.3, "generated_std": 0.4}
    assert system.unhealthy(healthy) is None and Sngan.watched == {}
    assert "the critic's loss is 0" in system.unhealthy(healthy | {"loss": 0.0})
    assert "collapsed" in system.unhealthy(healthy | {"generated_std": 0.0})
    assert system.selection_score(healthy) > system.selection_score(healthy | {"step": 8})


# Samples


def draw(run, name, **how):
    config = configure(GenerateConfig, run.config.system, run=str(run.path), name=name, device="cpu",
                       num_samples=40, batch_size=20, **how)  # fmt: skip
    generate_samples(config, progress=False)
    return run.samples(name)


def test_ddls_is_sampled_without_its_source(source, here):
    before = draw(source, "plain")[0]
    run = trained("ddls", "run")
    shutil.rmtree("source")
    kinds = {
        "langevin": {},
        "adjusted": dict(adjusted=True),
        "raw": dict(calibrated=False),
        "none": dict(steps=0),
    }
    sets = {name: draw(run, name, chain=dict(steps=3, step_size=0.05) | chain)[0] for name, chain in kinds.items()}
    assert torch.equal(sets["none"], before)  # the same noise, and no step: SNGAN's own samples
    assert len({x.numpy().tobytes() for x in sets.values()}) == 4
    stages, strip = run.strip("langevin")
    assert stages == ["prior", "step 1", "step 2", "step 3"] and torch.equal(strip[-1], sets["langevin"][:10])
    z = torch.randn(5, 4)
    system = run.system()
    energy = z.square().sum(1) / 2 - system.log_ratio(system.generator(z))
    assert torch.allclose(system.latent_energy(z), energy) and "latent" in system.capabilities


def test_conditional_images_depend_on_their_class(here):
    run = trained("sngan_conditional", "run")
    one, two = draw(run, "of classes"), draw(run, "of any", conditional=False)
    assert one[2]["config"]["conditional"] and not torch.equal(one[0], two[0])


# The source


def refused(match, **changes):
    with pytest.raises(InputError, match=match) as e:
        trained("ddls", "run", **changes)
    assert "\n" not in str(e.value) and not Path("run").exists()


def test_sources_that_do_not_fit_are_refused(source, here):
    refused("source: ddls starts from a finished run of sngan; give its folder", source="")
    refused("source: 'nowhere' is no run folder", source="nowhere")
    refused(r"source: its gan\.latent is 4, here it is 5; give the source's sizes", gan=SIZES | dict(latent=5))
    refused("source_weights: abc was given, but those of 'source' are", source_weights="abc")
    trained("sngan_conditional", "other")
    refused("source: a run of sngan_conditional; ddls starts from one of sngan", source="other")
    (source.path / "model.safetensors").unlink()
    refused("source: source isn't trained yet; finish")
    with pytest.raises(InputError, match="source: sngan does not start from another run; leave it empty"):
        trained("sngan", "run", source="other")
    assert not Path("run").exists()


def test_a_source_is_known_by_its_weights_not_by_its_place(source, here):
    run = trained("ddls", "run")
    assert run.config.source_weights == source.weights
    shutil.move("source", "moved")
    assert trained("ddls", "run", source="moved").summary == run.summary  # finished: nothing to do
    trained("sngan", "again", seed=1)
    with pytest.raises(InputError, match="out: run holds a run with other settings .source_weights: "):
        trained("ddls", "run", source="again")


@pytest.mark.parametrize("systems", [("ddls",), ("ddls", "sngan"), ("sngan", "ddls")])
def test_the_replication_trains_the_source_once_and_first(systems):
    first, chains, _ = plan(ReplicateConfig(systems=systems, seeds=(0, 1), runs="r"))
    training = [s for chain in chains for s in chain if s.notebook == "train"]
    folders = [s.parameters["out"] for s in training]
    assert sorted(folders) == ["r/ddls-s0", "r/ddls-s1", "r/sngan-s0", "r/sngan-s1"]
    for stage in training:
        if stage.parameters["system"] == "ddls":
            source = stage.parameters["source"]
            assert source == f"r/sngan-s{stage.parameters['seed']}"
            assert stage.after == training[folders.index(source)].output
    sampled = [s.parameters["run"] for chain in chains for s in chain if s.notebook == "generate"]
    assert sorted(sampled) == sorted(f"r/{s}-s{i}" for s in systems for i in (0, 1))


# Of published size


def of_cifar10_size():
    x, y = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8), torch.arange(64) % 10
    classes = tuple("0123456789")
    return Images("noise", x, y, x[:10], y[:10], classes)


@pytest.mark.long
@pytest.mark.parametrize("system", ["sngan", "sngan_conditional", "ddls"])
def test_the_published_size_builds_learns_and_samples(system):
    "Three updates, the second with a turn of the generator, and samples; memory and the time of an H100, projected."
    import resource

    from torch.utils.flop_counter import FlopCounterMode

    config = configure(TrainConfig, system, "cifar10", "paper")
    images = of_cifar10_size()
    runtime = SimpleNamespace(device=torch.device("cpu"), world=SimpleNamespace(size=1))
    rng = torch.Generator().manual_seed(0)
    model = system_class(system)(config, images, runtime, rng)
    if system == "ddls":
        model.adopt(Sngan(configure(TrainConfig, "sngan", "cifar10", "paper"), images, runtime))
    step, flops = Step(model.optimizers(), {"noise": rng}, runtime.world), []
    for number in (3, 4, 5):
        step.begin(number, config.optimizer.lr)
        with FlopCounterMode(display=False) as counter:
            metrics = model.update(Batch(images.train_x, images.train_y), step)
        flops.append(counter.get_total_flops())
        assert all(v.isfinite() for v in metrics.values())
    model.eval()
    how = configure(GenerateConfig, system, "cifar10", "paper")
    if system == "ddls":
        assert (how.chain.steps, how.chain.step_size) == (1000, 0.01)
        how = configure(GenerateConfig, system, "cifar10", "paper", chain=dict(steps=2))
    else:
        assert (config.gan.latent, config.gan.generator_width, config.gan.critic_width) == (128, 256, 128)
        rates = config.optimizer.batch_size, config.optimizer.lr
        assert (config.gan.critic_steps, config.schedule.updates, *rates) == (5, 500_000, 64, 2e-4)
    x = model.sample(torch.arange(64) % 10, how, rng)
    assert x.shape == (64, 3, 32, 32) and x.isfinite().all() and x.abs().max() <= 1
    an_update = (4 * flops[0] + flops[1]) / 5
    hours = config.schedule.updates * an_update / 20e12 / 3600
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    size = f"{sum(p.numel() for p in model.parameters()):,} parameters, {an_update / 1e9:.0f} GFLOP an update"
    print(f"{system}: {size}, {hours:.2f} hours at 20 TFLOP/s, {peak:.1f} GiB at most on this CPU")
