"""Flows against independent truths: Jacobians, integrals, singular values, Bayes' rule; and through the real loop."""

import math
import resource
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from normflows.distributions import GlowBase
from normflows.nets.lipschitz import InducedNormConv2d, InducedNormLinear
from scipy.stats import multivariate_normal
from torch.distributions import MultivariateNormal, Normal
from torch.utils.flop_counter import FlopCounterMode

from robust_jem.core.errors import InputError
from robust_jem.core.files import read_json
from robust_jem.core.images import Images, bits_per_dim, dequantise, load_images, to_unit
from robust_jem.core.random import stream
from robust_jem.engine.checkpoints import TrainState
from robust_jem.engine.runs import Run
from robust_jem.engine.runtime import as_written
from robust_jem.engine.sample import generate_samples
from robust_jem.engine.train import train
from robust_jem.judge import likelihood
from robust_jem.systems.catalog import GenerateConfig, TrainConfig, configure, system_class
from robust_jem.systems.flow import Flow, FlowSystem, MixtureBase, MultiScale, ResidualBlock, glow_scale, global_random

FLOWS = ("glow", "glow_conditional", "residual_flow", "glow_hybrid", "residual_flow_hybrid")
SMALL = {
    "glow": dict(blocks=(2, 2), hidden=16, logit=1e-6),
    "residual": dict(blocks=(1, 1), hidden=8, fc_blocks=2, fc_hidden=32, logit=1e-6, power_iterations=5),
}


def small(system, components=1, **changes):
    "Settings of a flow that an update of a few milliseconds trains."
    flow = SMALL["residual" if system.startswith("residual") else "glow"] | dict(components=components)
    head = dict(head=8) if system.endswith("hybrid") else {}
    options = dict(optimizer__batch_size=64, schedule__epochs=3, schedule__warmup_steps=0, log_every=4, threads=1)
    options |= dict(device="cpu", precision="float32", checkpoint_minutes=0.001) | changes
    return configure(TrainConfig, system, **options, flow=flow | head)


def perturbed(flow, shape, seed=0, scale=0.3):
    "A flow whose parameters are far from where they began, in float64, with images for it."
    generator = torch.Generator().manual_seed(seed)
    with global_random(generator):
        model = MultiScale(flow, shape, 10)
        model.initialise(torch.rand(64, *shape) * 2 - 1)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * scale * (0.1 if p.ndim == 2 and len(p) == p.shape[1] else 1))
        model.renormalise(200)
    x = (torch.rand(3, *shape, generator=generator) * 1.6 - 0.8).double()
    return model.double().eval(), x


def flat(model, x):
    latents, _, log_det = model.encode(x)
    return torch.cat([z.flatten(1) for z in latents], 1), log_det


FORMS = {
    "glow": Flow(blocks=(2, 2), hidden=8),
    "glow, logits": Flow(blocks=(3,), hidden=8, logit=0.05),
    "residual": Flow("residual", blocks=(2, 2), hidden=8, factor_out=False, fc_blocks=2, fc_hidden=16),
    "residual, factored out": Flow("residual", blocks=(1, 1), hidden=8, factor_out=True, logit=1e-6),
}


@pytest.mark.parametrize("form", FORMS)
def test_log_determinant_is_that_of_the_jacobian(form):
    model, x = perturbed(FORMS[form], (2, 4, 4))
    log_det = flat(model, x)[1]
    for i in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(lambda v: flat(model, v)[0], x[i : i + 1]).reshape(32, 32)
        assert abs(torch.linalg.slogdet(jacobian).logabsdet - log_det[i]) < 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_inverse(form):
    model, x = perturbed(FORMS[form], (2, 4, 4))
    model, x = model.float(), x.float()
    with torch.no_grad():
        latents = model.encode(x)[0]
        assert (model.decode(latents) - x).abs().max() < 1e-4
        again = model.encode(model.decode(latents))[0]
    assert max((a - b).abs().max() for a, b in zip(latents, again)) < 1e-3


def trained_in_the_plane(layers, base, steps=150):
    "Layers fitted to two moons within [-0.6, 0.6]; the log density of points [N,2]."
    from sklearn.datasets import make_moons

    points = torch.tensor(make_moons(2000, noise=0.08, random_state=0)[0] / 3 - [0.17, 0.08], dtype=torch.float32)
    parameters = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam([*parameters, *base.parameters()], 0.01)

    def log_density(x):
        z, log_det = x.view(-1, *base.shape), 0
        for layer in layers:
            z, more = layer.inverse(z)
            log_det = log_det + more
        return base.log_prob(z) + log_det

    with global_random(torch.Generator().manual_seed(1)):
        for i in range(steps):
            optimizer.zero_grad()
            loss = -log_density(points[i * 100 % 2000 :][:100]).mean()
            loss.backward()
            optimizer.step()
            for layer in (m for m in layers if isinstance(m, ResidualBlock)):
                for m in layer.modules():
                    if isinstance(m, InducedNormLinear):
                        m.compute_weight(True, 20)
        before = log_density(points[:500]).mean().item()
    for layer in layers:
        layer.eval()
    return log_density, before


@pytest.mark.parametrize("kind", ["glow", "residual"])
def test_density_in_the_plane_integrates_to_one(kind):
    with global_random(torch.Generator().manual_seed(0)):
        if kind == "glow":          # a scale's blocks, without the squeeze, which needs 2×2 pixels
            layers = glow_scale(2, 6, Flow(hidden=32))[1:]
            base = GlowBase((2, 1, 1))
        else:
            flow = Flow("residual", blocks=(0,), fc_blocks=6, fc_hidden=32, factor_out=False, power_iterations=20)
            model = MultiScale(flow, (1, 1, 2), 10)
            model.initialise(torch.rand(64, 1, 1, 2) - 0.5)
            layers, base = list(model.scales[0]), model.bases[0]
        log_density, fitted = trained_in_the_plane(layers, base)
    assert fitted > 0.3                                       # a Gaussian has about 0.15 nats
    side = torch.linspace(-1.2, 1.2, 241)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        mass = sum(log_density(part).exp().double().sum() for part in grid.split(20_000)) * (side[1] - side[0]) ** 2
    assert abs(mass - 1) < 0.01


@pytest.mark.parametrize(
    "mode, n", [("training", 1000), ("evaluation", 300), pytest.param("training", 4000, marks=pytest.mark.long)]
)
def test_the_estimate_of_the_log_determinant_is_unbiased(mode, n):
    flow = Flow("residual", blocks=(0,), fc_blocks=1, fc_hidden=4, factor_out=False, coefficient=0.9)
    model, x = perturbed(flow, (1, 2, 2))
    block = next(m for m in model.scales[0] if isinstance(m, ResidualBlock))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():                   # a contraction that is not close to zero
        for layer in (m for m in block.modules() if isinstance(m, InducedNormLinear)):
            layer.weight.copy_(2 * torch.eye(4) + 0.4 * torch.randn(4, 4, generator=generator))
    model.renormalise(200)
    x = x[:1]
    exact = block.inverse(x)[1].item()
    assert abs(exact) > 0.05
    block.exact = 0
    block.train(mode == "training")
    draws = []
    with global_random(torch.Generator().manual_seed(2)):
        for _ in range(n):
            draws.append(block.inverse(x.clone())[1].item())
    error = np.std(draws, ddof=1) / math.sqrt(len(draws))
    assert error > 0 and abs(np.mean(draws) - exact) < 3 * error


def state_of(system, updates=5, **changes):
    "A training after a few updates on digits."
    images = load_images("digits")
    state = TrainState(small(system, **changes), images, as_written())
    for i in (k % 20 for k in range(updates)):
        state.update(images.train_x[i * 64 : i * 64 + 64], images.train_y[i * 64 : i * 64 + 64], 3e-3)
    return state


def operator(layer, shape):
    "The matrix of a Lipschitz layer, in float64, as its forward pass has it."
    layer = layer.double()
    zero = torch.zeros(1, *shape, dtype=torch.float64)
    with torch.no_grad():
        return torch.autograd.functional.jacobian(lambda v: layer(v).flatten(), zero).flatten(1)


def test_every_block_is_a_contraction():
    system = state_of("residual_flow", 30).system
    system.flow.load_state_dict(system.weights())
    shapes, blocks = {}, [m for m in system.flow.modules() if isinstance(m, ResidualBlock)]
    layers = {m: [k for k in m.modules() if isinstance(k, InducedNormConv2d | InducedNormLinear)] for m in blocks}
    for layer in sum(layers.values(), []):
        layer.register_forward_hook(lambda m, given, _: shapes.__setitem__(m, given[0].shape[1:]))
    x = to_unit(load_images("digits").test_x[:8])
    system.eval().log_density(x)
    assert len(blocks) == 4
    for block, inside in layers.items():
        norms = [torch.linalg.matrix_norm(operator(layer, shapes[layer]), 2).item() for layer in inside]
        assert max(norms) < 0.99 and math.prod(norms) < 1, norms
        # the block itself, Swish included: singular values of its Jacobian at random points
        block.double()
        shape = shapes[inside[0]]
        image = (1, 8, 8) if len(shape) == 1 and system.flow.bases[0].shape == (1, 8, 8) else None
        shape = image or (system.flow.bases[0].shape if len(shape) == 1 else shape)
        for seed in range(3):
            point = torch.randn(1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            jacobian = torch.autograd.functional.jacobian(block.iresblock.nnet, point).reshape(64, 64)
            assert torch.linalg.matrix_norm(jacobian, 2) < 1


def by_torch(base, k):
    "log p(z|class k) of a base, by torch.distributions."
    if isinstance(base, MixtureBase):
        whitening = base.lower[k, 0].tril(-1) + base.log_diagonal[k, 0].exp().diag()
        law = MultivariateNormal(base.loc[k, 0], scale_tril=torch.linalg.inv(whitening).tril())
        return lambda z: law.log_prob(z.flatten(1))
    loc = base.loc * (3 * base.loc_logs).exp() + base.loc_cc[k].view(1, -1, 1, 1)
    log_scale = base.log_scale * (3 * base.log_scale_logs).exp() + base.log_scale_cc[k].view(1, -1, 1, 1)
    return lambda z: Normal(loc, log_scale.exp()).log_prob(z).flatten(1).sum(1)


@pytest.mark.parametrize("components", [0, 1])
def test_posterior_is_bayes_rule(components):
    state = state_of("glow_conditional", 20, components=components)
    system, images = state.system.eval(), load_images("digits")
    x = to_unit(images.test_x[:20])
    with torch.no_grad():
        posterior = system(x).softmax(1)
        joint = torch.stack([system.log_density(x, torch.full((20,), k)) for k in range(10)], 1)
        assert torch.allclose(posterior.sum(1), torch.ones(20), atol=1e-6)
        assert torch.allclose(system.log_density(x), joint.logsumexp(1), atol=1e-3)
        # p(x|y) anew: Gaussians of torch.distributions at the latent variables, and class frequencies
        latents, _, log_det = system.flow.encode(x)
        frequencies = torch.bincount(images.train_y) / len(images.train_y)
        ours = []
        for k in range(10):
            log_p = log_det + frequencies[k].log()
            for base, z in zip(system.flow.bases, latents):
                log_p = log_p + by_torch(base, k)(z)
            ours.append(log_p)
        ours = torch.stack(ours, 1)
    assert torch.allclose(ours.softmax(1), posterior, atol=1e-3) and torch.allclose(ours, joint, atol=1e-2)
    assert posterior.std(0).max() > 1e-3


@pytest.mark.parametrize("system", FLOWS)
def test_it_can_do_what_it_says(system):
    made = state_of(system, 2).system.eval()
    x, y = to_unit(load_images("digits").test_x[:4]), torch.arange(4)
    classifies = "logits" in system_class(system).capabilities
    assert classifies == (system not in ("glow", "residual_flow"))
    density = made.log_density(x)
    assert density.dtype == torch.float32 and density.isfinite().all() and torch.equal(density, made.log_density(x))
    assert made.log_density(5 * x).isfinite().all()                     # outside of where images are
    how = configure(GenerateConfig, system, temperature=0.7)
    a, b = (made.sample(y, how, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(a, b) and a.shape == (4, 1, 8, 8) and a.isfinite().all()
    assert how.conditional == (system == "glow_conditional")
    if classifies:
        logits = made(x)
        assert logits.shape == (4, 10)
        x.requires_grad_()
        assert torch.autograd.grad(made(x).sum(), x)[0].abs().sum() > 0
        joint = torch.stack([made.log_density(x, torch.full((4,), k)) for k in range(10)], 1)
        assert torch.allclose(joint.softmax(1), logits.softmax(1), atol=1e-4)
    else:
        with pytest.raises(InputError, match=f"{system} knows no classes"):
            made.log_density(x, y)


@pytest.mark.parametrize("weight, expected", [(None, 1.0), (1.0, 64.0), (0.0, 0.0)])
def test_weight_of_the_likelihood(weight, expected):
    flow = SMALL["glow"] | dict(head=8, weight=weight)
    config = configure(TrainConfig, "glow_hybrid", flow=flow, optimizer__batch_size=16)
    images = load_images("digits")
    system = system_class("glow_hybrid")(config, images, as_written(), torch.Generator())
    loss, parts = system.loss(dequantise(images.train_x[:16], torch.Generator().manual_seed(0)), images.train_y[:16])
    assert torch.isclose(loss, expected * parts["bits_per_dim"] + parts["cross_entropy"])


@pytest.mark.parametrize("system", ["glow_conditional", "residual_flow_hybrid"])
def test_it_is_killed_and_goes_on_to_the_same_bits(system, killed_and_resumed):
    def of(out):
        return small(system, out=out, optimizer__ema_decay=0.9, schedule__epochs=1)

    whole, _ = killed_and_resumed(of, FlowSystem, 13)
    generate_samples(configure(GenerateConfig, system, run="whole", num_samples=20, batch_size=20), progress=False)
    assert whole.sample_names() == ["sample"] and whole.samples("sample")[0].shape == (20, 1, 8, 8)


@pytest.mark.parametrize("system", ["glow", "residual_flow"])
def test_a_flow_that_diverges_is_taken_back(system, here, monkeypatch):
    update, poisoned = FlowSystem.update, []

    def poison(self, batch, step):
        if step.number == 13 and not poisoned:
            poisoned.append(1)
            with torch.no_grad():
                next(p for p in self.flow.parameters() if p.requires_grad).fill_(float("nan"))
        return update(self, batch, step)

    monkeypatch.setattr(FlowSystem, "update", poison)
    with pytest.warns(UserWarning, match="recovery 1 of 3: back to update"):
        run = Run(train(small(system, out="run", schedule__epochs=1, recovery__snapshot_every=4), progress=False))
    (event,) = run.summary["events"]
    assert event["settings"] == {"optimizer.lr": 0.0005}
    made = run.system()
    assert all(v.isfinite().all() for v in made.state_dict().values())
    assert made.log_density(to_unit(load_images("digits").test_x[:4])).isfinite().all()


@pytest.mark.parametrize(
    "argv, says",
    [
        ("--flow.blocks 1 -1", "blocks: -1 is outside 0..1000"),
        ("--flow.blocks 1 1 1 1", "8x8 pixels"),
        ("--flow.logit 0.5", "logit"),
        ("--flow.head 8", "glow doesn't classify"),
        ("--flow.conditional --flow.head 8", "two ways to classify"),
        ("--flow.kind planar", "kind"),
    ],
)
def test_bad_input_is_one_line(refused, argv, says):
    refused("train", "--system", "glow", "--dataset", "digits", "--preset", "cpu", *argv.split(), says=[says])


def test_samples_of_no_class_cannot_be_asked_for(here):
    run = Run(train(small("glow", out="run", schedule__updates=2), progress=False))
    how = configure(GenerateConfig, "glow", run="run", num_samples=10, batch_size=10, conditional=True)
    with pytest.raises(InputError, match="glow draws samples of no asked classes; accepted: false"):
        generate_samples(how, progress=False)
    with pytest.raises(InputError, match="temperature: 0.0 is outside"):
        configure(GenerateConfig, "glow", temperature=0.0)
    assert run.trained


def test_bits_a_dimension_of_gaussians_are_scipys():
    images = load_images("digits@0-1")
    ours = likelihood.gmm_bits_per_dim(images, images.test_x[:20], seed=3)
    noisy = dequantise(images.train_x, stream(3, "dequantise", "train")).flatten(1).double().numpy()
    test = dequantise(images.test_x[:20], stream(3, "dequantise")).flatten(1).double().numpy()
    y, log_p = images.train_y.numpy(), []
    for k in range(2):
        mine = noisy[y == k]
        law = multivariate_normal(mine.mean(0), np.cov(mine.T) + 1e-4 * np.eye(64))
        log_p.append(law.logpdf(test) + np.log((y == k).mean()))
    bits = np.log2(127.5) - np.logaddexp(*log_p) / (64 * np.log(2))
    assert np.allclose(ours.numpy(), bits, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Fréchet distance", "ignore:FD-digits")
def test_density_is_scored_beside_gaussians(here, cli):
    "The command line, from training to a score in bits a dimension."
    short = dict(network=dict(width=1), schedule=dict(epochs=1), device="cpu", out="judge")
    judge = train(configure(TrainConfig, "wide_resnet", **short), progress=False)
    train(small("glow", out="run", schedule__epochs=1), progress=False)
    generated = cli("generate", "run", "--num-samples", 40, "--batch-size", 40, "--temperature", 0.8)
    assert generated.code == 0, generated.err
    evaluated = cli("evaluate", "run", "--extractor", f"classifier:{judge}")
    assert evaluated.code == 0 and "bits/dim, GMM" in evaluated.out, evaluated.err
    found = read_json(Path("run/scores/density.json"))
    images = load_images("digits")
    assert abs(found["bits/dim, GMM"] - likelihood.gmm_bits_per_dim(images, images.test_x).mean()) < 1e-9
    system = Run("run").system()
    by_hand = bits_per_dim(system.log_density(dequantise(images.test_x, stream(0, "dequantise"))), (1, 8, 8))
    assert abs(found["bits/dim"] - by_hand.mean().item()) < 1e-4 and found["n"] == 360


@pytest.mark.long
@pytest.mark.parametrize("system", FLOWS)
def test_published_size(system):
    "CIFAR-10's preset: builds, takes an update and draws an image on the CPU, at full size; prints what it costs."
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8, generator=generator)
    y = torch.arange(20) % 10
    images = Images("noise", x, y, x, y, tuple(map(str, range(10))))
    config = configure(TrainConfig, system, "cifar10", "paper")
    seconds = [time.perf_counter()]
    state = TrainState(config, images, as_written())
    seconds.append(time.perf_counter())
    # the counter can't follow the gradients that a residual block takes in its forward pass
    counter = nullcontext() if system.startswith("residual") else FlopCounterMode(display=False)
    with counter as counted:
        state.update(x[:2], y[:2], 1e-5)
    seconds.append(time.perf_counter())
    how = configure(GenerateConfig, system, "cifar10", "paper")
    drawn = state.system.eval().sample(y[:1], how, generator)
    seconds.append(time.perf_counter())
    built, updated, sampled = (b - a for a, b in zip(seconds, seconds[1:]))
    parameters = sum(p.numel() for p in state.system.flow.parameters())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert drawn.shape == (1, 3, 32, 32) and drawn.isfinite().all()
    assert all(v.isfinite() for v in state.pending[-1].values())
    print(
        f"\n{system}: {parameters / 1e6:.1f} M parameters; built in {built:.0f} s, an update of two images "
        f"{updated:.0f} s, an image {sampled:.0f} s; {memory:.1f} GB at most"
    )
    if counted is not None:
        of_an_image = counted.get_total_flops() / 2
        hours = of_an_image * 50_000 * config.schedule.epochs / 1e14 / 3600
        epochs = config.schedule.epochs
        print(f"{of_an_image / 1e9:.0f} GFLOP an image: {epochs} epochs take {hours:.0f} hours at 100 TFLOP/s")
