"""Faults: killed processes, failing disks, damaged files, runs that diverge, and input that means harm. Small counts of
`python tests/faults.py`, and what that can't show."""
import json
import os
import pickle
import shutil
import signal
import zipfile
from pathlib import Path
from types import SimpleNamespace

import faults
import numpy as np
import pytest
import torch
from conftest import one_line, snapshot
from faults import CONFIG, SHORT, lines, options, running, undisturbed, until
from PIL import Image

from robust_jem.app.plan import ReplicateConfig
from robust_jem.core.errors import InputError, OutOfTime
from robust_jem.core.files import read_tensors, write_tensors
from robust_jem.core.images import load_images
from robust_jem.engine import runtime
from robust_jem.engine.runs import Run
from robust_jem.engine.pretrained import RobustJEM
from robust_jem.engine.train import train
from robust_jem.systems.hybrid_settings import HybridRecovery
from robust_jem.systems.catalog import EvaluateConfig, GenerateConfig, TrainConfig, configure

QUIET = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def short(whole_short, here):
    "`run` in the working directory, free to damage: a run of SHORT that was killed before it wrote its result."
    shutil.copytree(whole_short.path, here / "run")
    for name in ("model.safetensors", "summary.json"):
        (here / "run" / name).unlink()

    def again():
        return train(configure(TrainConfig, "robust_jem", **SHORT, out="run"), progress=False)

    return SimpleNamespace(run=Run(here / "run"), digest=whole_short.digest, again=again)


# The harness, with small counts

def test_killed_runs_end_in_the_same_bits(tmp_path, whole):
    r = faults.kills(tmp_path, n=1, seed=1, expected=whole.digest, life=Run(whole.path).summary["seconds"])
    assert r.kills == r.resumes == 1 and not r.lost and not r.unequal


def test_every_failed_write_is_one_error_and_the_run_goes_on(tmp_path, whole_short):
    r = faults.writes(tmp_path, every=8, offset=2, expected=whole_short.digest)
    assert r.positions >= 4 and not r.unusable and not r.other and not r.part_files


def test_one_changed_byte_is_always_noticed(tmp_path, whole_short):
    assert faults.bytes_changed(tmp_path, n=120, seed=2, whole=whole_short.path).missed == []


@pytest.mark.parametrize("case", faults.CASES)
def test_diverging_run_recovers_or_says_so(tmp_path, case):
    # in bfloat16, where a CPU multiplies it, one of the cases ends well
    r = faults.diverge(tmp_path / "run", **faults.CASES[case] | dict(recovery__times=1, precision="float32"))
    assert r.events and not r.wrong and (r.said or r.run.summary["recoveries"] == 1)


def test_jem_that_is_too_fast_needs_its_recoveries(tmp_path):
    assert "after 0 of 0 recoveries" in faults.diverge(tmp_path / "without", **faults.TOO_FAST, recovery__times=0).said
    r = faults.diverge(tmp_path / "with", **faults.TOO_FAST)
    assert not r.said and not r.wrong and r.run.summary["recoveries"] == len(r.events) > 0


@pytest.mark.parametrize("after", (0, pytest.param(12, marks=pytest.mark.long)), ids=("at once", "an epoch later"))
def test_recovered_run_that_is_killed_keeps_its_events(tmp_path, whole_recovered, after):
    assert faults.recovered_then_killed(tmp_path, after, expected=whole_recovered.digest, **faults.RECOVERING) == []


@QUIET
def test_recovered_run_that_runs_out_of_time_keeps_its_events(here, monkeypatch, whole_recovered):
    config, expected = faults.RECOVERING, whole_recovered.digest
    with monkeypatch.context() as m:
        m.setattr(runtime.Deadline, "reached", lambda _: any("event" in r for r in lines(here / "run")))
        with pytest.raises(OutOfTime):
            train(configure(TrainConfig, **config, max_minutes=1, out=str(here / "run")), progress=False)
    assert undisturbed(here / "run", config=config) == expected and json.loads(expected["events"])


def test_bad_inputs_are_one_line_by_every_route(tmp_path, session_runs):
    "Every fifth command line, since the others have tests of their own; a notebook, and every call."
    for route, r in faults.inputs(tmp_path, session_runs, every=5, notebooks_every=26).items():
        assert r.inputs == r.clear > 0 and not r.tracebacks + r.other + r.changed, route


# Locks, and folders that vanish

def test_second_training_is_refused_and_a_killed_one_lets_go(here, cli):
    with running(here / "run") as first:
        assert until(lambda: lines(here / "run"), first)
        first.send_signal(signal.SIGSTOP)                              # so that what changes is the second's doing
        before = snapshot(here)
        result = cli("train", "--system", "robust_jem", *options(CONFIG), "--out", "run")
        assert result.code == 2 and f"process {first.pid} " in one_line(result.err) and "in use" in result.err
        assert snapshot(here) == before
        first.kill()
        first.communicate()
    result = cli("train", "--system", "robust_jem", *options(CONFIG), "--out", "run")
    assert result.code == 0 and not (here / "run/.lock").exists()


def test_run_folder_that_vanishes(here):
    with running(here / "run") as process:
        assert until(lambda: lines(here / "run"), process)
        (here / "run").rename(here / "elsewhere")
        out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and out == "" and "run" in one_line(err)
    assert not (here / "run/config.json").exists() and not list(here.glob("run/**/*.safetensors"))


def test_read_only_folder(here, cli, monkeypatch):
    "Permissions don't bind everyone who runs tests, so the system call says no."
    def refusing(real):
        def mkdir(path, *a, **kw):
            if "locked" in str(path):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *a, **kw)
        return mkdir

    monkeypatch.setattr(os, "mkdir", refusing(os.mkdir))
    monkeypatch.setattr(Path, "mkdir", refusing(Path.mkdir))           # Python 3.10's has its own os.mkdir
    result = cli("train", "--out", "locked/run", *options(SHORT))
    assert result.code == 2 and "locked/run" in one_line(result.err) and "Permission denied" in result.err
    assert snapshot(here) == {}


# Damaged checkpoints

def test_damaged_checkpoint_goes_on_from_the_one_before(short):
    newest, before = short.run.checkpoints()
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match=f"{newest.name}.*damaged.*going on from the checkpoint before it"):
        short.again()
    assert faults.digest(short.run) == short.digest


@QUIET
def test_no_checkpoint_is_whole(short):
    for file in short.run.checkpoints():
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match="remove the folder checkpoints"):
        short.again()
    shutil.rmtree(short.run.path / "checkpoints")
    short.again()
    assert faults.digest(short.run) == short.digest


@QUIET
def test_checkpoint_of_other_settings(short):
    "Copied in from another run: not taken, and not passed over for the one before it."
    newest = short.run.checkpoints()[0]
    tensors, meta = read_tensors(newest)
    meta["config"]["attack"]["eps"] = 0.3
    write_tensors(newest, tensors, meta)
    with pytest.raises(InputError, match="other settings"):
        short.again()


def first_of(tensors, start):
    return next(name for name in tensors if name.startswith(start))


def without(tensors, part):
    for name in [name for name in tensors if part in name]:
        tensors.pop(name)


def renamed(tensors, meta):
    tensors["system.network.stem.other"] = tensors.pop(first_of(tensors, "system.network.stem"))


def reshaped(tensors, meta):
    name = next(k for k in tensors if k.startswith("system.network.trunk") and tensors[k].ndim == 4)
    tensors[name] = tensors[name][:, :1].contiguous()


def chains_of_another_size(tensors, meta):
    tensors["system.replay_x"] = tensors["system.replay_x"][..., :4].contiguous()


def fewer_chains(tensors, meta):
    for name in ("system.replay_x", "system.replay_y"):
        tensors[name] = tensors[name][:7].clone()


def momentum_of_another_shape(tensors, meta):
    name = first_of(tensors, "optimizer.")
    tensors[name] = tensors[name].flatten()[:1].clone()


def random_state_of_noise(tensors, meta):
    name = first_of(tensors, "generator.")
    tensors[name] = torch.randint(256, tensors[name].shape, dtype=torch.uint8)


MISFITS = {
    "renamed": renamed,
    "reshaped": reshaped,
    "chains of another size": chains_of_another_size,
    "fewer chains": fewer_chains,
    "no optimizer": lambda tensors, meta: without(tensors, "optimizer."),
    "momentum of another shape": momentum_of_another_shape,
    "no average": lambda tensors, meta: without(tensors, "system.average."),
    "no generators": lambda tensors, meta: without(tensors, "generator."),
    "random state of noise": random_state_of_noise,
    "no step": lambda tensors, meta: meta.pop("step"),
    "step of text": lambda tensors, meta: meta.update(step="six"),
    "negative step": lambda tensors, meta: meta.update(step=-3),
    "no config": lambda tensors, meta: meta.pop("config"),
    "events of text": lambda tensors, meta: meta.update(events=3),
    "no processes": lambda tensors, meta: meta.update(processes="two"),
}


@QUIET
@pytest.mark.parametrize("change", MISFITS)
def test_checkpoint_that_does_not_fit(short, change):
    "Its checksum is right, its contents aren't."
    newest, *older = short.run.checkpoints()
    for file in older:
        file.unlink()
    tensors, meta = read_tensors(newest)
    MISFITS[change](tensors, meta)
    write_tensors(newest, tensors, meta)
    with pytest.raises(InputError, match=r"step-\d+\.safetensors: "):
        short.again()
    assert not short.run.trained


# Pickles: nothing in them may run

class Payload:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


@pytest.fixture
def trap(here):
    "Write a pickle, plain or as torch.save writes it, in place of a file; `sprung` says whether its payload ran."
    marker = here.parent / "sprung"

    def write(path, plain=False):
        if plain:
            path.write_bytes(pickle.dumps(Payload(marker)))
        else:
            torch.save({"weight": torch.zeros(2), "payload": Payload(marker)}, path)

    write.sprung = marker.exists
    write(here.parent / "check.pt", plain=True)
    pickle.loads((here.parent / "check.pt").read_bytes())
    assert marker.exists()                                             # the trap works
    marker.unlink()
    return write


@QUIET
@pytest.mark.parametrize("plain", (True, False), ids=("pickle", "torch.save"))
def test_pickle_in_place_of_a_checkpoint(short, trap, plain):
    for file in short.run.checkpoints():
        trap(file, plain)
    with pytest.raises(InputError, match="not a readable safetensors file"):
        short.again()
    assert not trap.sprung()


READERS = {
    "runs/robust_jem/model.safetensors": "generate runs/robust_jem --name x --num-samples 10 --chain.outer-steps 1",
    "runs/robust_jem/samples/energy/images.safetensors":
        "evaluate runs/robust_jem --extractor classifier:runs/judge --num-robust 10 --attack-steps 1",
    "extractor.pt": "evaluate runs/robust_jem --extractor extractor.pt --num-robust 10",
}


@pytest.mark.parametrize("plain", (True, False), ids=("pickle", "torch.save"))
@pytest.mark.parametrize("file", READERS, ids=("model", "samples", "extractor"))
def test_pickle_in_place_of_another_file(runs, here, cli, trap, file, plain):
    trap(here / file, plain)
    result = cli(*READERS[file].split())
    assert result.code == 2 and Path(file).name in one_line(result.err) and not trap.sprung()


# Hostile input: one line, exit code 2, nothing changed

OPTIONS = [
    ("--dataset=/etc", ["dataset", "/etc"]),
    ("--dataset=.", ["dataset", "'.'"]),
    ("--dataset=..", ["dataset", "'..'"]),
    ("--dataset=digits/../digits", ["dataset"]),
    ("--dataset=", ["dataset"]),
    ("--dataset=.cache", ["dataset", ".cache"]),
    ("--dataset=nu\x00l", ["dataset"]),
    ("--dataset=new\nline", ["dataset"]),
    ("--dataset=" + "é" * 200, ["dataset"]),
    ("--dataset=" + "x" * 5000, ["xxxx"]),
    ("--dataset=\udcff", ["dataset"]),
    ("--out=run\x00", ["out"]),
    ("--out=/dev/null", ["/dev/null"]),
    ("--out=/proc/1/run", ["/proc/1/run"]),
    ("--out=" + "deep/" * 2000, ["deep"]),
    ("--root=nowhere\x00 --dataset=pets", ["root", "can't be printed"]),
    ("--attack.eps=inf", ["eps", "inf"]),
    ("--optimizer.lr=1e400", ["lr", "inf"]),
    ("--optimizer.lr=-inf", ["lr", "inf"]),
    ("--recovery.gap-limit=NaN", ["gap_limit", "nan"]),
    ("--seed=9223372036854775808", ["seed", "9223372036854775808"]),
    ("--seed=1e3", ["seed", "1e3"]),
    ("--seed=" + "9" * 5000, ["seed"]),
    ("--schedule.epochs=-1", ["epochs", "-1"]),
    ("--schedule.epochs=٣x", ["epochs"]),
    ("--max-minutes=inf", ["max_minutes"]),
    ("--max-minutes=-0.5", ["max_minutes"]),
    ("--checkpoint-minutes=nan", ["checkpoint_minutes"]),
    ("--optimizer.batch-size=0", ["batch_size", "0"]),
    ("--optimizer.batch-size=99999999999999999999", ["batch_size"]),
    ("--keep-checkpoints=0", ["keep_checkpoints", "0"]),
    ("--recovery.times=-1", ["recovery.times"]),
    ("--schedule.decay=1.01", ["decay"]),
    ("--augment.flip=yes", ["yes"]),
    ("--augment.flip maybe", ["maybe"]),
    ("--no-no-flip", ["no-flip"]),
    ("--preset=", ["preset"]),
    ("--preset=CPU", ["preset", "'CPU'"]),
    ("--system=__class__", ["system"]),
    ("--device=cuda:-1", ["device"]),
    ("--device=cpu:", ["device"]),
    ("--device=gpu", ["device", "gpu"]),
    ("--device=", ["device"]),
    ("--device=mps", ["device"]),
    ("--precision=float64", ["precision"]),
]


@pytest.fixture
def refused(cli, here):
    "Run a command that must change nothing; its one line must say all of `says`."
    def check(*argv, says=()):
        before = snapshot(here)
        result = cli(*argv)
        assert result.code == 2 and result.out == "", result
        message = one_line(result.err)
        assert all(w in message for w in says), message[:1000]
        assert snapshot(here) == before

    return check


@pytest.mark.parametrize("line, says", OPTIONS, ids=[repr(line)[1:40] for line, _ in OPTIONS])
def test_hostile_option(refused, line, says):
    out = [] if "--out" in line else ["--out", "run"]
    refused("train", *options(SHORT), *out, *line.split(" "), says=says)


@pytest.mark.parametrize("option, says", (
    ("--network.depth=10000000000", "depth"),
    ("--network.width=1000000000", "width"),
    ("--replay.size=100000000000000", "size"),
    ("--threads=1000000000000", "threads"),
))
def test_value_beyond_any_machine(run_command, here, option, says):
    "In a process with bounded memory and time, since what isn't refused takes all of both."
    done = run_command("train", *options(SHORT), "--out", "run", option, seconds=20, memory=8 << 30)
    assert done.code == 2 and done.out == "" and snapshot(here) == {}
    assert any(word in one_line(done.err) for word in (says, "memory"))


@pytest.mark.parametrize("name", ("a/../../b", "nul\x00", "new\nline", "/abs", "x" * 300), ids=ascii)
def test_hostile_name_of_a_sample_set(refused, runs, name):
    refused("generate", "runs/robust_jem", "--num-samples", 10, "--chain.outer-steps", 1, "--name", name)


VALUES = [
    (TrainConfig, dict(optimizer__lr="0.1")),
    (TrainConfig, dict(schedule__epochs=True)),
    (TrainConfig, dict(augment__flip="false")),
    (TrainConfig, dict(schedule__milestones=5)),
    (TrainConfig, dict(seed=1.0)),
    (TrainConfig, dict(attack__eps=10**400)),
    (TrainConfig, dict(dataset=None)),
    (TrainConfig, dict(network__norm=["batch"])),
    (TrainConfig, dict(__class__=1)),
    (TrainConfig, dict(system=[])),
    (GenerateConfig, dict(name="..")),
    (GenerateConfig, dict(run=Path("x"))),
    (EvaluateConfig, dict(attack_eps=(0.1, None))),
    (EvaluateConfig, dict(attack_eps=float("nan"))),
]


def test_hostile_values_from_python():
    for kind, values in VALUES:
        with pytest.raises(InputError) as e:
            kind.from_dict(values)
        assert "\n" not in str(e.value) and next(iter(values)) in str(e.value)
    for values in (dict(seeds=()), dict(systems="jempp"), dict(jobs=1.5)):
        with pytest.raises(InputError):
            ReplicateConfig(**values)
    for name in ("../digits", "/", "", "a\\b\x00"):
        with pytest.raises(InputError):
            load_images(name)


# Image trees

def pixels(size, value=0):
    return Image.fromarray(np.full((*size, 3), value, np.uint8))


def animated(file):
    pixels((8, 8)).save(file, "GIF", save_all=True, append_images=[pixels((8, 8), 200), pixels((8, 8), 90)])


def cut_off(file, end):
    file.write_bytes(file.read_bytes()[:end])


def cut_off_jpeg(p):
    pixels((8, 8)).save(p / "train/cat/5.jpg")
    cut_off(p / "train/cat/5.jpg", -200)


def class_as_file(p):
    shutil.rmtree(p / "test/dog")
    (p / "test/dog").write_text("")


def no_class(p):
    for name in ("cat", "dog"):
        shutil.rmtree(p / "train" / name)


def other_files_only(p):
    for file in (p / "train/dog").iterdir():
        file.rename(file.with_suffix(".txt"))


def empty_class(p):
    for file in (p / "test/dog").iterdir():
        file.unlink()


def link_to_outside(p):
    (p / "train/cat/2.png").rename(p.parent / "outside.png")
    (p / "train/cat/2.png").symlink_to(p.parent / "outside.png")


TREES = {
    "100000 pixels wide": (
        lambda p: pixels((8, 100_000)).save(p / "train/cat/0.png"), ["train/cat/0.png", "square"]),
    "a bomb": (lambda p: Image.new("1", (20_000, 20_000)).save(p / "train/cat/0.png"), ["train/cat/0.png"]),
    "text with an image's name": (
        lambda p: (p / "test/dog/0.png").write_text("<svg/>"), ["test/dog/0.png", "not a readable image"]),
    "cut off in the pixels": (
        lambda p: cut_off(p / "train/cat/0.png", 70), ["train/cat/0.png", "not a readable image"]),
    "cut off JPEG": (cut_off_jpeg, ["train/cat/5.jpg", "not a readable image"]),
    "link that leads in a circle": (lambda p: (p / "train/cat/loop").symlink_to(p / "train"), ["loop"]),
    "link to itself": (
        lambda p: (p / "train/cat/9.png").symlink_to(p / "train/cat/9.png"), ["train/cat/9.png"]),
    "class that is a file": (class_as_file, ["dog"]),
    "no class at all": (no_class, ["pets", "train"]),
    "class of other files only": (other_files_only, ["dog"]),
    "empty class in test": (empty_class, ["dog"]),
    "link to a file outside": (link_to_outside, ["train/cat/2.png", "link"]),
}


@pytest.mark.parametrize("damage", TREES)
def test_hostile_image_tree(refused, image_tree, damage):
    make, says = TREES[damage]
    make(image_tree())
    settings = ("--optimizer.batch-size 2 --augment.pad 0 --schedule.epochs 1 --attack.steps 1 --chain.outer-steps 1 "
                "--threads 1 --device cpu")
    refused("train", "--dataset", "pets", *settings.split(), "--out", "out", says=says)


def test_pipe_in_an_image_tree(run_command, here, image_tree):
    "In a process, since reading a pipe that nobody writes to takes for ever."
    os.mkfifo(image_tree() / "train/cat/9.png")
    train = "train --dataset pets --optimizer.batch-size 2 --augment.pad 0 --out out".split()
    done = run_command(*train, seconds=20)
    assert done.code == 2 and "9.png" in one_line(done.err) and not (here / "out").exists()


def test_image_that_cannot_be_opened(refused, image_tree, monkeypatch):
    image_tree()
    real = Image.open

    def opened(path, *a, **kw):
        if str(path).endswith("cat/1.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *a, **kw)

    monkeypatch.setattr(Image, "open", opened)
    refused("train", "--dataset", "pets", "--optimizer.batch-size", 2, "--out", "out",
            says=["cat/1.png", "Permission denied"])


def test_unusual_images_are_read_as_rgb(image_tree):
    "CMYK, an animation's first picture, an extension that isn't the format's."
    cat = image_tree() / "train/cat"
    pixels((8, 8), 100).convert("CMYK").save(cat / "0.png", "TIFF")
    animated(cat / "1.png")
    x = load_images("pets").train_x[:2]
    assert x.shape == (2, 3, 8, 8) and (x[0].int() - 100).abs().max() <= 1 and (x[1] == 0).all()


def test_sixteen_bit_images_are_refused(image_tree):
    "Pillow would clip them to white."
    cat = image_tree() / "train/cat"
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(cat / "0.png")
    with pytest.raises(InputError, match="convert the images to 8 bits"):
        load_images("pets")


# Run folders and extractors

CONFIGS = {
    "not UTF-8": lambda c: json.dumps(c).encode("utf-16"),
    "a field too many": lambda c: json.dumps(c | {"__init__": 1}).encode(),
    "a number as text": lambda c: json.dumps(c | {"optimizer": c["optimizer"] | {"lr": "0.1"}}).encode(),
    "true as a number": lambda c: json.dumps(c | {"schedule": c["schedule"] | {"epochs": True}}).encode(),
    "null": lambda c: json.dumps(c | {"seed": None}).encode(),
    "no settings": lambda c: b"{}",
    "no system": lambda c: json.dumps({k: v for k, v in c.items() if k != "system"}).encode(),
    "NaN": lambda c: json.dumps(c | {"optimizer": c["optimizer"] | {"lr": float("nan")}}).encode(),
    "Infinity": lambda c: json.dumps(c | {"recovery": c["recovery"] | {"gap_limit": float("inf")}}).encode(),
    "a nested list": lambda c: json.dumps(c | {"schedule": c["schedule"] | {"milestones": [[1]]}}).encode(),
    "an object as a name": lambda c: json.dumps(c | {"system": {"a": 1}}).encode(),
    "a data set elsewhere": lambda c: json.dumps(c | {"dataset": "../../etc"}).encode(),
    "deeper than Python counts": lambda c: b'{"lr":' + b"[" * 100_000,
    "a number longer than Python reads": lambda c: b'{"seed":' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("damage", CONFIGS)
def test_hostile_config(refused, runs, damage):
    file = runs / "robust_jem/config.json"
    file.write_bytes(CONFIGS[damage](json.loads(file.read_text())))
    refused("generate", "runs/robust_jem", "--name", "x", "--num-samples", 10, "--chain.outer-steps", 1)


def test_config_with_fewer_fields_takes_the_defaults(runs):
    file = runs / "robust_jem/config.json"
    config = json.loads(file.read_text())
    config["recovery"].pop("gap_limit")
    file.write_text(json.dumps(config))
    assert Run(runs / "robust_jem").config.recovery == HybridRecovery()


GARBAGE = {
    "not UTF-8": b"\xff\xfe\x00garbage\n",
    "a list": b"[1, 2]\n",
    "a number": b"3\n",
    "no step": b"{}\n",
    "step of text": b'{"step": "x"}\n',
    "no number": b'{"step": null}\n',
}


@pytest.mark.parametrize("garbage", GARBAGE)
@QUIET
def test_garbage_in_metrics(short, garbage):
    "Either left out, so that the run ends as if it weren't there, or refused in one line."
    file = short.run.path / "metrics.jsonl"
    file.write_bytes(GARBAGE[garbage] + file.read_bytes())
    try:
        short.again()
    except InputError as e:
        assert "metrics.jsonl" in str(e) and "\n" not in str(e)
    else:
        assert short.run.trained


class Wrong(torch.nn.Module):
    def __init__(self, what: str):
        super().__init__()
        self.what = what

    def forward(self, x):
        if self.what == "no batch":
            return x.mean()
        if self.what == "NaN":
            return x.flatten(1)[:, :4] * float("nan")
        return x.flatten(1)[:1, :4]


def script_with_a_tuple(file):
    torch.jit.trace(lambda x: (x.flatten(1), x.flatten(1)), torch.zeros(2, 3, 8, 8)).save(str(file))


def traversal(file):
    with zipfile.ZipFile(file, "w") as z:
        z.writestr("../../escaped.txt", "out")
        z.writestr("archive/data.pkl", b"\x80\x02}q\x00.")


EXTRACTORS = {
    "empty": lambda f: f.write_bytes(b""),
    "text": lambda f: f.write_text("import os\n"),
    "zip that climbs out": traversal,
    "empty zip": lambda f: zipfile.ZipFile(f, "w").close(),
    "two outputs": script_with_a_tuple,
    "no batch": lambda f: torch.jit.script(Wrong("no batch")).save(str(f)),
    "features of NaN": lambda f: torch.jit.script(Wrong("NaN")).save(str(f)),
    "one feature for all": lambda f: torch.jit.script(Wrong("one")).save(str(f)),
    "folder": lambda f: f.mkdir(),
}


@pytest.mark.parametrize("kind", EXTRACTORS)
@pytest.mark.filterwarnings("ignore")
def test_hostile_extractor(refused, runs, here, kind):
    EXTRACTORS[kind](here / "net.pt")
    attack = "--num-robust 10 --attack-steps 1 --attack-eps 0.1".split()
    refused("evaluate", "runs/robust_jem", "--extractor", "net.pt", *attack, says=["extractor"])
    assert not (here.parent / "escaped.txt").exists() and not (here.parent.parent / "escaped.txt").exists()


def test_duplicate_options_take_the_last(cli, here):
    "As everywhere on a command line; the first parsing and the real one agree."
    from robust_jem.app.cli import parse
    c = parse("train", ["--system", "jem", "--schedule.epochs", "3", "--system=jempp", "--schedule.epochs=4"])
    assert c.system == "jempp" and c.schedule.epochs == 4 and c == configure(TrainConfig, "jempp", schedule__epochs=4)


def test_pretrained_folder_that_is_damaged(here):
    (here / "model").mkdir()
    no_classes = b'{"train": {}, "classes": 3, "shape": [1, 8, 8]}'
    for content in (b"", b"{}", b"[]", b'{"train": 3}', b'{"train": {}}', no_classes):
        (here / "model/config.json").write_bytes(content)
        with pytest.raises(InputError):
            RobustJEM.from_pretrained(here / "model")
