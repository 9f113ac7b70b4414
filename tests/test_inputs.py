"""What a new user hands over: other types, shapes and ranges, other code under the same name, models in odd states."""

import io
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import snapshot
from PIL import Image
from torch import nn

from robust_jem.app.cli import main
from robust_jem.bench.comparison import all_logits
from robust_jem.core.errors import InputError
from robust_jem.core.files import fingerprint, read_json, write_json
from robust_jem.core.images import Batches, Images, add_noise, augment, load_images, to_uint8, to_unit
from robust_jem.core.inputs import evaluating
from robust_jem.ebm.attacks import attack_start, climb, pgd
from robust_jem.ebm.energy import conditional_density, detect, joint_energy, marginal_energy
from robust_jem.ebm.growth import GrowingLength, area_under_roc
from robust_jem.ebm.objectives import Terms, hybrid_loss
from robust_jem.ebm.priors import GaussianMixturePrior, UniformPrior
from robust_jem.ebm.replay import ReplayBuffer
from robust_jem.ebm.samplers import sgld
from robust_jem.engine.pretrained import RobustJEM
from robust_jem.engine.runs import Run
from robust_jem.engine.train import train
from robust_jem.judge.calibration import calibration
from robust_jem.judge.diversity import class_frechet, nearest
from robust_jem.judge.extractors import Extractor, extract, extract_once, feature_extractor
from robust_jem.judge.ood import detect_ood, ood_images, ood_scores
from robust_jem.judge.robustness import (
    UnitInterval, accuracy, autoattack_accuracy, eps_at_accuracy, robust_accuracy, zero_gradients,
)
from robust_jem.judge.sample_scores import (
    draw_test_images, frechet_distance, inception_score, moments, quality, reference_statistics,
)
from robust_jem.judge.curves import masking_verdict
from robust_jem.judge.foreign import check_classifier, import_model
from robust_jem.judge.likelihood import bits_per_dim
from robust_jem.judge.sweep import FrechetTo
from robust_jem.networks.wide_resnet import WideResNet
from robust_jem.report.figures import SuiteResults
from robust_jem.systems.catalog import TrainConfig, configure
from robust_jem.systems.hybrid_sampling import generate, run_chains

N = 40


@pytest.fixture(scope="module")
def digits():
    return load_images("digits")


@pytest.fixture(scope="module")
def linear(digits):
    "A linear classifier of digits, fitted: right about most of them, and exact to attack."
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nn.init.normal_(net[1].weight, std=0.01)
    x, y = to_unit(digits.train_x), digits.train_y
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(80):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.requires_grad_(False)


class Pixels(Extractor):
    "Pooled pixels as features."

    suffix = "pixels"

    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1) / 255


# A. Labels

MEASURES = {
    "accuracy": lambda net, x, y: accuracy(net, x, y),
    "robust_accuracy": lambda net, x, y: robust_accuracy(net, x, y, 0.2, 3),
    "autoattack_accuracy": lambda net, x, y: autoattack_accuracy(net, x, y, 0.1),
    "zero_gradients": lambda net, x, y: zero_gradients(net, x, y),
    "calibration": lambda net, x, y: calibration(net(to_unit(x)), y)["ECE"],
    "class_frechet": lambda net, x, y: class_frechet(to_unit(x).flatten(1), y, to_unit(x).flatten(1), y, 10),
}
FEW = [name for name in MEASURES if name != "autoattack_accuracy"]


@pytest.mark.filterwarnings("ignore:Fréchet distance by class")
@pytest.mark.parametrize("name", FEW)
def test_labels_in_every_integer_form_are_the_same(name, linear, digits):
    x, y = digits.test_x[:N], digits.test_y[:N]
    expected = MEASURES[name](linear, x, y)
    for same in (y.int(), y.to(torch.uint8), y.numpy(), y.numpy().astype(np.int16), y.tolist()):
        assert MEASURES[name](linear, x, same) == expected


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize(
    "form",
    ["column", "row", "one-hot", "float", "bool", "too few", "too large", "negative", "text", "scalar", "ragged"],
)
def test_other_labels_are_refused_in_one_line(name, form, linear, digits):
    x, y = digits.test_x[:N], digits.test_y[:N]
    others = {
        "column": y[:, None],
        "row": y[None],
        "one-hot": torch.eye(10).long()[y],
        "float": y.float(),
        "bool": y > 3,
        "too few": y[:3],
        "too large": y + 10,
        "negative": y - 10,
        "text": ["three"] * N,
        "scalar": y[0],
        "ragged": [[0]] * (N - 1) + [[1, 2]],
    }
    with pytest.raises(InputError, match="label") as error:
        MEASURES[name](linear, x, others[form])
    assert "\n" not in str(error.value)


def test_autoattack_takes_other_integers(linear, digits):
    "Its own code would index with them."
    x, y = digits.test_x[:4], digits.test_y[:4]
    assert autoattack_accuracy(linear, x, y.int(), 0.3) == autoattack_accuracy(linear, x, y, 0.3)


# A. Images


def of_images(digits, linear):
    "Every function that takes images, as a number or tensor."
    y, reference = digits.test_y[:N], reference_statistics(Pixels(), digits)

    def fidelity(x):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return quality(Pixels(), x, reference)["FD-pixels"]

    def detection(x):
        return detect_ood(linear, x, {"rotated": digits.test_x[:N].rot90(1, (-2, -1))})[0]["rotated"]["log p(x)"]

    return {
        "accuracy": lambda x: accuracy(linear, x, y),
        "robust_accuracy": lambda x: robust_accuracy(linear, x, y, 0.2, 3),
        "zero_gradients": lambda x: zero_gradients(linear, x, y),
        "ood_scores": lambda x: ood_scores(linear, x)["log p(x)"].sum().item(),
        "detect_ood": detection,
        "ood_images": lambda x: ood_images("rotated", x, 5, torch.Generator().manual_seed(0)).float().mean().item(),
        "extract": lambda x: extract(Pixels(), x)[0].sum().item(),
        "extract_once": lambda x: extract_once(Pixels(), x, None)[0].sum().item(),
        "quality": fidelity,
    }


IMAGE_FUNCTIONS = (
    "accuracy",
    "robust_accuracy",
    "zero_gradients",
    "ood_scores",
    "detect_ood",
    "ood_images",
    "extract",
    "extract_once",
    "quality",
)


@pytest.mark.parametrize("name", IMAGE_FUNCTIONS)
def test_images_in_every_clear_form_are_the_same(name, linear, digits):
    measure, x8 = of_images(digits, linear)[name], digits.test_x[:N]
    expected = measure(x8)
    for same in (to_unit(x8), to_unit(x8).double(), x8.numpy(), to_unit(x8).numpy(), to_unit(x8).tolist()):
        assert measure(same) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", IMAGE_FUNCTIONS)
@pytest.mark.parametrize(
    "form", ["0..1", "0..255", "int", "NaN", "too wide", "one image", "channels last", "text", "none"]
)
def test_other_images_are_refused_in_one_line(name, form, linear, digits):
    x8 = digits.test_x[:N]
    others = {
        "0..1": x8 / 255,
        "0..255": x8.float(),
        "int": x8.int(),
        "NaN": to_unit(x8) * float("nan"),
        "too wide": 1.5 * to_unit(x8),
        "one image": x8[0],
        "channels last": x8.permute(0, 2, 3, 1),
        "text": "digits",
        "none": None,
    }
    with pytest.raises(InputError) as error:
        of_images(digits, linear)[name](others[form])
    assert "images" in str(error.value) and "\n" not in str(error.value)


def test_distance_of_held_out_digits_is_small_in_either_form(digits):
    "As floats in [-1,1] they once were 70 away from themselves as bytes."
    reference = reference_statistics(Pixels(), digits)
    as_bytes, as_floats = (quality(Pixels(), x, reference) for x in (digits.test_x, to_unit(digits.test_x)))
    assert as_bytes == as_floats and as_bytes["FD-pixels"] < 0.01


def test_nearest_compares_like_with_like(digits):
    x8 = digits.test_x[:5]
    assert torch.equal(nearest(x8, digits.test_x)[1][:, 0], torch.arange(5))
    for bad in (to_unit(x8), to_unit(x8) * float("nan")):
        with pytest.raises(InputError, match="nearest"):
            nearest(bad, digits.test_x)


def test_probabilities_and_logits_are_told_apart(linear, digits):
    logits = linear(to_unit(digits.test_x))
    assert calibration(logits.log_softmax(1), digits.test_y)["ECE"] == pytest.approx(
        calibration(logits, digits.test_y)["ECE"], abs=1e-6
    )
    with pytest.raises(InputError, match="these are probabilities"):
        calibration(logits.softmax(1), digits.test_y)
    with pytest.raises(InputError, match="add up to 1"):
        inception_score(logits.exp(), 1)


# A. Models


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_models_in_other_precisions(dtype, linear, digits):
    x, y = digits.test_x[:N], digits.test_y[:N]
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    other.load_state_dict(linear.state_dict())
    other.to(dtype)
    assert abs(accuracy(other, x, y) - accuracy(linear, x, y)) <= 0.05
    assert abs(robust_accuracy(other, x, y, 0.2, 3) - robust_accuracy(linear, x, y, 0.2, 3)) <= 0.05
    assert torch.allclose(ood_scores(other, x)["log p(x)"], ood_scores(linear, x)["log p(x)"], rtol=0.05, atol=0.1)


@pytest.mark.parametrize("classes", [1, 2, 3, 1000])
def test_any_number_of_classes(classes, digits):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    x, y = digits.test_x[:N], net(to_unit(digits.test_x[:N])).argmax(1)
    assert accuracy(net, x, y) == 1 and robust_accuracy(net, x, y, 0.0) == 1
    if classes == 1:
        with pytest.raises(InputError, match="at least two"):
            robust_accuracy(net, x, y, 0.1, 2, targeted=True)
        with pytest.raises(InputError, match="at least two classes"):
            calibration(net(to_unit(x)), y)
    if classes < 4:
        with pytest.raises(InputError, match="at least four"):
            autoattack_accuracy(net, x, y, 0.1)


# B. Caches


def test_other_images_under_the_same_name_are_measured_again(runs, cli):
    "A folder of images whose files were replaced: its name is the same, the answer isn't."
    folder = Path("others")
    argv = ["evaluate", "runs/robust_jem", "--suite", "detection", "--strangers", "others", "--device", "cpu"]

    def measured(make):
        folder.mkdir(exist_ok=True)
        for i in range(20):
            Image.fromarray(make(i)).save(folder / f"{i}.png")
        assert cli(*argv, "--num-strangers", 20).code == 0
        return read_json(runs / "robust_jem/suite/detection.json")

    digits = load_images("digits").test_x
    first = measured(lambda i: np.full((8, 8), 12 * i, np.uint8))
    second = measured(lambda i: digits[i, 0].numpy())
    assert first["AUROC"] != second["AUROC"] and first["images"] != second["images"]
    again = measured(lambda i: digits[i, 0].numpy())
    assert again == second


CODE = """
import torch
from torch import nn
from parts import scale

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed({seed})
        self.inner = nn.Linear(64, 10)
    def forward(self, x):
        return {factor} * scale * self.inner(x.flatten(1))

def make():
    return Scaled()
"""


def test_a_model_is_known_by_its_code_and_its_weights(here, cli, monkeypatch):
    "Its own file, a file that it imports, its weights: what changes is measured again, and only then."
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    argv = [
        "evaluate",
        "--model",
        "judged:make",
        "--model-data",
        "digits",
        "--suite",
        "calibration",
        "--out",
        "judged-results",
    ]

    def measured(seed=0, factor=1, scale=1):
        (here / "judged.py").write_text(CODE.format(seed=seed, factor=factor))
        (here / "parts.py").write_text(f"scale = {scale}\n")
        for name in ("judged", "parts"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        assert cli(*argv, "--device", "cpu").code == 0
        return read_json(here / "judged-results/calibration.json")

    plain = measured()
    assert measured() == plain
    changed = [measured(factor=3), measured(scale=3), measured(seed=1)]
    assert changed[0]["ECE"] == changed[1]["ECE"] != plain["ECE"] != changed[2]["ECE"]
    assert changed[0]["code"] != plain["code"] and changed[0]["weights"] == plain["weights"] != changed[2]["weights"]
    assert changed[1]["answers"] == changed[0]["answers"] != plain["answers"]


def test_what_other_code_left_behind_is_not_in_the_card(here, cli, monkeypatch):
    "A part that isn't measured again, while another is."
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (here / "parts.py").write_text("scale = 1\n")
    argv = ["evaluate", "--model", "judged:make", "--model-data", "digits", "--out", "judged", "--device", "cpu"]
    for factor, part in ((1, "distal"), (2, "calibration")):
        (here / "judged.py").write_text(CODE.format(seed=0, factor=factor))
        for name in ("judged", "parts"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        assert cli(*argv, "--suite", part).code == 0
        assert list(SuiteResults("judged").parts) == [part]


def test_samples_drawn_again_are_judged_again_by_the_suite(evaluated, cli):
    "Other images under the same settings."
    argv = ["evaluate", evaluated, "--suite", "landscape", "--device", "cpu", "--attack-steps", 1]
    run = Run(evaluated)
    assert cli(*argv).code == 0
    before = read_json(evaluated / "suite/landscape.json")
    x, y, summary = run.samples("energy")
    run.save_samples("energy", dict(x=255 - x, y=y, strip=run.strip("energy")[1]), summary)
    assert cli(*argv).code == 0
    after = read_json(evaluated / "suite/landscape.json")
    assert after["median energy"]["energy samples"] != before["median energy"]["energy samples"]


def test_an_extractor_of_ones_own_is_not_taken_for_another(digits, tmp_path):
    "Without a key nothing is kept; with one, it is."

    class Doubled(Pixels):
        def forward(self, x):
            return 2 * super().forward(x)

    x = digits.test_x[:N]
    one, other = (extract_once(extractor, x, tmp_path)[0] for extractor in (Pixels(), Doubled()))
    assert torch.equal(2 * one, other) and not snapshot(tmp_path)
    assert not np.allclose(
        reference_statistics(Pixels(), digits, tmp_path)["mu"],
        reference_statistics(Doubled(), digits, tmp_path)["mu"],
    )


def test_an_extractor_file_with_other_contents_has_another_key(tmp_path):
    keys = []
    for size in (1, 2):
        torch.jit.script(nn.Sequential(nn.AdaptiveAvgPool2d(size), nn.Flatten())).save(str(tmp_path / "mine.pt"))
        keys.append(feature_extractor(str(tmp_path / "mine.pt")).key)
    assert keys[0] != keys[1]


def test_scores_by_class_are_measured_when_asked_for(evaluated, cli):
    argv = [
        "evaluate",
        evaluated,
        "--extractor",
        "classifier:runs/judge",
        "--num-robust",
        10,
        "--attack-steps",
        1,
        "--device",
        "cpu",
    ]
    file = evaluated / "scores/held-out.json"
    for option in ("--no-by-class", "--by-class"):
        assert cli(*argv, option).code == 0
        assert ("FD-digits by class" in read_json(file)) == (option == "--by-class")


# C. Models are left as they were


class Frozen(nn.Module):
    "A network whose first batch norm a user has frozen, and which may fail."

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.Dropout(0.5),
            nn.BatchNorm2d(4),
            nn.Flatten(),
            nn.Linear(144, 10),
        )
        self.fails = None
        self.train()
        self.net[1].eval()

    def forward(self, x):
        if self.fails:
            raise self.fails
        return self.net(x)


class FrozenExtractor(Extractor):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x / 127.5 - 1)


def state(model):
    "Modes, weights, statistics, and what gradients are asked for."
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [p.grad is None for p in model.parameters()],
        fingerprint(tensors),
    )


@pytest.mark.parametrize("fails", [None, ValueError("out of order"), KeyboardInterrupt(), MemoryError()], ids=repr)
def test_every_module_is_in_its_own_mode_afterwards(fails, digits):
    model = Frozen()
    model.fails = fails
    before = state(model)
    x, y = digits.test_x[:8], digits.test_y[:8]
    extractor = FrozenExtractor(model)
    measures = (
        lambda: accuracy(model, x, y),
        lambda: robust_accuracy(model, x, y, 0.1, 2),
        lambda: zero_gradients(model, x, y),
        lambda: autoattack_accuracy(model, x[:2], y[:2], 0.01),
        lambda: ood_scores(model, x),
        lambda: detect_ood(model, x, {"same": x}),
        lambda: check_classifier(model, digits, "frozen"),
        lambda: extract(extractor, x),
        lambda: all_logits(model, x),
    )
    for measure in measures:
        if fails:
            with pytest.raises((ValueError, KeyboardInterrupt, MemoryError)):
                measure()
        else:
            measure()
        assert state(model) == before


class Density(nn.Module):
    "A normalised density that may only be asked in evaluation mode, as one with dropout."

    def log_density(self, x, y=None):
        return x.new_full((len(x),), torch.nan) if self.training else x.flatten(1).sum(1)


def test_a_density_is_asked_in_evaluation_mode(digits):
    density = Density().train()
    assert bits_per_dim(density, digits.test_x[:4]).isfinite().all() and density.training


def test_modes_are_back_when_an_evaluation_within_another_fails():
    model = Frozen()
    before = state(model)
    with pytest.raises(KeyError), evaluating(model), evaluating(model.net):
        assert not any(m.training for m in model.modules())
        raise KeyError
    assert state(model) == before
    with pytest.raises(InputError, match="torch.nn.Module"):
        accuracy(lambda x: x, torch.zeros(2, 1, 2, 2, dtype=torch.uint8), [0, 1])


# D. Vanished gradients


class Times(nn.Module):
    "The same classifier with larger logits."

    def __init__(self, model, factor):
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x):
        return self.factor * self.model(x)


def test_large_logits_are_called_out(linear, digits):
    "Accuracy under attack rises for the same decisions; a warning says for which share of images the attack is blind."
    x, y = digits.test_x[:100], digits.test_y[:100]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        honest = robust_accuracy(linear, x, y, 0.3)
    with pytest.warns(UserWarning, match=r"gradient of \d+\.\d % of the attacked images is zero"):
        masked = robust_accuracy(Times(linear, 1000), x, y, 0.3)
    assert accuracy(Times(linear, 1000), x, y) == accuracy(linear, x, y)
    assert masked > honest + 0.1
    assert zero_gradients(linear, x, y) == 0 and zero_gradients(Times(linear, 1000), x, y) > 0.5
    assert zero_gradients(Times(linear, 1000), x, y, targeted=True) == 0  # a wrong class's loss is as steep as ever


LOUD = """
import torch
from torch import nn

class Times(nn.Module):
    def __init__(self, model, factor):
        super().__init__()
        self.model, self.factor = model, factor
    def forward(self, x):
        return self.factor * self.model(x)

def plain():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    net.load_state_dict(torch.load("weights.pt"))
    return net

def loud():
    return Times(plain(), 1000)
"""


def test_verdict_of_the_suite(here, cli, monkeypatch, linear):
    "The share is stored with the curve, and the verdict says masked."
    torch.save(linear.state_dict(), here / "weights.pt")
    (here / "loud.py").write_text(LOUD)
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.delitem(sys.modules, "loud", raising=False)
    quick = "--attack-eps 0.3 --l2-eps 1 --attack-steps 3 --num-robust 60 --num-restarts 20 --num-autoattack 0".split()
    for factory, verdict in (("plain", "not masked"), ("loud", "masked")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            argv = [
                "--model",
                f"loud:{factory}",
                "--model-data",
                "digits",
                "--suite",
                "robustness",
                "--out",
                factory,
                *quick,
            ]
            result = cli("evaluate", *argv)
        assert result.code == 0
        said = "- loud:loud, PGD-3, linf, untargeted, 1 random start: "
        card = (here / factory / "MODEL_CARD.md").read_text(encoding="utf-8")
        heads = ("Images whose gradient is zero", "- Its gradients are masked, PGD-3, linf")
        shown = [said in result.out, said in card, heads[0] in result.out, heads[1] in card]
        assert shown == [verdict == "masked"] * 4
        part = json.loads((here / factory / "robustness-linf-once.json").read_text())
        assert part["verdict"] == verdict and (part["zero gradients"] > 0.5) == (verdict == "masked")
    assert masking_verdict(0.0, {"0.1": {"AutoAttack": 0.5, "PGD": 0.6}}) == "masked"
    assert masking_verdict(0.0, {"0.1": {"AutoAttack": 0.59, "PGD": 0.6}}) == "not masked"


def test_the_share_is_stored_with_the_scores_and_shown(evaluated, cli):
    file = evaluated / "scores/classification.json"
    scores = read_json(file)
    assert scores["zero gradients"] == 0
    runs, results = evaluated.parent, evaluated.parent / "figures/results.csv"
    assert "Zero gradients" not in cli("report", "--runs", runs).out and "zero grad" not in results.read_text("utf-8")
    for share, said in ((0.004, "robust_jem (0.4 %)"), (0.25, "robust_jem (25 %, masked)")):
        write_json(file, scores | {"zero gradients": share})
        note = f"Zero gradients on images that are right before the attack: {said}. PGD can't move these"
        assert note in cli("report", "--runs", runs).out and f",zero gradients,{share}," in results.read_text("utf-8")


# E. Models from elsewhere


ODD = """
import torch
from torch import nn

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    def forward(self, x):
        {}
"""


@pytest.mark.parametrize(
    "forward, says",
    [
        ("return self.net(x).detach()", "no gradient"),
        ("with torch.no_grad(): return self.net(x)", "no gradient"),
        ("raise ValueError('only on Sundays')", "only on Sundays"),
    ],
)
def test_unusable_models_are_one_line(forward, says, here, cli, monkeypatch):
    (here / "odd.py").write_text(ODD.format(forward))
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.delitem(sys.modules, "odd", raising=False)
    done = cli(
        "evaluate", "--model", "odd:Odd", "--model-data", "digits", "--suite", "calibration", "--out", "judged"
    )
    assert done.code == 2 and says in done.err and len(done.err.strip().splitlines()) == 1, done.err


def test_a_mark_before_the_settings_is_read_over(tmp_path):
    "Editors on Windows write one."
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"seed": 3}')
    assert read_json(tmp_path / "config.json") == {"seed": 3}


@pytest.mark.parametrize("file", ["summary.json", "samples/energy/summary.json"])
def test_a_summary_that_lacks_something_is_named_by_the_suite(file, runs, cli):
    (runs / "robust_jem" / file).write_text("{}")
    done = cli("evaluate", "runs/robust_jem", "--suite", "calibration", "--device", "cpu")
    assert done.code == 2 and f"{file}: lacks" in done.err and len(done.err.strip().splitlines()) == 1, done.err


def test_a_report_names_the_damaged_file_alone(evaluated, cli):
    "Removing the scores, which was said to help, wouldn't."
    (evaluated / "summary.json").write_text("[]")
    done = cli("report", "--runs", evaluated.parent)
    assert done.code == 2 and "summary.json: holds a list" in done.err and "remove the scores" not in done.err


# F. The world around


def small_run(root="", system="wide_resnet", **changes):
    "A run on an image tree."
    config = configure(
        TrainConfig, system, dataset="pets", root=root, out="runs/pets", schedule__epochs=1,
        schedule__warmup_steps=0, optimizer__batch_size=4, augment__pad=0, threads=1, device="cpu", precision="float32",
        **changes,
    )
    return Run(train(config, progress=False))


def with_other_pixels(tree):
    file = next(tree.rglob("*.png"))
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file)


def test_data_that_moved_is_found_where_it_is_now(here, image_tree, monkeypatch):
    image_tree()
    run = small_run("data")
    before = run.images().fingerprint
    assert run.data_place == Path("data")
    Path("data").rename("elsewhere")
    with pytest.raises(InputError, match="--root") as error:
        Run(run.path).images()
    assert "ROBUST_JEM_DATA" in str(error.value) and "looked in data" in str(error.value)
    with pytest.raises(InputError, match="looked in nowhere, data"):
        Run(run.path).images("nowhere")
    assert Run(run.path).images("elsewhere").fingerprint == before
    moved = Run(run.path, "elsewhere")
    assert moved.images().fingerprint == before and moved.data_place == Path("elsewhere")
    assert moved.system()(to_unit(moved.images().test_x)).shape == (2, 2)
    monkeypatch.setenv("ROBUST_JEM_DATA", "elsewhere")
    assert Run(run.path).images().fingerprint == before
    monkeypatch.delenv("ROBUST_JEM_DATA")
    Path("elsewhere").rename("data")
    assert Run(run.path).images("elsewhere").fingerprint == before             # not there: where it was


def test_the_fingerprint_decides_between_places(here, image_tree, monkeypatch):
    "Other images under the same name are used only where there are no right ones."
    image_tree()
    run = small_run("data")
    before = run.images().fingerprint
    shutil.copytree("data", "right")
    with_other_pixels(Path("data/pets"))
    assert Run(run.path).images().fingerprint != before
    assert Run(run.path).images("right").fingerprint == before
    assert Run(run.path, "data").images().fingerprint != before
    monkeypatch.setenv("ROBUST_JEM_DATA", "right")
    found = Run(run.path)
    assert found.images().fingerprint == before and found.data_place == Path("right")


def test_samples_are_drawn_with_data_that_moved(here, image_tree, cli):
    image_tree()
    hybrid = dict(system="jempp", chain__outer_steps=1, replay__size=4)
    run = small_run("data", **hybrid)
    Path("data").rename("elsewhere")
    argv = ["generate", run.path, "--num-samples", 2, "--batch-size", 2, "--chain.outer-steps", 1, "--device", "cpu"]
    refused = cli(*argv)
    assert refused.code == 2 and "--root" in refused.err
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)                     # as if these were other images
        done = cli(*argv, "--root", "elsewhere")
    assert done.code == 0 and Run(run.path).samples("energy")[0].shape == (2, 3, 8, 8), done.err
    assert not Path("data").exists()


def test_evaluation_finds_data_that_moved(here, image_tree, cli):
    image_tree()
    run = small_run("data")
    Path("data").rename("elsewhere")
    argv = ["evaluate", run.path, "--num-robust", 2, "--attack-steps", 1, "--attack-eps", 0.1, "--extractor", "pool.pt"]
    torch.jit.script(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())).save("pool.pt")
    argv += ["--splits", 1, "--device", "cpu"]
    refused = cli(*argv)
    assert refused.code == 2 and "--root" in refused.err
    done = cli(*argv, "--root", "elsewhere")
    assert done.code == 0 and "accuracy" in done.out, done.err
    assert Path("elsewhere/.cache").is_dir() and not Path("data").exists()


def test_a_console_without_some_characters(evaluated, command, monkeypatch):
    "A Windows code page has no ε or →; what it lacks is replaced."
    env, folder = command.env | {"PYTHONIOENCODING": "cp1252"}, evaluated.parent.parent
    argv = [*command.argv, "report", "--runs", str(evaluated.parent)]
    with open("report.txt", "wb") as out:
        done = subprocess.run(argv, env=env, stdout=out, stderr=subprocess.PIPE, timeout=120, cwd=folder)
    printed = Path("report.txt").read_bytes().decode("cp1252")
    assert done.returncode == 0 and b"UnicodeEncodeError" not in done.stderr, done.stderr
    assert "PGD accuracy, ? = 0.2 %" in printed and "Robust JEM" in printed
    for errors in ("strict", "surrogateescape"):                    # the latter is what the C locale has
        console = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=errors)
        monkeypatch.setattr(sys, "stdout", console)
        assert main(["report", "--runs", str(evaluated.parent)]) == 0
        console.flush()
        assert b"Robust JEM" in console.buffer.getvalue() and console.buffer.getvalue().isascii()


# E. Messages


def test_a_message_never_says_that_it_wants_what_it_got(digits):
    for wrong in (digits.test_x.numpy(), to_unit(digits.test_x), digits.test_x.long(), [1, 2], None):
        with pytest.raises(InputError) as error:
            to_unit(wrong)
        said, _, wanted = str(error.value).partition("; expected ")
        kind = "NumPy" if isinstance(wrong, np.ndarray) else "torch.uint8"
        assert wanted and (kind in said) == isinstance(wrong, np.ndarray)
    with pytest.raises(InputError, match="grey levels already"):
        to_uint8(digits.test_x)


def test_outside_of_bounds_names_them(linear, digits):
    x8, y = digits.test_x[:N], digits.test_y[:N]
    for x, how in ((x8.float(), {}), (1.1 * to_unit(x8), {}), (x8 / 255, {}), (to_unit(x8), {"bounds": (0, 1)}),
                   (x8.float(), {"bounds": (0, 1)}), (x8, {"bounds": (0, 255)})):
        with pytest.raises(InputError, match="bounds"):
            pgd(linear, x, y, 8, 3, **how)
    for bounds in ((1, -1), (0, float("nan")), 1, (0, 1, 2), "signed"):
        with pytest.raises(InputError, match="^bounds: "):
            pgd(linear, to_unit(x8), y, 8, 3, bounds=bounds)
    scaled = UnitInterval(linear)
    a = pgd(linear, to_unit(x8), y, 0.2, 3, random_start=False)
    b = pgd(scaled, x8 / 255, y, 0.1, 3, random_start=False, bounds=(0, 1))
    assert torch.allclose(a, 2 * b - 1, atol=1e-5)                  # the same attack on the other scale


@pytest.mark.parametrize("name, value", [
    ("eps", "0.1"), ("eps", None), ("eps", float("inf")), ("eps", [0.1]), ("eps", True), ("steps", 2.5), ("steps", "3"),
    ("step_size", float("nan")), ("step_size", "none"), ("generator", 0), ("norm", None), ("norm", "Linf"),
])
def test_settings_of_another_type_are_one_line(name, value, linear, digits):
    how = {"eps": 0.1, "steps": 2, name: value}
    with pytest.raises(InputError, match=f"^{name}: "):
        pgd(linear, to_unit(digits.test_x[:N]), digits.test_y[:N], **how)


def test_a_score_of_another_shape_is_not_broadcast():
    with pytest.raises(InputError, match="score: gives"):
        sgld(lambda x: x.sum(1, keepdim=True), torch.zeros(3, 2), 2, 0.1)


# Others of these kinds


def test_a_radius_beyond_the_whole_range_is_called_out(linear, digits):
    "8 for 8/255, say."
    x, y = digits.test_x[:4], digits.test_y[:4]
    for measure in (robust_accuracy, autoattack_accuracy):
        with pytest.warns(UserWarning, match="16/255"):
            measure(linear, x, y, 8)


@pytest.mark.parametrize("curve", [{"0": 95, "0.1": 40}, {"0": "a"}, {"zero": 0.5}, [0.9, 0.5], {"0": None}])
def test_curves_that_are_none(curve):
    with pytest.raises(InputError):
        eps_at_accuracy(curve, 0.5)


def test_features_kept_without_probabilities_are_not_taken_for_all(digits, tmp_path):
    class Both(Pixels):
        key = "both"

        def probabilities(self, x):
            return self(x).softmax(1)

    x = digits.test_x[:N]
    assert extract_once(Both(), x, tmp_path, probabilities=False)[1] is None
    for _ in range(2):
        features, probabilities = extract_once(Both(), x, tmp_path)
        assert torch.equal(probabilities, extract(Both(), x)[1]) and torch.equal(features, extract(Both(), x)[0])


def test_attacks_leave_no_gradients_in_the_weights(digits):
    "The standard AutoAttack's do."
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    x, y = digits.test_x[:4], net(to_unit(digits.test_x[:4])).argmax(1)
    autoattack_accuracy(net, x, y, 0.5)
    assert all(p.grad is None for p in net.parameters())


def test_a_pretrained_folder_is_sampled(runs, cli):
    "As the run is that it was saved from."
    RobustJEM.from_run("runs/robust_jem").save_pretrained("pretrained")
    how = ["--num-samples", 10, "--batch-size", 10, "--chain.outer-steps", 1, "--name", "new", "--device", "cpu"]
    for folder in ("runs/robust_jem", "pretrained"):
        done = cli("generate", folder, *how)
        assert done.code == 0, done.err
    assert torch.equal(Run("pretrained").samples("new")[0], Run("runs/robust_jem").samples("new")[0])


def test_a_pretrained_folder_is_judged(runs, cli):
    "Its card tells what is known without the run."
    RobustJEM.from_run("runs/robust_jem").save_pretrained("pretrained")
    for folder in ("runs/robust_jem", "pretrained"):
        assert cli("evaluate", folder, "--suite", "calibration", "--device", "cpu").code == 0
    found = [read_json(Path(folder) / "suite/calibration.json")["ECE"] for folder in ("runs/robust_jem", "pretrained")]
    assert found[0] == found[1] and "from_pretrained(" in Path("pretrained/suite/MODEL_CARD.md").read_text()


def test_samples_to_keep_are_grey_levels(runs):
    run = Run("runs/robust_jem")
    x, y, summary = run.samples("energy")
    for wrong in (to_unit(x), x[0]):
        with pytest.raises(InputError, match="uint8"):
            run.save_samples("mine", dict(x=wrong, y=y), summary)
    with pytest.raises(InputError, match="label"):
        run.save_samples("mine", dict(x=x, y=y[:, None]), summary)
    assert run.sample_names() == ["energy"]


ODD_CALLS = {
    "an extractor that is none": lambda d, m: feature_extractor(None),
    "weights that aren't there": lambda d, m: accuracy(m.to("meta"), d.test_x[:4], d.test_y[:4]),
    "a loader in place of images": lambda d, m: accuracy(m, torch.utils.data.DataLoader([0]), d.test_y[:4]),
    "a pair in place of images": lambda d, m: accuracy(m, (d.test_x[:4], d.test_y[:4]), d.test_y[:4]),
    "a batch size of a half": lambda d, m: accuracy(m, d.test_x[:4], d.test_y[:4], 0.5),
    "a batch size in words": lambda d, m: extract(Pixels(), d.test_x[:4], "500"),
    "a function for an extractor": lambda d, m: extract(lambda x: x, d.test_x[:4]),
    "restarts by half": lambda d, m: robust_accuracy(m, d.test_x[:4], d.test_y[:4], 0.1, restarts=1.5),
    "sets in a list": lambda d, m: detect_ood(m, d.test_x[:4], [d.test_x[:4]]),
    "one feature": lambda d, m: moments(torch.zeros(1, 3)),
    "features of NaN": lambda d, m: moments(torch.full((4, 3), float("nan"))),
    "deviations for covariances": lambda d, m: frechet_distance(np.zeros(3), np.ones(3), np.zeros(3), np.ones(3)),
    "classes in words": lambda d, m: class_frechet(torch.zeros(4, 2), [0] * 4, torch.zeros(4, 2), [0] * 4, "ten"),
    "other features": lambda d, m: class_frechet(torch.zeros(4, 2), [0] * 4, torch.zeros(4, 3), [0] * 4, 2),
    "bins by half": lambda d, m: calibration(torch.randn(4, 3), [0, 1, 2, 0], 1.5),
    "a threshold of NaN": lambda d, m: detect(torch.zeros(2, 3), float("nan")),
    "a negative temperature": lambda d, m: conditional_density(torch.zeros(2, 3), -1),
    "a negative weight": lambda d, m: hybrid_loss(m, Terms(clean=-1.0), d.test_y[:4], x_clean=d.test_x[:4]),
    "logits in words": lambda d, m: marginal_energy("logits"),
    "whole logits": lambda d, m: joint_energy(torch.zeros(2, 3).long(), [0, 1]),
    "no prior": lambda d, m: generate(m, None, [0, 1]),
    "a chain that is none": lambda d, m: run_chains(m, to_unit(d.test_x[:4]), {"outer_steps": 2}),
    "a method by number": lambda d, m: generate(m, UniformPrior((1, 8, 8)), [0, 1], 5),
    "a prior of another shape": lambda d, m: GaussianMixturePrior(
        torch.zeros(2, 4), torch.zeros(2, 4, 4), torch.ones(2), (1, 3, 3)),
    "few classes": lambda d, m: GaussianMixturePrior.fit(d.train_x, d.train_y, 0),
    "a buffer of a half": lambda d, m: ReplayBuffer(0.5, UniformPrior((1, 8, 8))),
    "an image for interpolations": lambda d, m: ood_images("interpolations", d.test_x[:1], 3),
    "fewer than no strangers": lambda d, m: ood_images("rotated", d.test_x, -3),
    "labels as floats in a data set": lambda d, m: Images(
        "mine", d.train_x, d.train_y.float(), d.test_x, d.test_y, d.classes),
    "arrays in a data set": lambda d, m: Images(
        "mine", d.train_x.numpy(), d.train_y, d.test_x, d.test_y, d.classes),
    "lists in a data set": lambda d, m: Images(
        "mine", d.train_x, d.train_y.tolist(), d.test_x, d.test_y, d.classes),
    "chains of another shape": lambda d, m: ReplayBuffer(4, UniformPrior((1, 8, 8))).fill(
        torch.zeros(4, 3, 8, 8), [0, 1, 2, 3]),
    "grey levels as floats for bits": lambda d, m: bits_per_dim(Density(), to_unit(d.test_x[:2])),
    "bits in batches of none": lambda d, m: bits_per_dim(Density(), d.test_x[:2], batch_size=0),
    "labels in a column in a data set": lambda d, m: Images(
        "mine", d.train_x, d.train_y[:, None], d.test_x, d.test_y, d.classes),
    "weights that don't exist yet": lambda d, m: accuracy(
        nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), d.test_x[:4], d.test_y[:4]),
    "a masked array": lambda d, m: accuracy(m, np.ma.array(d.test_x[:4].numpy(), mask=True), d.test_y[:4]),
    "nested images": lambda d, m: pgd(m, torch.nested.nested_tensor([*to_unit(d.test_x[:2])]), [0, 1], 0.1, 2),
    "no score": lambda d, m: sgld(None, to_unit(d.test_x[:2]), 2, 0.1),
    "a model for a score": lambda d, m: sgld(m, to_unit(d.test_x[:2]), 2, 0.1),
    "fewer than no labels": lambda d, m: UniformPrior((1, 8, 8)).sample_labels(-1),
    "a slot that isn't there": lambda d, m: ReplayBuffer(4, UniformPrior((1, 8, 8))).store(
        [9], torch.zeros(1, 1, 8, 8)),
    "terms in a dictionary": lambda d, m: hybrid_loss(m, {"clean": 1}, d.test_y[:4], x_clean=d.test_x[:4]),
    "a sampler by name": lambda d, m: generate(m, UniformPrior((1, 8, 8)), [0, 1], trained="sgld"),
    "a model by number": lambda d, m: import_model(5),
    "a root by number": lambda d, m: load_images("digits", 5),
    "a draw of a half": lambda d, m: draw_test_images(d, 0.5),
    "a draw of fewer than none": lambda d, m: draw_test_images(d, -1),
    "noise on grey levels": lambda d, m: add_noise(d.test_x, 0.1),
    "one image to augment": lambda d, m: augment(d.test_x[0]),
    "no name for strangers": lambda d, m: ood_images("", d.test_x, 3),
    "a radius of another type": lambda d, m: attack_start(to_unit(d.test_x[:2]), "0.1"),
    "steps by half of a climb": lambda d, m: climb(
        m, to_unit(d.test_x[:2]), to_unit(d.test_x[:2]), [0, 1], 0.1, 0.1, 1.5),
    "a start of a climb in words": lambda d, m: climb(m, to_unit(d.test_x[:2]), "x", [0, 1], 0.1, 0.1, 1),
    "targeted in words": lambda d, m: robust_accuracy(m, d.test_x[:4], d.test_y[:4], 0.1, targeted="no"),
    "a start in words": lambda d, m: pgd(m, to_unit(d.test_x[:2]), [0, 1], 0.1, 2, random_start="no"),
    "a radius that float32 lacks": lambda d, m: pgd(m, to_unit(d.test_x[:2]), [0, 1], 1e300, 2),
    "a batch size that int64 lacks": lambda d, m: accuracy(m, d.test_x[:4], d.test_y[:4], 2**70),
    "a seed of a half": lambda d, m: draw_test_images(d, 3, 0.5),
    "a seed in words": lambda d, m: robust_accuracy(m, d.test_x[:4], d.test_y[:4], 0.1, seed="a"),
    "a seed in words of AutoAttack": lambda d, m: autoattack_accuracy(m, d.test_x[:4], d.test_y[:4], 0.1, seed="a"),
    "means in words": lambda d, m: frechet_distance("x", np.eye(3), np.zeros(3), np.eye(3)),
    "another mean than covariance": lambda d, m: FrechetTo(np.zeros(2), np.eye(3)),
    "another number of features": lambda d, m: FrechetTo(np.zeros(3), np.eye(3))(torch.zeros(4, 2)),
    "features with NaN": lambda d, m: FrechetTo(np.zeros(3), np.eye(3))(torch.full((4, 3), torch.nan)),
    "images for logits in words": lambda d, m: all_logits(m, "digits"),
    "images for logits in 0..1": lambda d, m: all_logits(m, d.test_x[:4] / 255),
    "logits in batches of none": lambda d, m: all_logits(m, d.test_x[:4], batch_size=0),
    "a share in words": lambda d, m: masking_verdict("0.1"),
    "no scores for an area": lambda d, m: area_under_roc(torch.zeros(0), torch.zeros(3)),
    "a window of none": lambda d, m: GrowingLength(0.8, 10, 0),
    "a shape by number": lambda d, m: UniformPrior(64),
    "no classes": lambda d, m: UniformPrior((1, 8, 8), 0),
    "a threshold in a list": lambda d, m: detect(torch.zeros(2, 3), [0.1]),
    "a crop by half": lambda d, m: augment(to_unit(d.test_x[:2]), 1.5),
    "a generator that is none": lambda d, m: augment(to_unit(d.test_x[:2]), 1, generator=0),
    "noise below none": lambda d, m: add_noise(to_unit(d.test_x[:2]), -0.1),
    "noise of NaN": lambda d, m: add_noise(to_unit(d.test_x[:2]), float("nan")),
    "a list of labels to train on": lambda d, m: Batches(d.train_x, d.train_y.tolist(), 8, 0),
    "batches by half": lambda d, m: Batches(d.train_x, d.train_y, 1.5, 0),
    "a network given grey levels": lambda d, m: WideResNet(10, 1, in_channels=1)(d.test_x[:2]),
    "a network given other channels": lambda d, m: WideResNet(10, 1)(to_unit(d.test_x[:2])),
}


@pytest.mark.parametrize("what", ODD_CALLS)
def test_odd_calls_are_one_line(what, digits):
    with pytest.raises(InputError) as error:
        ODD_CALLS[what](digits, nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_pipe_that_closes(evaluated, command):
    "`robust-jem report | head -1`: no traceback."
    shell = f'"{sys.executable}" -m robust_jem.app.cli report --runs "{evaluated.parent}" | head -c 10'
    done = subprocess.run(shell, shell=True, env=command.env, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
