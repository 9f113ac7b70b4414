"""What a new user hands over: other types, shapes and ranges, other code under the same name, models in odd states."""

import io
import json
import os
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

from robust_jem.app.cli import main, parse
from robust_jem.bench.comparison import all_logits
from robust_jem.core.errors import InputError
from robust_jem.core.files import fingerprint, read_json, read_tensors, write_json, write_tensors
from robust_jem.core.images import (
    Batches, Images, add_noise, augment, bits_per_dim as bits_of_density, data_root, dequantise, load_images, to_uint8,
    to_unit,
)
from robust_jem.core.inputs import evaluating
from robust_jem.ebm.attacks import attack_start, climb, pgd
from robust_jem.ebm.energy import (
    conditional_density, detect, energy, joint_energy, marginal_energy, predict, rank, score_of,
)
from robust_jem.ebm.growth import GrowingLength, area_under_roc
from robust_jem.ebm.objectives import Terms, hybrid_loss, likelihood_loss
from robust_jem.ebm.priors import GaussianMixturePrior, UniformPrior, prior_from_tensors
from robust_jem.ebm.replay import ReplayBuffer
from robust_jem.ebm.samplers import mala, sgld
from robust_jem.ebm.sharpness import ascent_step, at_worst_weights
from robust_jem.engine.pretrained import RobustJEM
from robust_jem.engine.runs import Run
from robust_jem.engine.runtime import Accelerated
from robust_jem.engine.train import train
from robust_jem.judge.calibration import all_logits as all_logits_judged, calibration
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
from robust_jem.judge.likelihood import bits_per_dim, gmm_bits_per_dim
from robust_jem.judge.sweep import FrechetTo, sweep
from robust_jem.judge.zoo import zoo_model
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


def test_an_area_counts_pairs_whatever_the_type():
    "Differences of uint8 wrap, those of infinities aren't numbers, and NaN isn't above or below."
    grey = [torch.tensor(v, dtype=torch.uint8) for v in ([1, 2], [3, 4])]
    assert area_under_roc(*grey) == 0 and area_under_roc(*grey[::-1]) == 1
    assert area_under_roc([torch.inf], [torch.inf]) == 0.5
    assert area_under_roc([1.0, torch.nan], [0.0]).isnan()


@pytest.mark.parametrize("norm, eps, n", [("linf", 2.5, 2), ("l2", 40.0, 2), ("linf", 2.0, 0), ("l2", 5.0, 0)])
def test_a_radius_in_other_units_is_called_out(norm, eps, n, linear, digits):
    "By attacks and by what measures them, for the norm that it is of."
    x, y = digits.test_x[:4], digits.test_y[:4]
    for attack in (pgd, robust_accuracy):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            attack(linear, to_unit(x), y, eps, 2, norm=norm)
        assert any("whole range" in str(w.message) for w in said) == bool(n)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        configure(TrainConfig, "robust_jem", attack=dict(eps=eps, norm=norm))
    assert any("16/255" in str(w.message) for w in said) == (eps > 2 and norm == "linf")


# B. Caches


def test_the_prior_is_measured_again_when_chains_start_elsewhere(runs, cli):
    "The same weights and data, and noise in place of Gaussians."
    argv = ["evaluate", "runs/robust_jem", "--extractor", "classifier:runs/judge", "--device", "cpu",
            "--num-robust", "10", "--attack-steps", "1"]
    file = runs / "robust_jem/scores/prior.json"
    assert cli(*argv).code == 0
    gaussian = read_json(file)
    config = read_json(runs / "robust_jem/config.json")
    config["replay"]["prior"] = "uniform"
    write_json(runs / "robust_jem/config.json", config)
    assert cli(*argv).code == 0
    uniform = read_json(file)
    assert (gaussian["prior"], uniform["prior"]) == ("gaussian", "uniform")
    distance = next(k for k in uniform if k.startswith("FD-") and "class" not in k)
    assert uniform[distance] > gaussian[distance]
    assert cli(*argv).code == 0 and read_json(file) == uniform


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


class AlwaysTrains(nn.Module):
    "A model that stays in training mode when it is told not to."

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))

    def train(self, mode=True):
        return super().train(True)

    def forward(self, x):
        return self.net(x)


class Noisy(AlwaysTrains):
    def forward(self, x):
        return self.net(x + torch.randn_like(x))


def test_a_model_that_stays_in_training_mode(digits):
    "Without dropout it gives the same answers; with noise of its own it is called random."
    model = AlwaysTrains().eval()
    with evaluating(model):
        assert torch.equal(model(to_unit(digits.test_x[:4])), model(to_unit(digits.test_x[:4])))
    assert model.net[1].training
    with pytest.warns(UserWarning, match="random in evaluation mode"):
        check_classifier(Noisy(), digits, "noisy")


def test_a_models_file_changes_no_settings_of_torch(here):
    (here / "odd_settings.py").write_text(
        "import torch\n"
        "def make():\n"
        "  torch.set_default_dtype(torch.float64); torch.set_grad_enabled(False); torch.set_num_threads(3)\n"
        "  return torch.nn.Linear(2, 2)\n")
    before = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    import_model("odd_settings:make")
    assert before == (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())


class ColumnDensity(Density):
    def log_density(self, x, y=None):
        return super().log_density(x)[:, None]


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
    "probabilities of one image at a time": lambda d, m: robust_accuracy(
        nn.Sequential(m, nn.Softmax(1)), d.test_x[:9], m(to_unit(d.test_x[:9])).argmax(1), 0.1, 2, batch_size=1),
    "probabilities of one image": lambda d, m: energy(nn.Sequential(m, nn.Softmax(1)), to_unit(d.test_x[:1])),
    "log-probabilities of one image": lambda d, m: energy(nn.Sequential(m, nn.LogSoftmax(1)), to_unit(d.test_x[:1])),
    "probabilities for logits": lambda d, m: marginal_energy(torch.randn(4, 3).softmax(1)),
    "probabilities for joint logits": lambda d, m: joint_energy(torch.randn(4, 3).softmax(1), [0, 1, 2, 0]),
    "probabilities at a temperature": lambda d, m: conditional_density(torch.randn(4, 3).softmax(1), 2.0),
    "probabilities to detect by": lambda d, m: detect(torch.randn(4, 3).softmax(1), 0.0),
    "log-probabilities to detect by": lambda d, m: detect(torch.randn(4, 3).log_softmax(1), 0.0),
    "a prediction from NaN": lambda d, m: predict(torch.full((2, 3), torch.nan)),
    "a ranking of NaN": lambda d, m: rank(torch.full((2, 3), torch.nan)),
    "a window of other numbers": lambda d, m: GrowingLength(0.8, 10, 9).observe(torch.zeros(3), torch.zeros(4)),
    "a gradient of another shape": lambda d, m: ascent_step([torch.ones(3, 4)], [torch.ones(4)], 1.0),
    "no gradient": lambda d, m: ascent_step([torch.ones(3)], [None], 1.0),
    "a module's parameters": lambda d, m: at_worst_weights(m, 1.0).__enter__(),
    "proposals that don't move": lambda d, m: mala(lambda x: -x.square().sum(1), torch.zeros(3, 2), 5, 0.0),
    "a density of NaN": lambda d, m: mala(lambda x: x.sum(1) * torch.nan, torch.zeros(3, 2), 5, 0.1),
    "a density that fails": lambda d, m: mala(lambda x: 1 / 0, torch.zeros(3, 2), 5, 0.1),
    "a score that fails": lambda d, m: sgld(lambda x: x.no_such_thing, to_unit(d.test_x[:2]), 2, 0.1),
    "covariances for their factors": lambda d, m: GaussianMixturePrior(
        torch.zeros(2, 4), torch.full((2, 4, 4), 0.5) + torch.eye(4), torch.ones(2), (1, 2, 2)),
    "frequencies below zero": lambda d, m: GaussianMixturePrior(
        torch.zeros(2, 4), torch.eye(4).repeat(2, 1, 1), -torch.ones(2), (1, 2, 2)),
    "a mean of NaN": lambda d, m: GaussianMixturePrior(
        torch.zeros(2, 4) / 0, torch.eye(4).repeat(2, 1, 1), torch.ones(2), (1, 2, 2)),
    "lists for a prior": lambda d, m: GaussianMixturePrior(
        [[0.0] * 4], torch.eye(4)[None], torch.ones(1), (1, 2, 2)),
    "a prior in whole numbers": lambda d, m: GaussianMixturePrior.fit(
        d.train_x, d.train_y, 10).compact(3, dtype=torch.int32),
    "a prior on no device": lambda d, m: UniformPrior((1, 8, 8), device="gpu"),
    "a prior from a list": lambda d, m: prior_from_tensors([1], (1, 8, 8)),
    "no prior of a buffer": lambda d, m: ReplayBuffer(4, None),
    "no term": lambda d, m: hybrid_loss(m, Terms(), d.test_y[:4]),
    "statistics in words": lambda d, m: likelihood_loss(
        m, to_unit(d.test_x[:2]), to_unit(d.test_x[:2]), track_sampled="no"),
    "bins by the billion": lambda d, m: calibration(torch.randn(4, 3), [0, 1, 2, 0], 10**9),
    "classes by the billion": lambda d, m: class_frechet(
        torch.zeros(4, 2), [0] * 4, torch.zeros(4, 2), [0] * 4, 10**12),
    "a device for logits": lambda d, m: all_logits_judged(m, d.test_x[:4], "gpu"),
    "a device for features": lambda d, m: extract(Pixels(), d.test_x[:4], device="cuda:99"),
    "a device for a distance": lambda d, m: FrechetTo(np.zeros(3), np.eye(3), "gpu"),
    "a device for a model": lambda d, m: RobustJEM.from_pretrained(".", "gpu"),
    "neighbours in 0..1": lambda d, m: nearest(to_unit(d.test_x[:4]), d.train_x / 255),
    "neighbours of another type": lambda d, m: nearest(d.test_x[:4].flatten(1), d.train_x.long().flatten(1)),
    "variances below zero": lambda d, m: frechet_distance(np.zeros(3), -np.eye(3), np.zeros(3), np.eye(3)),
    "a covariance that isn't symmetric": lambda d, m: frechet_distance(
        np.zeros(2), np.array([[1.0, 0.5], [0, 1]]), np.zeros(2), np.eye(2)),
    "variances below zero to compare with": lambda d, m: FrechetTo(np.zeros(3), -np.eye(3)),
    "no reference": lambda d, m: quality(Pixels(), d.test_x[:20], None),
    "half a reference": lambda d, m: quality(Pixels(), d.test_x[:20], {"mu": np.zeros(16)}),
    "images for a reference": lambda d, m: reference_statistics(Pixels(), d.test_x),
    "a classifier for an extractor": lambda d, m: reference_statistics(m, d),
    "a classifier for features": lambda d, m: extract_once(m, d.test_x[:4], None),
    "a tensor to draw from": lambda d, m: draw_test_images(d.test_x, 3),
    "a norm in capitals": lambda d, m: robust_accuracy(m, d.test_x[:4], d.test_y[:4], 0.1, 2, "Linf"),
    "steps by half of an evaluation": lambda d, m: robust_accuracy(m, d.test_x[:4], d.test_y[:4], 0.1, 1.5),
    "a curve with a radius of NaN": lambda d, m: eps_at_accuracy({"0": 0.8, "nan": 0.2}, 0.5),
    "a curve in percent": lambda d, m: eps_at_accuracy({"0": 80, "0.1": 20}, 50),
    "strangers that are named as the test images": lambda d, m: detect_ood(
        m, d.test_x[:4], {"test images": d.test_x[:4]}),
    "a density by number": lambda d, m: ood_scores(m, d.test_x[:4], log_density=5),
    "a density of images that fails": lambda d, m: ood_scores(None, d.test_x[:4], log_density=lambda x: 1 / 0),
    "a density of images of NaN": lambda d, m: ood_scores(
        None, d.test_x[:4], log_density=lambda x: x.flatten(1).sum(1) * torch.nan),
    "probabilities beside a density": lambda d, m: ood_scores(
        nn.Sequential(m, nn.Softmax(1)), d.test_x[:4], log_density=lambda x: x.flatten(1).sum(1)),
    "bits of a classifier": lambda d, m: bits_per_dim(m, d.test_x[:4]),
    "bits of no images": lambda d, m: bits_per_dim(Density(), d.test_x[:0]),
    "bits of one image without a batch": lambda d, m: bits_per_dim(Density(), d.test_x[0]),
    "bits of a column": lambda d, m: bits_per_dim(ColumnDensity(), d.test_x[:4]),
    "bits of a tensor of images": lambda d, m: gmm_bits_per_dim(d.test_x, d.test_x[:4]),
    "bits of a list": lambda d, m: bits_of_density([1.0, 2.0], (1, 8, 8)),
    "bits of no pixels": lambda d, m: bits_of_density(torch.zeros(3), (0, 8, 8)),
    "a generator of cells that is none": lambda d, m: dequantise(d.test_x[:4], 5),
    "a generator of noise that is none": lambda d, m: add_noise(to_unit(d.test_x[:4]), 0.1, 5),
    "no zoo": lambda d, m: zoo_model(None, d),
    "another zoo": lambda d, m: zoo_model("foo:bar", d),
    "a depth in words": lambda d, m: WideResNet("28"),
    "a width of a half": lambda d, m: WideResNet(10, 1.5),
    "a network without classes": lambda d, m: WideResNet(10, 1, num_classes=0),
    "grey levels of NaN": lambda d, m: to_uint8(torch.tensor([0.0, torch.nan])),
    "energies in a tuple": lambda d, m: hybrid_loss(
        m, Terms(likelihood=1.0), [0, 1], x_real=d.test_x[:2], x_sampled=d.test_x[:2], energies=()),
    "floats to train on": lambda d, m: Batches(to_unit(d.train_x), d.train_y, 8, 0),
    "a process that isn't there": lambda d, m: Batches(d.train_x, d.train_y, 8, 0, rank=2, size=2),
    "a batch for fewer than all processes": lambda d, m: Batches(d.train_x, d.train_y, 2, 0, rank=2, size=3),
    "chains by the billion": lambda d, m: ReplayBuffer(10**12, UniformPrior((1, 8, 8))),
    "images by the billion": lambda d, m: UniformPrior((1, 8, 8)).sample(torch.zeros(1, dtype=int).expand(10**12)),
    "covariances of photographs": lambda d, m: GaussianMixturePrior.fit(
        torch.zeros(4, 3, 512, 512, dtype=torch.uint8), [0, 1, 0, 1], 2),
}


@pytest.mark.parametrize("what", ODD_CALLS)
def test_odd_calls_are_one_line(what, digits):
    with pytest.raises(InputError) as error:
        ODD_CALLS[what](digits, nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


# Memory


class Huge(nn.Module):
    "A model that asks for more memory than any machine has."

    def forward(self, x):
        return torch.empty(len(x), 10**15)


@pytest.mark.filterwarnings("ignore:out of memory")
@pytest.mark.parametrize("measure", [
    lambda x, y: accuracy(Huge(), x, y), lambda x, y: robust_accuracy(Huge(), x, y, 0.1, 2),
    lambda x, y: energy(Huge(), x), lambda x, y: pgd(Huge(), to_unit(x), y, 0.1, 2),
    lambda x, y: sgld(score_of(Huge()), to_unit(x), 2, 0.1), lambda x, y: ood_scores(Huge(), x),
    lambda x, y: ReplayBuffer(10**12, UniformPrior((1, 8, 8))),
])
def test_memory_that_runs_out_is_one_line(measure, digits):
    "It says what didn't fit, how much it takes, and what to lower; whoever handles a MemoryError handles it."
    with pytest.raises(InputError, match=r"[\d,.]+ GB") as error:
        measure(digits.test_x[:4], digits.test_y[:4])
    assert isinstance(error.value, MemoryError) and "\n" not in str(error.value)
    assert "lower" in str(error.value) or "fewer" in str(error.value)


def test_a_buffer_larger_than_the_memory_is_named_by_training(here, cli, monkeypatch):
    monkeypatch.setattr("robust_jem.core.memory.free_memory", lambda device: 10**7)
    said = cli("train", "--system", "jempp", "--replay.size", 10**6, "--out", "new", "--device", "cpu")
    assert said.code == 2 and "chains of 1x8x8 would take" in said.err and "replay.size" in said.err
    assert len(said.err.strip().splitlines()) == 1 and not Path("new/config.json").exists()
    config = configure(TrainConfig, "jempp", replay__size=10**6, device="cpu", out="new")
    with pytest.raises(InputError, match="replay.size"):
        train(config, progress=False)


def test_memory_that_runs_out_in_training_names_what_to_lower(here, cli, monkeypatch):
    "As on a GPU, whose message is of many lines."
    said = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...\nIf reserved but unallocated memory is large"

    def forward(self, x):
        raise torch.OutOfMemoryError(said)

    monkeypatch.setattr(Accelerated, "for_update", forward)
    done = cli("train", "--system", "jempp", "--replay.size", 64, "--schedule.updates", 1, "--out", "new",
               "--chain.outer-steps", 1, "--device", "cpu")
    assert done.code == 2 and "Traceback" not in done.err, done.err
    assert "21.5 GB" in done.err and "optimizer.batch_size (64)" in done.err and "replay.size (64)" in done.err


def test_a_system_says_what_it_lacks_and_what_it_has(here, digits):
    config = configure(TrainConfig, "sngan", "digits", "cpu", device="cpu", threads=1, schedule__updates=1, out="gan")
    gan = Run(train(config, progress=False)).system()
    x, y = digits.test_x[:4], digits.test_y[:4]
    for asked in (lambda: gan(to_unit(x)), lambda: gan.log_density(to_unit(x)), lambda: gan.start(y, None),
                  lambda: accuracy(gan, x, y), lambda: ood_scores(gan, x), lambda: bits_per_dim(gan, x)):
        with pytest.raises(InputError, match=r"^system: sngan, a Sngan, has no \w+; it has: sample$"):
            asked()


def test_an_unnormalised_density_has_no_bits(runs, digits):
    "An energy's constant isn't known: the number would mean nothing."
    with pytest.raises(InputError, match="up to a constant"):
        bits_per_dim(Run("runs/robust_jem").system(), digits.test_x[:4])


# Images without a dark pixel


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_bright_image_alone_is_not_taken_for_one_in_0_to_1(dtype, linear):
    "One in ten thousand of CIFAR-10; what lies on the grey levels of -1..1 is on that scale."
    bright = torch.randint(128, 256, (1, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert accuracy(linear, to_unit(bright).to(dtype), [3]) == accuracy(linear, bright, [3])
    assert pgd(linear, to_unit(bright).to(dtype), [3], 0.1, 2).shape == bright.shape
    for other in (bright / 255, torch.rand(1, 1, 8, 8)):
        with pytest.raises(InputError, match=r"as in images in 0..1"):
            accuracy(linear, other.to(dtype), [3])
    with pytest.raises(InputError, match=r"or dark ones in 0..255"):
        accuracy(linear, (bright > 200).to(dtype), [3])


# Samples that are no numbers


def test_samples_that_are_no_numbers_are_counted(runs, cli):
    weights = runs / "robust_jem/model.safetensors"
    tensors, meta = read_tensors(weights)
    write_tensors(weights, {k: v * torch.nan if v.is_floating_point() else v for k, v in tensors.items()}, meta)
    argv = ["generate", "runs/robust_jem", "--num-samples", 20, "--batch-size", 10, "--name", "new", "--device", "cpu"]
    done = cli(*argv, "--chain.outer-steps", 1)
    assert done.code == 2 and "samples: in 10 of 10 drawn" in done.err and "aren't numbers" in done.err


def test_a_walk_that_diverges_is_infinitely_far(runs):
    system = Run("runs/robust_jem").system()
    for p in system.parameters():
        p.data.fill_(torch.nan)
    rows, _ = sweep(system, lambda x: float(len(x)), "digits", "cpu", (("ascent", 0.2, (1, 2)),), 10)
    assert [row["distance"] for row in rows] == [np.inf, np.inf]


def test_a_distance_of_few_samples_is_called_biased():
    near = FrechetTo(np.zeros(4), np.eye(4))
    with pytest.warns(UserWarning, match="of 3 samples in 4 dimensions"):
        near(torch.randn(3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        near(torch.randn(4, 4))


# What surrounds a call


def test_draws_are_the_same_under_autocast_and_another_default_type(digits):
    "Products of the priors would be rounded to bfloat16, or meet numbers of another type."
    full = GaussianMixturePrior.fit(digits.train_x, digits.train_y, 10)
    y = torch.arange(10)
    for prior in (full, full.compact(5), UniformPrior((1, 8, 8))):
        plain = prior.sample(y, torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(prior.sample(y, torch.Generator().manual_seed(0)), plain)
        try:
            torch.set_default_dtype(torch.float64)
            assert torch.equal(prior.sample(y, torch.Generator().manual_seed(0)), plain)
        finally:
            torch.set_default_dtype(torch.float32)


def test_a_buffer_writes_into_no_tensor_of_the_callers(digits):
    "Nor, where its chains came expanded, into all of them at once; half precision and gradients stay usable."
    x, y, ones = to_unit(digits.test_x[:4]), digits.test_y[:4], torch.ones(1, 1, 8, 8)
    b = ReplayBuffer(4, UniformPrior((1, 8, 8)), reinit_prob=1.0)
    for given in (x, x.numpy(), nn.Parameter(x.clone()), x.half(), x[:1].expand(4, -1, -1, -1)):
        before = torch.as_tensor(given).detach().clone()
        b.fill(given, y)
        b.store([0], ones)
        assert torch.equal(torch.as_tensor(given).detach(), before)
        assert (b.x[0] == 1).all() and torch.equal(b.x[1:], before[1:])
        assert not b.draw(4)[0].requires_grad


def test_no_steps_give_a_copy(linear, digits):
    x = to_unit(digits.test_x[:4])
    for walk in (lambda v: sgld(score_of(linear), v, 0, 0.1), lambda v: pgd(linear, v, [0] * 4, 0.1, 0),
                 lambda v: mala(lambda u: -u.square().flatten(1).sum(1), v, 0, 0.1)[0]):
        given = x.clone()
        walk(given).zero_()
        assert torch.equal(given, x)


def test_a_copy_of_a_training_image_is_at_distance_zero(digits):
    "Products of float32 would leave it a little away."
    x = (digits.train_x.float() + 1000).flatten(1)
    distance, index = nearest(x[:50], x)
    assert (distance == 0).all() and torch.equal(x[index[:, 0]], x[:50])
    distance, index = nearest(x[:50].double(), x.double(), 4)
    exact, order = (x[:50, None].double() - x[None].double()).norm(dim=2).topk(4, largest=False)
    assert torch.allclose(distance.double(), exact, rtol=1e-5)


@pytest.mark.parametrize("change", [
    {"WORLD_SIZE": "x"},
    {"WORLD_SIZE": "2.5"},
    {"WORLD_SIZE": "2", "RANK": "x", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
    {"WORLD_SIZE": "2", "RANK": "5", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
    {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "99999"},
])
def test_a_job_that_is_none_is_one_line(change, runs, cli, monkeypatch):
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    done = cli("generate", "runs/robust_jem", "--num-samples", 10, "--name", "new", "--device", "cpu")
    assert done.code == 2 and "torchrun" in done.err and len(done.err.strip().splitlines()) == 1, done.err


@pytest.mark.parametrize("change", [{"WORLD_SIZE": ""}, {"RANK": "1"}, {"RANK": ""}, {"RANK": "3", "WORLD_SIZE": "1"}])
def test_variables_that_an_earlier_job_left_silence_nobody(change, runs, cli, monkeypatch):
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    assert "unknown option" in cli("generate", "runs/robust_jem", "--colour", "red").err


def test_strangers_of_more_than_8_bits_are_refused(digits, tmp_path):
    "They would all come out white."
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match="8 bits"):
        ood_images(str(tmp_path), digits.test_x, 3)


def test_a_set_without_its_chains_is_exported_all_the_same(runs, cli):
    run = Run("runs/robust_jem")
    x, y, summary = run.samples("energy")
    run.save_samples("mine", dict(x=x, y=y), summary)
    with pytest.raises(InputError, match="keeps no chains"):
        run.strip("mine")
    assert cli("export", "runs/robust_jem", "--name", "mine", "--to", "npz", "--out", "new").code == 0


def test_samples_of_a_prior_fitted_to_images_that_are_gone_are_drawn_again(here, image_tree, cli):
    "Those of the images that the run was trained on are kept, whatever lies there now."
    image_tree()
    run = small_run("data", system="jempp", chain__outer_steps=1, replay__size=4)
    argv = ["generate", run.path, "--num-samples", 2, "--batch-size", 2, "--chain.outer-steps", 1, "--device", "cpu"]

    def drawn(name):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert cli(*argv, "--name", name).code == 0
        return Run(run.path).samples(name)[0]

    first = drawn("first")
    with_other_pixels(Path("data/pets/train"))
    assert torch.equal(drawn("first"), first)
    second = drawn("second")
    assert torch.equal(drawn("second"), second)
    for file in Path("data/pets/train").rglob("*.png"):
        Image.fromarray(np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8)).save(file)
    assert not torch.equal(drawn("second"), second)


def test_the_landscape_is_measured_again_with_another_chain(runs, cli):
    argv = ["evaluate", "runs/robust_jem", "--suite", "landscape", "--device", "cpu", "--attack-steps", 1]
    file = runs / "robust_jem/suite/landscape.json"
    assert cli(*argv).code == 0
    before = read_json(file)["chain"]
    config = read_json(runs / "robust_jem/config.json")
    config["chain"]["step_size"] *= 2
    write_json(runs / "robust_jem/config.json", config)
    assert cli(*argv).code == 0
    assert read_json(file)["chain"]["step_size"] == 2 * before["step_size"]


def test_the_command_answers_from_its_beginning(command):
    "What takes a second to import comes within `main`, where Ctrl-C is one line."
    code = "import sys, robust_jem.app.cli; print({'torch', 'tyro', 'pydantic', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], env=command.env, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize("argv", ["tune --networks", "tune --variants", "benchmark --batches"])
def test_an_empty_list_is_one_line(argv, here, cli):
    said = cli(*argv.split())
    assert said.code == 2 and "is empty" in said.err and len(said.err.strip().splitlines()) == 1


def test_a_pipe_that_closes(evaluated, command):
    "`robust-jem report | head -1`: no traceback."
    shell = f'"{sys.executable}" -m robust_jem.app.cli report --runs "{evaluated.parent}" | head -c 10'
    done = subprocess.run(shell, shell=True, env=command.env, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr


def test_a_single_run_in_place_of_the_folder_of_runs(runs, cli):
    for argv in (["report", "--runs", "runs/robust_jem"], ["report", "runs/robust_jem/"]):
        said = cli(*argv)
        assert said.code == 2 and "is a single run" in said.err and f"--runs {runs.resolve()}" in said.err
    assert "there is no folder" in cli("report", "nowhere").err


def test_a_home_folder_that_the_shell_left_alone(runs, cli, monkeypatch):
    "As in --run=~/x, and in an environment variable."
    monkeypatch.setenv("HOME", str(runs.parent))
    monkeypatch.setenv("ROBUST_JEM_DATA", "~/data")
    assert cli("export", "--run=~/runs/robust_jem", "--out=~/pictures").code == 0
    assert (runs.parent / "pictures/energy").is_dir() and not Path("~").exists()
    assert Run("~/runs/robust_jem").trained and data_root() == runs.parent / "data"


@pytest.mark.parametrize("argv", [["--attack.step-size", "none"], ["--attack.step-size=none"],
                                  ["--attack.step-size", "None"]])
def test_none_in_small_letters(argv, runs, cli):
    drawn = cli("generate", "runs/robust_jem", "--method", "attack", "--num-samples", 20, "--name", "new", *argv)
    assert drawn.code == 0, drawn.err
    assert Run("runs/robust_jem").drawn_with("new").attack.step_size is None
    assert parse("train", ["--network.norm", "none"]).network.norm == "none"        # a word there


def test_two_names_of_a_set(runs, cli):
    said = cli("export", "runs/robust_jem/samples/energy", "--name", "gan", "--out", "new")
    assert said.code == 2 and "gan" in said.err and not Path("new").exists()


@pytest.mark.parametrize("argv", ["tune --seconds 1 --out", "benchmark --out"])
def test_a_place_that_cannot_be_written_is_found_before_the_work(argv, here, cli):
    (here / "file").write_text("")
    for place in ("file", "file/below"):
        said = cli(*argv.split(), place)
        assert said.code == 2 and "can't be written" in said.err and len(said.err.splitlines()) == 1


WITHOUT_RIGHTS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search",
                  "--inh-caps=-dac_override,-dac_read_search"]
QUICK = ["--device", "cpu", "--num-robust", "10", "--attack-steps", "1"]
READ_ONLY = {
    "generate": (["generate", "runs/robust_jem", "--num-samples", "10", "--name", "new"], "samples/new"),
    "evaluate": (["evaluate", "runs/robust_jem", "--extractor", "classifier:runs/judge", *QUICK], "scores"),
    "a suite": (["evaluate", "runs/robust_jem", "--suite", "calibration", "--device", "cpu"], "suite"),
    "export": (["export", "runs/robust_jem"], "export"),
}


def as_user(command, argv, **env):
    "In a process that rights of files hold for, though it may be root's."
    if not shutil.which("setpriv"):
        pytest.skip("needs setpriv")
    before = WITHOUT_RIGHTS if os.geteuid() == 0 else []
    return subprocess.run([*before, *command.argv, *argv], env=command.env | env, capture_output=True, text=True,
                          timeout=120)


@pytest.mark.parametrize("what", READ_ONLY)
def test_a_run_that_may_only_be_read(what, runs, command):
    "One line that names the place."
    argv, place = READ_ONLY[what]
    folders = [p for p in [runs / "robust_jem", *(runs / "robust_jem").rglob("*")] if p.is_dir()]
    try:
        for folder in folders:
            folder.chmod(0o555)
        done = as_user(command, argv)
    finally:
        for folder in folders:
            folder.chmod(0o755)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"runs/robust_jem/{place}" in last and "can't be written" in last


def test_a_cache_that_cannot_be_written_is_a_warning(runs, command):
    "What would be kept there is computed, and said to be computed again next time."
    cache = runs.parent / "data/.cache"
    cache.mkdir(parents=True)
    argv = ["evaluate", "runs/robust_jem", "--extractor", "classifier:runs/judge", *QUICK]
    cache.chmod(0o555)
    try:
        done = as_user(command, argv, ROBUST_JEM_DATA=str(cache.parent))
    finally:
        cache.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert "no cache written" in done.stderr and not list(cache.iterdir())


@pytest.mark.parametrize("name", ["samples", "scores"])
def test_a_folder_that_may_not_be_read_is_not_an_empty_one(name, runs, command):
    folder = runs / "robust_jem" / name
    folder.mkdir(exist_ok=True)
    folder.chmod(0)
    try:
        done = as_user(command, ["export", "runs/robust_jem", "--out", "new"] if name == "samples" else [
            "report", "--runs", "runs"])
    finally:
        folder.chmod(0o755)
    assert done.returncode == 2 and f"{name}: can't be read" in done.stderr, done.stderr


def test_a_score_that_is_no_number_is_one_line(evaluated, cli):
    file = next(p for p in evaluated.glob("scores/energy*.json"))
    values = read_json(file)
    distance = next(k for k, v in values.items() if k.startswith("FD-") and isinstance(v, float))
    write_json(file, values | {distance: float("nan")})
    said = cli("report", "--runs", evaluated.parent, "--figures", "new")
    assert said.code == 2 and "holds something else" in said.err and not Path("new").exists()


def test_settings_of_a_newer_version_name_the_file(runs, cli):
    file = runs / "robust_jem/config.json"
    write_json(file, read_json(file) | {"colour": "blue"})
    said = cli("generate", "runs/robust_jem")
    assert said.code == 2 and "runs/robust_jem/config.json" in said.err and "newer version" in said.err


def test_letters_in_a_locale_that_has_none(runs, command):
    """A path with letters beyond ASCII is found, or the way to it is said."""
    (runs / "robust_jem").rename(runs / "jém")
    old = dict(LANG="C", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    argv = [*command.argv, "export", "runs/jém", "--out", "new"]
    refused = subprocess.run(argv, env=command.env | old, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2 and "PYTHONUTF8=1" in refused.stderr and "Traceback" not in refused.stderr
    done = subprocess.run(argv, env=command.env | old | {"PYTHONUTF8": "1"}, capture_output=True, timeout=120)
    assert done.returncode == 0 and Path("new/energy").is_dir()


@pytest.mark.parametrize("system", ["glow", "glow_hybrid"])
def test_a_flows_density_is_asked_on_its_scale(system, here, digits):
    "Grey levels are brought there; other floats, shapes and labels are refused."
    config = configure(TrainConfig, system, "digits", "cpu", device="cpu", threads=1, schedule__epochs=0, out="flow")
    flow = Run(train(config, progress=False)).system()
    grey, y = digits.test_x[:4], digits.test_y[:4]
    x = to_unit(grey)
    assert torch.equal(flow.log_density(grey), flow.log_density(x))
    wrong = [grey.float(), grey / 255, x * torch.nan, x[0], x.expand(-1, 3, -1, -1), grey.int()]
    for images in wrong:
        with pytest.raises(InputError, match="images"):
            flow.log_density(images)
    with pytest.raises(InputError, match="label"):
        flow.log_density(x, y[:, None])
