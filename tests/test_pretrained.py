"""The weights that the repository carries: whole, documented, and as good as their cards say."""

import hashlib
import importlib.util
import json

import numpy as np
import pytest
import torch
from conftest import REPO

from robust_jem.core.files import read_json
from robust_jem.core.images import to_unit
from robust_jem.engine.pretrained import RobustJEM

FOLDERS = sorted(p.parent for p in (REPO / "data" / "pretrained").glob("*/model.safetensors"))


def test_there_are_some():
    assert FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_weights_record_and_card_agree(folder):
    weights, card = (folder / "model.safetensors").read_bytes(), (folder / "README.md").read_text(encoding="utf-8")
    scores = [read_json(p) for p in (folder / "run" / "scores").glob("*.json")]
    assert len(weights) < 12e6 and scores
    name = hashlib.sha256(weights).hexdigest()[:16]
    assert f"| weights | {name} |" in card
    accuracy = read_json(folder / "run/scores/classification.json")
    assert accuracy["weights"] == name and f"{100 * accuracy['accuracy']:.1f} % of all 10,000 test images" in card
    assert read_json(folder / "config.json")["train"] | {"out": ""} == read_json(folder / "run/config.json") | {
        "out": ""
    }
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert max(r["step"] for r in rows) == read_json(folder / "run/summary.json")["updates"]


@pytest.fixture(scope="module")
def cifar10(shared_data):
    "CIFAR-10's test images, labels and classes, read by the sheets' own script."
    spec = importlib.util.spec_from_file_location("unpack", shared_data / "unpack.py")
    spec.loader.exec_module(unpack := importlib.util.module_from_spec(spec))
    return unpack.load("cifar10", "test")


def measured_accuracy(folder, cifar10, n):
    "Accuracy of a folder's weights on the first test images."
    x, y, classes = cifar10
    model = RobustJEM.from_pretrained(folder)
    assert model.classes == tuple(classes)
    right = [
        model.classify(to_unit(torch.from_numpy(x[i : i + 500][: n - i]).permute(0, 3, 1, 2))).numpy()
        == y[i : i + 500][: n - i]
        for i in range(0, n, 500)
    ]
    return np.concatenate(right).mean()


def accuracy_of_the_card(folder):
    return read_json(folder / "run/scores/classification.json")["accuracy"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_accuracy_of_some_images_is_near_the_cards(folder, cifar10):
    "Within three and a half standard errors; wrong weights, classes or pixels would be far from it."
    p, n = accuracy_of_the_card(folder), 100
    assert abs(measured_accuracy(folder, cifar10, n) - p) < 3.5 * (p * (1 - p) / n) ** 0.5


@pytest.mark.long
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_accuracy_is_the_cards(folder, cifar10):
    "Every test image again; another processor may round a few to the other side."
    assert abs(measured_accuracy(folder, cifar10, 10_000) - accuracy_of_the_card(folder)) < 0.001
