"""Agreement with independent implementations, and with plain loops over random arguments."""
import copy
import warnings

import foolbox
import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robust_jem.core.images import load_images, to_unit
from robust_jem.core.inputs import trusted_inputs
from robust_jem.ebm import energy
from robust_jem.ebm.attacks import pgd
from robust_jem.ebm.priors import UniformPrior
from robust_jem.ebm.samplers import proximal_sgld, sgld
from robust_jem.judge import sample_scores
from robust_jem.systems.hybrid_sampling import generate
from robust_jem.systems.hybrid_settings import METHODS, Chain

modest = settings(max_examples=30, deadline=None, derandomize=True)


# PGD, step for step

@pytest.fixture(scope="module")
def smooth_classifier():
    "Smooth, so that no pixel's gradient sits on a kink where two implementations may round to different signs."
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 64, 10)).double().eval()


@pytest.fixture(scope="module")
def digits_batch():
    images = load_images("digits")
    return to_unit(images.test_x[:16]).double(), images.test_y[:16]


ATTACKS = {
    "linf": (foolbox.attacks.LinfProjectedGradientDescentAttack, 0.15),
    "l2": (foolbox.attacks.L2ProjectedGradientDescentAttack, 1.2),
}


@pytest.mark.parametrize("targeted", (False, True), ids=("untargeted", "targeted"))
@pytest.mark.parametrize("norm", ATTACKS)
def test_pgd_equals_foolbox_step_for_step(smooth_classifier, digits_batch, norm, targeted):
    (x, y), (attack, eps) = digits_batch, ATTACKS[norm]
    labels = (y + 3) % 10 if targeted else y
    criterion = foolbox.criteria.TargetedMisclassification if targeted else foolbox.criteria.Misclassification
    goal = criterion(labels)
    choices = dict(norm=norm, targeted=targeted, random_start=False)
    peer_model = foolbox.PyTorchModel(smooth_classifier, bounds=(-1, 1), device="cpu")
    last = x
    for steps in range(1, 9):                                              # every state of the chain, not only its end
        peer = attack(steps=steps, abs_stepsize=eps / 3, random_start=False).run(peer_model, x, goal, epsilon=eps)
        ours = pgd(smooth_classifier, x, labels, eps, steps, step_size=eps / 3, **choices)
        assert torch.allclose(ours, peer, rtol=0, atol=1e-12), steps
        assert not torch.equal(ours, last), "the attack stands still, so agreement says nothing"
        last = ours


# Any module, left as it was found

class Stop(Exception):
    "What interrupts a chain."


def state_of(model):
    return dict(
        buffers=copy.deepcopy(model.state_dict()),
        modes=[m.training for m in model.modules()],
        flags=[p.requires_grad for p in model.parameters()],
        tracked=[getattr(m, "track_running_stats", None) for m in model.modules()])


def assert_untouched(model, before):
    after = state_of(model)
    assert all(torch.equal(v, before["buffers"][k]) for k, v in after["buffers"].items())
    assert all(after[k] == before[k] for k in ("modes", "flags", "tracked"))
    assert all(p.grad is None for p in model.parameters())


@pytest.fixture(scope="module")
def resnet():
    "A classifier that knows nothing of energies: in training mode, partly frozen, one layer in evaluation mode."
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).train()
    model.layer1.requires_grad_(False)
    model.layer2[0].bn1.eval()
    return model


IMAGES, LABELS = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1, torch.arange(4)
PRIOR = UniformPrior((3, 32, 32))


def generated(method):
    return lambda m: generate(m, PRIOR, LABELS, method, chain__outer_steps=2, attack__steps=2)


USES = {
    "score": lambda m: energy.score(m, IMAGES, LABELS),
    "marginal score": lambda m: energy.score(m, IMAGES),
    "pgd linf": lambda m: pgd(m, IMAGES, LABELS, 0.1, 2),
    "pgd l2": lambda m: pgd(m, IMAGES, LABELS, 1.0, 2, norm="l2", targeted=True),
    "sgld": lambda m: sgld(energy.score_of(m, LABELS), IMAGES, 2, 0.1, noise_std=0.01),
    "proximal_sgld": lambda m: proximal_sgld(energy.score_of(m), IMAGES, 2, 5, 0.2),
    "sgld by other statistics": lambda m: sgld(energy.score_of(m, statistics="running"), IMAGES, 2, 0.1),
    **{f"generate {method}": generated(method) for method in METHODS},
}


@pytest.mark.parametrize("use", USES)
def test_torchvision_model_is_left_untouched(resnet, use):
    before = state_of(resnet)
    x = USES[use](resnet)
    assert x.shape == IMAGES.shape and x.isfinite().all() and not x.requires_grad
    assert_untouched(resnet, before)


def stop_at_second(i, *_):
    if i in (1, "step 2"):
        raise Stop


INTERRUPTED = {
    "sgld": lambda m: sgld(energy.score_of(m), IMAGES, 5, 0.1, noise_std=0.01, on_step=stop_at_second),
    "proximal_sgld": lambda m: proximal_sgld(energy.score_of(m), IMAGES, 5, 5, 0.2, on_step=stop_at_second),
    "generate": lambda m: generate(
        m, PRIOR, LABELS, "combined", chain__outer_steps=5, attack__steps=2, on_stage=stop_at_second),
}


@pytest.mark.parametrize("use", INTERRUPTED)
def test_exception_in_the_middle_of_a_chain_leaves_the_model_untouched(resnet, use):
    before = state_of(resnet)
    with pytest.raises(Stop):
        INTERRUPTED[use](resnet)
    assert_untouched(resnet, before)


def test_interrupted_attack_leaves_the_model_untouched(resnet):
    before, calls = state_of(resnet), []
    def stop(*_):
        calls.append(1)
        if len(calls) == 2:
            raise Stop
    handle = resnet.fc.register_forward_hook(stop)
    with pytest.raises(Stop):
        pgd(resnet, IMAGES, LABELS, 0.1, 5)
    handle.remove()
    assert_untouched(resnet, before)


SHORT = {
    "sgld": lambda score: sgld(score, IMAGES, 5, 0.1),
    "proximal_sgld": lambda score: proximal_sgld(score, IMAGES, 5, 5, 0.2),
}


@pytest.mark.parametrize("chain", SHORT)
def test_a_chain_prepares_its_model_once(resnet, monkeypatch, chain):
    "Looking through all layers at every step would cost a wide network's chain its speed."
    entered, real = [], energy.untouched
    monkeypatch.setattr(energy, "untouched", lambda *a: entered.append(1) or real(*a))
    score = energy.score_of(resnet, LABELS)
    SHORT[chain](score)
    assert len(entered) == 1 and not score.blocks


@pytest.mark.parametrize("conditional", (False, True))
def test_a_plain_function_is_a_score_too(smooth_classifier, digits_batch, conditional):
    x, y = digits_batch
    y = y if conditional else None
    def by_hand(x):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(-energy.energy(smooth_classifier, leaf, y).sum(), leaf)[0]
    def seeded():
        return torch.Generator().manual_seed(0)
    ours = energy.score_of(smooth_classifier, y)
    assert torch.equal(sgld(by_hand, x, 4, 0.1, generator=seeded()), sgld(ours, x, 4, 0.1, generator=seeded()))
    assert torch.equal(proximal_sgld(by_hand, x, 4, 5, 0.1), proximal_sgld(ours, x, 4, 5, 0.1))


def test_a_sampler_changes_neither_its_start_nor_what_the_score_returns():
    x, constant = torch.full((2, 3), 0.5), torch.full((2, 3), 4.0, requires_grad=True)
    for end in (sgld(lambda x: constant, x, 2, 0.1, noise_std=0), proximal_sgld(lambda x: constant, x, 2, 5, 0.01)):
        assert not end.requires_grad
    assert (x == 0.5).all() and (constant == 4).all()


# The proximal inner loop

torch.manual_seed(1)
TWO_PART = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 16, 3)).double()


def proximal_loop(model, x, outer_steps, inner_steps, step_size, clip, y, bounds):
    "n small steps with one clipped gradient, clamped after each: JEM++'s inner loop as it is written."
    for _ in range(outer_steps):
        leaf = x.clone().requires_grad_()
        logits = model(leaf)
        log_p = logits.logsumexp(1) if y is None else logits[torch.arange(len(y)), y]
        p = torch.autograd.grad(log_p.sum(), leaf)[0].clamp(-clip, clip)
        for _ in range(inner_steps):
            x = x + step_size * p
            if bounds is not None:
                x = x.clamp(*bounds)
    return x


@modest
@given(outer=st.integers(0, 4), inner=st.integers(1, 9), step_size=st.floats(0, 3), clip=st.floats(1e-3, 2),
       conditional=st.booleans(), bounds=st.sampled_from((None, (-1, 1), (-0.3, 0.8))), spread=st.floats(0.1, 2),
       seed=st.integers(0, 2**32))
def test_proximal_closed_form_equals_its_loop(outer, inner, step_size, clip, conditional, bounds, spread, seed):
    # starts may lie outside the bounds, as after an augmentation with noise
    x = spread * torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    y = torch.tensor([0, 2, 1]) if conditional else None
    with trusted_inputs():
        ours = proximal_sgld(energy.score_of(TWO_PART, y), x, outer, inner, step_size, clip=clip, bounds=bounds)
    loop = proximal_loop(TWO_PART, x, outer, inner, step_size, clip, y, bounds)
    assert torch.allclose(ours, loop, rtol=1e-9, atol=1e-9)


# Scores

@modest
@given(n=st.integers(30, 80), m=st.integers(30, 80), d=st.integers(2, 12), shift=st.floats(-3, 3),
       scale=st.floats(0.2, 4), seed=st.integers(0, 2**32))
def test_distances_equal_clean_fid(n, m, d, shift, scale, seed):
    import cleanfid.fid
    g = torch.Generator().manual_seed(seed)
    f1 = torch.randn(n, d, generator=g, dtype=torch.float64)
    f2 = scale * torch.randn(m, d, generator=g, dtype=torch.float64) + shift
    moments = *sample_scores.moments(f1), *sample_scores.moments(f2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                             # clean-fid calls SciPy in a way that it is retiring
        frechet = cleanfid.fid.frechet_distance(*moments)
    assert np.isclose(sample_scores.frechet_distance(*moments), frechet, rtol=1e-6, atol=1e-6)
    # one subset of everything: then no draw of subsets differs between the two
    k = min(n, m)
    kernel = cleanfid.fid.kernel_distance(f1[:k].numpy(), f2[:k].numpy(), num_subsets=1, max_subset_size=k)
    assert np.isclose(sample_scores.kernel_distance(f1[:k], f2[:k], subsets=1)[0], kernel, rtol=1e-6, atol=1e-6)


@modest
@given(n=st.integers(4, 60), k=st.integers(2, 10), splits=st.integers(2, 4), sharpness=st.floats(0, 10),
       seed=st.integers(0, 2**32))
def test_inception_score_equals_its_definition(n, k, splits, sharpness, seed):
    p = (sharpness * torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).softmax(1)
    mean, std = sample_scores.inception_score(p, 1)
    assert np.isclose(mean, (p * (p.log() - p.mean(0).log())).nansum(1).mean().exp()) and abs(std) < 1e-9
    # parts are drawn at random but always alike; none can beat the bounds
    parts = sample_scores.inception_score(p, splits)
    assert parts == sample_scores.inception_score(p, splits) and 1 - 1e-9 <= parts[0] <= k + 1e-9


def test_kernel_distance_is_reproducible_and_grows_with_the_shift():
    g = torch.Generator().manual_seed(0)
    f1, f2 = torch.randn(300, 6, generator=g), torch.randn(300, 6, generator=g)
    def distance(shift):
        return sample_scores.kernel_distance(f1, f2 + shift, subsets=20, subset_size=50)
    assert distance(0.3) == distance(0.3) and distance(0)[0] < distance(0.3)[0] < distance(1)[0]


def test_sampler_default_needs_no_run():
    "generate() on a bare module: the sampler's defaults are JEM++'s."
    assert Chain().sampler == "proximal" and Chain().inner_steps == 5
    x = generate(TWO_PART.float(), UniformPrior((1, 4, 4)), torch.tensor([0, 1]), "energy", chain__outer_steps=1,
                 generator=torch.Generator().manual_seed(0))
    TWO_PART.double()
    assert x.shape == (2, 1, 4, 4) and x.abs().max() <= 1


def test_autoattack_and_our_attacks_agree_with_the_exact_margin():
    "On a linear classifier an image stands where every margin exceeds eps times the weights' difference in L1."
    from robust_jem.judge.robustness import autoattack_accuracy, robust_accuracy
    g = torch.Generator().manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(16, 5)).eval()
    with torch.no_grad():
        linear[1].weight.copy_(torch.randn(5, 16, generator=g))
        linear[1].bias.zero_()
    x = torch.randint(90, 166, (200, 1, 4, 4), dtype=torch.uint8, generator=g)         # in the middle: no bound binds
    w, unit = linear[1].weight.detach(), x / 127.5 - 1
    y = linear(unit).argmax(1)
    difference = w[y][:, None] - w[None]
    margin = (difference * unit.flatten(1)[:, None]).sum(2)
    for eps in (0.01, 0.03):
        slack = margin - eps * difference.abs().sum(2)
        slack[torch.arange(200), y] = float("inf")
        exact = (slack.amin(1) > 0).float().mean().item()
        assert 0.1 < exact < 0.95
        assert abs(autoattack_accuracy(linear, x, y, eps) - exact) <= 0.01
        # the cross-entropy's steepest class isn't always the nearest
        assert exact - 0.005 <= robust_accuracy(linear, x, y, eps, steps=50, restarts=2) <= exact + 0.08
        # one wrong class is a weaker attack than any
        assert robust_accuracy(linear, x, y, eps, steps=50, targeted=True) >= exact
