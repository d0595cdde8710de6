"""Every benchmark runs once in its smallest size, and the rows that were measured stay valid."""

import dataclasses
import importlib
import inspect
import itertools
import json
import pathlib
import shutil

import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers import ROOT

import fpnas_keras.train
from fpnas_keras.commands import run_command
from fpnas_keras.errors import UserError
from fpnas_keras.train import TrainSettings

FOLDER = ROOT / "benchmarks"
# What the benchmarks share. Every other file of the folder is a benchmark.
SHARED = {
    *("dmasking", "harness", "networks", "peer_networks", "rivals", "torch_trainings"),
    "tuner_trials",
}
NAMES = sorted({file.stem for file in FOLDER.glob("*.py")} - SHARED)
# These need more than their rows to report: a data set, a run directory, or a latency table.
NEEDS_MORE = {
    "build",
    "few_photos",
    "imagenet",
    "joint_logits",
    "macro_search",
    "milliseconds",
    "multi_trial",
    "nas_bench_macro",
    "recipe",
    "soak",
    "training_free",
    "user_sizes",
    "versus",
}


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def load(name):
    return importlib.import_module(name)


def output_name(benchmark):
    """Name of the file of rows."""
    (field,) = [
        field for field in dataclasses.fields(benchmark.COMMAND.settings) if field.name == "output"
    ]
    return pathlib.Path(field.default).name


def read_bytes(file):
    return file.read_bytes() if file.exists() else b""


def read(file):
    """The rows of a .json or .jsonl file, by their name."""
    text = file.read_text()
    if file.suffix == ".jsonl":
        rows = list(map(json.loads, text.splitlines()))
    else:
        rows = json.loads(text)
        rows = rows if isinstance(rows, list) else [rows]
    return {row.get("name", row.get("job", row.get("choices"))): row for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_smoke_run(name, tmp_path, monkeypatch, capsys):
    """It has the columns of the rows that were measured, and leaves them as they are."""
    monkeypatch.setattr(fpnas_keras.train, "_RECALIBRATION_BATCHES", 2)
    benchmark = load(name)
    measured_file = FOLDER / output_name(benchmark)
    before = read_bytes(measured_file), sorted(FOLDER.iterdir())
    output = tmp_path / measured_file.name
    assert run_command(benchmark.COMMAND, ["--smoke", f"--output={output}"]) == 0
    rows = read(output)
    assert rows
    measured = read(measured_file)
    for key, row in rows.items():
        # A run that was interrupted continues by these names, and reports read these columns.
        assert key in measured
        read_by_reports = {"name", "macs", "test_accuracy", "val_accuracy"}
        columns = measured[key].keys()
        if "trainer" in columns:  # Rows of torch_trainings.py, which has columns of its own.
            columns &= read_by_reports
        assert columns <= row.keys(), key
    assert (read_bytes(measured_file), sorted(FOLDER.iterdir())) == before
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NEEDS_MORE])
def test_measured_rows_are_complete(name, tmp_path, capsys):
    """With all rows there is nothing left to run, and the report is printed."""
    benchmark = load(name)
    output = tmp_path / output_name(benchmark)
    shutil.copy(FOLDER / output.name, output)
    before = output.read_bytes()
    others = {
        "baselines": [f"--work_dir={tmp_path}/runs"],
        "fashion_mnist": [f"--work_dir={tmp_path}/runs"],
        "formats": [f"--work_dir={tmp_path}/runs", "--flowers=flowers"],
        "scaling": [f"--picture={tmp_path}/scaling.png"],
    }
    arguments = [f"--output={output}", *others.get(name, [])]
    assert run_command(benchmark.COMMAND, arguments) == 0
    assert output.read_bytes() == before
    assert "|---" in capsys.readouterr().out or name == "large_searches"


@pytest.mark.parametrize("count, draws", [(5, 2), (6, 3), (7, 7), (4, 1)])
def test_trials_of_random_search(count, draws):
    """The closed forms, against all orders of the draws."""
    multi_trial = load("multi_trial")
    accuracies = np.random.default_rng(count).normal(size=count)
    level = np.sort(accuracies)[-2]
    orders = list(itertools.permutations(accuracies))
    best = np.mean([max(order[:draws]) for order in orders])
    needed = [multi_trial.trials_to_reach(order, level) for order in orders]
    needed = np.quantile(needed, 0.5, method="inverted_cdf")
    assert multi_trial.expected_best(accuracies, draws) == pytest.approx(best)
    assert multi_trial.random_trials(accuracies, level) == pytest.approx(needed)
    assert multi_trial.trials_to_reach(accuracies, 1e9) == np.inf


def test_picture_of_builds(tmp_path):
    picture = tmp_path / "build.png"
    load("build").draw(read(FOLDER / "build.jsonl"), str(picture))
    assert plt.imread(picture).shape[1] > 2 * plt.imread(picture).shape[0]  # two panels or more


def test_given_settings_stay_in_a_smoke_run(tmp_path):
    settings = load("scaling").ScalingSettings(smoke=True, repeats=2, output="given.jsonl")
    smallest = settings.shrink(tmp_path)
    assert (smallest.repeats, smallest.values, smallest.output) == (2, 1, "given.jsonl")


def test_job_in_a_process():
    benchmark = load("joint_logits")
    settings = benchmark.JointLogitsSettings(job="720,factorized", blocks=2, steps=1, target=50e6)
    row = load("harness").measure_job(benchmark.__file__, settings, {})
    assert row["choices"] == 720
    assert row["milliseconds"] > 0


def test_unknown_job():
    benchmark = load("joint_logits")
    settings = benchmark.JointLogitsSettings(job="nothing")
    with pytest.raises(UserError, match="Received: job=nothing"):
        benchmark.run(settings)


def python_job(directory, contents):
    """A job whose process writes its summary."""
    harness = load("harness")
    code = (
        f"import pathlib; d = pathlib.Path({str(directory)!r}); d.mkdir(); "
        f"(d / 'summary.json').write_text({json.dumps(contents)!r})"
    )
    return harness.Job(["-c", code], run=None)


def test_phases_in_processes(tmp_path):
    """Jobs that have a row already do not run again. The phases run in order."""
    output = tmp_path / "rows.jsonl"
    output.write_text('{"name": "a 0", "value": 0}\n')
    settings = load("fashion_mnist").FashionMnistSettings(
        output=str(output), work_dir=str(tmp_path / "runs")
    )
    runs = load("harness").Runs(settings)
    jobs = {
        name: python_job(runs.directory(name), {"value": value})
        for value, name in enumerate(("a 0", "a 1", "b 0"), 10)
    }
    rows = runs.run_phases([{name: jobs[name] for name in ("a 0", "a 1")}, {"b 0": jobs["b 0"]}])
    expected = [("a 0", 0), ("a 1", 11), ("b 0", 12)]
    assert [(row["name"], row["value"]) for row in rows.values()] == expected
    assert read(output) == rows


def test_failed_job_names_its_log(tmp_path):
    settings = load("fashion_mnist").FashionMnistSettings(
        output=str(tmp_path / "rows.jsonl"), work_dir=str(tmp_path / "runs")
    )
    harness = load("harness")
    job = harness.Job(["-c", "raise SystemExit('why it failed')"], run=None)
    with pytest.raises(RuntimeError, match=r"see .*a_0\.log"):
        harness.Runs(settings).run_phases([{"a 0": job}])
    assert "why it failed" in (tmp_path / "runs" / "a_0.log").read_text()
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize("name", ["milliseconds", "nas_bench_macro"])
def test_missing_table(name, capsys):
    assert run_command(load(name).COMMAND, []) == 1
    assert "must be given" in capsys.readouterr().err


def test_recipes_are_settings_of_a_training():
    for recipe in load("recipe").RECIPES.values():
        TrainSettings(architecture="a.json", output_dir="runs/a", **recipe)


def test_every_benchmark_is_documented():
    text = (FOLDER / "README.md").read_text()
    assert [name for name in NAMES if f"`{name}.py`" not in text] == []


def test_rows_of_nas_bench_macro_give_arguments_of_the_search():
    """A smoke run makes few of the rows."""
    known = inspect.signature(fpnas_keras.ArchitectureSearch).parameters.keys()
    for name, job in load("nas_bench_macro").make_jobs().items():
        assert job.keywords.keys() - {"learning_rate", "least_share"} <= known, name
