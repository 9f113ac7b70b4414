"""The whole picture through the command line: files, resumption, time limits, classifiers from elsewhere, bad input."""

import json
import re
import shutil
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import snapshot
from torch import nn

from robust_jem.core.errors import InputError
from robust_jem.core.files import write_tensors
from robust_jem.core.images import load_images, to_unit
from robust_jem.engine.runs import Run
from robust_jem.engine.train import train
from robust_jem.judge import robustness
from robust_jem.judge.probes import capabilities_of
from robust_jem.judge.extractors import Extractor
from robust_jem.judge.robustness import robust_accuracy
from robust_jem.judge.suite import evaluate
from robust_jem.systems.catalog import EvaluateConfig, TrainConfig, configure

QUICK = (
    "--attack-eps 0.1 0.3 --l2-eps 0.5 --attack-steps 2 --num-robust 30 --num-restarts 20 --restarts 2 "
    "--num-autoattack 0 --num-strangers 40 --device cpu"
).split()
MODELS = """
import torch
from torch import nn

class Logits(nn.Module):
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, x): return self.f(x)

def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def narrow(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
def flat(): return Logits(lambda x: x.flatten(1).sum(1))
def nothing(): return Logits(lambda x: None)
def infinite(): return Logits(lambda x: x.flatten(1)[:, :10] * float("inf"))
def later(): return Logits(lambda x: x.flatten(1)[:, :10] * (1 if len(x) == 2 else float("nan")))
def other_images(): return nn.Sequential(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
def fails(): raise RuntimeError("no weights here\\nand a second line")
def needs(argument): return linear()
text = "not callable"
"""


@pytest.fixture
def models(here, monkeypatch):
    "A module with factories in the working directory."
    (here / "zoo.py").write_text(MODELS)
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.delitem(__import__("sys").modules, "zoo", raising=False)
    return "zoo"


def suite(cli, *argv):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cli("evaluate", *argv)


def test_full_suite_of_a_run(runs, here, cli):
    argv = [
        "runs/robust_jem",
        "--extractor",
        "classifier:runs/judge",
        "--suite",
        "full",
        "--strangers",
        "rotated",
        "digits@8-9",
        "svhn",
        *QUICK,
    ]
    done = suite(cli, *argv)
    assert done.code == 0, done.err
    folder = here / "runs/robust_jem/suite"
    parts = {p.stem: json.loads(p.read_text()) for p in folder.glob("*.json")}
    assert set(parts) == {
        "subject",
        "calibration",
        "detection",
        "distal",
        "landscape",
        "neighbours",
        *(f"robustness-{n}-{a}" for n in ("linf", "l2") for a in ("once", "restarts", "targeted")),
    }
    figures = {
        "robustness",
        "calibration",
        "detection",
        "distal",
        "landscape",
        "neighbours",
        *(f"samples-{n}" for n in Run("runs/robust_jem").sample_names()),
    }
    assert {p.stem for p in folder.glob("*.png")} == {p.stem for p in folder.glob("*.svg")} == figures
    # every number knows its threat model, and what it was measured on
    for name, part in parts.items():
        if name != "subject":
            assert (
                part["weights"] == Run("runs/robust_jem").weights and {"commit", "device", "precision"} <= part.keys()
            )
        if name.startswith("robustness"):
            assert part["n"] in (20, 30) and "[-1,1] scale" in part["threat_model"] and part["seed"] == 0
    assert (
        list(parts["detection"]["AUROC"]) == ["rotated", "digits@8-9"]
        and "svhn" in parts["detection"]["not measured"]
    )
    # the card and the printed tables say the same as the files
    card = (folder / "MODEL_CARD.md").read_text()
    for text in (card, done.out):
        assert (
            f"{100 * parts['calibration']['ECE']:.1f}" in text
            and "*svhn* isn't measured" in text
            and "PGD-2, linf, untargeted, 1 random start" in text
        )
    assert json.loads((folder / "results/results.json").read_text())["calibration"] == parts["calibration"]
    # measured once
    times = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.json") if p.stem != "subject"}
    assert (
        suite(cli, *argv).code == 0
        and {p.name: p.stat().st_mtime_ns for p in folder.glob("*.json") if p.stem != "subject"} == times
    )


def test_one_part_alone_needs_no_extractor(runs, here, cli):
    assert suite(cli, "runs/robust_jem", "--suite", "calibration").code == 0
    assert {p.stem for p in (here / "runs/robust_jem/suite").glob("*.json")} == {"subject", "calibration"} and not (
        here / "runs/robust_jem/scores"
    ).exists()


def test_results_of_other_weights_are_left_out(runs, here, cli):
    from robust_jem.report.figures import SuiteResults

    suite(cli, "runs/robust_jem", "--suite", "calibration")
    file = here / "runs/robust_jem/model.safetensors"
    from robust_jem.core.files import read_tensors

    write_tensors(file, {k: v + 0.01 if v.is_floating_point() else v for k, v in read_tensors(file)[0].items()})
    suite(cli, "runs/robust_jem", "--suite", "detection", "--strangers", "rotated", *QUICK)
    assert set(SuiteResults("runs/robust_jem/suite").parts) == {"detection"}
    assert "Calibration" not in (here / "runs/robust_jem/suite/MODEL_CARD.md").read_text()


def test_time_limit_of_the_suite_goes_on_to_the_same_results(runs, here, cli, monkeypatch):
    argv = ["runs/robust_jem", "--suite", "robustness", *QUICK, "--num-robust", "10", "--num-restarts", "8"]
    assert suite(cli, *argv, "--out", "whole").code == 0
    asked = []

    def late(self):
        "The clock runs out at every third look."
        asked.append(1)
        return len(asked) % 3 == 0

    monkeypatch.setattr("robust_jem.engine.runtime.Deadline.reached", late)
    codes = []
    while 0 not in codes and len(codes) < 16:
        codes.append(suite(cli, *argv, "--out", "pieces").code)
    assert codes[0] == 3 and codes[-1] == 0 and set(codes) == {0, 3}

    def curves(folder):
        return {p.name: json.loads(p.read_text())["curve"] for p in sorted((here / folder).glob("robustness*.json"))}

    assert curves("pieces") == curves("whole") and len(curves("whole")) == 6


@pytest.mark.parametrize("inputs", ["signed", "unit"])
def test_classifier_from_elsewhere(models, here, cli, inputs):
    done = suite(
        cli,
        "--model",
        f"{models}:linear",
        "--model-data",
        "digits",
        "--model-inputs",
        inputs,
        "--suite",
        "full",
        "--out",
        "judged",
        *QUICK,
        "--attack-eps",
        "0.02",
        "0.3",
    )
    assert done.code == 0, done.err
    import zoo

    digits = load_images("digits")
    x = to_unit(digits.test_x)
    right = (zoo.linear()(x if inputs == "signed" else (x + 1) / 2).argmax(1) == digits.test_y).float()
    part = json.loads((here / "judged/calibration.json").read_text())
    assert np.isclose(sum(n * a for n, a in zip(part["count"], part["accuracy"]) if n) / 360, right.mean())
    assert {"MODEL_CARD.md", "robustness.png", "landscape.svg"} <= {p.name for p in (here / "judged").iterdir()}
    assert "from elsewhere" in (here / "judged/MODEL_CARD.md").read_text()


@pytest.mark.parametrize(
    "spec, says",
    [
        ("zoo", "can't be imported"),
        ("zoo:", "can't be imported"),
        ("zoo:nobody", "can't be imported"),
        ("nowhere:linear", "can't be imported"),
        (":linear", "can't be imported"),
        ("zoo:text", "failed"),
        ("zoo:fails", "no weights here"),
        ("zoo:needs", "failed"),
        ("zoo:narrow", "expected logits"),
        ("zoo:flat", "expected logits"),
        ("zoo:nothing", "NoneType"),
        ("zoo:infinite", "aren't finite"),
        ("zoo:later", "aren't finite"),
        ("zoo:other_images", "doesn't take 1x8x8 images"),
    ],
)
def test_unusable_classifier_is_one_line(models, here, cli, spec, says):
    before = snapshot(here)
    done = suite(cli, "--model", spec, "--model-data", "digits", "--suite", "calibration", "--out", "judged")
    assert done.code == 2 and says in done.err and len(done.err.strip().splitlines()) == 1, done.err
    assert {k: v for k, v in snapshot(here).items() if "__pycache__" not in k} == before


@pytest.mark.parametrize(
    "line, says",
    [
        ("--suite full", "neither is given"),
        ("--model zoo:linear --run runs/robust_jem --suite full", "both are given"),
        ("--model zoo:linear --model-data digits", "needs a run"),
        ("--model zoo:linear --model-data digits --suite neighbours", "needs a run"),
        ("--model zoo:linear --model-data nothing --suite calibration", "'nothing' is unknown"),
        ("--model zoo:linear --model-data digits@5-99 --suite calibration", "names no classes"),
        ("--run runs/robust_jem --suite everything", "suite"),
        ("--run runs/robust_jem --suite distal --out runs/robust_jem/model.safetensors", "can't be written"),
        ("--run runs/robust_jem --suite detection --restarts 0", "restarts"),
        ("--run runs/robust_jem --suite detection --num-strangers none", "num-strangers"),
    ],
)
def test_unusable_options_are_one_line(models, runs, here, cli, line, says):
    before = snapshot(here)
    done = suite(cli, *line.split())
    assert done.code == 2 and says in done.err and len(done.err.strip().splitlines()) == 1, done.err
    assert snapshot(here) == before


def test_ood_sets_from_a_folder(runs, here, cli, image_tree):
    image_tree("pets", size=20)
    shutil.rmtree(
        image_tree("cifar100", size=32) / "train"
    )  # a known name, of which only a tree of test images is there
    done = suite(
        cli,
        "runs/robust_jem",
        "--suite",
        "detection",
        "--strangers",
        "data/pets/test",
        "pets",
        "cifar100",
        "nobody",
        "--num-strangers",
        5,
    )
    part = json.loads((here / "runs/robust_jem/suite/detection.json").read_text())
    assert (
        done.code == 0
        and part["n"]["data/pets/test"] == 2
        and part["n"]["pets"] == 2
        and part["n"]["cifar100"] == 2
        and list(part["not measured"]) == ["nobody"]
    )
    (here / "data/pets/test/cat/0.png").write_bytes(b"not an image")
    done = suite(cli, "runs/robust_jem", "--suite", "detection", "--strangers", "data/pets/test", "--out", "again")
    assert (
        "not a readable image"
        in json.loads((here / "again/detection.json").read_text())["not measured"]["data/pets/test"]
    )


def test_scores_warn_where_images_are_few(runs, cli):
    with pytest.warns(UserWarning, match="biased upwards"):
        cli("evaluate", "runs/robust_jem", "--extractor", "classifier:runs/judge", *QUICK)
    assert {"precision", "recall", "density", "coverage", "memorisation"} == Run("runs/robust_jem").scores()[
        "energy"
    ]["diversity"].keys()


@pytest.fixture(scope="module")
def robust_classifier(made_once):
    return Run(
        made_once(
            "robust-classifier",
            lambda folder: train(
                configure(
                    TrainConfig,
                    "robust_classifier",
                    schedule__epochs=6,
                    attack__steps=2,
                    device="cpu",
                    precision="float32",
                    out=str(folder / "run"),
                ),
                progress=False,
            ),
        )
        / "run"
    ).model()


def test_robustness_falls_with_the_radius_and_the_attack(robust_classifier):
    "A trained network: curves fall, and more restarts never help it."
    model, digits = robust_classifier, load_images("digits")
    x, y = digits.test_x[:80], digits.test_y[:80]
    for norm, radii in (("linf", (0.1, 0.2, 0.4)), ("l2", (0.5, 1.0, 2.0))):
        curve = [robust_accuracy(model, x, y, eps, 20, norm) for eps in (0.0, *radii)]
        error = [2 * (a * (1 - a) / 80) ** 0.5 for a in curve]
        assert all(b <= a + e for a, b, e in zip(curve, curve[1:], error)) and curve[-1] < curve[0] - 0.2
        assert robust_accuracy(model, x, y, radii[1], 20, norm, restarts=3) <= curve[2]


@pytest.mark.long
def test_autoattack_is_no_weaker_than_pgd(robust_classifier):
    "On a trained network; that it is exact on a linear one, see the peers."
    digits = load_images("digits")
    x, y = digits.test_x[:80], digits.test_y[:80]
    assert (
        robustness.autoattack_accuracy(robust_classifier, x, y, 0.2)
        <= robust_accuracy(robust_classifier, x, y, 0.2, 20) + 1e-9
    )


def test_unit_interval_adapters_are_each_others_inverse():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x = torch.rand(5, 1, 2, 2) * 2 - 1
    assert torch.allclose(robustness.SignedInterval(robustness.UnitInterval(net))(x), net(x)) and torch.allclose(
        robustness.UnitInterval(net)((x + 1) / 2), net(x)
    )


def test_configuration_of_the_suite_is_checked():
    for bad in (
        dict(suite="all"),
        dict(model_inputs="bytes"),
        dict(num_autoattack=-1),
        dict(extractor_precision="float16"),
        dict(strangers=[1]),
    ):
        with pytest.raises(InputError, match=re.escape(next(iter(bad)))):
            configure(EvaluateConfig, **bad)


# What a system is capable of


def test_what_a_run_cannot_do_is_left_out(runs, here, monkeypatch):
    "A run that only draws samples: no accuracy, no prior, no part of the suite that asks a classifier; and it says so."
    for module in ("evaluate", "targets"):
        monkeypatch.setattr(f"robust_jem.judge.{module}.capabilities_of", lambda run: frozenset({"sample"}))
    monkeypatch.setattr(Run, "model", lambda *_: pytest.fail("a classifier was asked for"))
    monkeypatch.setattr(Run, "prior", lambda *_: pytest.fail("a prior was asked for"))
    judge = Extractor()
    judge.forward = lambda x: nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
    monkeypatch.setattr("robust_jem.judge.scorer.feature_extractor", lambda *_: judge)

    def ask(suite):
        return evaluate(configure(EvaluateConfig, run="runs/robust_jem", suite=suite, device="cpu"), progress=False)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = ask("full")
    assert {"held-out", *Run("runs/robust_jem").sample_names(), "subject", "neighbours"} == set(found)
    kept = {p.stem for p in (here / "runs/robust_jem/scores").glob("*.json")}
    assert kept == {"held-out", *Run("runs/robust_jem").sample_names()}
    subject = json.loads((here / "runs/robust_jem/suite/subject.json").read_text())
    assert subject["capabilities"] == ["sample"] and subject["left_out"]["calibration"] == "logits"
    with pytest.raises(InputError, match="'calibration' needs logits"):
        ask("calibration")


def test_a_runs_own_system_says_what_it_can_do(runs, monkeypatch):
    run = Run("runs/robust_jem")
    assert {"logits", "start"} <= capabilities_of(run)
    monkeypatch.setattr(Run, "system", lambda self: SimpleNamespace(capabilities=frozenset({"latent"})), raising=False)
    assert capabilities_of(run) == {"latent"}
