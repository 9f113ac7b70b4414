"""The papermill stages alone, and `replicate`: what runs, in which order, what is skipped.

And what is left after a failure or an interruption."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from conftest import REPO, snapshot
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from robust_jem.app import replicate as command_line
from robust_jem.app.plan import ReplicateConfig, Stage, notebook_path, plan
from robust_jem.core.files import write_json
from robust_jem.engine.runs import Run
from robust_jem.report.tables import ReportConfig
from robust_jem.systems.catalog import SYSTEMS, EvaluateConfig, TrainConfig, configure, sample_plan

STAGES = REPO / "nbs/replication"


# Each notebook alone

@pytest.fixture
def papermill(run_command):
    "Run a replication notebook, in the working directory, as its text says: `papermill NOTEBOOK OUT -p NAME VALUE …`."
    def run(notebook, **parameters):
        argv = ["-m", "papermill", STAGES / f"{notebook}.ipynb", f"{notebook}-out.ipynb",
                "--no-progress-bar", "-k", "python3"]
        for name, value in parameters.items():
            argv += ["-y", json.dumps({name: value})] if isinstance(value, dict) else ["-p", name, str(value)]
        return run_command(*argv)

    return run


def pictures(notebook):
    cells = nbformat.read(notebook, 4).cells
    return sum("image/png" in o.get("data", {}) for c in cells if c.cell_type == "code" for o in c.outputs)


@pytest.fixture
def without_a_kernel(run_command):
    "As `papermill`, in a process that has the imports, which take longer than the work."
    def run(notebook, **parameters):
        source, out = load_notebook_node(str(STAGES / f"{notebook}.ipynb")), f"{notebook}-out.ipynb"
        asked = {name: str(value) if isinstance(value, Path) else value for name, value in parameters.items()}
        nbformat.write(parameterize_notebook(source, asked), out)
        return run_command("fill", out)

    return run


def test_stages_run_alone_one_after_the_other(papermill, without_a_kernel, runs, here):
    "Train, generate, evaluate and report, each in a process of its own; they share nothing but folders."
    folder, judge = Path("runs/digits-cpu/robust_jem-s0"), "classifier:runs/judge"
    short = dict(schedule__epochs=1, attack__steps=1, chain__outer_steps=1, schedule__warmup_steps=0, device="cpu")

    def ran(by, notebook, **parameters):
        done = by(notebook, **parameters)
        assert done.code == 0, done.err[-2000:]
        assert pictures(f"{notebook}-out.ipynb") > 0                         # each shows what it made

    ran(papermill, "train", system="robust_jem", dataset="digits", preset="cpu", **short)
    run = Run(folder)
    assert run.trained and run.config == configure(TrainConfig, "robust_jem", **short)

    short_chains = {"num_samples": 40, "batch_size": 40, "chain.outer_steps": 2, "attack.steps": 2}
    ran(without_a_kernel, "generate", run=folder, settings=short_chains)
    assert run.sample_names() == sorted(c.label for c in sample_plan("robust_jem", "digits", "cpu"))
    assert all(len(run.samples(name)[0]) == 40 for name in run.sample_names())

    ran(without_a_kernel, "evaluate", run=folder, extractor=judge, attack_steps=1, num_robust=20)
    assert set(run.scores()) == {"classification", "held-out", "prior", *run.sample_names()}

    ran(without_a_kernel, "report", runs="runs/digits-cpu", figures="figures")
    table = json.loads((here / "figures/table1.json").read_text())
    rows = {r["model"]: r for r in table["rows"]}
    assert rows["Robust JEM"]["FD-digits"]["values"] == [run.scores()["combined"]["FD-digits"]]
    assert rows["JEM++"]["runs"] == 0
    for name in ("figure3", "chain", "curves", "robustness"):
        assert (here / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")


REFUSED = [
    ("train", dict(epocs=1), "InputError: epocs: unknown field; accepted: device, threads"),
    ("evaluate", dict(run="nowhere"), "InputError: run: 'nowhere' is no run folder"),
]


# the fault harness tries these too, the first of them every day
@pytest.mark.long
@pytest.mark.parametrize("notebook, parameters, says", REFUSED, ids=("unknown parameter", "no run"))
def test_stage_refuses_before_any_work(papermill, here, notebook, parameters, says):
    done = papermill(notebook, **parameters)
    assert done.code != 0 and says in done.err
    assert set(snapshot(here)) == {f"{notebook}-out.ipynb"}                  # papermill's record of the failure


# The plan

SMALL = dict(systems=("robust_jem", "jempp"), seeds=(3, 4))


def stages_of(config):
    first, chains, report = plan(config)
    return [s for chain in first + chains for s in chain] + [report]


def notebooks(chain):
    return [stage.notebook for stage in chain]


def sees_all_classes(chain):
    return "@" not in chain[0].parameters["dataset"]


CONFIGS = (
    dict(),
    SMALL,
    dict(seeds=(0, 1, 2), suite="full", chains=True),
    dict(dataset="cifar10", preset="paper"),
    dict(systems=tuple(SYSTEMS), extractor="classifier:x"),
)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_plan_trains_samples_and_scores_each_row_once(config):
    config = ReplicateConfig(**config)
    first, chains, report = plan(config)
    trained = [Path(c[0].parameters["out"]) for c in first + chains]
    assert len(set(trained)) == len(trained)
    # in the full suite on digits also one that has never seen two of the classes, for detection alone
    partial = [notebooks(c) for c in chains if not sees_all_classes(c)]
    assert partial == [["train", "evaluate"]] * (config.suite == "full")
    chains = [c for c in chains if sees_all_classes(c)]
    rows = {(c[0].parameters["system"], c[0].parameters["seed"]) for c in chains}
    assert rows == {(system, seed) for system in config.systems for seed in config.seeds}
    for chain in chains:
        out = chain[0].parameters["out"]
        assert notebooks(chain)[:3] == ["train", "generate", "evaluate"]
        assert all(s.parameters.get("run", s.parameters.get("out")) == out for s in chain)
        # executed copies lie in the run folder
        assert {s.output.parent for s in chain} == {Path(out) / "notebooks"}
        # training and sampling needn't wait for the judge
        assert [s.notebook for s in chain if s.waits] == notebooks(chain)[2:]
    studies = [c[0].parameters["out"] for c in chains if c[-1].notebook == "chains"]
    assert studies == [f"{report.parameters['runs']}/robust_jem-s0"] * config.chains
    # the judge is trained first, by itself, and is none of those it judges
    judges = [s.parameters["extractor"] for c in chains for s in c if s.notebook == "evaluate"]
    assert len(set(judges)) == 1 and (not first) == bool(config.extractor or config.dataset != "digits")
    for chain in first:
        assert judges[0] == f"classifier:{chain[0].parameters['out']}"
        assert chain[0].parameters["seed"] not in config.seeds
    assert all(notebook_path(s.notebook).is_file() for s in stages_of(config))
    assert report.notebook == "report"


def test_results_lie_beside_the_runs_unless_asked_otherwise():
    "Nothing that a replication writes by default is committed."
    def report(**settings):
        return stages_of(ReplicateConfig(**settings))[-1].parameters

    folders = {"runs": "runs/cifar10-paper", "figures": "runs/cifar10-paper/figures"}
    assert report(dataset="cifar10", preset="paper") == folders
    assert report(runs="here")["figures"] == str(ReportConfig(runs="here").folder) == "here/figures"
    assert report(figures="there")["figures"] == str(ReportConfig(figures="there").folder) == "there"


def test_plan_expects_what_the_notebooks_make():
    "The settings that mark a stage as finished are those its notebook derives from the same parameters."
    for stage in stages_of(ReplicateConfig(**SMALL)):
        if stage.notebook == "train":
            assert [c for _, c in stage.expected] == [configure(TrainConfig, **stage.parameters)]
        if stage.notebook == "generate":
            system = stage.output.parent.parent.name.rsplit("-s", 1)[0]
            assert [c for _, c in stage.expected] == sample_plan(system, "digits", "cpu", **stage.parameters)


def finish(stage):
    "Leave behind what a finished stage leaves, as far as a plan can see."
    for file, config in stage.expected:
        settings = config.to_dict()
        write_json(file, {"config": settings} if file.name == "summary.json" else settings)
    stage.output.parent.mkdir(parents=True, exist_ok=True)
    if stage.notebook == "train":
        (stage.output.parent.parent / "model.safetensors").touch()
    stage.output.write_text(json.dumps({"metadata": {"papermill": {"parameters": stage.parameters}}, "cells": []}))


def test_stage_is_finished_only_with_its_notebook_and_its_result(here):
    for stage in stages_of(ReplicateConfig(**SMALL)):
        assert not stage.finished()
        stage.output.parent.mkdir(parents=True, exist_ok=True)
        stage.output.with_suffix(".part.ipynb").write_text("{}")             # an interrupted one
        assert not stage.finished()
        finish(stage)
        assert stage.finished()
        for file, _ in stage.expected:
            kept = file.read_bytes()
            file.unlink()
            assert not stage.finished()
            file.write_bytes(kept)
        weights = stage.output.parent.parent / "model.safetensors"
        if weights.exists() and stage.notebook == "train":
            weights.unlink()
            assert not stage.finished()
            weights.touch()
        stage.output.unlink()
        assert not stage.finished()
        finish(stage)


@pytest.mark.parametrize("changes, again", [
    (dict(device="cpu"), []),                                                # where it runs doesn't change what it is
    (dict(jobs=1), []),
    (dict(seeds=(3, 4, 5)), ["evaluate", "generate", "train"]),
    (dict(extractor="classifier:other"), ["evaluate"]),                      # scores in other features are other scores
], ids=str)
def test_changed_settings_run_again_what_depends_on_them(here, changes, again):
    for stage in stages_of(ReplicateConfig(**SMALL)):
        finish(stage)
    left = {s.notebook for s in stages_of(ReplicateConfig(**SMALL | changes)) if not s.finished()}
    assert sorted(left - {"report"}) == again


def test_other_training_settings_are_not_finished(here):
    stage = stages_of(ReplicateConfig(**SMALL))[1]
    finish(stage)
    file, config = stage.expected[0]
    write_json(file, config.to_dict() | {"log_every": config.log_every + 1})
    assert not stage.finished()


# Running a plan, with small notebooks in the place of the real ones

LOG = r"""
import sys
from pathlib import Path
open("log.txt", "a").write(f"{name} {sys.executable}\n")
"""
REPORT = LOG + r"""
figures = Path(figures)
figures.mkdir(exist_ok=True)
for file in ("table1.md", "table1.csv", "table1.json"):
    (figures / file).write_text("the table\n\nnotes")
"""


def write_small_notebook(path, code):
    "A notebook with a cell for the stage's parameters and a cell of code."
    parameters = nbformat.v4.new_code_cell("name = figures = runs = run = ''", metadata={"tags": ["parameters"]})
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    cells = [parameters, nbformat.v4.new_code_cell(code)]
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


@pytest.fixture
def small_plan(here, command, monkeypatch):
    "A first stage, a chain that waits for it and one that doesn't, and a report, whose notebooks are given as code."
    for k, v in command.env.items():
        monkeypatch.setenv(k, v)                            # kernels write to this working directory

    def stage(name, **kw):
        parameters = {"name": name, "figures": "figures", "runs": "runs", "run": f"runs/{name}"}
        return Stage(name, parameters, here / f"runs/{name}/notebooks/{name}.ipynb", [], **kw)

    def stages(config):
        return [[stage("first")]], [[stage("b1", waits=True)], [stage("a1"), stage("a2")]], stage("report")

    def make(**sources):
        started = []

        def find(name):
            started.append(name)
            path = here / "source" / f"{name}.ipynb"
            write_small_notebook(path, sources.get(name, LOG))
            return path

        monkeypatch.setattr("robust_jem.app.plan.notebook_path", find)
        monkeypatch.setattr(command_line, "plan", stages)
        return started

    return make


def executed(here):
    return sorted(p.name for p in here.glob("runs/*/notebooks/*.ipynb"))


def test_stages_run_in_order_in_this_python_and_finished_ones_are_skipped(small_plan, here, cli):
    started = small_plan(first="import time\ntime.sleep(2)\n" + LOG, report=REPORT)      # b1 would overtake it
    assert cli("replicate", "--jobs", 3).code == 0
    log = [line.split() for line in (here / "log.txt").read_text().splitlines()]
    names = [name for name, _ in log]
    assert names[-1] == "report" and sorted(names[:-1]) == ["a1", "a2", "b1", "first"]
    assert names.index("first") < names.index("b1") and names.index("a1") < names.index("a2")
    assert {Path(python) for _, python in log} == {Path(sys.executable)}     # kernels are this environment's
    assert executed(here) == ["a1.ipynb", "a2.ipynb", "b1.ipynb", "first.ipynb", "report.ipynb"]

    started.clear()
    again = cli("replicate")
    assert again.code == 0 and "nothing to do" in again.out and started == []

    (here / "runs/a2/notebooks/a2.ipynb").unlink()
    assert cli("replicate").code == 0 and started == ["a2", "report"]


INPUT_ERROR = """
from robust_jem.core.errors import InputError
raise InputError("eps: -1 is outside 0..∞")
"""
DIVERGED = """
from robust_jem.engine.recovery import Diverged
raise Diverged("the loss is nan")
"""
KILLED = """
import os
os._exit(9)
"""


@pytest.mark.parametrize("code, exit_code, says", [
    (INPUT_ERROR, 2, "eps: -1 is outside 0..∞"),
    ("raise ValueError('something broke')", 1, "ValueError: something broke"),
    (DIVERGED, 1, "the loss is nan"),
    (KILLED, 1, "died"),
], ids=("InputError", "ValueError", "Diverged", "killed kernel"))
def test_failed_stage_is_one_line_and_nothing_depends_on_it(small_plan, here, cli, code, exit_code, says):
    started = small_plan(first=code, report=REPORT)
    result = cli("replicate", "--jobs", 1)
    printed = result.err.replace("\r", "\n").splitlines()
    lines = [line for line in printed if line.strip() and "%|" not in line]
    assert result.code == exit_code and len(lines) == 1 and "Traceback" not in result.err, result.err
    assert lines[0].startswith("robust-jem: first of runs/first") and says in lines[0].replace("Died", "died")
    # what was written up to the failure, under another name
    assert started == ["first"] and executed(here) == ["first.part.ipynb"]
    assert not (here / "figures").exists()


def test_failed_stage_leaves_what_went_wrong_as_a_file(small_plan, here, cli):
    small_plan(first="x = 1\nraise ValueError('something broke')", report=REPORT)
    assert cli("replicate", "--jobs", 1).code == 1
    error = json.loads((here / "runs/first/notebooks/error.json").read_text())
    part = str(here / "runs/first/notebooks/first.part.ipynb")
    told = dict(stage="first", of="runs/first", kind="ValueError", message="something broke", notebook=part)
    assert {k: v for k, v in error.items() if k != "cell"} == told and isinstance(error["cell"], int)
    small_plan(report=REPORT)
    assert cli("replicate", "--jobs", 1).code == 0
    assert list(here.rglob("error.json")) == []                             # it went well this time


# A cluster

def test_cluster_without_submitit_or_slurm_is_refused(refused, here, monkeypatch):
    monkeypatch.setenv("PATH", str(here))
    refused("replicate", "--cluster", "slurm", says=["cluster", "sbatch"])
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setitem(sys.modules, "submitit", None)
    refused("replicate", "--cluster", "slurm", says=["cluster", "submitit", "robust-jem[cluster]"])
    refused("replicate", "--cluster", "pbs", says=["cluster", "pbs", "local", "slurm"])
    refused("replicate", "--cluster", "slurm", "--minutes", 0, says=["minutes", "0", "1.."])


@pytest.fixture
def slurm(tmp_path_factory, monkeypatch):
    "A SLURM of one node, on this machine."
    pytest.importorskip("submitit", reason="submitit isn't installed: pip install 'robust-jem[cluster]'")
    folder, script = tmp_path_factory.mktemp("slurm"), REPO / "tests/slurm.sh"
    started = subprocess.run(["bash", script, "start", folder], capture_output=True, text=True, timeout=120)
    if started.returncode == 2:
        pytest.skip(started.stderr.strip())
    assert started.returncode == 0, started.stderr
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    yield folder
    subprocess.run(["bash", script, "stop", folder], timeout=60)


# Over two minutes, whatever the machine: nine seconds an epoch, each of which leaves a checkpoint.
TRAIN = """
import time
from robust_jem.engine import train as training
from robust_jem.systems.catalog import TrainConfig, configure

real = training.Batches.epoch

def slowly(*args):
    for batch in real(*args):
        time.sleep(0.8)
        yield batch

training.Batches.epoch = slowly
short = dict(schedule=dict(epochs=16, warmup_steps=0), optimizer=dict(batch_size=128), threads=1)
config = configure(TrainConfig, "wide_resnet", **short, device="cpu", precision="float32", out=run + "/trained")
training.train(config, progress=False)
"""


@pytest.mark.long
@pytest.mark.timeout(900)
def test_job_that_its_time_limit_kills_goes_on_when_submitted_again(small_plan, slurm, here, cli):
    "A failure in a job arrives as on this machine, a time limit as an end of time; the same command goes on."
    small_plan(first="raise ValueError('something broke')", report=REPORT)
    failed = cli("replicate", "--cluster", "slurm", "--minutes", 1)
    assert failed.code == 1 and "first of runs/first failed: ValueError: something broke" in failed.err
    small_plan(first=TRAIN, report=REPORT)
    codes = []
    while 0 not in codes and len(codes) < 8:
        done = cli("replicate", "--cluster", "slurm", "--partition", "cpu", "--minutes", 2)
        codes.append(done.code)
        assert done.code in (0, 3), done.err
        if done.code == 3:
            assert "the same command goes on from there" in done.err
            error = json.loads((here / "runs/first/notebooks/error.json").read_text())
            assert error["kind"] == "TimeLimit" and not (here / "runs/first/trained/model.safetensors").exists()
            print(done.err.splitlines()[-1], *(here / "runs/first/trained").glob("checkpoints/step*"))
    assert codes[0] == 3 and codes[-1] == 0, codes
    run = Run(here / "runs/first/trained")
    steps = [row["step"] for row in run.metrics()]
    assert run.trained and steps == sorted(set(steps)) and steps[-1] == run.summary["updates"] == 16 * 11
    assert executed(here) == ["a1.ipynb", "a2.ipynb", "b1.ipynb", "first.ipynb", "report.ipynb"]


# Interruption

def hear_interrupts():
    "Tests that run in the background inherit that the signal is ignored."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("whole_group, jobs", (
    pytest.param(False, 2, marks=pytest.mark.long), pytest.param(True, 2, marks=pytest.mark.long), (True, 1),
), ids=("this process", "Ctrl-C to the whole group", "Ctrl-C to the whole group, one job"))
def test_interrupted_replication_leaves_no_process_and_nothing_that_looks_finished(command, here, whole_group, jobs):
    options = f"--seeds 0 --systems jempp --runs runs --figures figures --device cpu --jobs {jobs}".split()
    process = subprocess.Popen([*command.argv, "replicate", *options], cwd=here, env=command.env,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True, preexec_fn=hear_interrupts)
    try:
        began, end = here / "runs/extractor/metrics.jsonl", time.monotonic() + 120
        while not (began.exists() and began.stat().st_size):
            assert process.poll() is None and time.monotonic() < end, process.communicate()
            time.sleep(0.02)
        children = psutil.Process(process.pid).children(recursive=True)
        assert any("ipykernel" in " ".join(c.cmdline()) for c in children)
        if whole_group:
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err and err.rstrip().splitlines()[-1].startswith("robust-jem: interrupted")
    assert psutil.wait_procs(children, timeout=15)[1] == []
    assert [p for p in here.rglob("*.ipynb") if not p.name.endswith(".part.ipynb")] == []
    assert not (here / "figures").exists() and not Run(here / "runs/extractor").trained
    config = ReplicateConfig(seeds=(0,), systems=("jempp",), runs=str(here / "runs"))
    assert not any(stage.finished() for stage in stages_of(config))


# Shipped notebooks

def test_replication_notebooks_name_parameters_that_exist():
    "What the notebooks' texts and parameter cells set is a field of what they configure."
    for name, config in (("train", TrainConfig), ("evaluate", EvaluateConfig)):
        cells = nbformat.read(STAGES / f"{name}.ipynb", 4).cells
        cell = next(c for c in cells if "parameters" in c.metadata.get("tags", []))
        names = {line.split("=")[0].strip() for line in cell.source.splitlines()}
        assert names and names - {"settings"} <= set(config.__dataclass_fields__)
