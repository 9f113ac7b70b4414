"""The weights that the repository carries: whole, documented, and as good as their cards say."""
import hashlib
import importlib.util
import json

import numpy as np
import pytest
import torch
from conftest import REPO

from robust_jem.data import to_unit
from robust_jem.generation import RobustJEM
from robust_jem.runs import read_json

FOLDERS = sorted(p.parent for p in (REPO / "data" / "pretrained").glob("*/model.safetensors"))


def test_there_are_some(): assert FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_weights_record_and_card_agree(folder):
    weights, card = (folder / "model.safetensors").read_bytes(), (folder / "README.md").read_text(encoding="utf-8")
    scores = [read_json(p) for p in (folder / "run" / "scores").glob("*.json")]
    assert len(weights) < 12e6 and scores
    name = hashlib.sha256(weights).hexdigest()[:16]
    assert f"| weights | {name} |" in card
    accuracy = read_json(folder / "run/scores/classification.json")
    assert accuracy["weights"] == name and f"{100 * accuracy['accuracy']:.1f} % of all 10,000 test images" in card
    assert read_json(folder / "config.json")["train"] | {"out": ""} == read_json(folder / "run/config.json") | {"out": ""}
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert max(r["step"] for r in rows) == read_json(folder / "run/summary.json")["updates"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_accuracy_is_the_cards(folder, shared_data):
    "Every test image again, read by the sheets' own script."
    spec = importlib.util.spec_from_file_location("unpack", shared_data / "unpack.py")
    spec.loader.exec_module(unpack := importlib.util.module_from_spec(spec))
    x, y, classes = unpack.load("cifar10", "test")
    model = RobustJEM.from_pretrained(folder)
    assert model.classes == tuple(classes)
    right = [model.classify(to_unit(torch.from_numpy(part).permute(0, 3, 1, 2))).numpy() == labels for part, labels in zip(np.split(x, 20), np.split(y, 20))]
    assert abs(np.mean(right) - read_json(folder / "run/scores/classification.json")["accuracy"]) < 0.001      # another processor may round a few images to the other side
