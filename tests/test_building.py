"""`fpnas build`: from images to the file for the app, its plan, and builds that are killed."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import keras
import numpy as np
import pytest
from helpers import SMALL_SPACE, environment, run, run_process, write_latency_table
from hypothesis import given
from hypothesis import strategies as st

import fpnas_keras as fpnas
from export.latency_parts import named_parts
from fpnas_keras import data, report
from fpnas_keras.building import build, finalists, measuring, planning
from fpnas_keras.building.planning import Probe
from fpnas_keras.building.settings import BuildSettings
from fpnas_keras.building.targets import parse_target, parse_time
from fpnas_keras.cost import published_tables
from fpnas_keras.errors import UserError
from fpnas_keras.files import write_json
from fpnas_keras.runs import BuildRun
from fpnas_keras.runs.search_run import KEPT_FINALISTS

MODULE = "fpnas_keras.building.build"


@pytest.fixture(scope="module")
def small_space(tmp_path_factory):
    file = tmp_path_factory.mktemp("space") / "small.json"
    file.write_text(json.dumps(SMALL_SPACE))
    return file


def short_flags(space, directory):
    """A build of digits in seconds."""
    return [
        *("--data=digits", "--train_images=400", f"--space={space}", "--input_size=16"),
        *("--search.epochs=2", "--search.steps_per_epoch=3", "--search.ranked_samples=2"),
        *("--train.epochs=12", "--train.batch_size=16", f"--output_dir={directory}"),
    ]


@pytest.fixture(scope="module")
def built(tmp_path_factory, small_space):
    """The directory of a build, and what the command printed."""
    directory = tmp_path_factory.mktemp("build") / "run"
    done = run_process(
        "fpnas_keras", "build", "--target=166k", *short_flags(small_space, directory)
    )
    assert done.returncode == 0, done.stderr
    return BuildRun(directory), done


@given(st.floats(0.01, 999).map(lambda number: round(number, 2)), st.sampled_from("kMG"))
def test_targets_in_macs(number, unit):
    factor = {"k": 1e3, "M": 1e6, "G": 1e9}[unit]
    assert parse_target(f"{number}{unit}") == ("macs", number * factor)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("2ms", ("latency", 2.0)),
        ("500us", ("latency", 0.5)),
        ("300kB", ("bytes", 300e3)),
        ("1.5MB", ("bytes", 1.5e6)),
        ("0.5 ms", ("latency", 0.5)),
    ],
)
def test_targets_in_milliseconds_and_bytes(text, expected):
    assert parse_target(text) == expected


@pytest.mark.parametrize("text", ["", "8", "0M", "-1M", "8e6", "1e3ms", "M", "8m", "8 kb", "nanM"])
def test_bad_targets(text):
    with pytest.raises(UserError, match="must be a number above 0 with its unit"):
        parse_target(text)


@pytest.mark.parametrize(
    "text, seconds", [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("0.5h", 1800), ("45s", 45)]
)
def test_times(text, seconds):
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "0h", "h", "30m1h", "-1h", "1 hour"])
def test_bad_times(text):
    with pytest.raises(UserError, match="must be hours, minutes or seconds"):
        parse_time(text)


def test_settings_of_steps_are_flags():
    settings = BuildSettings(
        target="8M",
        output_dir="x",
        train={"epochs": 3, "mix_up": 0.2},
        search={"stratified": False},
        latency={"threads": (2,)},
    )
    flags = settings.to_flags()
    assert {"--train.epochs=3", "--nosearch.stratified", "--latency.threads=2"} <= set(flags)
    assert BuildSettings.from_flags(flags) == settings


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--train.epochs=0", "`train.epochs` must be an integer from 1"),
        ("--train.nothing=1", "train.nothing"),
        ("--train.data=digits", "`train.data` cannot be given: the job itself sets it"),
        ("--search.target=3e6", "`search.target` cannot be given"),
        ("--nosearch.control_variate", "--nocontrol_variate needs --cost_window=0"),
        ("--search.samples=1", "`samples` must be at least 2"),
        ("--search.coarse_epochs=5", "with the flags --search.FLAG: --coarse_epochs needs"),
        ("--train.temperature=2", "with the flags --train.FLAG: --temperature needs --teacher"),
        ("--export.prune=0.5", "`export.prune` cannot be given"),
        ("--latency.threads=1,2", "`latency.threads` must be one number"),
        ("--device=adb", "--device=adb needs --benchmark_model"),
        ("--latency_table=t.json", "--latency_table needs a target in milliseconds"),
        ("--trained_finalists=1", "`trained_finalists` must be 0 or at least 2"),
        ("--time=soon", "`time` must be hours, minutes or seconds"),
        ("--data=folder:nowhere", "`data` names no folder"),
    ],
)
def test_bad_flags_are_refused_before_any_work(tmp_path, flag, message):
    directory = tmp_path / "run"
    done = run(MODULE, "--target=8M", f"--output_dir={directory}", flag)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not directory.exists()


def test_probe():
    probe = Probe(start=10.0, step=0.5, steps_per_epoch=20, epochs=30, batch_size=8)
    assert probe.seconds(5) == 60.0
    assert probe.epochs_in(60.0) == 5
    assert probe.epochs_in(59.9) == 4
    assert probe.epochs_in(9.0) < 0


@given(st.floats(0, 1e4), st.floats(1e-4, 10), st.integers(1, 500), st.floats(0, 1e6))
def test_as_many_epochs_as_fit(start, step, steps_per_epoch, seconds):
    probe = Probe(start, step, steps_per_epoch, 20, 8)
    epochs = probe.epochs_in(seconds)
    assert probe.seconds(epochs) <= seconds + 1e-6 * abs(seconds) + 1e-6
    assert probe.seconds(epochs + 1) >= seconds - 1e-6 * abs(seconds) - 1e-6


def test_files_and_summary(built):
    run_, _ = built
    summary = run_.summary
    names = {"model.tflite", "model_int8.tflite", "labels.txt", "report.html", "steps.json"}
    assert names <= {path.name for path in run_.directory.iterdir()}
    assert summary["file"] == "model_int8.tflite"
    assert summary["macs"] == run_.search.architecture.macs() <= 166e3
    assert summary["baseline"]["macs"] <= 166e3
    assert [step["name"] for step in run_.steps] == ["search", "training", "export", "baseline"]
    assert sum(summary["class_counts"].values()) == 400
    assert run_.training.summary["epochs"] == run_.baseline.summary["epochs"] == 12
    exported = json.loads(run_.path("model_int8_report.json").read_text())
    assert summary["accuracy"] == exported["tflite_accuracy"]
    assert summary["bytes"] == run_.path("model_int8.tflite").stat().st_size


def test_output(built):
    run_, done = built
    assert "step 1 of 4: search" in done.stderr
    assert "; step 2 of 4" in done.stderr
    assert "Traceback" not in done.stderr
    # What the data holds is said once.
    assert done.stderr.count("1,797 images") == 1
    assert f"{run_.path('model_int8.tflite')}: " in done.stdout
    assert "MobileNetV3-Small: " in done.stdout
    assert run_.summary["next"] in done.stdout


def test_the_next_command_works(built, tmp_path):
    run_, _ = built
    photo = tmp_path / "photo.png"
    image = fpnas.data.load("digits", image_size=16).x[0]
    keras.utils.save_img(photo, image, scale=False)
    command, *arguments = run_.summary["next"].removeprefix("fpnas ").split()
    assert command == "predict"
    done = run("export.predict", *arguments[:-1], photo)
    assert done.returncode == 0, done.stderr
    assert str(photo) in done.stdout


def test_report(built):
    run_, _ = built
    page = run_.report.read_text()
    for text in (
        *("What the search bought", "Your images", "Files for the app", "baseline_int8.tflite"),
        *("Which classes are taken for which", "Steps and their time", "train.epochs"),
    ):
        assert text in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    run_.report.unlink()
    done = run("fpnas_keras.report.__main__", f"--run_dir={run_.directory}")
    assert done.returncode == 0, done.stderr
    assert run_.report.read_text() == page


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("summary.json", "{}", "lacks the key `description`"),
        ("summary.json", "[", "is not a summary file"),
        ("steps.json", '[{"name": 3}]', "`name` of a step must be text"),
        ("planned.json", "[]", "it must be an object of lists"),
        ("trained_finalists.json", '{"count": 0}', "`count` must be above 0"),
        ("model_int8_report.json", "{}", "lacks the key"),
    ],
)
def test_damaged_files_are_named(built, tmp_path, file, content, message):
    copy = BuildRun(shutil.copytree(built[0].directory, tmp_path / "copy"))
    copy.path(file).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        copy.planned  # noqa: B018
        report.write_report(copy.directory)
    assert file in str(error.value)


def test_a_class_name_may_be_anything(built):
    """Also the name of an argument."""
    run_ = built[0]
    summary = json.loads(run_.summary_file.read_text())
    for name in ("data", "where", "name", "self"):
        run_._checked_summary(summary | {"class_counts": {name: 3}})


def test_a_finished_build_is_not_run_again(built, small_space):
    run_, _ = built
    before = {path: path.stat().st_mtime_ns for path in run_.directory.rglob("*")}
    done = run(MODULE, "--target=166k", *short_flags(small_space, run_.directory))
    assert done.returncode == 0, done.stderr
    assert run_.summary["next"] in done.stdout
    assert {path: path.stat().st_mtime_ns for path in run_.directory.rglob("*")} == before


@pytest.mark.parametrize(
    "flag, name", [("--target=200k", "--target"), ("--train.epochs=5", "--train.epochs")]
)
def test_other_settings_are_refused_by_name(built, small_space, flag, name):
    run_, _ = built
    flags = ["--target=166k", *short_flags(small_space, run_.directory), flag]
    done = run(MODULE, *flags)
    assert done.returncode == 1
    assert f"holds another run; it differs in {name}." in done.stderr


@pytest.mark.parametrize(
    "step",
    [
        pytest.param("search", marks=pytest.mark.slow),
        "training",
        pytest.param("baseline", marks=pytest.mark.slow),
    ],
)
def test_a_build_that_is_terminated_goes_on_bit_for_bit(built, small_space, tmp_path, step):
    directory = tmp_path / "run"
    flags = ["--target=166k", *short_flags(small_space, directory)]
    names = ["training", "baseline"] if step == "baseline" else ["training"]
    flags += [] if step == "baseline" else ["--nobaseline"]
    command = [sys.executable, "-m", "fpnas_keras.building", *flags]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if f": {step}" in line:
                break
        rows = BuildRun(directory).path(step) / "metrics.csv"
        while not (rows.is_file() and rows.read_text()) and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
    assert process.returncode in (0, 128 + signal.SIGTERM)
    if process.returncode:
        assert "to continue:\n  python -m fpnas_keras.building --flagfile=" in errors
    done = run(MODULE, *flags)
    assert done.returncode == 0, done.stderr
    first, second = built[0], BuildRun(directory)
    for name in names:
        for one, other in zip(
            getattr(first, name).model().get_weights(),
            getattr(second, name).model().get_weights(),
            strict=True,
        ):
            np.testing.assert_array_equal(one, other)
    for key in ("accuracy", "bytes", "macs", "params"):
        assert first.summary[key] == second.summary[key]


def test_the_step_of_a_killed_build_keeps_its_settings(built, small_space, monkeypatch):
    """With --time, a step that has begun is not planned again."""
    run_, _ = built
    settings = BuildSettings.from_flags(
        ["--target=166k", *short_flags(small_space, run_.directory)]
    )
    session = fpnas.runs.Session(run_, settings, "x")
    try:
        job = build._Build(session)
        known = job._resumed(
            fpnas.train.TrainSettings, run_.training, architecture=run_.search.architecture_file
        )
    finally:
        session.close()
    assert known.epochs == 12
    assert known.output_dir == str(run_.training.directory.absolute())


def test_the_time_of_a_killed_step_counts(built, small_space, tmp_path):
    """What its epochs took is known at its start already."""
    directory = tmp_path / "run"
    shutil.copytree(built[0].directory, directory)
    run_ = BuildRun(directory)
    settings = BuildSettings.from_flags(["--target=166k", *short_flags(small_space, directory)])
    session = fpnas.runs.Session(run_, settings, "x")
    whole = run_.training.summary["wall_seconds"]
    run_.training.summary_file.unlink()
    taken = run_.training.epochs[-1]["seconds"]
    assert whole > taken > 0
    elapsed = []

    def work():
        elapsed.append(job._elapsed())
        return taken + 7  # With its start and its end.

    try:
        job = build._Build(session)
        job._names, job._earlier, job._started = ["training"], 100.0, time.monotonic()
        job._do("training", work)
    finally:
        session.close()
    assert elapsed[0] == pytest.approx(100 + taken, abs=0.5)
    assert job._elapsed() == pytest.approx(107 + taken, abs=0.5)
    assert run_.steps[-1]["seconds"] == pytest.approx(7 + taken, abs=0.5)
    # Finalists that are finished count with their start and their end.
    run_.plan_trained_finalists(2)
    for training in run_.trained_finalists:
        shutil.copytree(built[0].training.directory, training.directory)
    assert job._seconds_before("training") == pytest.approx(2 * whole + taken)


def test_time_decides_steps_and_epochs(small_space, tmp_path, monkeypatch):
    """The plan follows from the probes; what was cut or added is said."""
    monkeypatch.setattr(planning, "probe_search", lambda *_: Probe(5.0, 0.1, 50, 30, 16))
    monkeypatch.setattr(planning, "probe_training", lambda *_: Probe(5.0, 1.0, 10, 20, 1440))
    directory = tmp_path / "run"
    flags = [
        flag
        for flag in short_flags(small_space, directory)
        if not flag.startswith(("--search.epochs", "--search.steps", "--train.epochs"))
    ]
    directory.mkdir()
    settings = BuildSettings.from_flags(["--target=166k", "--time=600s", *flags])
    session = fpnas.runs.Session(BuildRun(directory), settings, "x")
    job = build._Build(session)
    job.settings = settings
    job.images = data.load("digits", image_size=16)
    job._started = time.monotonic() - 95
    # 15% of 505 s are 75.75 s: 5 s to start, and 14 epochs of 5 s.
    job.settings = job.settings.fit_to(job.images)
    planned = job._plan_search()
    assert (planned.epochs, planned.steps_per_epoch) == (14, 50)
    assert (planned.finalists, planned.ranked_samples) == (20, 2)
    # 300 steps take 35 s, up to 30% of the time.
    monkeypatch.setattr(job, "_left", lambda: 117.0)
    assert job._plan_search().epochs == 6
    monkeypatch.setattr(job, "_left", lambda: 116.0)
    with pytest.raises(UserError, match="with which the search has 300 steps"):
        job._plan_search()
    # A whole search of three epochs.
    monkeypatch.setattr(planning, "probe_search", lambda *_: Probe(5.0, 0.1, 500, 3, 16))
    monkeypatch.setattr(job, "_left", lambda: 155.1 / 0.3)
    whole = job._plan_search()
    assert (whole.epochs, whole.steps_per_epoch, whole.finalists) == (3, 500, 100)
    architecture = tmp_path / "a.json"
    architecture.write_text("{}")
    train = job.settings.train_settings(directory / "training", str(architecture))

    def plan(name, left, **more):
        monkeypatch.setattr(job, "_left", lambda: left)
        planned = job._plan_training(train, name, **more)
        return planned and planned.epochs

    # 5 s to start, and 19 epochs of 10 s. A file takes 6.5 s, and a sixth of a second for two
    # passes over 360 test images.
    assert plan("baseline", 201.8) == 19
    assert plan("baseline", 201.5) == 18
    # Two trainings, and a file more of the first one.
    assert plan("training", 2 * 195.1 + 3 * 6.67) == 19
    assert plan("training", 2 * 194.9 + 3 * 6.66) == 18
    # A baseline gets no more than the time of the other training.
    assert plan("baseline", 1e6, most=195.0) == 19
    assert plan("training", 1e6) == 4 * 20
    assert plan("training", 30.0) == 1
    assert plan("baseline", 20.0) is None
    cut = "19 epochs instead of 20, for lack of time"
    more = "18 epochs instead of 20, for lack of time"
    assert job._notes == [
        "search: 700 steps instead of 1,500, and 20 finalists, for lack of time",
        "search: 300 steps instead of 1,500, and 20 finalists, for lack of time",
        *(f"{name}: {text}" for name in ("baseline", "training") for text in (cut, more)),
        f"baseline: {cut}",
        "training: 80 epochs instead of 20, since there is time",
        "training: 1 epoch, though it does not fit into the time",
        "MobileNetV3-Small is left out: not even one epoch fits into the time",
    ]
    monkeypatch.undo()
    monkeypatch.setattr(planning, "probe_search", lambda *_: Probe(5.0, 0.1, 50, 30, 16))
    job._started = time.monotonic() - 590  # 590 s and 35 s / 0.3 are 11.8 minutes.
    with pytest.raises(UserError, match="`time` must be at least 12m, with which the search"):
        job._plan_search()


@given(
    st.floats(0, 50),
    st.floats(0.01, 2),
    st.integers(1, 200),
    st.integers(1, 30),
    st.floats(-9, 1e4),
)
def test_as_many_finalists_as_fit(start, step, steps_per_epoch, epochs, seconds):
    probe = Probe(start, step, steps_per_epoch, epochs, 32, teaching=1e6)  # They have no teacher.
    one = start + step * steps_per_epoch * epochs
    count = finalists.count_that_fit(probe, seconds)
    assert count == 0 or 2 <= count <= KEPT_FINALISTS
    assert count * one <= max(0, seconds) * (1 + 1e-9)
    if count < KEPT_FINALISTS:
        assert max(count + 1, 2) * one > seconds * (1 - 1e-9)


def test_finalists_are_trained_in_spare_time(built, small_space, tmp_path, monkeypatch):
    directory = tmp_path / "run"
    shutil.copytree(built[0].directory, directory)
    settings = BuildSettings.from_flags(
        ["--target=166k", "--time=1h", *short_flags(small_space, directory)]
    )
    job = build._Build(fpnas.runs.Session(BuildRun(directory), settings, "x"))
    job.images = data.load("digits", image_size=16)
    monkeypatch.setattr(planning, "probe_training", lambda *_: Probe(5.0, 1.0, 10, 20, 1440))
    monkeypatch.setattr(finalists, "LEAST_IMAGES", len(job.images.y))
    known = len(job.run.search.finalist_files)
    assert known > 1

    def count(left, **changes):
        monkeypatch.setattr(job, "_left", lambda: left)
        job.settings = dataclasses.replace(settings, **{"train": {}} | changes)
        return job._count_finalists()

    # A training of all 80 epochs takes 805 s, one of a finalist 205 s, a file 6.67 s; each twice,
    # and one file more.
    needed = 2 * 805 + 3 * 6.67
    assert count(needed + 2 * 205 + 2) == 2
    assert count(needed + 2 * 205 - 1) == 0  # Instead of one.
    assert count(805 + 2 * 6.67 + 2 * 205 + 2, baseline=False) == 2
    assert count(needed + 1e5) == known
    assert count(np.inf) == 0
    # With 30 epochs as the user says, finalists have as many.
    monkeypatch.setattr(planning, "probe_training", lambda *_: Probe(5.0, 1.0, 10, 30, 1440))
    job._measured.clear()
    assert count(2 * 305 + 3 * 6.67 + 2 * 305 + 2, train={"epochs": 30}) == 2
    assert count(2 * 305 + 3 * 6.67 + 2 * 305 - 1, train={"epochs": 30}) == 0
    assert count(10.0, trained_finalists=0) == 0
    assert count(10.0, trained_finalists=2) == 2
    assert count(10.0, trained_finalists=8) == known
    assert job._notes == [f"training: the search has kept {known} of its finalists, not 8"]
    for file in job.run.search.finalist_files[1:]:  # A single one would be trained for nothing.
        file.unlink()
    assert count(1e6) == count(10.0, trained_finalists=2) == 0
    monkeypatch.setattr(finalists, "LEAST_IMAGES", len(job.images.y) + 1)
    assert count(1e6) == 0


def test_trainings_of_finalists(tmp_path):
    """They have the epochs of the whole training, and what they cannot have is left out."""
    images = data.load("digits", image_size=16)
    settings = BuildSettings(
        target="166k",
        output_dir=str(tmp_path),
        train={"ema_momentum": 0.999, "teacher": "t.keras", "validation_split": 0.05},
    ).train_settings(tmp_path, "a.json")
    short = finalists.shorten(settings, images)
    kept = images.part(data.split(images.y, 0.05, 0)[0])
    whole = settings.fit_to(kept)
    assert (short.epochs, short.batch_size, short.mix_up) == (
        *(whole.epochs, whole.batch_size, whole.mix_up),
    )
    assert (short.validation_split, short.teacher, short.ema_momentum) == (0.2, None, 0.0)
    more = dataclasses.replace(settings, validation_split=0.4)
    assert finalists.shorten(more, images).validation_split == 0.4


def test_flags_of_trainings_may_change_until_they_are_used(tmp_path):
    settings = BuildSettings(target="166k", output_dir=str(tmp_path))
    run_ = BuildRun(tmp_path)
    run_.write_flags(settings.to_flags())
    run_.search.directory.mkdir()
    run_.search.write_flags(["--epochs=1"])
    run_.plan_trained_finalists(2)

    def changeable():
        names = ("train.batch_size", "trained_finalists", "train.teacher", "train.ema_momentum")
        return [settings.may_still_change(run_, name) for name in names]

    assert changeable() == [True, True, True, True]
    run_.trained_finalists[0].directory.mkdir(parents=True)
    run_.trained_finalists[0].write_flags(["--epochs=1"])
    assert changeable() == [False, False, True, True]  # The finalists have no teacher.
    run_.training.directory.mkdir()
    run_.training.write_flags(["--epochs=1"])
    assert changeable() == [False, False, False, False]


@pytest.mark.parametrize("accuracies, best", [((0.5, 0.75, 0.625), 2), ((0.5, 0.5), 1)])
def test_the_finalist_with_the_highest_accuracy_is_chosen(
    tmp_path, small_space, monkeypatch, accuracies, best
):
    space = fpnas.spaces.get(str(small_space), (16, 16, 1), 10)
    networks = [
        space.architecture(space.entries.to_choices([number] * len(space.blocks)))
        for number in range(len(accuracies))
    ]
    run_ = BuildRun(tmp_path)
    run_.search.directory.mkdir()
    run_.search.write_finalists(networks)
    run_.plan_trained_finalists(len(accuracies))

    def train(settings):
        training, file = settings
        number = run_.search.finalist_files.index(file)
        assert training.directory == run_.trained_finalists[number].directory
        summary = {"val_accuracy": accuracies[number], "epochs": 20}
        return types.SimpleNamespace(summary=summary)

    monkeypatch.setattr(finalists, "run_training", train)
    note = finalists.train_and_choose(run_, lambda *given: given)
    assert f"number {best} is the best on the images held out" in note
    assert ("the first one has 50.00%" in note) == (best > 1)
    assert run_.architecture == networks[best - 1]
    assert run_.network_file == run_.architecture_file


@pytest.mark.slow
def test_the_best_finalist_is_the_network(built, small_space, tmp_path):
    """A build that is killed among its finalists trains the same ones when it goes on."""
    directory = tmp_path / "run"
    shutil.copytree(built[0].directory, directory)
    run_ = BuildRun(directory)
    for name in ("training", "baseline"):
        shutil.rmtree(run_.path(name))
    for path in (run_.summary_file, *directory.glob("*.tflite"), *directory.glob("*_report.json")):
        path.unlink()
    write_json(run_.steps_file, [step for step in run_.steps if step["name"] == "search"])
    write_json(run_.path("planned.json"), {})
    flags = ["--target=166k", "--trained_finalists=2", "--nobaseline"]
    flags += short_flags(small_space, directory)
    command = [sys.executable, "-m", "fpnas_keras.building", *flags]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if "finalist 2 of 2" in line:
                break
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert len(run_.trained_finalists) == 2 and run_.trained_finalists[0].finished
    first = run_.trained_finalists[0].model_file.stat().st_mtime_ns
    refused = run(MODULE, *flags, "--trained_finalists=0")
    assert "it differs in --trained_finalists." in refused.stderr
    done = run(MODULE, *flags)
    assert done.returncode == 0, done.stderr
    assert run_.trained_finalists[0].model_file.stat().st_mtime_ns == first
    summaries = [training.summary for training in run_.trained_finalists]
    accuracies = [summary["val_accuracy"] for summary in summaries]
    best = int(np.argmax(accuracies))
    files = run_.search.finalist_files
    assert run_.search.architecture == fpnas.Architecture.load(files[0])
    for training, file in zip(run_.trained_finalists, files):
        assert training.architecture == fpnas.Architecture.load(file)
        assert training.flags["validation_split"] == "0.2" and training.flags["epochs"] == "12"
    assert run_.training.architecture == fpnas.Architecture.load(files[best])
    assert run_.summary["macs"] == run_.training.architecture.macs()
    (training,) = (step for step in run_.steps if step["name"] == "training")
    planned, found = training["notes"]
    assert planned == "training: 2 finalists of the search are trained first"
    assert f"number {best + 1} is the best on the images held out: {accuracies[best]:.2%}" in found
    assert training["seconds"] >= sum(summary["wall_seconds"] for summary in summaries)
    page = run_.report.read_text()
    assert "Finalists that were trained" in page
    assert all(f"{accuracy:.2%}" in page for accuracy in accuracies)
    assert [number for number in (1, 2) if f"{number}, chosen" in page] == [best + 1]


def test_what_there_is_no_time_for_is_left_out(built, small_space, tmp_path, monkeypatch):
    """An int8 file that loses accuracy is not fine-tuned, and there is no baseline."""
    directory = tmp_path / "run"
    shutil.copytree(built[0].directory, directory)
    shutil.rmtree(directory / "baseline")
    flags = ["--target=166k", "--time=100s", *short_flags(small_space, directory)]
    job = build._Build(fpnas.runs.Session(BuildRun(directory), BuildSettings.from_flags(flags), ""))
    monkeypatch.setattr(build, "_loses_too_much", lambda _: True)
    monkeypatch.setattr(build, "run_export", lambda settings: written.append(settings.quantize))
    # The int8 file is there, so writing it takes no time. A tenth of the time may be exceeded.
    written, allowed = [], job._tuning_seconds(job.run.training, 0.0)
    assert -10.0 < allowed < 50.0
    monkeypatch.setattr(job, "_left", lambda: allowed - 0.1)
    job._export_rounded(job.run.training, "model")
    assert written == [] and job._notes[-1] == "export: model is not fine-tuned, for lack of time"
    monkeypatch.setattr(job, "_left", lambda: allowed + 60.0)
    job._export_rounded(job.run.training, "model")
    assert written == ["qat"]
    job.settings = dataclasses.replace(job.settings, train={})  # Its epochs would be kept.
    monkeypatch.setattr(job, "_plan_training", lambda *_: None)
    assert job._train_baseline() == 0.0
    assert not job.run.baseline.directory.exists()
    assert job._describe(job.run.baseline, "baseline") is None


def test_a_probe_times_a_teacher(small_space, tmp_path):
    """A teacher that sees each image once is not part of a step, nor of the start."""
    images = data.load("digits", image_size=16)
    space = fpnas.spaces.get(str(small_space), images.image_shape, 10)
    architecture = space.architecture([block.entries[0] for block in space.blocks])
    architecture.save(tmp_path / "a.json")
    architecture.build().save(tmp_path / "teacher.keras")
    settings = BuildSettings.from_flags(
        ["--target=166k", "--train.batch_size=16", *short_flags(small_space, tmp_path / "run")]
    )
    plain = settings.train_settings(tmp_path / "training", str(tmp_path / "a.json"))
    taught = dataclasses.replace(plain, teacher=str(tmp_path / "teacher.keras"), random_flip=False)
    probe = planning.probe_training(taught, images)
    assert probe.teaching > 0 and probe.epochs_in(probe.seconds(3) + 1e-6) == 3
    mirrored = dataclasses.replace(taught, random_flip=True)
    assert planning.probe_training(mirrored, images).teaching == 0


def test_probes_measure_the_jobs(small_space, tmp_path):
    images = data.load("digits", image_size=16)
    settings = BuildSettings.from_flags(
        ["--target=166k", "--data=digits", f"--space={small_space}", "--output_dir=x"]
    ).fit_to(images)
    search = settings.search_settings(
        tmp_path / "search", str(small_space), 16, cost="macs", target=166e3
    )
    probe = planning.probe_search(search, images)
    assert (probe.steps_per_epoch, probe.epochs) == (50, 30)
    assert probe.start > probe.step > 0
    file = tmp_path / "a.json"
    measuring.smallest_network(fpnas.spaces.get(str(small_space), images.image_shape, 10)).save(
        file
    )
    probe = planning.probe_training(settings.train_settings(tmp_path / "t", str(file)), images)
    assert (probe.steps_per_epoch, probe.epochs) == (1437 // 16, 70)
    assert probe.start > probe.step > 0
    assert not list(tmp_path.glob("*/flags.txt"))


@pytest.mark.parametrize(
    "target, shape, expected",
    [
        ("8M", (128, 128, 3), 128),
        ("8M", (300, 300, 3), 128),
        ("2M", (300, 300, 3), 64),
        ("2M", (32, 32, 3), 32),
        ("2M", (28, 28, 1), 28),
        ("500k", (8, 8, 1), 16),
        ("40M", (3000, 3000, 3), 224),
    ],
)
def test_image_size_by_target(target, shape, expected):
    settings = BuildSettings(target=target, output_dir="x")
    assert measuring.choose_size(settings, shape, 5) == expected


@given(
    text=st.sampled_from(["2ms", "500us", "8M", "1.2G", "30kB", "1.5MB"]),
    least=st.floats(1.01, 100),
    width=st.floats(1, 2),
)
def test_the_limits_that_a_refused_target_is_told_are_within_the_limits(text, least, width):
    target = parse_target(text)
    least *= target.aim
    with pytest.raises(UserError) as caught:
        target.check_reachable(least, width * least, "of these networks", text)
    message, _, received = str(caught.value).partition(" Received: target=")
    assert received == text
    assert ("1% for the error" in message) == (target.kind == "bytes")
    numbers = re.findall(r"([\d.,]+) ?(ms|M MACs|G MACs|kB)", message)
    limits = [parse_target(number.replace(",", "") + unit.split()[0]) for number, unit in numbers]
    if len(limits) == 2:
        for limit in limits:
            limit.check_reachable(least, width * least, "", "")
    else:  # The two are nearly the same.
        assert width < 1.02
        assert limits[0].aim == pytest.approx(least, rel=0.01)


def test_a_target_below_every_network_is_refused():
    settings = BuildSettings(target="10k", output_dir="x")
    message = r"must be at least .*M MACs, the cost of the small.* Received: target=10k$"
    with pytest.raises(UserError, match=message):
        measuring.choose_size(settings, (64, 64, 3), 5)


def test_the_smallest_network_costs_least():
    for name in ("mobile_40", "mobile_128", "mobile_224", "mobile_mini"):
        space = fpnas.spaces.get(name, (64, 64, 3), 5)
        least = float(fpnas.cost.SpaceCost(space, fpnas.MacsCost()).least())
        assert measuring.smallest_network(space).macs() <= 1.05 * least


def test_the_smallest_network_of_choices_in_any_order(tmp_path):
    """Nothing sorts the choices of a user."""
    operations = [{"kernel_size": 7, "expansion": 6}, {"kernel_size": 3, "expansion": 3}]
    blocks = [
        {"filters": [96, 24], "kernel_size": [7, 3], "expansion": [6, 3], "splits": [2, 0]},
        {"filters": ["same"], "skip": [True, False]},
        {"filters": [64, 32], "operation": operations},
        {"filters": ["same"], "operation": [*operations, {"skip": True}]},
    ]
    space = {"format": 1, "stem": {"filters": 16}, "blocks": blocks, "head": {"filters": 64}}
    write_json(tmp_path / "space.json", space)
    space = fpnas.spaces.get(str(tmp_path / "space.json"), (32, 32, 3), 10)
    least = fpnas.cost.SpaceCost(space, fpnas.MacsCost()).least()
    assert measuring.smallest_network(space).macs() == least


def test_a_published_table_is_no_table_of_ours(tmp_path):
    """Once-for-all's tables are found as JSON too."""
    blocks = [{"filters": [16, 24], "kernel_size": [3, 5], "expansion": [3]}]
    space = {"format": 1, "stem": {"filters": 16}, "blocks": blocks, "head": {"filters": 64}}
    write_json(tmp_path / "space.json", space)
    space = fpnas.spaces.get(str(tmp_path / "space.json"), (16, 16, 3), 10)
    names = published_tables.find_names({"MBConv-input:": 1.0})
    entries = {name: {"mean": 1.0} for part in space.parts() for name in names(part)}
    write_json(tmp_path / "table.json", entries)
    settings = BuildSettings(target="1ms", output_dir="x")
    assert measuring.check_table(settings, str(tmp_path / "table.json"), space) == []


@pytest.mark.slow
def test_milliseconds_with_a_table_that_was_measured_before(small_space, tmp_path):
    space = fpnas.spaces.get(str(small_space), (16, 16, 1), 10)
    table = write_latency_table(tmp_path / "table.json", space, lambda part: 0.01, quantize="int8")
    directory = tmp_path / "run"
    done = run(
        MODULE,
        "--target=0.035ms",
        f"--latency_table={table}",
        "--nobaseline",
        *short_flags(small_space, directory),
    )
    assert done.returncode == 0, done.stderr
    run_ = BuildRun(directory)
    assert [step["name"] for step in run_.steps][:2] == ["latency table", "search"]
    assert run_.search.summary["cost"] == "latency"
    assert run_.search.summary["found_cost"] <= 0.035
    assert run_.summary["baseline"] is None
    assert run_.summary["milliseconds"] > 0


@pytest.mark.slow
def test_size_of_the_file(small_space, tmp_path):
    directory = tmp_path / "run"
    done = run_process(
        "fpnas_keras.building",
        "--target=25kB",
        "--nobaseline",
        *short_flags(small_space, directory),
    )
    assert done.returncode == 0, done.stderr
    run_ = BuildRun(directory)
    assert run_.search.summary["cost"] == "bytes"
    assert 0.9 * 25e3 < run_.summary["bytes"] <= 25e3


def test_a_latency_table_is_found_again(small_space, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    measured = []

    def measure(settings):
        measured.append(settings)
        of = fpnas.spaces.get(settings.space, (settings.input_size, settings.input_size, 1), 10)
        fit = {"measured": min(settings.max_entries, len(named_parts(of)))}
        write_latency_table(
            pathlib.Path(settings.output), of, lambda part: 0.01, quantize="int8", fit=fit
        )

    monkeypatch.setattr(measuring, "run_measuring", measure)
    settings = BuildSettings(target="1ms", output_dir="x", space="mobile_40")
    space = fpnas.spaces.get("mobile_40", (32, 32, 1), 10)
    file = tmp_path / "table.json"
    notes = measuring.measure_table(settings, space, file, 200.0)
    # 2 cores for 180 s, without the 64 s of 16 networks, in entries of 0.9 s.
    assert measured[0].max_entries == 328
    assert notes[0].startswith("latency table: 328 of ")
    # It is good enough for as little time, and not for more.
    (cached,) = (tmp_path / "cache" / "fpnas_keras").iterdir()
    file.unlink()
    notes = measuring.measure_table(settings, space, file, 200.0)
    assert notes == [f"latency table: {cached}, with 328 measured entries"]
    assert file.read_bytes() == cached.read_bytes()
    assert len(measured) == 1
    file.unlink()
    measuring.measure_table(settings, space, file, None)
    assert (len(measured), measured[1].max_entries) == (2, 1500)
    assert len(list(cached.parent.iterdir())) == 1
    # Another size is another table.
    other = fpnas.spaces.get("mobile_40", (16, 16, 1), 10)
    measuring.measure_table(settings, other, tmp_path / "other.json", 200.0)
    assert len(list(cached.parent.iterdir())) == 2
    # Another interpreter or converter may be faster.
    monkeypatch.setattr(measuring, "versions", lambda: {"ai-edge-litert": "99"})
    measuring.measure_table(settings, other, tmp_path / "other.json", 200.0)
    assert (len(measured), len(list(cached.parent.iterdir()))) == (4, 3)
    # A table that cannot be kept for later builds is good for this one.
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    notes = measuring.measure_table(settings, other, tmp_path / "other.json", 200.0)
    assert "file/fpnas_keras: Not a directory; later builds measure" in notes[-1]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--latency_table=nowhere.json"], "nowhere.json"),
        (["--device=adb", "--benchmark_model=nowhere"], "`benchmark_model` must be"),
        (["--train.teacher=nowhere.keras"], "nowhere.keras"),
    ],
)
def test_what_was_wrong_can_be_put_right(small_space, tmp_path, flags, message):
    """Nothing is written, or the same directory takes the corrected flags."""
    directory = tmp_path / "run"
    target = "--target=1ms" if "latency" in flags[0] else "--target=166k"
    short = short_flags(small_space, directory)
    done = run(MODULE, target, *short, *flags)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    run_ = BuildRun(directory)
    settings = BuildSettings.from_flags([target, *short])
    if directory.exists():
        session = fpnas.runs.Session(
            run_, settings, "x", may_change=functools.partial(settings.may_still_change, run_)
        )
        session.close()
        other = dataclasses.replace(settings, search={"epochs": 3})
        with pytest.raises(UserError, match="it differs in --search"):
            fpnas.runs.Session(
                run_, other, "x", may_change=functools.partial(other.may_still_change, run_)
            )
    assert directory.exists() == ("--train.teacher=nowhere.keras" in flags)


def test_another_kind_of_run_is_not_taken_for_a_build(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "flags.txt").write_text("--cost=macs\n--target=1e6\n--space=x\n")
    done = run(MODULE, "--target=1M", "--data=digits", f"--output_dir={directory}")
    assert done.returncode == 1
    assert "holds another run" in done.stderr
    assert [path.name for path in directory.iterdir()] == ["flags.txt"]


def test_a_build_that_has_not_searched_begins_with_other_flags(small_space, tmp_path):
    directory = tmp_path / "run"
    short = short_flags(small_space, directory)
    first = BuildSettings.from_flags(["--target=150k", *short])
    run_ = BuildRun(directory)
    session = fpnas.runs.Session(run_, first, "x")
    with session.working():
        build._Build(session)._begin()
    assert "--target=150k" in run_.flag_lines()
    (directory / "latency_table.json.files").mkdir()
    assert build._differs(run_, dataclasses.replace(first, target="166k"))
    assert not build._differs(run_, dataclasses.replace(first, output_dir="elsewhere"))
    run_.forget_beginning()
    assert list(directory.iterdir()) == []


@pytest.mark.slow
def test_a_build_that_was_moved_goes_on(built, tmp_path):
    """Its steps name files inside of it."""
    first, _ = built
    moved = tmp_path / "moved"
    shutil.copytree(first.directory, moved)
    run_ = BuildRun(moved)
    settings = BuildSettings.from_flags(
        [*(flag for flag in run_.flag_lines() if "output_dir" not in flag), f"--output_dir={moved}"]
    )
    for name in ("summary.json", "training/summary.json", "training/model.keras"):
        (moved / name).unlink()
    shutil.rmtree(moved / "training" / "checkpoints")
    steps = json.loads(run_.steps_file.read_text())
    run_.steps_file.write_text(json.dumps(steps[:1]))
    for file in moved.glob("*.tflite"):
        file.unlink()
    again = build.run_build(settings)
    assert again.summary["accuracy"] == first.summary["accuracy"]
    assert str(moved) in again.training.flags["architecture"]
    for one, other in zip(
        first.training.model().get_weights(), again.training.model().get_weights(), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_a_target_outside_of_the_space_leaves_nothing(small_space, tmp_path):
    directory = tmp_path / "run"
    done = run(MODULE, "--target=2M", *short_flags(small_space, directory))
    assert done.returncode == 1
    assert "`target` must be at least 0.0157M MACs and at most 0.166M MACs" in done.stderr
    assert "Received: target=2M\n" in done.stderr
    assert not directory.exists()
