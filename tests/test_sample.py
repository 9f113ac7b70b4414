"""Samples without a data set: the compact prior, folders that carry it, the sheet, the animation, the hub."""
import base64
import io
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPO
from PIL import Image

from robust_jem.app import sample
from robust_jem.app.plan import ReplicateConfig
from robust_jem.app.replicate import cifar10_figures
from robust_jem.app.sample import SampleConfig, draw_images, draw_samples, half_blocks, terminal_pictures, terminal_text
from robust_jem.app.stage import run_notebook
from robust_jem.core.errors import InputError
from robust_jem.core.files import read_json, read_tensors, write_json, write_tensors
from robust_jem.core.images import to_uint8
from robust_jem.core.random import stream
from robust_jem.ebm.priors import CompactGaussianPrior, GaussianMixturePrior, UniformPrior, prior_from_tensors
from robust_jem.engine import pretrained
from robust_jem.engine.pretrained import RobustJEM
from robust_jem.networks.wide_resnet import WideResNet
from robust_jem.systems.base import TrainConfig
from robust_jem.systems.catalog import configure

SHAPE, DIM, RANK, FLOOR = (3, 6, 4), 72, 5, 1e-4
CLASSES = ("ant", "bee", "cow")


def images_with_structure(n=240, seed=0):
    "Correlated colour images and labels: smooth fields whose size and colour depend on the class."
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(DIM, DIM, generator=g) * torch.logspace(0, -2, DIM)
    y = torch.arange(n) % len(CLASSES)
    x = 0.08 * (1 + y[:, None]) * (torch.randn(n, DIM, generator=g) @ mix.T) / 3 + 0.1 * y[:, None] - 0.1
    return x.clamp(-1, 1).view(n, *SHAPE), y


@pytest.fixture(scope="module")
def whole():
    return GaussianMixturePrior.fit(*images_with_structure(), len(CLASSES))


def cosine_basis(prior):
    "B in float64 by its definition, a row a colour axis and frequency, NumPy alone."
    def cosines(n):
        k, i = np.arange(n)[:, None], np.arange(n)
        rows = np.sqrt(2 / n) * np.cos(np.pi * k * (2 * i + 1) / (2 * n))
        rows[0] = np.sqrt(1 / n)
        return rows

    return np.kron(prior.colours.double().numpy(), np.kron(cosines(SHAPE[1]), cosines(SHAPE[2])))


def test_a_compact_prior_is_its_closed_form(whole):
    "Leading eigenvectors and the spectrum of the rest, in float64 from the covariance of the images."
    x, y = images_with_structure()
    compact = whole.compact(RANK, dtype=torch.float64)
    basis = cosine_basis(compact)
    assert np.allclose(basis @ basis.T, np.eye(DIM), atol=1e-6)
    for k in range(len(CLASSES)):
        points = x[y == k].flatten(1).double().numpy()
        covariance = np.cov(points, rowvar=False) + 1e-4 * np.eye(DIM)
        variance, vectors = np.linalg.eigh(covariance)
        leading = (vectors[:, -RANK:] * variance[-RANK:]) @ vectors[:, -RANK:].T
        spectrum = np.maximum(np.diag(basis @ (covariance - leading) @ basis.T), FLOOR)
        expected = leading + basis.T @ np.diag(spectrum) @ basis
        assert np.allclose(compact.covariance(k).numpy(), expected, atol=1e-6)
        assert np.allclose(compact.mean[k].numpy(), points.mean(0), atol=1e-6)
        assert abs(compact.covariance(k).trace() - covariance.trace()) <= FLOOR * DIM
        # nearer to the whole covariance than a white remainder of the same size
        white = leading + np.eye(DIM) * (np.trace(covariance) - variance[-RANK:].sum()) / DIM
        assert frechet(covariance, compact.covariance(k).numpy()) < frechet(covariance, white)


def frechet(a, b):
    "Of two centred Gaussians: tr a + tr b - 2 tr (a b)^(1/2)."
    return np.trace(a) + np.trace(b) - 2 * np.sqrt(np.maximum(np.linalg.eigvals(a @ b).real, 0)).sum()


def test_a_large_sample_has_the_compact_moments(whole):
    "Within four and a half standard errors; the images lie far inside of [-1, 1], so that the clip moves nothing."
    compact, n = whole.compact(RANK), 60_000
    for k in range(2):
        drawn = compact.sample(torch.full((n,), k), torch.Generator().manual_seed(k)).flatten(1).double()
        truth = compact.covariance(k)
        variance = truth.diagonal()
        assert (drawn.abs().amax(1) < 1).double().mean() > 0.999
        assert ((drawn.mean(0) - compact.mean[k].double()) / (variance / n).sqrt()).abs().max() < 4.5
        error = ((variance[:, None] * variance + truth**2) / n).sqrt()
        assert ((torch.cov(drawn.T) - truth) / error).abs().max() < 5


def test_densities_are_those_of_the_written_out_gaussians(whole):
    x, y = images_with_structure(30, seed=1)
    compact = whole.compact(RANK)
    flat = x.flatten(1).double()
    for prior, covariance in (
        (whole, lambda k: whole.factor[k].double() @ whole.factor[k].double().T),
        (compact, compact.covariance),
    ):
        found = prior.log_prob(x, y)
        for i in range(6):
            gaussian = torch.distributions.MultivariateNormal(prior.mean[y[i]].double(), covariance(y[i]))
            assert torch.isclose(found[i], gaussian.log_prob(flat[i]), rtol=1e-6)


def test_a_draw_depends_on_the_labels_order_alone(whole):
    "Each image has noise of its own: the others' labels don't change it; on any type, within a rounding."
    compact, y = whole.compact(RANK), torch.tensor([2, 0, 1, 1])
    x = compact.sample(y, torch.Generator().manual_seed(0))
    other = compact.sample(torch.tensor([0, 0, 1, 2]), torch.Generator().manual_seed(0))
    assert torch.equal(x[1:3], other[1:3]) and not torch.equal(x[3], other[3])
    wide = compact.to("cpu", torch.float32)
    assert torch.equal(wide.sample(y, torch.Generator().manual_seed(0)), x) and wide.directions.dtype == torch.float32
    assert compact.sample(torch.zeros(0, dtype=torch.long)).shape == (0, *SHAPE)
    assert set(compact.sample_labels(100, torch.Generator().manual_seed(0)).tolist()) == {0, 1, 2}


def test_priors_survive_a_file(whole, tmp_path):
    for prior in (whole, whole.compact(RANK)):
        write_tensors(tmp_path / "prior.safetensors", prior.tensors())
        again = prior_from_tensors(read_tensors(tmp_path / "prior.safetensors")[0], SHAPE)
        assert type(again) is type(prior)
        assert all(torch.equal(t, again.tensors()[name]) for name, t in prior.tensors().items())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda p: p.compact(0),
        lambda p: p.compact(DIM),
        lambda p: p.compact(2.5),
        lambda p: p.compact(RANK, floor=0),
        lambda p: p.compact(RANK).sample(torch.tensor([3])),
        lambda p: p.compact(RANK).log_prob(torch.zeros(1, 3, 4, 4), [0]),
        lambda p: p.compact(RANK).log_prob(torch.zeros(1, *SHAPE), [5]),
        lambda p: prior_from_tensors({}, SHAPE),
        lambda p: prior_from_tensors(p.compact(RANK).tensors() | {"more": p.mean}, SHAPE),
        lambda p: prior_from_tensors(p.compact(RANK).tensors(), (3, 4, 4)),
    ],
)
def test_what_a_prior_refuses(whole, wrong):
    with pytest.raises(InputError) as e:
        wrong(whole)
    assert len(str(e.value).splitlines()) == 1


# Folders


def model_of(prior, seed=0):
    torch.manual_seed(seed)
    config = configure(TrainConfig, "robust_jem", "cifar10", "h100", network__depth=10, network__width=1)
    return RobustJEM(WideResNet(10, 1, len(CLASSES), 3, "batch"), prior, config, CLASSES, SHAPE)


@pytest.fixture(scope="module")
def square():
    "A model of 8×8 colour images of three classes, and its compact prior."
    g = torch.Generator().manual_seed(3)
    y = torch.arange(90) % 3
    x = (0.3 * torch.randn(90, 3, 8, 8, generator=g) + 0.2 * (y[:, None, None, None] - 1.0)).clamp(-1, 1)
    jem = model_of(GaussianMixturePrior.fit(x, y, 3).compact(4))
    jem.shape = (3, 8, 8)
    return jem


@pytest.fixture
def offline(monkeypatch):
    "No data set, and no network."
    def none(*args, **kw):
        raise AssertionError("a data set was asked for")

    monkeypatch.setattr(pretrained, "load_images", none)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_a_folder_draws_without_a_data_set(square, offline, tmp_path):
    square.save_pretrained(tmp_path / "m")
    again = RobustJEM.from_pretrained(tmp_path / "m")
    y, g = torch.arange(3), lambda: torch.Generator().manual_seed(0)
    assert isinstance(again.prior, CompactGaussianPrior)
    assert torch.equal(again.generate(y, "combined", generator=g()), square.generate(y, "combined", generator=g()))
    assert "license: apache-2.0" in (tmp_path / "m/README.md").read_text()
    # a second save keeps a card that is there, unless another is given
    again.save_pretrained(tmp_path / "m", card="# mine\n")
    again.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m/README.md").read_text() == "# mine\n"


def test_folders_may_share_a_prior_beside_them(square, offline, tmp_path):
    square.save_pretrained(tmp_path / "m", prior="none")
    write_tensors(tmp_path / "shared.safetensors", square.prior.tensors())
    config = read_json(tmp_path / "m/config.json")
    write_json(tmp_path / "m/config.json", config | {"prior": "shared.safetensors"})
    there = RobustJEM.from_pretrained(tmp_path / "m")
    assert torch.equal(there.prior.spread, square.prior.spread)
    there.save_pretrained(tmp_path / "alone/m", prior="compact")                # whole again by itself
    assert torch.equal(RobustJEM.from_pretrained(tmp_path / "alone/m").prior.mean, square.prior.mean)
    for name in ("../shared.safetensors", "/etc/passwd", 3):
        write_json(tmp_path / "m/config.json", config | {"prior": name})
        with pytest.raises(InputError, match="the name of a file"):
            RobustJEM.from_pretrained(tmp_path / "m")


def test_what_saving_refuses(square, tmp_path):
    with pytest.raises(InputError, match="full, compact, none"):
        square.save_pretrained(tmp_path / "m", prior="half")
    with pytest.raises(InputError, match="UniformPrior"):
        model_of(UniformPrior((3, 8, 8), 3)).save_pretrained(tmp_path / "m", prior="compact")
    square.save_pretrained(tmp_path / "m")
    write_tensors(tmp_path / "m/prior.safetensors", {"mean": square.prior.mean})
    with pytest.raises(InputError, match="fit each other"):
        RobustJEM.from_pretrained(tmp_path / "m")


PRETRAINED = sorted((REPO / "data/pretrained").glob("*/config.json"))


@pytest.mark.parametrize("file", PRETRAINED, ids=lambda p: p.parent.name)
def test_every_committed_folder_has_its_prior(file, offline):
    jem = RobustJEM.from_pretrained(file.parent)
    assert isinstance(jem.prior, CompactGaussianPrior) and jem.prior.mean.shape == (10, 3072)
    assert (file.parent.parent / read_json(file)["prior"]).stat().st_size <= 4e6
    x = jem.generate(torch.arange(10), "attack", attack__steps=1, generator=torch.Generator().manual_seed(0))
    assert x.shape == (10, 3, 32, 32)


# The hub, of which only the interface is here


class Hub:
    "What `HfApi` does, into a folder."
    refuses = None

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repo_id, private, exist_ok):
        if Hub.refuses:
            raise Hub.refuses
        Hub.made = (repo_id, private, self.token)
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self, repo_id, folder_path, commit_message, revision, create_pr):
        Hub.files = {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}
        Hub.commit = (repo_id, commit_message, revision)
        return "https://hub/commit/1"


@pytest.fixture
def hub(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="pip install 'robust-jem[hub]'")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "refuses", None)
    return huggingface_hub


def test_push_and_fetch(square, hub, offline, tmp_path, monkeypatch):
    said = square.push_to_hub("toy", private=True, token="t", branch="b", dtype=torch.bfloat16)
    assert said == "https://hub/commit/1" and Hub.made == ("toy", True, "t") and Hub.commit[0] == "me/toy"
    assert sorted(Hub.files) == ["README.md", "config.json", "model.safetensors", "prior.safetensors"]
    asked = {}

    def snapshot_download(repo_id, allow_patterns, **kw):
        asked.update(kw, repo_id=repo_id)
        for name, content in Hub.files.items():
            (tmp_path / name).write_bytes(content)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    jem = RobustJEM.from_pretrained("me/toy", revision="b", cache_dir="c")
    assert asked == {"revision": "b", "cache_dir": "c", "repo_id": "me/toy"}
    assert torch.equal(jem.prior.directions, square.prior.directions) and jem.classes == CLASSES


def test_a_hub_that_refuses_is_one_line(square, hub, monkeypatch):
    monkeypatch.setattr(Hub, "refuses", RuntimeError("401\nUnauthorized"))
    with pytest.raises(InputError, match="^push_to_hub: the hub refuses .RuntimeError: 401 Unauthorized.$"):
        square.push_to_hub("toy")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"robust-jem\[hub\]"):
        square.push_to_hub("toy")


# The sheet


@pytest.fixture
def folder(square, offline, here):
    square.save_pretrained(here / "toy", prior="compact")
    return here


def test_a_sheet_from_the_command_line(folder, cli):
    said = cli("sample", "toy", "--classes", "cow", "ant", "--per-class", 5, "--seed", 3, "--animate", "a/b.gif",
               "--method", "combined")
    assert said.code == 0 and "samples.png and a/b.gif: 10 images in " in said.out
    assert "10 combined samples: 100%" in said.err
    gif = Image.open("a/b.gif")
    assert gif.n_frames == 32 and Image.open("samples.png").size == gif.size
    first = (folder / "samples.png").read_bytes()
    again = cli("sample", "toy", "--classes", "cow", "ant", "--per-class", 5, "--seed", 3, "--method", "combined")
    assert again.code == 0 and (folder / "samples.png").read_bytes() == first
    assert cli("sample", "toy", "--classes", "cow", "ant", "--per-class", 5, "--method", "combined").code == 0
    assert (folder / "samples.png").read_bytes() != first


def test_the_images_are_the_models_own_and_their_states_the_chains(square, offline):
    y = torch.arange(3).repeat(2)
    x, states = draw_images(square, y, "combined", seed=5, states=1000, batch_size=4, progress=False)
    stages, parts = {}, []
    for i, labels in enumerate(y.split(4)):
        here = {}
        parts.append(square.generate(labels, "combined", generator=stream(5, "batch", i), on_stage=here.__setitem__))
        stages = {k: torch.cat([stages[k], v]) if k in stages else v for k, v in here.items()}
    assert torch.equal(x, to_uint8(torch.cat(parts)))
    kept = dict(states)
    assert len(states) == 15 + 50 + 1 and torch.equal(kept["image"], x)
    assert torch.equal(kept["prior"], to_uint8(stages["prior"]))
    assert torch.equal(kept["contrast × 0.8"], to_uint8(stages["contrast"]))
    assert torch.equal(kept["chain 7/50"], to_uint8(stages["step 7"]))
    assert not square.model._forward_pre_hooks


@pytest.mark.parametrize(
    "options, says",
    [
        ([], "folder: none holds no pretrained model; accepted"),
        (["nowhere/model"], "no such folder"),
        (["empty"], "folder: empty holds no pretrained model; accepted"),
        (["run"], "robust-jem generate run"),
        (["toy", "--classes", "dog"], "accepted, each once: ant, bee, cow"),
        (["toy", "--classes", "ant", "ant"], "accepted, each once: ant, bee, cow"),
        (["toy", "--method", "magic"], "attack"),
        (["toy", "--out", "x.jpg"], "accepted: a file's name that ends in .png"),
        (["toy", "--animate", "x.mp4"], "accepted: a file's name that ends in .gif"),
        (["toy", "--out", "toy/config.json/x.png"], "can't be written"),
        (["toy", "--per-class", "-1"], "outside 0..100"),
        (["toy", "--colour", "red"], "unknown option"),
    ],
)
def test_what_the_command_refuses(folder, cli, options, says):
    (folder / "empty").mkdir()
    (folder / "run").mkdir()
    write_json(folder / "run/config.json", {"system": "robust_jem"})
    said = cli("sample", *options)
    assert said.code == 2 and says in said.err and len(said.err.strip().splitlines()) == 1
    assert not (folder / "samples.png").exists()


def test_a_replication_draws_the_papers_figures_beside_the_digits(square, offline, here, capsys):
    "From trained networks where they are; a line says so where they aren't; once drawn, nothing is left to do."
    config, figures = ReplicateConfig(), here / "figures"
    assert cifar10_figures(config, figures) == []
    for system in ("robust_classifier", "jempp", "robust_jem"):
        square.save_pretrained(here / f"data/pretrained/{system}-cifar10-cpu", prior="compact")
    for other in (ReplicateConfig(dataset="cifar10"), ReplicateConfig(table="jem")):
        assert cifar10_figures(other, figures) == []
    ((stage,),) = cifar10_figures(config, figures)
    run_notebook(stage.task({}))
    assert sorted(p.name for p in figures.iterdir()) == [f"cifar10-figure{i}.png" for i in (1, 2, 3)]
    assert stage.finished() and cifar10_figures(config, figures) == []
    (figures / "cifar10-figure2.png").unlink()
    assert cifar10_figures(config, figures) == [[stage]]


def test_the_usual_method_is_the_papers():
    found = [sample.usual_method(s) for s in ("robust_classifier", "jempp", "robust_jem", "jem")]
    assert found == ["attack", "energy", "combined", "energy"]


# Terminals


@pytest.mark.parametrize(
    "environment, kind",
    [
        ({}, "none"),
        ({"TERM": "dumb"}, "none"),
        ({"TERM": "vt100"}, "none"),
        ({"TERM": "xterm"}, "blocks-256"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "Apple_Terminal"}, "blocks-256"),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, "blocks"),
        ({"TERM": "foot", "COLORTERM": "truecolor"}, "blocks"),
        ({"WT_SESSION": "1"}, "blocks"),
        ({"TERM": "tmux-256color", "TMUX": "/tmp/0", "KITTY_WINDOW_ID": "1", "TERM_PROGRAM": "tmux"}, "blocks-256"),
        ({"TERM": "screen", "LC_TERMINAL": "iTerm2"}, "blocks-256"),
        ({"TERM_PROGRAM": "vscode", "COLORTERM": "truecolor", "KITTY_WINDOW_ID": "1"}, "blocks"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm"),
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM_PROGRAM": "WezTerm"}, "iterm"),
    ],
)
def test_terminals(environment, kind):
    assert terminal_pictures(environment) == kind


def test_half_blocks_are_the_pixels():
    picture = np.arange(5 * 3 * 3, dtype=np.uint8).reshape(5, 3, 3)
    lines = half_blocks(picture).split("\n")
    assert len(lines) == 3 and all(line.count("▀") == 3 for line in lines)
    assert lines[0].startswith("\x1b[38;2;0;1;2;48;2;9;10;11m▀") and lines[-1].endswith("\x1b[0m")
    rows = {"ant": torch.zeros(30, 3, 32, 32, dtype=torch.uint8)}
    assert max(line.count("▀") for line in terminal_text(b"", rows, "blocks", 40).split("\n")) == 40


def test_a_terminal_gets_the_whole_file():
    out = io.BytesIO()
    Image.effect_noise((90, 90), 50).save(out, "PNG")
    said = terminal_text(out.getvalue(), {}, "kitty")
    parts = [p.split(";", 1) for p in said.split("\x1b\\") if p]
    assert base64.b64decode("".join(p[1] for p in parts)) == out.getvalue()
    assert [p[0][-3:] for p in parts] == ["m=1"] * (len(parts) - 1) + ["m=0"] and len(parts) > 1
    assert base64.b64encode(out.getvalue()).decode() in terminal_text(out.getvalue(), {}, "iterm")


def test_show_says_where_the_sheet_is_when_there_is_no_terminal(folder, capsys):
    draw_samples(SampleConfig("toy", method="attack", per_class=1, show=True), progress=False)
    assert "no terminal; the sheet is samples.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    "environment, encoding, said",
    [
        ({"TERM": "dumb"}, "utf-8", "no colours in this terminal"),
        ({"TERM": "xterm"}, "ascii", "no block characters"),
        ({"TERM": "xterm"}, "utf-8", "\x1b[38;5;231;48;5;16m▀"),
    ],
)
def test_show_degrades(environment, encoding, said, monkeypatch):
    "A terminal that can't show the sheet is told where it is; nothing else reaches it."
    class Terminal(io.TextIOWrapper):
        def isatty(self):
            return True

    monkeypatch.setattr(sample.os, "environ", environment)
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", Terminal(written, encoding=encoding))
    sample._show(b"", {"ant": torch.tensor([0, 255], dtype=torch.uint8).repeat_interleave(3).view(1, 1, 2, 3)}, "a.png")
    sys.stdout.flush()
    text = written.getvalue().decode()
    assert said in text and ("\x1b" in said or ("a.png" in text and "\x1b" not in text))
