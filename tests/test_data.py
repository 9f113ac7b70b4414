"""Data from disk and from the network: trees, the cache, torchvision's download, and files of tensors."""
import functools
import hashlib
import http.server
import importlib.util
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save

from robust_jem.core.errors import InputError
from robust_jem.core.files import read_tensors, write_tensors
from robust_jem.core.images import load_images


def forbid_decoding(monkeypatch):
    def never(*_, **__):
        raise AssertionError("an image was decoded")
    monkeypatch.setattr(Image, "open", never)


def same(a, b):
    if (a.fingerprint, a.classes) != (b.fingerprint, b.classes):
        return False
    return all(torch.equal(x, b.tensors()[k]) for k, x in a.tensors().items())


def test_tree_holds_the_pixels_and_labels_of_its_files(image_tree):
    tree = image_tree(classes=("b", "a"), train=4)
    images = load_images("pets")                                             # below ./data
    assert images.classes == ("a", "b") and images.train_y.tolist() == [0] * 4 + [1] * 4
    files = [tree / "train" / c / f"{i}.png" for c in "ab" for i in range(4)]
    for x, file in zip(images.train_x, files):
        assert np.array_equal(x.permute(1, 2, 0), np.asarray(Image.open(file)))


def test_second_load_decodes_nothing(image_tree, monkeypatch):
    image_tree()
    first = load_images("pets")
    forbid_decoding(monkeypatch)
    assert same(load_images("pets"), first)


def test_cache_moves_with_the_tree_and_the_fingerprint_is_the_contents(image_tree, here):
    image_tree()
    first = load_images("pets")
    os.rename(here / "data", here / "elsewhere")
    assert load_images("pets", here / "elsewhere").fingerprint == first.fingerprint
    image_tree("others")                                                     # the same pixels under another name
    assert load_images("others").fingerprint == first.fingerprint


@pytest.mark.parametrize("change", ("pixels", "added", "removed", "moved to another class"))
def test_changed_tree_is_decoded_again(image_tree, change):
    tree = image_tree()
    first, file = load_images("pets"), tree / "train/cat/0.png"
    if change == "pixels":
        Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    if change == "added":
        Image.new("RGB", (8, 8)).save(tree / "train/cat/9.png")
    if change == "removed":
        file.unlink()
    if change == "moved to another class":
        file.rename(tree / "train/dog/9.png")
    changed = load_images("pets")
    assert changed.fingerprint != first.fingerprint
    assert len(changed.train_x) - len(first.train_x) == {"added": 1, "removed": -1}.get(change, 0)
    if change == "pixels":
        assert torch.equal(changed.train_x[0], 255 - first.train_x[0])


def test_pixels_that_change_under_the_same_name_and_size_are_noticed(image_tree):
    "An uncompressed format: the new file is as long as the old one."
    tree = image_tree(train=2)
    for f in sorted(tree.rglob("*.png")):
        Image.open(f).save(f.with_suffix(".bmp"))
        f.unlink()
    first, file = load_images("pets"), tree / "train/cat/1.bmp"
    before = file.stat()
    Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))              # as `cp -p` and rsync do
    assert file.stat().st_size == before.st_size and file.stat().st_mtime_ns == before.st_mtime_ns
    assert load_images("pets").fingerprint != first.fingerprint


def test_cache_that_cannot_be_written_is_only_a_warning(image_tree, here):
    image_tree()
    (here / "data/.cache").write_text("a file where the folder would be")
    with pytest.warns(UserWarning, match="no cache written: .*pets"):
        first = load_images("pets")
    assert len(first.train_x) == 6


def test_root_from_the_environment(image_tree, here, monkeypatch):
    image_tree()
    os.rename(here / "data", here / "elsewhere")
    with pytest.raises(InputError, match="'pets' is unknown"):
        load_images("pets")
    monkeypatch.setenv("ROBUST_JEM_DATA", str(here / "elsewhere"))
    assert load_images("pets").name == "pets"


@pytest.mark.parametrize("mode", ("L", "P", "RGBA", "1"))
def test_other_colour_modes_become_rgb(image_tree, mode):
    tree = image_tree()
    file = tree / "train/cat/0.png"
    Image.open(file).convert(mode).save(file)
    pixels = np.array(Image.open(file).convert("RGB"))
    assert torch.equal(load_images("pets").train_x[0], torch.from_numpy(pixels).permute(2, 0, 1))


# torchvision's download

@pytest.fixture
def mirror(tmp_path, monkeypatch):
    "A server on this machine with an archive in CIFAR-10's format: torchvision downloads from it as from the real one."
    rng, batches, sums = np.random.default_rng(0), {}, {}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        pixels = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        batches[name] = {"data": pixels, "labels": [i % 10 for i in range(20)]}
    batches["batches.meta"] = {"label_names": [f"class{i}" for i in range(10)]}
    (tmp_path / "mirror").mkdir()
    archive = tmp_path / "mirror/cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in batches.items():
            raw = pickle.dumps(content)
            sums[name] = hashlib.md5(raw).hexdigest()
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))

    requests = []
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            requests.append(self.path)
    handler = functools.partial(Handler, directory=str(archive.parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    CIFAR10 = torchvision.datasets.CIFAR10
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", [[n, sums[n]] for n in batches if n.startswith("data")])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
    yield batches, requests
    server.shutdown()
    server.server_close()


def test_cifar10_is_downloaded_once_and_then_cached(here, mirror, monkeypatch):
    batches, requests = mirror
    images = load_images("cifar10")
    assert images.shape == (3, 32, 32) and len(images.train_x) == 100
    assert images.classes == tuple(batches["batches.meta"]["label_names"])
    pixels = np.concatenate([batches[f"data_batch_{i}"]["data"] for i in range(1, 6)]).reshape(-1, 3, 32, 32)
    assert np.array_equal(images.train_x, pixels)
    assert np.array_equal(images.test_x, batches["test_batch"]["data"].reshape(-1, 3, 32, 32))
    assert images.test_y.tolist() == batches["test_batch"]["labels"]
    assert (here / "data/cifar10/cifar-10-python.tar.gz").is_file() and requests
    asked = len(requests)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "__init__", lambda *_, **__: pytest.fail("read again"))
    assert same(load_images("cifar10"), images) and len(requests) == asked


def test_download_that_fails_its_checksum_is_refused(here, mirror, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", "0" * 32)
    with pytest.raises(InputError, match="'cifar10': not found .* not downloaded"):
        load_images("cifar10")
    assert not (here / "data/.cache").exists()


def test_download_can_be_declined(here, mirror):
    with pytest.raises(InputError, match="'cifar10': not found under data/cifar10"):
        load_images("cifar10", download=False)
    assert not mirror[1] and not (here / "data").exists()


@pytest.mark.parametrize("name, labels, shape", (
    ("cifar10", "targets", (4, 32, 32, 3)),
    ("cifar100", "targets", (4, 32, 32, 3)),
    ("svhn", "labels", (4, 3, 32, 32))))
def test_each_torchvision_set_is_asked_for_its_real_download(here, monkeypatch, name, labels, shape):
    asked, pixels = [], np.arange(np.prod(shape)).reshape(shape).astype(np.uint8)
    class Fake:
        classes = ["0", "1"]
        def __init__(self, root, download=False, **split):
            asked.append((root, download, split))
            os.makedirs(root, exist_ok=True)
            self.data = pixels.copy()
            setattr(self, labels, [0, 0, 1, 1])
    monkeypatch.setattr(torchvision.datasets, name.upper(), Fake)
    images = load_images(name)
    assert [(root, download) for root, download, _ in asked] == [(f"data/{name}", True)] * 2
    by_split = [{"split": "train"}, {"split": "test"}] if name == "svhn" else [{"train": True}, {"train": False}]
    assert [split for *_, split in asked] == by_split
    assert images.shape == (3, 32, 32) and images.train_y.tolist() == [0, 0, 1, 1]
    assert np.array_equal(images.train_x, pixels if shape[1] == 3 else pixels.transpose(0, 3, 1, 2))


# CIFAR-10 sheets beside the repository

def test_unpacked_sheets_are_read_by_name(shared_data, here):
    command = [sys.executable, shared_data / "unpack.py", here, "--sheets", "0", "1", "--workers", "1"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    spec = importlib.util.spec_from_file_location("unpack", shared_data / "unpack.py")
    unpack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unpack)
    some = here / "sheets/cifar10"                                    # the same two sheets, for the script's own reader
    some.mkdir(parents=True)
    for f in (shared_data / "cifar10").iterdir():
        if f.suffix != ".webp" or f.stem.rsplit("-", 1)[1] in ("00", "01"):
            (some / f.name).symlink_to(f)
    images = load_images("cifar10", here)
    for split in ("train", "test"):
        x, y, classes = unpack.load("cifar10", split, here / "sheets")
        order = np.argsort(y, kind="stable")                                 # a tree is read class by class
        assert images.classes == tuple(classes) == tuple(sorted(classes))
        assert np.array_equal(images.tensors()[f"{split}_y"], y[order])
        assert np.array_equal(images.tensors()[f"{split}_x"], x[order].transpose(0, 3, 1, 2))


# Files of tensors

TENSORS = {
    "weight": torch.arange(6.).view(2, 3),
    "label": torch.tensor([1, 2]),
    "half": torch.ones(2, dtype=torch.bfloat16),
}


def test_the_same_tensors_give_the_same_file(here):
    "A hash of the file then says whether two runs agree; entries of the header in random order would hide it."
    hashes = set()
    for i in range(10):
        write_tensors(here / f"{i}/model.safetensors", TENSORS, {"seed": 0, "classes": ["a", "b"]})
        hashes.add(hashlib.sha256((here / f"{i}/model.safetensors").read_bytes()).hexdigest())
    assert len(hashes) == 1


def checksum(tensors, description):
    h = hashlib.sha256(description.encode())
    for name, t in sorted(tensors.items()):
        h.update(repr((name, str(t.dtype), tuple(t.shape))).encode() + t.view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def test_files_of_earlier_versions_are_read(here):
    "They hold description and checksum as two entries of the header."
    description = json.dumps({"seed": 0})
    file = here / "old.safetensors"
    file.write_bytes(save(TENSORS, {"meta": description, "sha256": checksum(TENSORS, description)}))
    tensors, meta = read_tensors(file)
    assert meta == {"seed": 0} and all(torch.equal(tensors[k], v) for k, v in TENSORS.items())
    file.write_bytes(save(TENSORS, {"meta": description, "sha256": checksum(TENSORS, "{}")}))
    with pytest.raises(InputError, match="its checksum is wrong"):
        read_tensors(file)
    file.write_bytes(save(TENSORS))
    with pytest.raises(InputError, match="it has no checksum"):
        read_tensors(file)
