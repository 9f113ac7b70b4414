"""Fixtures: a tiny trained run, image trees, folder snapshots, and the command line in this process."""
import hashlib
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from matplotlib import pyplot as plt
from PIL import Image

from robust_jem.app import plan
from robust_jem.app.cli import main
from robust_jem.core.files import read_tensors
from robust_jem.engine.runs import Run
from robust_jem.engine.runtime import keep_freed_memory
from robust_jem.engine.sample import generate_samples
from robust_jem.engine.train import train
from robust_jem.systems.catalog import GenerateConfig, TrainConfig, configure, register

REPO = Path(__file__).resolve().parent.parent
# Two epochs of a few updates each: enough to have a trained run, small enough for every test session.
# In float32, so that no bit depends on whether this processor is fast at another precision.
TINY = dict(
    schedule=dict(epochs=2, warmup_steps=0),
    optimizer=dict(batch_size=128),
    attack=dict(steps=2),
    chain=dict(outer_steps=2),
    replay=dict(size=200),
    threads=1,
    device="cpu",
    precision="float32",
)

# Processes that come from one that has imported what most of them need and done nothing else: as good as new ones, and
# there at once.
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload([
    "matplotlib.pyplot", "nbdev.test", "pandas", "papermill", "pytest", "scipy.stats", "sklearn.datasets",
    "sklearn.model_selection", "torch.utils.tensorboard", "torchvision", "robust_jem.app.cli", "robust_jem.app.plan",
    "robust_jem.engine.sample", "robust_jem.engine.train",
])
# jsonschema, by which notebooks are checked, compiles grammars for six seconds where JupyterLab is installed.
sys.modules.setdefault("rfc3987_syntax", None)
# What a run does for itself: tests and notebooks compute outside of runs too.
keep_freed_memory()


# Thousands of cases of some milliseconds.
QUICK = {"test_cli", "test_forms", "test_inputs", "test_project", "test_properties", "test_sample"}


def pytest_collection_modifyitems(items):
    """What trains or starts processes first, and what is quick in the end, so that no worker waits for another.

    pytest-xdist deals tests out in equal parts, one after the other in this order: each begins with the long ones."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    parts = ([item for item in items if (item.path.stem in QUICK) == quick] for quick in (False, True))
    shares = [[part[i * len(part) // workers:(i + 1) * len(part) // workers] for i in range(workers)] for part in parts]
    items[:] = [item for of_a_worker in zip(*shares) for share in of_a_worker for item in share]


@pytest.fixture(autouse=True)
def one_thread():
    "Same bits on every machine, and no fight over cores."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty working directory: relative defaults such as runs/ and data/ land here."
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ROBUST_JEM_DATA", raising=False)
    return tmp_path


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    "`made_once(name, make)`: a folder that `make(folder)` filled, made once for all processes of pytest-xdist."
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def call(name, make):
        folder, done = base / "made-once" / name, base / f"made-{name}"
        with FileLock(base / f"lock-{name}"):
            if not done.exists():
                torch.set_num_threads(1)
                shutil.rmtree(folder, ignore_errors=True)               # what a failed attempt left
                folder.mkdir(parents=True)
                make(folder)
                done.touch()
        return folder

    return call


def make_runs(root):
    "Two trained runs below a folder: `robust_jem`, with a sample set, and `judge`."
    train(configure(TrainConfig, "robust_jem", **TINY, out=str(root / "robust_jem")), progress=False)
    samples = configure(GenerateConfig, "robust_jem", run=str(root / "robust_jem"), num_samples=40, batch_size=40,
                        chain__outer_steps=2, device="cpu")
    generate_samples(samples, progress=False)
    train(configure(TrainConfig, "wide_resnet", **TINY, seed=1000, out=str(root / "judge")), progress=False)
    return root


@pytest.fixture(scope="session")
def session_runs(made_once):
    "The runs of `runs`, to copy from; not to change."
    return made_once("runs", make_runs)


@pytest.fixture
def runs(session_runs, here):
    "Two trained runs in the working directory: `robust_jem`, with a sample set, and `judge`. Free to damage."
    return Path(shutil.copytree(session_runs, here / "runs"))


def undisturbed_run(made_once, name, config, system="robust_jem"):
    "A whole run with the settings of the faults, made once: its folder and its digest."
    from faults import digest, undisturbed                              # which imports this module
    path = made_once(name, lambda folder: undisturbed(folder / "run", system, config)) / "run"
    return SimpleNamespace(path=path, digest=digest(Run(path)))


@pytest.fixture(scope="session")
def whole(made_once):
    "An undisturbed run of faults.CONFIG, and its digest; not to change."
    from faults import CONFIG
    return undisturbed_run(made_once, "whole", CONFIG)


@pytest.fixture(scope="session")
def whole_short(made_once):
    "An undisturbed run of faults.SHORT, and its digest; not to change."
    from faults import SHORT
    return undisturbed_run(made_once, "short", SHORT)


@pytest.fixture(scope="session")
def whole_recovered(made_once):
    "A run that recovers by itself, faults.RECOVERING, and its digest; not to change."
    from faults import RECOVERING
    return undisturbed_run(made_once, "recovered", RECOVERING)


def train_and_die(config, kind, dies_at, entry):
    "A training that is killed between two updates, as an operating system kills: nothing is tidied up."
    if entry:
        register(config.system, entry)
    update = kind.update

    def until(self, batch, step):
        if step.number == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(self, batch, step)

    kind.update = until
    train(config, progress=False)


@pytest.fixture
def killed_and_resumed(here):
    """Train a system whole, and once more with a kill on the way: what is left goes on to the same bits.

    `killed_and_resumed(settings, kind, dies_at)`: `settings(folder)` is the configuration, `kind` the system's class,
    of which update `dies_at` is killed; `entry` a catalog entry that the test has added; `meanwhile()` is called
    between the kill and the next start. Gives the whole run and the tensors of its last checkpoint.
    """
    def call(settings, kind, dies_at, entry=None, meanwhile=None):
        whole = Run(train(settings("whole"), progress=False))
        process = FRESH.Process(target=train_and_die, args=(settings("broken"), kind, dies_at, entry))
        process.start()
        process.join(300)
        broken = Run("broken")
        assert process.exitcode == -signal.SIGKILL and not broken.trained and broken.checkpoints()
        if meanwhile:
            meanwhile()
        train(settings("broken"), progress=False)
        for file in (lambda run: run.path / "model.safetensors", lambda run: run.checkpoints()[0]):
            a, b = (read_tensors(file(run))[0] for run in (whole, broken))
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        assert whole.metrics() == broken.metrics()
        return whole, a

    return call


@pytest.fixture
def cli(capsys):
    "Run a command in this process: exit code, stdout and stderr."
    def call(*argv):
        try:
            code = main([str(a) for a in argv])
        except SystemExit as e:
            code = e.code or 0
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, out=printed.out, err=printed.err)
    return call


# What a surrounding test run has set and a user hasn't.
OURS = ("IN_TEST", "MPLBACKEND", "ROBUST_JEM_DATA")


@pytest.fixture
def command():
    "The environment and the start of a command line that runs the package in another process."
    env = {k: v for k, v in os.environ.items() if k not in OURS}
    path = os.pathsep.join(filter(None, [str(REPO), env.get("PYTHONPATH")]))
    return SimpleNamespace(argv=[sys.executable, "-m", "robust_jem.app.cli"],
                           env=env | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path})


def execute(argv):
    """The package's command line; or, as Python takes them, a script or `-m` and a module.

    Or a notebook, to be tested; or `fill` and a notebook, to be executed in its place."""
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    elif argv[0].endswith(".py"):
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")
    elif argv[0].endswith(".ipynb"):
        run_notebook(Path(argv[0]))
    elif argv[0] == "fill":
        fill_notebook(argv[1])
    else:
        sys.exit(main(argv))


def run_notebook(path):
    "A notebook's cells from top to bottom, as nbdev_test runs them: those that its flags name are left out."
    from nbdev import test
    from nbdev.config import get_config
    # figures as a plain screen shows them: for one of twice the pixels, they take twice as long
    test.CaptureShell = partial(test.CaptureShell, mpl_format="png")
    passed, _ = test.test_nb(path, skip_flags=get_config().tst_flags.split(), basepath=REPO)
    sys.exit(not passed)


def fill_notebook(path):
    "A notebook's cells from top to bottom; what they show is kept in the file."
    from execnb.shell import CaptureShell
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    CaptureShell(mpl_format="png").execute(path, path, exc_stop=True)


def run_there(argv, folder, changes, printed, memory):
    "What `execute` does, with its output in two files."
    for fd, file in enumerate(("out", "err"), 1):
        os.dup2(os.open(printed / file, os.O_WRONLY | os.O_CREAT), fd)
    os.chdir(folder)
    for name in OURS:
        os.environ.pop(name, None)
    os.environ.update(changes)
    if memory:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    keep_freed_memory()
    execute(argv)


def executed_here(notebook, parameters):
    "A notebook's cells with papermill's parameters, in this process: no kernel starts."
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook
    names = {}
    for cell in parameterize_notebook(load_notebook_node(str(notebook)), parameters).cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
    plt.close("all")


class Fresh:
    "What `execute` does, in a process of its own; with the methods of `subprocess.Popen`."

    def __init__(self, argv, folder, changes=(), memory=0):
        self.printed = Path(tempfile.mkdtemp())
        what = ([*map(str, argv)], folder, dict(changes), self.printed, memory)
        self.process = FRESH.Process(target=run_there, args=what)
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return self.returncode

    def communicate(self, timeout=None):
        self.wait(timeout)
        return (self.printed / "out").read_text(), (self.printed / "err").read_text()


@pytest.fixture
def run_command(here):
    "Run the command line in another process, in the working directory: exit code, stdout and stderr."
    def call(*argv, seconds=300, memory=0):
        process = Fresh(argv, here, memory=memory)
        try:
            out, err = process.communicate(seconds)
        finally:
            process.kill()
        return SimpleNamespace(code=process.returncode, out=out, err=err)
    return call


def snapshot(folder):
    "Every file below a folder, with its hash: what 'unchanged' means."
    found = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def make_tree(root, name="pets", classes=("cat", "dog"), train=3, test=1, size=8):
    "Write an image tree `<name>/{train,test}/<class>/*.png` of random images below a folder of data sets; its folder."
    rng = np.random.default_rng(0)
    for split, n in (("train", train), ("test", test)):
        for c in classes:
            folder = root / name / split / c
            folder.mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return root / name


@pytest.fixture
def image_tree(here):
    "`make_tree` in data/."
    return lambda name="pets", **kw: make_tree(here / "data", name, **kw)


@pytest.fixture(scope="session")
def shared_data():
    "CIFAR sheets and the script that unpacks them, where they lie beside the repository."
    folder = REPO.parent / "shared" / "data"
    if not (folder / "unpack.py").is_file():
        pytest.skip("no ../shared/data")
    return folder


def one_line(stderr):
    "The message: all that is on stderr, progress bars aside."
    progress = r"\d+%\||\?(img|it|B)/s\]?"
    lines = [line for line in re.split(r"[\r\n]+", stderr) if line.strip() and not re.search(progress, line)]
    assert len(lines) == 1 and lines[0].startswith("robust-jem: "), stderr
    assert "---" not in lines[0], stderr                                  # nor the parser's box around it
    return lines[0]


def never(*_, **__):
    raise AssertionError("a notebook was started")


@pytest.fixture
def refused(cli, here, monkeypatch):
    "Run a command that must fail before it does anything; its message must say all of `says`."
    # a replication that isn't refused fails here, not in ten minutes
    monkeypatch.setattr(plan, "notebook_path", never)

    def check(*argv, says):
        before = snapshot(here)
        result = cli(*argv)
        assert result.code == 2, result
        message = one_line(result.err)
        for word in says:
            assert word.search(message) if isinstance(word, re.Pattern) else str(word) in message, message
        assert result.out == ""
        assert snapshot(here) == before
        return message

    return check


@pytest.fixture(scope="session")
def _session_scores(made_once, session_runs):
    "Scores of the run in `runs`; they don't name the folder that they were measured in."
    def make(folder):
        shutil.copytree(session_runs, folder / "runs")
        back = os.getcwd()
        os.chdir(folder)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                attack = "--attack-eps 0.2 --attack-steps 1 --num-robust 20"
                evaluate = f"evaluate --run runs/robust_jem --extractor classifier:runs/judge {attack}"
                assert main(evaluate.split()) == 0
        finally:
            os.chdir(back)

    return made_once("scores", make) / "runs/robust_jem/scores"


@pytest.fixture
def evaluated(_session_scores, runs):
    "The run in `runs`, with scores."
    shutil.copytree(_session_scores, runs / "robust_jem/scores")
    return runs / "robust_jem"
