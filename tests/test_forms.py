"""Every public function that takes images, labels or a model, against every form that these come in.

Each gives the value of the usual form, or an `InputError` of one line: never another value, never a traceback from
inside. Which functions there are is read from the modules; what isn't in the table is named with its reason.
"""

import importlib
import inspect
import pkgutil
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn

from robust_jem.core.errors import InputError
from robust_jem.core.images import Images, to_unit
from robust_jem.ebm.attacks import attack_start, climb, distal, pgd
from robust_jem.ebm.energy import (
    ClassifierScore, conditional_density, detect, energy, joint_energy, marginal_energy, predict, rank, score, score_of,
)
from robust_jem.ebm.objectives import Terms, classification_loss, discrimination_loss, hybrid_loss, likelihood_loss
from robust_jem.ebm.priors import GaussianMixturePrior, UniformPrior
from robust_jem.ebm.replay import ReplayBuffer
from robust_jem.ebm.samplers import mala, normalised_ascent, proximal_sgld, sgld
from robust_jem.judge.calibration import all_logits, calibration
from robust_jem.judge.diversity import class_frechet
from robust_jem.judge.extractors import Extractor, extract, extract_once
from robust_jem.judge.ood import detect_ood, ood_images, ood_scores
from robust_jem.judge.robustness import accuracy, autoattack_accuracy, robust_accuracy, zero_gradients
from robust_jem.judge.sample_scores import quality, reference_statistics
from robust_jem.judge.foreign import check_classifier
from robust_jem.systems.hybrid_sampling import generate, run_chains
from robust_jem.systems.hybrid_settings import Chain

K, N = 4, 12


def generator():
    return torch.Generator().manual_seed(0)


X8 = torch.randint(256, (N, 1, 4, 4), dtype=torch.uint8, generator=generator())
X = to_unit(X8)
WEIGHT = torch.randn(1000, 16, generator=generator())


def linear(classes=K):
    "A linear classifier."
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, classes))
    net.load_state_dict({"1.weight": WEIGHT[:classes].clone(), "1.bias": torch.zeros(classes)})
    return net


Y = linear()(X).argmax(1)                           # right, but for one of them …
last = (Y == K - 1).nonzero()[0].item()              # among the first two, the ones that AutoAttack gets
X8[[1, last]], X[[1, last]], Y[[1, last]] = X8[[last, 1]], X[[last, 1]], Y[[last, 1]]
Y[0] = (Y[0] + 1) % (K - 1)
Y_EACH = torch.arange(N) % K                        # … and labels of which there are some of each


class Pixels(Extractor):
    suffix = "pixels"

    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1) / 255


IMAGES = Images("random", X8, Y_EACH, X8, Y_EACH, tuple("abcd"))
PRIOR = GaussianMixturePrior.fit(X8, Y_EACH, K)
COMPACT = PRIOR.compact(rank=2)
REFERENCE = reference_statistics(Pixels(), IMAGES)
CHAIN = Chain(outer_steps=2, step_size=0.01, statistics=None)


def buffer():
    return ReplayBuffer(N, PRIOR, generator=generator())


def filled(x, y):
    b = buffer()
    b.fill(x, y)
    return torch.cat([b.x.flatten(), b.y.float()])


def stored(x):
    b = buffer()
    b.store(torch.arange(0 if empty(x) else N), x)
    return b.x


def normal_law(x):
    return -x.square().flatten(1).sum(1)


def empty(x):
    return isinstance(x, torch.Tensor) and not x.numel()


def two(v):
    "AutoAttack takes its time."
    try:
        return v[:2]
    except (TypeError, NotImplementedError):
        return v


def loss_of(s):
    total, parts = hybrid_loss(
        s.model, Terms(clean=1.0, likelihood=1.0), s.y, x_clean=s.x, x_real=s.x, x_sampled=s.x, y_real=s.y,
        y_sampled=s.y,
    )
    return torch.stack([total.detach(), parts["clean_loss"]])


# Each entry: what to do with a namespace of model, x and y, and which of these are tried.
TABLE = {
    "energy.joint_energy": ("y", lambda s: joint_energy(linear()(X), s.y)),
    "energy.detect": ("y", lambda s: detect(linear()(X), 0.0, s.y)),
    "energy.energy": ("mxy", lambda s: energy(s.model, s.x, s.y)),
    "energy.ClassifierScore": ("mxy", lambda s: ClassifierScore(s.model, s.y)(s.x)),
    "energy.score_of": ("mxy", lambda s: score_of(s.model, s.y)(s.x)),
    "energy.score": ("mxy", lambda s: score(s.model, s.x, s.y)),
    "attacks.attack_start": ("x", lambda s: attack_start(s.x, 0.1, generator=generator())),
    "attacks.climb": ("mxy", lambda s: climb(s.model, s.x, X[:0] if empty(s.x) else X, s.y, 0.1, 0.05, 2)),
    "attacks.pgd": ("mxy", lambda s: pgd(s.model, s.x, s.y, 0.1, 2, norm="l2", random_start=False)),
    "attacks.distal": ("mxy", lambda s: distal(s.model, s.x, s.y, 0.8, 3)[0]),
    "samplers.sgld": ("mxy", lambda s: sgld(score_of(s.model, s.y), s.x, 2, 0.1, noise_std=0)),
    "samplers.proximal_sgld": ("mxy", lambda s: proximal_sgld(score_of(s.model, s.y), s.x, 2, 5, 0.01)),
    "samplers.normalised_ascent": ("mxy", lambda s: normalised_ascent(score_of(s.model, s.y), s.x, 2, 0.1)),
    "samplers.mala": ("x", lambda s: mala(normal_law, s.x, 2, 0.01, generator=generator())[0]),
    "priors.GaussianMixturePrior.fit": ("xy", lambda s: GaussianMixturePrior.fit(s.x, s.y, K).mean),
    "priors.GaussianMixturePrior.sample": ("y", lambda s: PRIOR.sample(s.y, generator())),
    "priors.GaussianMixturePrior.log_prob": ("xy", lambda s: PRIOR.log_prob(s.x, s.y)),
    "priors.CompactGaussianPrior.sample": ("y", lambda s: COMPACT.sample(s.y, generator())),
    "priors.CompactGaussianPrior.log_prob": ("xy", lambda s: COMPACT.log_prob(s.x, s.y)),
    "priors.UniformPrior.sample": ("y", lambda s: UniformPrior((1, 4, 4), K).sample(s.y, generator())),
    "replay.ReplayBuffer.fill": ("xy", lambda s: filled(s.x, s.y)),
    "replay.ReplayBuffer.store": ("x", lambda s: stored(s.x)),
    "objectives.classification_loss": ("mxy", lambda s: classification_loss(s.model, s.x, s.y)[0].detach()),
    "objectives.likelihood_loss": ("mxy", lambda s: likelihood_loss(s.model, s.x, s.x, s.y, s.y)[1].detach()),
    "objectives.discrimination_loss": (
        "mxy", lambda s: discrimination_loss(s.model, s.x, s.x, s.y, s.y)[1].detach()),
    "objectives.hybrid_loss": ("mxy", loss_of),
    "robustness.accuracy": ("mxy", lambda s: accuracy(s.model, s.x, s.y)),
    "robustness.robust_accuracy": ("mxy", lambda s: robust_accuracy(s.model, s.x, s.y, 0.1, 3)),
    "robustness.zero_gradients": ("mxy", lambda s: zero_gradients(s.model, s.x, s.y)),
    "robustness.autoattack_accuracy": ("mxy", lambda s: autoattack_accuracy(s.model, two(s.x), two(s.y), 3.0)),
    "calibration.all_logits": ("mx", lambda s: all_logits(s.model, s.x).argsort(1).double()),
    "calibration.calibration": ("y", lambda s: calibration(linear()(X), s.y)["ECE"]),
    "diversity.class_frechet": ("y", lambda s: class_frechet(X.flatten(1), s.y, X.flatten(1), s.y, K)[0]),
    "ood.ood_scores": ("mx", lambda s: torch.stack(list(ood_scores(s.model, s.x).values()))),
    "ood.ood_images": ("x", lambda s: ood_images("interpolations", s.x, 5, generator())),
    "ood.detect_ood": ("mx", lambda s: detect_ood(s.model, s.x, {"a": X8})[1]["test images"]["log p(x)"]),
    "extractors.extract": ("x", lambda s: extract(Pixels(), s.x)[0]),
    "extractors.extract_once": ("x", lambda s: extract_once(Pixels(), s.x, None)[0]),
    "sample_scores.quality": ("x", lambda s: quality(Pixels(), s.x, REFERENCE)["FD-pixels"]),
    "foreign.check_classifier": ("m", lambda s: check_classifier(s.model, IMAGES, "mine")),
    "hybrid_sampling.run_chains": ("mxy", lambda s: run_chains(s.model, s.x, CHAIN, s.y, generator())),
    "hybrid_sampling.generate": ("my", lambda s: generate(
        s.model, PRIOR, s.y, generator=generator(), attack={"steps": 2, "statistics": None},
        chain={"outer_steps": 2, "inner_steps": 1, "statistics": None})),
}
# These want labels of every class; the others want labels that are mostly right.
EVEN = ("priors", "replay", "diversity", "hybrid_sampling.generate")

REASONS = {
    "extractors.Extractor": "its methods are called by extract, which has looked at the images",
    "extractors.ClassifierExtractor": "as Extractor",
    "extractors.ScriptExtractor": "as Extractor",
    "extractors.InceptionExtractor": "as Extractor",
    "extractors.EffNetExtractor": "as Extractor",
    "extractors.PairExtractor": "as Extractor",
    "energy.input_gradient": "a building block: its callers have looked at the values",
    "energy.untouched": "a block around a model: no value comes out",
    "energy.frozen_statistics": "a block around a model: no value comes out",
    "energy.batch_norms": "lists layers",
    "energy.check_labels": "is itself the check of labels",
    "attacks.Linf.draw": "a building block of attacks",
    "attacks.L2.draw": "a building block of attacks",
    "robustness.device_of": "where a model is",
    "robustness.OwnPrecision": "a module around a model, as torch calls modules",
    "robustness.in_own_precision": "a module around a model",
    "robustness.UnitInterval": "a module around a model, as torch calls modules",
    "robustness.SignedInterval": "a module around a model, as torch calls modules",
    "zoo.Preprocessed": "a module around a model, as torch calls modules",
    "zoo.load_state": "fills a model's weights",
    "foreign.source_hash": "looks at code",
    "foreign.on_signed_images": "a module around a model",
    "sweep.Nearness": "hands the images to extract, which looks at them",
    "targets.EvalTarget": "made of a run or a factory's model, which check_classifier has looked at",
    "foreign.check_drawn": "what our own chains drew; looked at for numbers and nothing else",
    "ood.auroc": "takes scores",
    "likelihood.bits_per_dim": "takes uint8 grey levels alone: dequantise refuses all else",
    "likelihood.gmm_bits_per_dim": "as bits_per_dim",
    "likelihood.GaussianMixtureDensity": "a system's density, as bits_per_dim calls it",
    "scorer.SampleScorer": "called by evaluation with what it has read from a run",
    "wide_resnet.Block": "a layer",
    "wide_resnet.WideResNet": "a module: types and shapes are checked, ranges aren't, for it trains on noisy images",
    "fused.can_fuse": "looks at layers",
    "fused.fused_forward": "a network's own forward pass on a GPU",
    "hybrid_update.HotPaths": "an update's own parts, in a block of trusted_inputs",
    "hybrid.EnergyClassifier": "a system, called by later stages; log_density is energy, sample is generate",
}
def modules_of(room):
    "The names of a room's modules."
    return tuple(m.name for m in pkgutil.iter_modules(importlib.import_module(f"robust_jem.{room}").__path__))


MODULES = {
    "ebm": modules_of("ebm"),
    "judge": modules_of("judge"),
    "networks": ("wide_resnet", "fused"),       # the others are layers of systems, called by these
    "systems": ("hybrid_settings", "hybrid_sampling", "hybrid_update", "hybrid"),
}
TAKEN = {"x", "x0", "y", "model", "x_clean", "inside"}


def public_callables():
    "Functions, and methods of classes, by module and name, of which a parameter is called as images, labels or models."
    for room, names in MODULES.items():
        for name in names:
            module = importlib.import_module(f"robust_jem.{room}.{name}")
            for public in module.__all__:
                value = getattr(module, public)
                if inspect.isfunction(value):
                    yield f"{name}.{public}", value
                elif inspect.isclass(value):
                    yield f"{name}.{public}", value.__init__
                    for attribute, method in vars(value).items():
                        method = getattr(method, "__func__", method)
                        if inspect.isfunction(method) and not attribute.startswith("_"):
                            yield f"{name}.{public}.{attribute}", method


def test_every_public_function_is_in_the_table():
    "By itself, as a method, or as all methods of a class."
    found = {name for name, f in public_callables() if TAKEN & set(inspect.signature(f).parameters)}
    chains = {"samplers.sgld", "samplers.proximal_sgld", "energy.joint_energy", "energy.detect"}
    known = set(TABLE) | set(REASONS)
    lacking = {name for name in found if name not in known and name.rpartition(".")[0] not in known}
    assert not lacking, "give each an entry in TABLE, or a reason"
    assert chains <= set(TABLE)
    stale = {name for name in REASONS if not any(f == name or f.startswith(name + ".") for f, _ in public_callables())}
    assert not stale


def usual(name, **changes):
    y = Y_EACH if name.startswith(EVEN) else Y
    return SimpleNamespace(**{"model": linear(), "x": X, "y": y} | changes)


def outcome(name, **changes):
    "What a function gives; an `InputError` must be of one line."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return TABLE[name][1](usual(name, **changes))
        except InputError as e:
            assert "\n" not in str(e) and len(str(e)) > 10
            return e


def same(a, b, rtol=1e-4, atol=1e-5):
    a, b = (torch.as_tensor(v, dtype=torch.float64) for v in (a, b))
    return a.shape == b.shape and torch.allclose(a, b, rtol=rtol, atol=atol)


def of(letter):
    return [name for name, (takes, _) in TABLE.items() if letter in takes]


@pytest.fixture(scope="module")
def expected():
    "The values of the usual forms."
    return {name: outcome(name) for name in TABLE}


def test_the_usual_forms_have_values(expected):
    assert not [name for name, v in expected.items() if isinstance(v, InputError)]


LABELS = {
    "int64": (lambda y: y, True),
    "int32": (lambda y: y.int(), True),
    "uint8": (lambda y: y.to(torch.uint8), True),
    "numpy": (lambda y: y.numpy(), True),
    "list": (lambda y: y.tolist(), True),
    "backwards in memory": (lambda y: y.numpy()[::-1].copy()[::-1], True),
    "of another byte order": (lambda y: y.numpy().astype(">i4"), True),
    "uint16": (lambda y: y.numpy().astype("uint16"), True),
    "column of a table": (lambda y: pd.Series(y.numpy(), index=range(5, 5 + len(y))), True),
    "list of tensors": (lambda y: list(y), True),
    "float": (lambda y: y.float(), False),
    "complex": (lambda y: y.to(torch.complex64), False),
    "meta": (lambda y: y.to("meta"), False),
    "column": (lambda y: y[:, None], False),
    "one-hot": (lambda y: torch.eye(K).long()[y], False),
    "out of range": (lambda y: torch.where(y == 3, 4, y), False),
    "negative": (lambda y: y - 1, False),
    "bool": (lambda y: y > 1, False),
    "too few": (lambda y: y[:5], False),
    "text": (lambda y: ["three"] * len(y), False),
    "ragged": (lambda y: [[0], [1, 2]], False),
    "none": (lambda y: None, None),
}
# Of these, too few labels are as many as are wanted.
DRAWS = (
    "priors.GaussianMixturePrior.sample", "priors.CompactGaussianPrior.sample", "priors.UniformPrior.sample",
    "hybrid_sampling.generate",
)
# A buffer doesn't know how many classes there are; of AutoAttack's few labels no fewer are given.
UNTOLD = {("replay.ReplayBuffer.fill", "out of range"), ("robustness.autoattack_accuracy", "too few")}


@pytest.mark.parametrize("form", LABELS)
@pytest.mark.parametrize("name", of("y"))
def test_labels(name, form, expected):
    make, right = LABELS[form]
    got = outcome(name, y=make(usual(name).y))
    if form == "none" or (name, form) in UNTOLD:                # the marginal, where there is one; never a traceback
        return
    if name in DRAWS and form == "too few":
        assert len(got) == 5
    elif right:
        assert same(got, expected[name])
    else:
        assert isinstance(got, InputError) and "label" in str(got), got


PIXELS = {
    "float": (lambda: X, True),
    "uint8": (lambda: X8, True),
    "numpy": (lambda: X.numpy(), True),
    "numpy uint8": (lambda: X8.numpy(), True),
    "list": (lambda: X.tolist(), True),
    "float64": (lambda: X.double(), True),
    "not contiguous": (lambda: X.to(memory_format=torch.channels_last), True),
    "backwards in memory": (lambda: X.numpy()[::-1].copy()[::-1], True),
    "of another byte order": (lambda: X.numpy().astype(">f4"), True),
    "list of tensors": (lambda: list(X), True),
    "with a gradient": (lambda: X.clone().requires_grad_(), True),
    "0..1": (lambda: X8 / 255, False),
    "0..255": (lambda: X8.float(), False),
    "int64": (lambda: X8.long(), False),
    "NaN": (lambda: X * float("nan"), False),
    "infinite": (lambda: X / 0, False),
    "one image": (lambda: X[0], False),
    "channels last": (lambda: torch.full((N, 8, 8, 3), -0.5), False),
    "text": (lambda: "digits", False),
    "none": (lambda: None, False),
    "one pixel NaN": (lambda: torch.where(torch.arange(X.numel()).view_as(X) == 7, torch.nan, X), False),
    "meta": (lambda: X.to("meta"), False),
    "float8": (lambda: X.to(torch.float8_e4m3fn), False),
    "no pixels": (lambda: X[..., :0], False),
    "complex": (lambda: X.to(torch.complex64), False),
    "sparse": (lambda: X.to_sparse(), False),
}
# Chains are stored as they are, once their type and shape fit.
STORES = {
    "replay.ReplayBuffer.store": {"uint8": False, "numpy uint8": False, "0..1": None, "0..255": None, "NaN": None,
                                  "infinite": None, "one pixel NaN": None},
    "replay.ReplayBuffer.fill": {"0..1": None, "0..255": None},
    "samplers.mala": {"one image": None, "float64": None, "0..1": None, "0..255": None},     # of any law
    "attacks.attack_start": {"one image": None, "float64": None},            # any points; other random numbers
}


@pytest.mark.parametrize("form", PIXELS)
@pytest.mark.parametrize("name", of("x"))
def test_images(name, form, expected):
    make, right = PIXELS[form]
    right = STORES.get(name, {}).get(form, right)
    got = outcome(name, x=make())
    if right:
        assert not isinstance(got, InputError), got
        assert same(got.detach() if isinstance(got, torch.Tensor) else got, expected[name])
    elif right is False:
        assert isinstance(got, InputError), got


@pytest.mark.parametrize("name", of("x"))
def test_no_images(name):
    "Empty batches come back empty where they can; a mean of none is refused."
    takes = TABLE[name][0]
    got = outcome(name, x=X[:0], **({"y": Y[:0]} if "y" in takes else {}))
    if not isinstance(got, InputError):
        assert len(got) == 0 or name == "replay.ReplayBuffer.store"
    means = ("robustness", "objectives", "ood", "extract", "sample_scores", "priors.GaussianMixturePrior.fit",
             "replay.ReplayBuffer.fill")
    assert isinstance(got, InputError) == name.startswith(means), got


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", [True, False])
def test_an_attack_on_no_images_is_empty(norm, start):
    assert pgd(linear(), X[:0], Y[:0], 0.1, 2, norm=norm, random_start=start).shape == (0, 1, 4, 4)


# Models


class Within(nn.Module):
    "A model whose forward pass runs within some block."

    def __init__(self, block, net=None):
        super().__init__()
        self.net, self.block = net or linear(), block

    def forward(self, x):
        with self.block():
            return self.net(x)


class Raises(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.net, self.error = linear(), error

    def forward(self, x):
        raise self.error


class Detached(Within):
    def forward(self, x):
        return self.net(x).detach()


class InPlace(Within):
    "What a first layer that works in place does."

    def forward(self, x):
        return self.net(x.mul_(1.0))


def frozen():
    "Layers in modes and flags of their own; they change nothing."
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16, eps=1e-9), nn.Dropout(0.0), linear()).train()
    net[1].eval()
    net[3][1].bias.requires_grad_(False)
    return net


def state(model):
    return (
        [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()],
        [(p.requires_grad, p.grad is None) for p in model.parameters()],
        [v.clone() for v in model.state_dict().values()],
    )


MODELS = {
    "frozen layers": frozen,
    "no parameters asked for gradients": lambda: linear().requires_grad_(False),
    "no_grad": lambda: Within(torch.no_grad),
    "inference_mode": lambda: Within(torch.inference_mode),
    "detached": lambda: Detached(nullcontext),
    "in place": lambda: InPlace(nullcontext),
    "double": lambda: linear().double(),
    "DataParallel": lambda: nn.DataParallel(linear()),
    "log-probabilities": lambda: nn.Sequential(linear(), nn.LogSoftmax(1)),
    "probabilities": lambda: nn.Sequential(linear(), nn.Softmax(1)),
    "scripted": lambda: torch.jit.script(linear()),
    "EMA": lambda: torch.optim.swa_utils.AveragedModel(linear()),
}
# By what users expect, these are right whatever is asked.
ALWAYS = ("frozen layers", "no parameters asked for gradients", "double", "DataParallel", "scripted", "EMA")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", of("m"))
@pytest.mark.filterwarnings("ignore")
def test_models(name, kind, expected):
    "The usual value or a refusal; and the model as it was."
    model, x = MODELS[kind](), X.clone()
    before = state(model)
    got = outcome(name, model=model, x=x)
    if isinstance(got, InputError):
        assert kind not in ALWAYS, got
        assert "model" in str(got)
    elif not (kind == "log-probabilities" and name == "foreign.check_classifier"):
        assert same(got, expected[name], rtol=1e-3, atol=1e-4)
    after = state(model)
    assert before[:2] == after[:2] and all(torch.equal(a, b) for a, b in zip(before[2], after[2]))
    if kind != "in place" or not isinstance(got, InputError):
        assert torch.equal(x, X)


@pytest.mark.parametrize("name", of("m"))
def test_what_needs_no_gradient_takes_models_without(name, expected):
    for kind in ("no_grad", "detached"):
        got = outcome(name, model=MODELS[kind]())
        needs = not name.startswith(("energy.energy", "robustness.accuracy", "objectives", "calibration"))
        assert isinstance(got, InputError) == needs
        assert not needs or "no gradient" in str(got)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", of("m"))
def test_models_in_half_precision(name, dtype, expected):
    got = outcome(name, model=linear().to(dtype))
    assert not isinstance(got, InputError), got
    got, usual_value = (torch.as_tensor(v, dtype=torch.float64) for v in (got, expected[name]))
    assert got.shape == usual_value.shape
    spread = usual_value.abs().mean() + 0.1
    assert (got - usual_value).abs().mean() <= 0.1 * spread


@pytest.mark.parametrize("classes", [1, 2, 3, 1000])
@pytest.mark.parametrize("name", of("m"))
def test_any_number_of_classes(name, classes):
    model = linear(classes)
    y = model(X).argmax(1)
    got = outcome(name, model=model, **({} if name == "foreign.check_classifier" else {"y": y}))
    few = name == "robustness.autoattack_accuracy" and classes < 4
    if few or name in ("foreign.check_classifier", "hybrid_sampling.generate"):   # these have classes of their own
        return
    assert not isinstance(got, InputError), got
    assert torch.as_tensor(got).isfinite().all()
    if name == "energy.energy":
        assert same(got, -model(X).amax(1).detach())
    if name.startswith("robustness.accuracy"):
        assert got == 1


ERRORS = [ValueError("only on\nSundays"), RuntimeError(), KeyError("a"), ZeroDivisionError("b")]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("name", of("m"))
def test_a_models_own_error_is_named_and_is_the_cause(name, error):
    got = outcome(name, model=Raises(error))
    assert isinstance(got, InputError) and got.__cause__ is error
    assert type(error).__name__ in str(got) or "only on" in str(got) or name == "foreign.check_classifier"


@pytest.mark.parametrize("answer", [
    lambda z: (z, z), lambda z: {"logits": z}, lambda z: z[:, 0], lambda z: z[:1], lambda z: z[..., None],
    lambda z: None, lambda z: z.argmax(1, keepdim=True), lambda z: z.sum(),
], ids=["tuple", "dict", "one number", "too few", "three dimensions", "none", "whole numbers", "a mean"])
@pytest.mark.parametrize("name", of("m"))
def test_answers_that_are_no_logits(name, answer):
    class Other(Within):
        def forward(self, x):
            return answer(self.net(x))

    got = outcome(name, model=Other(nullcontext))
    assert isinstance(got, InputError) and "model" in str(got), got


@pytest.mark.parametrize("name", of("m"))
@pytest.mark.parametrize("model", ["resnet18", None, linear, lambda x: linear()(x)], ids=["text", "none", "class", "f"])
def test_what_is_no_model(name, model):
    got = outcome(name, model=model)
    if not (name.startswith(("energy.energy", "objectives")) and callable(model)):
        assert isinstance(got, InputError), got
        assert "model" in str(got)


@pytest.mark.parametrize("name", of("m"))
def test_under_inference_mode(name, expected):
    "Everything is made there, but the model."
    model = linear()
    with torch.inference_mode():
        got = outcome(name, model=model, x=X.clone(), y=usual(name).y.clone())
        assert not isinstance(got, InputError), got
        assert same(got, expected[name])


@pytest.mark.parametrize("name", of("m"))
def test_a_model_made_under_inference_mode(name, expected):
    with torch.inference_mode():
        model = linear()
    got = outcome(name, model=model)
    if isinstance(got, InputError):
        assert "inference_mode" in str(got)
    else:
        assert same(got, expected[name])


@pytest.mark.parametrize("name", of("m"))
def test_under_no_grad(name, expected):
    with torch.no_grad():
        assert same(outcome(name), expected[name])


@pytest.mark.parametrize("name", [n for n in of("m") if n != "robustness.autoattack_accuracy"])
def test_compiled_models(name, expected, compiled):
    got = outcome(name, model=compiled)
    assert same(got, expected[name], rtol=1e-3, atol=1e-4), got


@pytest.fixture(scope="module")
def compiled():
    return torch.compile(linear(), backend="aot_eager")


def test_log_probabilities_have_no_density_but_classify():
    "Where E(x) would be 0 for every image, nothing is measured; where only p(y|x) counts, it is the same."
    model = MODELS["log-probabilities"]()
    for name in ("energy.energy", "energy.score", "samplers.sgld", "ood.ood_scores", "ood.detect_ood"):
        assert "log-probabilities" in str(outcome(name, model=model))
    for name in ("attacks.pgd", "robustness.robust_accuracy", "objectives.classification_loss"):
        assert same(outcome(name, model=model), outcome(name))
    assert same(marginal_energy(linear()(X).log_softmax(1)), torch.zeros(N))
    logits = linear()(X)
    assert torch.equal(predict(logits.log_softmax(1)), predict(logits))
    assert torch.equal(rank(logits.detach().numpy()), rank(logits))
    assert torch.allclose(conditional_density(logits.log_softmax(1)), conditional_density(logits))
