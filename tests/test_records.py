"""What is kept says the truth: of these weights, these images, these settings, and how long it took."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from conftest import snapshot

from robust_jem.app.cli import parse
from robust_jem.core.errors import InputError
from robust_jem.core.files import read_json, read_tensors, write_json, write_tensors
from robust_jem.core.images import load_images
from robust_jem.ebm.attacks import pgd
from robust_jem.ebm.energy import joint_energy
from robust_jem.ebm.objectives import Terms, hybrid_loss
from robust_jem.engine.recovery import Health
from robust_jem.engine.runtime import as_written
from robust_jem.engine.runs import Run
from robust_jem.engine.pretrained import RobustJEM
from robust_jem.engine.sample import generate_samples
from robust_jem.judge.extractors import feature_extractor
from robust_jem.systems import hybrid
from robust_jem.systems.catalog import TrainConfig, build_system, configure
from robust_jem.systems.hybrid_settings import HybridConfig, HybridSampling

SMALL = ("--num-samples", 12, "--batch-size", 3, "--chain.outer-steps", 1, "--device", "cpu")


def moved(run, by=0.01):
    "The run with other weights."
    file = run / "model.safetensors"
    write_tensors(file, {k: v + by if v.is_floating_point() else v for k, v in read_tensors(file)[0].items()})


# Samples


def test_sampling_took_no_longer_than_the_call(runs, monkeypatch):
    "A slow start is counted once, not once a batch."
    calls, real = [], hybrid.generate

    def slow_at_first(*a, **kw):
        if not calls:
            time.sleep(0.5)
        calls.append(1)
        return real(*a, **kw)

    monkeypatch.setattr(hybrid, "generate", slow_at_first)
    began = time.perf_counter()
    folder = generate_samples(
        HybridSampling(
            run=str(runs / "robust_jem"), num_samples=20, batch_size=2, chain=dict(outer_steps=1), name="timed",
            device="cpu",
        ),
        progress=False,
    )
    took, summary = time.perf_counter() - began, read_json(folder / "summary.json")
    assert len(calls) == 10 and 0.5 <= summary["seconds"] <= took + 0.01  # each part is rounded
    assert summary["images_per_second"] == pytest.approx(20 / summary["seconds"], rel=0.01, abs=0.06)


def test_samples_that_are_no_numbers_are_never_kept(runs, cli):
    moved(runs / "robust_jem", float("nan"))
    done = cli("generate", "runs/robust_jem", "--name", "broken", *SMALL)
    assert done.code == 2 and "aren't numbers" in done.err and "--chain.step-size" in done.err
    assert not (runs / "robust_jem/samples/broken/summary.json").exists()


def test_samples_of_other_weights_are_not_judged(refused, runs):
    moved(runs / "robust_jem")
    refused(
        "evaluate",
        "runs/robust_jem",
        "--extractor",
        "classifier:runs/judge",
        "--num-robust",
        10,
        says=["samples/energy", "other weights", "robust-jem generate"],
    )


def test_a_set_drawn_again_is_judged_again(evaluated, cli):
    "Other images under the same settings, as another processor draws them."
    before = read_json(evaluated / "scores/energy.json")
    run = Run(evaluated)
    x, y, summary = run.samples("energy")
    run.save_samples("energy", dict(x=255 - x, y=y, strip=run.strip("energy")[1]), summary)
    assert (
        cli(
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
        ).code
        == 0
    )
    after = read_json(evaluated / "scores/energy.json")
    assert after["images"] != before["images"] and after["FD-digits"] != before["FD-digits"]


# Tables


def second(evaluated, seed=1):
    "A copy of the run that says it is of another seed."
    copy = shutil.copytree(evaluated, evaluated.parent / f"copy{seed}")
    write_json(copy / "config.json", read_json(copy / "config.json") | {"seed": seed, "out": str(copy)})
    return copy


def test_seeds_share_a_table(evaluated, cli):
    second(evaluated)
    assert cli("report", "--runs", "runs", "--figures", "figures").code == 0
    row = next(r for r in read_json(Path("figures/table1.json"))["rows"] if r["model"] == "Robust JEM-Energy")
    assert row["sets"] == 2 and row["FD-digits"]["std"] == 0


@pytest.mark.parametrize(
    "file, changes, says",
    [
        ("scores/classification.json", {"n attacked": 7}, ["attacked images", "7"]),
        ("scores/classification.json", {"seed": 5}, ["attack's seed", "5"]),
        (
            "scores/energy.json",
            {"extractor_key": "another"},
            ["energy and held-out", "extractor_key", "robust-jem evaluate"],
        ),
        ("scores/prior.json", {"splits": 3}, ["prior and held-out", "splits"]),
        ("summary.json", {"precision": "float16"}, ["precision", "float16"]),
    ],
)
def test_unlike_runs_share_no_table(refused, evaluated, file, changes, says):
    copy = second(evaluated)
    write_json(copy / file, read_json(copy / file) | changes)
    refused("report", "--runs", "runs", "--figures", "figures", says=says)


def _with_step(samples, step):
    return samples | {"chain": samples["chain"] | {"step_size": step}}


def test_sets_that_the_first_run_lacks_are_compared_too(refused, evaluated):
    for seed, step in ((1, 0.1), (2, 0.9)):
        copy = second(evaluated, seed)
        scores = read_json(copy / "scores/energy.json")
        write_json(copy / "scores/long.json", scores | {"samples": _with_step(scores["samples"], step)})
    refused("report", "--runs", "runs", "--figures", "figures", says=["long", "chain.step_size", "0.1", "0.9"])


def test_the_place_and_precision_of_sampling_are_its_own(evaluated, cli):
    file = evaluated / "samples/energy/summary.json"
    write_json(file, read_json(file) | {"device": "an abacus", "precision": "float16"})
    assert cli("report", "--runs", "runs", "--figures", "figures").code == 0
    cost, table = (Path(f"figures/{f}.md").read_text(encoding="utf-8") for f in ("cost", "table1"))
    trained = Run(evaluated).summary["precision"]
    assert (
        "; sampling: an abacus" in cost
        and f"{trained}; sampling: float16" in cost
        and f"in {trained} while training, in float16 while sampling" in table
    )


# OOD sets


def test_ood_sets_that_have_come_are_measured(runs, cli, image_tree):
    argv = [
        "evaluate",
        "runs/robust_jem",
        "--suite",
        "detection",
        "--strangers",
        "rotated",
        "late",
        "--device",
        "cpu",
        "--num-strangers",
    ]

    def found():
        return read_json(runs / "robust_jem/suite/detection.json")

    assert cli(*argv, 20).code == 0 and "late" in found()["not measured"]
    image_tree("late", test=15)
    assert cli(*argv, 20).code == 0 and not found()["not measured"] and found()["n"]["late"] == 20
    assert cli(*argv, 30).code == 0 and found()["n"]["rotated"] == 30


# Options


def test_underscores_are_hyphens():
    a, b = (parse("evaluate", ["--model", "m:f", option, "digits"]) for option in ("--model_data", "--model-data"))
    assert a == b and a.attack_eps != parse("evaluate", ["--model", "m:f"]).attack_eps
    assert parse("train", ["--out=my_run"]).out == "my_run"


def test_replication_looks_for_its_extractor_before_it_trains(cli, image_tree, monkeypatch):
    image_tree("pets")

    def absent(spec, *_, **__):
        raise InputError(f"extractor: {spec} can't be had")

    monkeypatch.setattr("robust_jem.app.replicate.feature_extractor", absent)
    monkeypatch.setattr(
        "robust_jem.app.executors.subprocess.Popen", lambda *_, **__: pytest.fail("a notebook was started")
    )
    done = cli("replicate", "--dataset", "pets", "--preset", "cpu")
    assert done.code == 2 and "extractor: inception" in done.err


@pytest.mark.parametrize(
    "stem, distance", [("inception-2015-12-05-768", "FID-768"), ("768", "FD-768"), ("mine", "FD-mine")]
)
def test_only_layers_of_inception_are_called_fid(tmp_path, stem, distance):
    torch.jit.script(torch.nn.Flatten()).save(str(tmp_path / f"{stem}.pt"))
    assert feature_extractor(str(tmp_path / f"{stem}.pt")).names()["frechet"] == distance


# Settings that contradict each other


@pytest.mark.parametrize(
    "values, says",
    [
        (dict(optimizer=dict(ema_decay=1.0)), "optimizer.ema_decay"),
        (dict(objective=dict(likelihood_weight=0.0, energy_penalty=0.1)), "objective.energy_penalty"),
    ],
)
def test_training_that_would_ignore_a_setting_is_refused(values, says):
    with pytest.raises(InputError, match=says):
        HybridConfig(**values)


def test_a_penalty_needs_energies():
    model, x, y = (
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)),
        torch.zeros(2, 1, 2, 2),
        torch.tensor([0, 1]),
    )
    with pytest.raises(InputError, match="energy_penalty"):
        hybrid_loss(model, Terms(clean=1.0, energy_penalty=1.0), y, x_clean=x)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.int64])
def test_labels_of_any_integer_kind(kind):
    model, x = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)), torch.rand(3, 1, 2, 2)
    y = torch.tensor([0, 2, 1])
    for f in (
        lambda y: joint_energy(model(x), y),
        lambda y: pgd(model, x, y, 0.1, 2, random_start=False),
        lambda y: hybrid_loss(model, Terms(clean=1.0), y, x_clean=x)[0],
    ):
        assert torch.equal(f(y.to(kind)), f(y))
        with pytest.raises(InputError, match="labels"):
            f(y.bool())


def test_small_gradients_are_no_jump():
    "Near the end of a good fit most gradients vanish; one that doesn't is no divergence, one that explodes is."
    health = Health(build_system(configure(TrainConfig), load_images("digits"), as_written()))
    for _ in range(30):
        assert health.check({"gradient_norm": 0.001}) is None
    assert health.check({"gradient_norm": 2.4}) is None
    assert "gradient norm" in health.check({"gradient_norm": 50.0})


# Changed data


def repaint(folder, seed):
    rng = np.random.default_rng(seed)
    for file in folder.rglob("*.png"):
        Image.fromarray(rng.integers(0, 256, np.asarray(Image.open(file)).shape, dtype=np.uint8)).save(file)


def test_training_does_not_go_on_with_other_images(cli, image_tree):
    folder = image_tree(train=8)
    argv = [
        "train",
        "--dataset",
        "pets",
        "--optimizer.batch-size",
        4,
        "--replay.size",
        16,
        "--augment.pad",
        0,
        "--attack.steps",
        1,
        "--chain.outer-steps",
        1,
        "--schedule.warmup-steps",
        0,
        "--device",
        "cpu",
        "--out",
        "run",
        "--schedule.epochs",
        2,
    ]
    assert cli(*argv, "--max-minutes", 1e-6).code == 3
    repaint(folder, 1)
    before, done = snapshot("run"), cli(*argv)
    assert done.code == 2 and "data set has changed" in done.err and "fingerprint" in done.err
    assert snapshot("run") == before


def test_sampling_says_that_the_images_are_others(cli, image_tree):
    folder = image_tree(train=8)
    assert (
        cli(
            "train",
            "--dataset",
            "pets",
            "--optimizer.batch-size",
            4,
            "--replay.size",
            16,
            "--augment.pad",
            0,
            "--attack.steps",
            1,
            "--chain.outer-steps",
            1,
            "--schedule.warmup-steps",
            0,
            "--device",
            "cpu",
            "--out",
            "run",
            "--schedule.epochs",
            1,
        ).code
        == 0
    )
    repaint(folder, 1)
    with pytest.warns(UserWarning, match="trained on other images"):
        assert cli("generate", "run", *SMALL).code == 0


# Pretrained models


def test_weights_alone_leave_no_prior_of_an_earlier_model(runs, tmp_path):
    model = RobustJEM.from_run(runs / "robust_jem")
    model.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m/prior.safetensors").exists()
    model.save_pretrained(tmp_path / "m", torch.bfloat16, prior=False)
    assert not (tmp_path / "m/prior.safetensors").exists()
    with safe_open(tmp_path / "m/model.safetensors", "pt") as f:
        assert torch.bfloat16 in {f.get_tensor(k).dtype for k in f.keys()}


def test_a_run_is_not_overwritten_by_its_own_export(runs):
    before = (runs / "robust_jem/model.safetensors").read_bytes()
    with pytest.raises(InputError, match="run folder"):
        RobustJEM.from_run(runs / "robust_jem").save_pretrained(runs / "robust_jem", torch.bfloat16)
    assert (runs / "robust_jem/model.safetensors").read_bytes() == before


def test_a_prior_is_not_fitted_to_another_data_set(runs, tmp_path):
    RobustJEM.from_run(runs / "robust_jem").save_pretrained(tmp_path / "m", prior=False)
    write_json(
        tmp_path / "m/config.json",
        (c := read_json(tmp_path / "m/config.json")) | {"train": c["train"] | {"dataset": "digits@0-4"}},
    )
    with pytest.raises(InputError, match="trained on 10"):
        RobustJEM.from_pretrained(tmp_path / "m").generate(torch.tensor([0]))
