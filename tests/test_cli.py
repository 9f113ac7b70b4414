"""Bad input at the command line: exit code 2, one line that names it, nothing left behind.

And a help that can be copied."""
import errno
import inspect
import json
import re
import shlex
import shutil
import urllib.request
import zipfile
from pathlib import Path
from urllib.error import URLError

import pandas as pd
import pytest
import torch
from conftest import REPO, one_line, snapshot
from PIL import Image

from robust_jem.app.cli import EXAMPLES, parse
from robust_jem.app.doctor import DoctorConfig
from robust_jem.app.export import ExportConfig
from robust_jem.app.plan import ReplicateConfig
from robust_jem.app.sample import SampleConfig
from robust_jem.bench.benchmark import BenchmarkConfig
from robust_jem.bench.tune import TuneConfig
from robust_jem.core import images as core_images
from robust_jem.core.errors import InputError
from robust_jem.core.config import folded
from robust_jem.core.files import read_json
from robust_jem.core.images import Images
from robust_jem.ebm.priors import GaussianMixturePrior
from robust_jem.engine import run_log
from robust_jem.engine.runs import Run
from robust_jem.report.tables import ReportConfig
from robust_jem.systems.catalog import SYSTEMS, EvaluateConfig, GenerateConfig, TrainConfig, configure


# Options

TINY = ("--schedule.epochs", "1", "--attack.steps", "1", "--chain.outer-steps", "1")
OPTIONS = [
    ("trian", ["command", "'trian'", ", ".join(EXAMPLES)]),
    ("train --system jem2", ["system", "'jem2'", *SYSTEMS]),
    ("train --preset tpu", ["preset", "'tpu'", "paper", "cpu"]),
    ("train --dataset nothing", ["dataset", "'nothing'", "digits, cifar10, cifar100, svhn", "{train,test}/<class>"]),
    ("train --dataset ../nothing", ["dataset", "'../nothing'", "digits"]),
    ("train --epocs 3", ["--epocs", "--schedule.epochs"]),
    ("train --attack.eps -0.1", ["eps", "-0.1", "0..∞"]),
    ("train --attack.eps much", ["eps", "much", "float"]),
    ("train --attack.eps nan", ["eps", "nan"]),
    ("train --attack.eps", ["--attack.eps", "value"]),
    ("train --optimizer.batch-size 1.5", ["batch-size", "1.5", "int"]),
    ("train --system wide_resnet --optimizer.batch-size 5000", ["batch_size", "5000", "1..1437"]),
    ("train --replay.size 10", ["replay.size", "10"]),
    ("train --schedule.milestones 10 soon", ["milestones", "soon", re.compile("INT|whole number")]),
    ("train --network.norm layer", ["norm", "layer", "batch", "group", "none"]),
    ("train --seed -1", ["seed", "-1", "0.."]),
    ("train --network.depth 12", ["depth", "12", "6n+4"]),
    ("train --network.width 0", ["width", "0", "1..100"]),
    ("train --augment.pad 8", ["pad", "8", "0..7"]),
    ("train --replay.reinit-prob 1.5", ["reinit_prob", "1.5", "0..1"]),
    ("train --threads -1", ["threads", "-1", "0..4096"]),
    ("train --device cuda:99", ["device", "cuda:99", "auto, cpu, cuda"]),
    ("train --device meta", ["device", "meta", "auto, cpu, cuda"]),
    ("generate", ["run", "config.json", "robust-jem train"]),
    ("generate --run nowhere", ["run", "nowhere", "config.json"]),
    ("generate --run runs/robust_jem --method gan", ["method", "gan", "attack", "energy", "combined"]),
    ("generate --run runs/robust_jem --num-samples 0", ["num_samples", "0", "1..∞"]),
    ("generate --run runs/robust_jem --contrast 0 --method combined", ["contrast", "0"]),
    ("generate --run runs/robust_jem --contrast 1.5 --method combined", ["contrast", "1.5", "..1"]),
    ("generate --run runs/robust_jem --attack.eps -1 --method attack", ["eps", "-1", "0..∞"]),
    ("generate --run runs/robust_jem --name ../elsewhere --num-samples 10", ["name", "../elsewhere"]),
    # scores/prior.json is the bare prior's
    ("generate --run runs/robust_jem --name prior --num-samples 10 --chain.outer-steps 1", ["name", "prior"]),
    ("evaluate --run nowhere", ["run", "nowhere", "config.json"]),
    ("evaluate --run runs/robust_jem --attack-eps -0.1", ["attack_eps", "-0.1", "0..∞"]),
    ("evaluate --run runs/robust_jem --attack-norm l1", ["attack-norm", "l1", "linf", "l2"]),
    ("report --runs nowhere", ["runs", "nowhere", "robust-jem evaluate"]),
    ("replicate --systems jem2", ["system", "'jem2'", *SYSTEMS]),
    ("replicate --preset tpu", ["preset", "'tpu'", "paper", "cpu"]),
    ("replicate --dataset nothing", ["dataset", "'nothing'", "digits, cifar10, cifar100, svhn"]),
    ("replicate --extractor missing.pt", ["extractor", "missing.pt"]),
    ("replicate --seeds -1", ["seeds", "-1", "0.."]),
    ("replicate --seeds 0 0", ["seeds", "0"]),                              # two trainings would write to one folder
    ("replicate --systems jempp jempp", ["systems", "jempp"]),
    ("replicate --jobs -1", ["jobs", "-1", "0..∞"]),
    ("replicate --device cuda:99", ["device", "cuda:99"]),
    ("replicate --epochs 3", ["--epochs"]),
]


@pytest.mark.parametrize("line, says", OPTIONS, ids=[line for line, _ in OPTIONS])
def test_option_is_refused(refused, runs, line, says):
    refused(*line.split(), says=says)


def test_no_command_prints_usage(cli):
    result = cli()
    assert result.code == 2 and "usage: robust-jem" in result.out and all(c in result.out for c in EXAMPLES)


# The same in a process of its own: what the shell sees

@pytest.mark.parametrize("line, says", [OPTIONS[0], OPTIONS[1], ("train --attack.eps -0.1", ["eps", "-0.1"])])
def test_option_is_refused_by_a_process(run_command, here, line, says):
    done = run_command(*line.split())
    assert done.code == 2 and done.out == "" and all(w in one_line(done.err) for w in says)
    assert snapshot(here) == {}


# Data

def leave_dogs(pets, n):
    for path in sorted((pets / "train/dog").iterdir())[n:]:
        path.unlink()


def draw(path, *size):
    Image.new("RGB", size).save(path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-60])


UNREADABLE = ["pets/train/cat/1.png", "not a readable image"]
TREES = {
    "class with one image": (lambda pets: leave_dogs(pets, 1), ["'pets'", "'dog'", "at least two"]),
    "class without images": (lambda pets: leave_dogs(pets, 0), ["pets", "dog"]),
    "not square": (lambda pets: draw(pets / "train/cat/0.png", 8, 9), ["pets/train/cat/0.png", "square", "8x9"]),
    "two sizes": (lambda pets: draw(pets / "test/dog/0.png", 9, 9), ["pets/test/dog/0.png", "9x9", "8x8"]),
    "no image": (lambda pets: (pets / "train/cat/1.png").write_bytes(b"not an image"), UNREADABLE),
    "empty file": (lambda pets: (pets / "train/cat/1.png").write_bytes(b""), UNREADABLE),
    "truncated": (lambda pets: truncate(pets / "train/cat/1.png"), UNREADABLE),
    "broken link": (lambda pets: (pets / "train/cat/9.png").symlink_to("nowhere.png"), ["pets/train/cat/9.png"]),
    "no test split": (lambda pets: shutil.rmtree(pets / "test"), ["pets", "test", "{train,test}/<class>"]),
    "other classes in test": (lambda pets: (pets / "test/dog").rename(pets / "test/wolf"), ["pets", "dog", "wolf"]),
}


@pytest.mark.parametrize("damage", TREES)
def test_damaged_image_tree_is_refused(refused, image_tree, damage):
    make, says = TREES[damage]
    make(image_tree())
    small = ("--optimizer.batch-size", 2, "--augment.pad", 0)
    refused("train", "--dataset", "pets", *small, "--out", "out", *TINY, says=says)


def offline(*_, **__):
    raise URLError("no network")


def timeout(*_, **__):
    raise TimeoutError


@pytest.mark.parametrize("name", ("cifar10", "cifar100", "svhn"))
@pytest.mark.parametrize("failure", (offline, timeout), ids=("refused", "timeout"))
def test_no_data_and_no_network(refused, here, monkeypatch, name, failure):
    monkeypatch.setattr(urllib.request, "urlopen", failure)
    says = [f"'{name}'", f"data/{name}", "{train,test}/<class>"]
    refused("train", "--dataset", name, "--out", "out", *TINY, says=says)
    assert not (here / "out").exists()


def images(**changes):
    x, y = torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 0, 1, 1])
    good = dict(name="toy", train_x=x, train_y=y, test_x=x, test_y=y, classes=("a", "b"))
    return Images(**good | changes)


@pytest.mark.parametrize("changes, says", [
    (dict(train_y=torch.tensor([0, 0, 1, 2])), "'toy', train split: labels 0..2 are outside 0..1"),
    (dict(test_y=torch.tensor([-1, 0, 1, 1])), "'toy', test split: labels -1..1 are outside 0..1"),
    (dict(train_y=torch.tensor([0, 0, 0, 1])), "class 'b' has fewer than two training images"),
    (dict(train_x=torch.zeros(4, 1, 2, 3, dtype=torch.uint8)), "must be square, got 2x3"),
    (dict(train_x=torch.zeros(4, 1, 2, 2)), "expects uint8 images"),
    (dict(test_y=torch.tensor([0])), "4 images and 1 labels"),
    (dict(test_x=torch.zeros(0, 1, 2, 2, dtype=torch.uint8), test_y=torch.zeros(0, dtype=torch.long)), "above zero"),
])
def test_images_that_make_no_data_set(changes, says):
    assert images().shape == (1, 2, 2)
    with pytest.raises(InputError, match=re.escape(says)):
        images(**changes)


@pytest.mark.parametrize("y", ([0, 0, 1, 2], [0, 0, -1, 1]))
def test_prior_refuses_labels_outside_the_classes(y):
    with pytest.raises(InputError, match=r"labels: .* outside 0\.\.1"):
        GaussianMixturePrior.fit(torch.zeros(4, 1, 2, 2), torch.tensor(y), 2)


# Where results go

@pytest.mark.parametrize("out", ("taken/run", "taken", "notes", "x" * 300),
                         ids=("below a file", "a file", "other things in it", "name too long"))
def test_unusable_out_is_refused(refused, here, out):
    (here / "taken").write_text("a file")
    (here / "notes").mkdir()
    (here / "notes/todo.txt").write_text("mine")
    refused("train", "--out", out, *TINY, says=[out[:100]])


@pytest.mark.parametrize("line", (
    "report --runs runs --figures taken/figures", "replicate --runs taken/runs", "replicate --figures taken/figures"))
def test_results_below_a_file_are_refused_before_any_work(refused, here, evaluated, line):
    (here / "taken").write_text("a file")
    refused(*line.split(), says=["taken"])


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_leaves_no_half_written_file(refused, runs, monkeypatch):
    monkeypatch.setattr("os.fsync", full_disk)
    refused("train", "--out", "out", *TINY, says=["out/config.json", "No space left on device"])
    refused("generate", "--run", "runs/robust_jem", "--num-samples", 10, "--chain.outer-steps", 1, "--name", "few",
            says=["samples/few", "No space left on device"])


def test_disk_that_fills_while_training_is_one_line(cli, here, monkeypatch):
    def append(path, mode="r", *a, **kw):
        return full_disk() if mode == "a" else open(path, mode, *a, **kw)

    monkeypatch.setattr(run_log, "open", append, raising=False)
    result = cli("train", "--out", "out", *TINY)
    assert result.code == 2
    message = one_line(result.err)
    assert "metrics.jsonl" in message and "No space left on device" in message
    assert not Run("out").trained


# Run folders

SET_BY_FIXTURE = (
    "schedule.epochs", "schedule.warmup_steps", "optimizer.batch_size", "attack.steps", "chain.outer_steps",
    "replay.size", "threads",
)


def test_run_with_other_settings_is_never_overwritten(refused, runs):
    given = folded(json.loads((runs / "robust_jem/config.json").read_text()))
    same = [f"--{k.replace('_', '-')}={given[k]}" for k in SET_BY_FIXTURE]
    refused("train", "--out", "runs/robust_jem", *same, "--attack.eps", 0.3,
            says=["out", "runs/robust_jem", "eps: 0.2 there, 0.3 given"])
    refused("train", "--out", "runs/robust_jem", "--system", "jempp", says=["system: robust_jem there, jempp given"])


def test_samples_with_other_settings_are_never_overwritten(refused, runs):
    refused("generate", "--run", "runs/robust_jem", "--num-samples", 30,
            says=["name", "samples/energy", "num_samples: 40 there, 30 given"])


AFTER_TRAINING = {
    "generate": "generate --run runs/robust_jem --name more --num-samples 10 --chain.outer-steps 1".split(),
    "evaluate": "evaluate --run runs/robust_jem --extractor classifier:runs/judge --num-robust 10".split(),
}


@pytest.mark.parametrize("command", AFTER_TRAINING)
def test_run_that_is_not_trained(refused, runs, command):
    (runs / "robust_jem/model.safetensors").unlink()
    refused(*AFTER_TRAINING[command], says=["run", "runs/robust_jem", "isn't trained", "robust-jem train"])


CONFIGS = {
    "cut off": lambda b: b[:len(b) // 2],
    "binary": lambda b: b"\xff\xfe\x00\x01",
    "empty": lambda b: b"",
    "a list": lambda b: b"[]",
    "a number": lambda b: b"3",
    "unknown field": lambda b: b.replace(b'"depth"', b'"deep"'),
    "wrong type": lambda b: b.replace(b'"depth": 10', b'"depth": "ten"'),
}
NAMED_FIELDS = {"unknown field": ["deep", "depth"], "wrong type": ["depth", "ten"]}


@pytest.mark.parametrize("damage", CONFIGS)
@pytest.mark.parametrize("command", [*AFTER_TRAINING, "train"])
def test_damaged_config(refused, runs, command, damage):
    file = runs / "robust_jem/config.json"
    file.write_bytes(CONFIGS[damage](file.read_bytes()))
    argv = AFTER_TRAINING.get(command) or ("train", "--out", "runs/robust_jem", *TINY)
    refused(*argv, says=NAMED_FIELDS.get(damage, ["runs/robust_jem/config.json"]))


MODELS = {
    "cut off": lambda b: b[:len(b) // 2],
    "header cut off": lambda b: b[:4],
    "empty": lambda b: b"",
    "zeros": lambda b: b"\x00" * 4096,
}


@pytest.mark.parametrize("command", AFTER_TRAINING)
@pytest.mark.parametrize("damage", MODELS)
def test_damaged_model(refused, runs, command, damage):
    file = runs / "robust_jem/model.safetensors"
    file.write_bytes(MODELS[damage](file.read_bytes()))
    refused(*AFTER_TRAINING[command], says=["runs/robust_jem/model.safetensors", "safetensors"])


def test_model_of_another_network(refused, runs):
    shutil.copy(runs / "judge/model.safetensors", runs / "robust_jem/model.safetensors")
    refused(*AFTER_TRAINING["generate"], says=["runs/robust_jem/model.safetensors", "config.json"])


@pytest.mark.parametrize("content", ("{", "[]", "{}"))
def test_damaged_sample_set(refused, runs, content):
    (runs / "robust_jem/samples/energy/summary.json").write_text(content)
    refused("generate", "--run", "runs/robust_jem", "--num-samples", 40, says=["runs/robust_jem/samples/energy"])


# Extractors

EXTRACTORS = [
    ("missing.pt", ["extractor", "missing.pt", "inception", "TorchScript", "classifier:RUN"]),
    ("inceptoin", ["extractor", "inceptoin", "inception", "classifier:RUN"]),
    ("runs", ["extractor", "runs"]),
    ("garbage.pt", ["extractor", "garbage.pt", "TorchScript"]),
    ("state.pt", ["extractor", "state.pt", "TorchScript"]),
    ("newer.pt", ["extractor", "newer.pt", torch.__version__, "aten::softmix", "update PyTorch"]),
    ("other.pt", ["extractor", "other.pt"]),
    ("classifier:", ["run", "config.json"]),
    ("classifier:nowhere", ["run", "nowhere", "config.json"]),
    ("classifier:runs/untrained", ["runs/untrained", "isn't trained"]),
]


def write_extractors(here):
    "The files and the run that the list names."
    (here / "garbage.pt").write_bytes(b"junk" * 100)
    torch.save({"weight": torch.zeros(2)}, here / "state.pt")
    # a script by a PyTorch that has operators which this one lacks
    torch.jit.script(torch.nn.Softmax(1)).save(str(here / "known.pt"))
    with zipfile.ZipFile(here / "known.pt") as known, zipfile.ZipFile(here / "newer.pt", "w") as newer:
        for name in known.namelist():
            newer.writestr(name, known.read(name).replace(b"torch.softmax", b"torch.softmix"))
    # a script that takes other images than ours: found out before anything is measured
    torch.jit.trace(torch.nn.Conv2d(5, 2, 3), torch.zeros(1, 5, 8, 8)).save(str(here / "other.pt"))
    shutil.copytree(here / "runs/judge", here / "runs/untrained", ignore=shutil.ignore_patterns("model.safetensors"))


@pytest.mark.parametrize("spec, says", EXTRACTORS, ids=[spec for spec, _ in EXTRACTORS])
def test_unusable_extractor_is_refused_before_any_work(refused, runs, here, spec, says):
    write_extractors(here)
    refused("evaluate", "--run", "runs/robust_jem", "--extractor", spec, "--num-robust", 10, says=says)


def test_more_splits_than_images_are_refused_before_any_work(refused, runs):
    refused(*AFTER_TRAINING["evaluate"], "--splits", 41, says=["splits", "41", "1..40"])


@pytest.mark.parametrize("root", ("", "elsewhere"))
def test_inception_without_a_network(refused, runs, monkeypatch, root):
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    if root:
        monkeypatch.setenv("ROBUST_JEM_DATA", root)         # where data sets are looked for, weights are too
    refused("evaluate", "--run", "runs/robust_jem", "--extractor", "inception", "--num-robust", 10,
            says=["extractor", "inception-2015-12-05.pt", f"{root or 'data'}/.cache", "no network", "classifier:RUN"])


def test_download_of_inception_that_broke_off(refused, runs, here):
    file = here / "data/.cache/inception-2015-12-05.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"PK\x03\x04 and no more")
    refused("evaluate", "--run", "runs/robust_jem", "--extractor", "inception", "--num-robust", 10,
            says=["extractor", "data/.cache/inception-2015-12-05.pt"])


# Reports

def test_report_of_an_evaluation_that_was_interrupted(refused, evaluated):
    for part in ("held-out", "prior", "energy"):
        (evaluated / f"scores/{part}.json").unlink()
    refused("report", "--runs", "runs", "--figures", "figures", says=["runs", "robust-jem evaluate"])


@pytest.mark.parametrize("file, content, says", [
    ("scores/held-out.json", '{"n": 36', ["scores/held-out.json", "not valid JSON"]),
    ("scores/held-out.json", "{}", ["runs", "scores", "KeyError"]),
    ("scores/energy.json", '{"n": "many"}', ["runs", "scores"]),
    ("scores/classification.json", '{"accuracy": "high", "robust accuracy": {"0": 1}}', ["runs", "scores"]),
    ("scores/classification.json", '{"accuracy": 1, "robust accuracy": {"a": 1}}', ["runs", "scores"]),
    ("summary.json", "{}", ["runs", "summary.json", "KeyError"]),
], ids=lambda v: v if isinstance(v, str) else "")
def test_report_of_damaged_scores(refused, evaluated, file, content, says):
    "Cut off, or JSON that holds something else: refused before anything is written."
    (evaluated / file).write_text(content)
    refused("report", "--runs", "runs", "--figures", "figures", says=says)


def test_commands_in_order(cli, evaluated):
    assert cli("report", "--runs", "runs", "--figures", "figures").code == 0
    table = json.loads((evaluated.parent.parent / "figures/table1.json").read_text())
    ours = next(r for r in table["rows"] if r["model"] == "Robust JEM-Energy")
    assert ours["n"] == 40 and ours["FD-digits"]["mean"] == Run(evaluated).scores()["energy"]["FD-digits"]


def test_report_names_every_run_and_why_a_cell_is_empty(cli, evaluated):
    "What lacks a score is listed with what it has; its numbers are in results.csv all the same."
    def another(name, *without):
        shutil.copytree(evaluated, f"runs/{name}")
        for part in without:
            Path(f"runs/{name}/scores/{part}.json").unlink()

    another("begun", "held-out", "prior")
    another("no-classifier", "classification", "prior")                     # nothing that it is asked for is missing
    shutil.copytree("runs/judge", "runs/untrained", ignore=shutil.ignore_patterns("model.safetensors"))
    done = cli("report", "--runs", "runs", "--figures", "figures")
    assert done.code == 0
    found = Path("figures/found.md").read_text(encoding="utf-8")
    for name, says in (("robust_jem", "yes"), ("no-classifier", "yes"), ("judge", "no: it isn't evaluated"),
                       ("begun", "no: it isn't evaluated"), ("untrained", "no: it isn't trained to the end")):
        line = next(line for line in found.splitlines() if line.startswith(f"| {name} "))
        assert line.endswith(f"| {says} |") or f"| {says}:" in line, line
        assert (f"not in the table: {name}" in done.out) == (says != "yes")
    assert "scores: classification, energy" in next(line for line in found.splitlines() if line.startswith("| begun "))

    # every cell that is empty is explained once
    table = json.loads(Path("figures/table1.json").read_text())
    columns = ["accuracy", *table["columns"], *(f"PGD accuracy, ε = {e}" for e in table["eps"])]
    for row in table["rows"]:
        reasons = [line for line in found.splitlines() if line.startswith(f"| {row['model']} | ")]
        for column in columns:
            assert sum(column in line for line in reasons) == (column not in row)
    assert "no run of jempp in this folder" in found and "on all of its runs" in found

    # one row a number, whoever has it
    results = pd.read_csv("figures/results.csv", float_precision="round_trip", keep_default_na=False)
    key = ["run", "sample_set", "sampling_seed", "metric"]
    assert not results.duplicated(key).any() and set(results["run"]) == {"robust_jem", "begun", "no-classifier"}
    stored = Run("runs/begun").scores()
    values = results[results["run"] == "begun"].set_index(["sample_set", "metric"])["value"]
    assert values["energy", "FD-digits"] == stored["energy"]["FD-digits"]
    assert values["", "accuracy"] == stored["classification"]["accuracy"]
    same = results[results["metric"] == "recall"].groupby("sample_set")["fingerprint"].nunique()
    assert same["energy"] == 1                                              # the same images, weights and extractor


# Help

CONFIG_OF = {
    "sample": SampleConfig,
    "train": TrainConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "report": ReportConfig,
    "benchmark": BenchmarkConfig,
    "tune": TuneConfig,
    "doctor": DoctorConfig,
    "replicate": ReplicateConfig,
}


@pytest.fixture
def documented_runs(here):
    "The run folders that the examples name: a configuration is all that parsing needs."
    for system in ("robust_jem", "jempp"):
        Run.create(configure(TrainConfig, system, out=f"runs/digits-cpu/{system}-s0"))


@pytest.mark.parametrize("command", EXAMPLES)
def test_help_shows_examples_that_parse(cli, documented_runs, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "200")
    result = cli(command, "--help")
    assert result.code == 0 and result.err == ""
    start = re.compile(rf"(robust-jem|torchrun .* -m robust_jem.app.cli) {command} ?")
    examples = [line.strip() for line in result.out.splitlines() if start.match(line.strip())]
    assert examples == EXAMPLES[command][1].splitlines()
    for line in examples:
        assert isinstance(parse(command, shlex.split(start.sub("", line))), CONFIG_OF[command])
    for name in inspect.signature(CONFIG_OF[command]).parameters:
        assert f"--{name.replace('_', '-')}" in result.out


def test_usage_lists_every_command(cli):
    result = cli("--help")
    assert result.code == 0 and all(f"robust-jem {c}" in result.out for c in EXAMPLES)


def test_tune_prints_what_it_measured(cli, here):
    quick = "--networks 10-1/8 --variants eager fused --attack-steps 1 --outer-steps 1 --repeats 1 --no-profile"
    result = cli("tune", *quick.split(), "--device", "cpu", "--threads", 1)
    assert result.code == 0 and "| 10-1/8 | eager |" in result.out and "- 10-1/8, fused: " in result.out
    assert read_json(Path("runtime.tuned.json"))["choice"] == {"10-1/8": "off"}
    assert result.out.strip() == Path("tune.md").read_text(encoding="utf-8").strip()


def test_help_of_a_process(run_command):
    done = run_command("replicate", "--help")
    assert done.code == 0 and "robust-jem replicate --preset cpu" in done.out and done.err == ""


def test_readme_shows_commands_that_parse(documented_runs):
    "Every robust-jem line in the README is a command that the parser takes."
    text = (REPO / "README.md").read_text(encoding="utf-8")
    for shown in re.findall(r"^\s*(robust-jem [a-z].*)$", text, re.M):
        line = shown.split("#")[0].strip()
        _, command, *argv = shlex.split(line)
        assert isinstance(parse(command, argv), CONFIG_OF[command]), line


def test_dataset_error_names_every_accepted_name(cli, here):
    assert all(name in cli("train", "--dataset", "nothing").err for name in core_images.DATASETS)
