"""Classifiers of other libraries by name, samples in other tools' forms, and what `doctor` says.

No weights can be downloaded in tests. What timm and RobustBench answer with weights is stood in for by modules with the
functions that are called; the real libraries are tried with weights from a file."""
import importlib
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from robust_jem.app import doctor as doctor_module
from robust_jem.core.errors import InputError
from robust_jem.core.images import Images, load_images
from robust_jem.judge.zoo import zoo_model


class Plain(nn.Module):
    "Linear on the mean of each channel: what it sees can be read off its logits."

    def __init__(self, classes):
        super().__init__()
        self.fc = nn.Linear(3, classes)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


def data(classes, name="mine", size=4):
    "Black images of as many classes."
    y = torch.arange(classes)
    x = torch.zeros(classes, 3, size, size, dtype=torch.uint8)
    return Images(name, x.repeat(2, 1, 1, 1), y.repeat(2), x, y, tuple(map(str, range(classes))))


def module(monkeypatch, name, **members):
    made = types.ModuleType(name)
    vars(made).update(members)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def offline(*a, **kw):
    raise ConnectionError("Name or service\nnot known")


@pytest.fixture
def timm(monkeypatch):
    "timm's few functions: two models, one of them without weights."
    about = types.SimpleNamespace(has_weights=True, num_classes=5)

    def create_model(name, pretrained=False, num_classes=5):
        return Plain(num_classes)

    def config(name, allow_unregistered=True):
        if name.partition(".")[2] not in ("", "in5"):
            raise RuntimeError("Invalid pretrained tag")
        return about if name.startswith("net18") else None

    how = dict(mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.5), input_size=(3, 8, 8))
    return module(
        monkeypatch, "timm",
        is_model=lambda name: name in ("net18", "bare"),
        list_models=lambda: ["net18", "bare"],
        list_pretrained=lambda: ["net18.in5"],
        create_model=create_model,
        models=types.SimpleNamespace(get_pretrained_cfg=config),
        data=types.SimpleNamespace(resolve_model_data_config=lambda model: how),
    )


@pytest.fixture
def robustbench(monkeypatch):
    "RobustBench's two functions: three models for CIFAR-10."
    dicts = {"cifar10": {"Linf": {"Ann2019": 0, "Bob2020": 0}, "L2": {"Ann2019": 0, "Cy2021": 0}}}
    asked = {}

    def load_model(**how):
        asked.update(how)
        return Plain(10)

    zoo = module(monkeypatch, "robustbench.model_zoo", model_dicts=dicts)
    utils = module(monkeypatch, "robustbench.utils", load_model=load_model)
    module(monkeypatch, "robustbench", model_zoo=zoo, utils=utils)
    return types.SimpleNamespace(asked=asked, utils=utils)


def refused(spec, images, *says):
    with pytest.raises(InputError) as e:
        zoo_model(spec, images)
    text = str(e.value)
    assert "\n" not in text and [s for s in says if s not in text] == []


def test_timm_sees_its_own_preprocessing(timm):
    model = zoo_model("timm:net18", data(5))
    x = torch.rand(2, 3, 4, 4) * 2 - 1
    seen = ((x + 1) / 2).mean((2, 3)).sub(torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.1, 0.2, 0.5])
    large = model(nn.functional.interpolate(x, scale_factor=2))                  # its own size: nothing is enlarged
    torch.testing.assert_close(large, model.model.fc(seen))
    assert model(x).shape == (2, 5) and not model.training


def test_timm_says_what_is_wrong(timm, monkeypatch):
    refused("timm:net81", data(5), "'net81'", "did you mean net18", "2 models")
    refused("timm:net18", data(3), "5 classes", "has 3", "@FILE")
    refused("timm:bare", data(5), "no weights for 'bare'", "@FILE")
    refused("timm:net18.in6", data(5), "'net18.in6'", "net18.in5")
    refused("timm:", data(5), "names no model", "timm:NAME")
    monkeypatch.setattr(timm, "create_model", offline)
    refused("timm:net18", data(5), "can't be had", "ConnectionError", "HF_HOME")


def test_robustbench_takes_unit_images(robustbench, here):
    model = zoo_model("robustbench:Ann2019", data(10, "cifar10"))
    x = torch.rand(2, 3, 4, 4) * 2 - 1
    torch.testing.assert_close(model(x), model.model((x + 1) / 2))
    assert robustbench.asked["threat_model"] == "Linf" and robustbench.asked["dataset"] == "cifar10"
    zoo_model("robustbench:L2/Ann2019", data(10, "cifar10"))
    assert robustbench.asked["threat_model"] == "L2"
    zoo_model("robustbench:Cy2021", data(10, "cifar10"))
    assert robustbench.asked["threat_model"] == "L2"


def test_robustbench_says_what_is_wrong(robustbench, monkeypatch, here):
    refused("robustbench:Anne2019", data(10, "cifar10"), "'Anne2019'", "Linf/Ann2019")
    refused("robustbench:L2/Bob2020", data(10, "cifar10"), "'Bob2020'")
    refused("robustbench:Ann2019", data(10), "no models for mine", "cifar10")
    monkeypatch.setattr(robustbench.utils, "load_model", offline)
    refused("robustbench:Ann2019", data(10, "cifar10"), "can't be had", "robustbench/cifar10/Linf")


def real(name):
    "A library that is installed, as its users import it; the test is skipped where it isn't or can't be imported."
    try:
        return importlib.import_module(name)
    except ImportError as e:
        pytest.skip(f"{name} can't be imported here: {e}")


def test_the_real_timm(here):
    timm = real("timm")
    theirs = timm.create_model("resnet18", num_classes=10).eval()
    torch.save(theirs.state_dict(), "mine.pt")
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(zoo_model("timm:resnet18@mine.pt", data(10))(x), theirs(x))
    unit = zoo_model("timm:resnet18@mine.pt", data(10), inputs="unit")
    torch.testing.assert_close(unit(x), theirs((x + 1) / 2), rtol=1e-4, atol=1e-5)
    refused("timm:resnet34@mine.pt", data(10), "mine.pt", "doesn't hold its weights")
    refused("timm:resnet18", data(10), "1000 classes", "has 10", "@FILE")
    refused("timm:resnet18.none", data(1000), "no weights for 'resnet18.none'", "resnet18.a1_in1k")
    refused("timm:rsnet18", data(10), "'rsnet18'", "did you mean resnet18")


def test_the_real_robustbench(here):
    "Its smallest network: it looks for the weights in our cache before it downloads."
    dicts = real("robustbench.model_zoo").model_dicts
    threats = {str(getattr(k, "value", k)): v for k, v in dicts.items()}["cifar10"]
    models = {str(getattr(k, "value", k)): v for k, v in threats.items()}["Linf"]
    name = "Addepalli2022Efficient_RN18"
    theirs = models[name]["model"]().eval()
    folder = here / ".cache/robustbench/cifar10/Linf"
    folder.mkdir(parents=True)
    torch.save(theirs.state_dict(), folder / f"{name}.pt")
    ours = zoo_model(f"robustbench:{name}", data(10, "cifar10"), root=here)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(ours(x), theirs((x + 1) / 2), rtol=1e-4, atol=1e-5)
    refused("robustbench:Nobody2020", data(10, "cifar10"), "'Nobody2020'", "models to choose from")


def test_torchvision_says_what_is_wrong(monkeypatch, here):
    refused("torchvision:resnet81", data(10), "'resnet81'", "did you mean resnet", "resnet18")
    refused("torchvision:resnet18", data(10), "1000 classes", "has 10", "@FILE")
    refused("torchvision:resnet18@nowhere.pt", data(10), "no file nowhere.pt")
    (here / "junk.pt").write_bytes(b"junk")
    refused("torchvision:resnet18@junk.pt", data(10), "junk.pt", "doesn't hold its weights")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    refused("torchvision:resnet18", data(1000), "can't be had", "ConnectionError", "https://", "checkpoints")


@pytest.mark.parametrize("zoo", ("timm", "robustbench"))
def test_what_is_not_installed(monkeypatch, zoo):
    for name in (zoo, f"{zoo}.model_zoo"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Blind(zoo), *sys.meta_path])
    refused(f"{zoo}:net", data(10, "cifar10"), "isn't installed", f"pip install {zoo}")


class Blind:
    "A finder that finds one package missing."

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=self.package)


def test_a_zoos_model_is_judged(cli, timm, here):
    "From the command line to the card, and a result's folder of its own."
    def grey(name, num_classes=10, pretrained=False):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))

    timm.create_model = grey
    torch.save(grey("net18").state_dict(), here / "mine.pt")
    small = ("--num-robust", 20, "--batch-size", 20, "--suite", "calibration", "--device", "cpu")
    done = cli("evaluate", "--model", "timm:net18@mine.pt", "--model-data", "digits", *small)
    assert done.code == 0, done.err
    assert (here / "runs/models/timm.net18.mine.pt/MODEL_CARD.md").is_file()
    missing = cli("evaluate", "--model", "timm:net81", "--model-data", "digits", *small)
    assert missing.code == 2 and len(missing.err.splitlines()) == 1 and "net18" in missing.err


# Export


def test_export_from_the_command_line(cli, runs):
    run = runs / "robust_jem"
    name = next(p.name for p in (run / "samples").iterdir())
    done = cli("export", run, "--to", "npz", "--out", "arrays")
    assert done.code == 0 and done.out.strip() == f"arrays/{name}.npz"
    with np.load(f"arrays/{name}.npz") as arrays:
        x, y = arrays["arr_0"], arrays["arr_1"]
    assert x.shape == (40, 8, 8, 3) and x.dtype == np.uint8 and y.dtype == np.int64 and len(y) == 40
    assert cli("export", run / "samples" / name, "--out", "files").code == 0
    files = sorted((runs.parent / "files" / name).iterdir())
    assert [p.name for p in files] == [f"{i:05d}-class{k}.png" for i, k in enumerate(y)]
    assert all(np.array_equal(np.asarray(Image.open(p)), image) for p, image in zip(files, x))
    again = cli("export", run / "samples" / name, "--out", "files")
    assert again.code == 2 and "exists" in again.err and len(again.err.splitlines()) == 1


def test_export_to_tensorboard(cli, runs, monkeypatch):
    run = runs / "robust_jem"
    assert cli("export", run, "--to", "tensorboard", "--out", "events").code == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    seen = EventAccumulator("events", size_guidance={"images": 0})
    seen.Reload()
    tags = seen.Tags()["images"]
    assert any(t.endswith("/class 3") for t in tags)
    assert any(len(seen.Images(t)) > 1 for t in tags if t.endswith("/chains"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    without = cli("export", run, "--to", "tensorboard", "--out", "more")
    assert without.code == 2 and "pip install tensorboard" in without.err


@pytest.mark.parametrize("line, says", [
    ("export", "not given"),
    ("export nowhere", "no run folder"),
    ("export runs/judge", "robust-jem generate"),
    ("export runs/robust_jem --name other", "'other'"),
    ("export runs/robust_jem --to jpeg", "png"),
])
def test_export_says_what_is_wrong(cli, runs, line, says):
    done = cli(*line.split())
    assert done.code == 2 and says in done.err and len(done.err.splitlines()) == 1


# Doctor


def test_doctor_is_ten_lines(cli, here, monkeypatch):
    done = cli("doctor")
    lines = done.out.splitlines()
    assert done.code == 0 and len(lines) <= 10 and done.err == ""
    heads = [line.split()[0] for line in lines]
    assert heads == ["robust-jem", "python", "optional", "device", "precision", "compile", "data", "extractors", "free"]
    assert torch.__version__.partition("+")[0] in lines[1]
    (here / "elsewhere/birds/train/wren").mkdir(parents=True)
    (here / "elsewhere/birds/test/wren").mkdir(parents=True)
    monkeypatch.setenv("ROBUST_JEM_DATA", str(here / "elsewhere"))
    assert "birds (images)" in cli("doctor").out
    wrong = cli("doctor", "--device", "tpu")
    assert wrong.code == 2 and "tpu" in wrong.err and len(wrong.err.splitlines()) == 1


@pytest.mark.parametrize("fast, chosen", [(True, "bfloat16"), (False, "float32")])
def test_doctor_says_why(monkeypatch, fast, chosen):
    monkeypatch.setattr("robust_jem.engine.runtime.fast_bfloat16", lambda device: fast)
    line = doctor_module.doctor()[4]
    assert chosen in line and ("no less" in line) != fast


def test_digits_are_always_there():
    assert load_images("digits").num_classes == 10
