"""The commands as a user types them, on the digits that come with scikit-learn.

`run_process` starts a process, as a user does. `run` runs the same command in this process.
"""

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from helpers import ROOT, SMALL_SPACE, environment, run, run_process, write_latency_table

from fpnas_keras import Architecture, FileSizeCost, LatencyCost, data, spaces
from fpnas_keras.architecture import count_part
from fpnas_keras.runs import SearchRun

SEARCH = ["fpnas_keras.search", "--input_size=16", "--epochs=3", "--steps_per_epoch=2"]
SEARCH += ["--batch_size=16", "--cost=macs", "--target=500e3", "--seed=5", "--sample_scale=0.1"]
SEARCH += [
    "--ranked_samples=3",
    "--warmup_steps=2",
    "--distribution=coarse_to_fine",
    "--coarse_epochs=2",
]


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def next_command(stdout):
    """What the output tells the user to type next, as arguments after `python -m`."""
    words = shlex.split(stdout.strip().splitlines()[-1])
    assert words[:2] == ["python", "-m"]
    return words[2:]


def assert_refused(result, message):
    assert result.returncode == 1
    assert "Traceback" not in result.stdout + result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    file = tmp_path_factory.mktemp("with space") / "small.json"
    file.write_text(json.dumps(SMALL_SPACE))
    return file


@pytest.fixture(scope="module")
def search(small):
    """The command of a search of a small space."""
    flags = ["--target=60e3", "--train_images=720", "--sample_scale=0.5"]
    return [*SEARCH, f"--space={small}", *flags]


@pytest.fixture(scope="module")
def searched(search, tmp_path_factory):
    directory = tmp_path_factory.mktemp("with space") / "searched"
    result = run_process(*search, f"--output_dir={directory}")
    assert result.returncode == 0, result.stderr
    return directory, result.stdout


@pytest.fixture(scope="module")
def trained(searched):
    flags = ["--epochs=2", "--batch_size=64", "--ema_momentum=0.5"]
    result = run_process(*next_command(searched[1]), *flags)
    assert result.returncode == 0, result.stderr
    # A part of the training images is kept in the next command.
    assert "720 training images" in result.stderr
    return searched[0].with_name("searched_trained"), result.stdout


def test_search_leaves_a_run_directory(searched):
    directory, stdout = searched
    assert sorted(path.name for path in directory.iterdir()) == [
        "architecture.json",
        "checkpoints",
        "chosen.txt",
        "finalists",
        "flags.txt",
        "images.json",
        "metrics.csv",
        "probabilities.jsonl",
        "ranking.json",
        "report",
        "report.html",
        "search.weights.h5",
        "space.json",
        "summary.json",
        "tensorboard",
    ]
    architecture = Architecture.load(directory / "architecture.json")
    space = spaces.get(directory / "space.json", (16, 16, 1), 10)
    space.choices(architecture)  # raises unless it is in the space
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["macs"] == architecture.macs()
    assert (summary["space"], summary["seed"], summary["steps"]) == ("small", 5, 6)
    assert summary["num_architectures"] == space.num_architectures
    assert f"{architecture.macs():,} MACs" in stdout
    with (directory / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["epoch"], row["phase"]) for row in rows] == [
        ("2", "1", "warm_up"),
        ("4", "2", "factorized"),
        ("6", "3", "joint"),
    ]
    assert 0.95 * summary["target"] <= summary["macs"] <= summary["target"]
    assert summary["derivation_gap"] == 0
    assert 0 < summary["total_evaluated"] <= summary["total_samples"]
    assert int(rows[-1]["total_samples"]) == summary["total_samples"] == 2 * 2 + 4 * 3
    assert {
        "samples",
        "entropy",
        "evaluated",
        "expected_cost",
        "cost_coefficient",
        "train_loss",
        "validation_loss",
        "seconds",
    } <= set(rows[0])


def test_parsec_by_flags(small, search, tmp_path):
    """What the run says of itself follows from the flags of the method."""
    flags = ["--distribution=joint", "--nocontrol_variate", "--nostratified", "--nodeduplicate"]
    flags += ["--start=uniform", "--cost_window=0", "--finalists=0"]
    flags += ["--samples=40", "--likelihood_scale=9", "--cost_penalty=hinge", "--least_share=0"]
    flags += ["--cost_coefficient=0.7", "--architecture_batch_size=32", "--epochs=2"]
    search = [each for each in search if "coarse" not in each]
    result = run(*search, *flags, f"--output_dir={tmp_path}/run")
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    space = spaces.get(small, (16, 16, 1), 10)
    assert summary["num_logits"] == sum(len(block.entries) for block in space.blocks)
    assert summary["total_samples"] == summary["total_evaluated"] == 2 * 2 + 2 * 40
    assert (summary["derivation_least"], summary["macs"] <= 60e3) == (0, True)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["phase"] for row in rows] == ["warm_up", "joint"]
    assert [float(row["cost_coefficient"]) for row in rows] == pytest.approx([0.7, 0.7])


@pytest.mark.slow
def test_a_space_of_ones_own_from_search_to_tflite(tmp_path):
    flags = [each for each in SEARCH if "target" not in each and "cost" not in each]
    flags += [f"--space={ROOT}/configs/spaces/example.json"]
    result = run(*flags, f"--output_dir={tmp_path}/run")
    assert result.returncode == 0, result.stderr
    architecture = Architecture.load(tmp_path / "run" / "architecture.json")
    assert architecture.space == "example"
    assert architecture.blocks[2] == architecture.blocks[3]  # they share their choices
    assert (tmp_path / "run" / "space.json").is_file()
    result = run(*next_command(result.stdout), "--epochs=1")
    assert result.returncode == 0, result.stderr
    result = run(*next_command(result.stdout))
    assert result.returncode == 0, result.stderr


def test_a_search_for_bytes(search, tmp_path):
    flags = [each for each in search if "target" not in each and "cost" not in each]
    flags += ["--cost=bytes"]
    result = run(*flags, "--target=25e3", f"--output_dir={tmp_path}/run")
    assert result.returncode == 0, result.stderr
    architecture = Architecture.load(tmp_path / "run" / "architecture.json")
    size = sum(map(FileSizeCost(), architecture.parts()))
    assert 0.95 * 25e3 <= size <= 25e3
    assert f"about {size:,.0f} bytes in int8 (target 25,000)" in result.stdout
    too_small = run(*flags, "--target=1e3", f"--output_dir={tmp_path}/small")
    assert_refused(too_small, "bytes, the least and the largest cost in the space")


def test_a_search_for_milliseconds(small, search, tmp_path):
    space = spaces.get(small, (16, 16, 1), 10)
    table = write_latency_table(
        tmp_path / "table.json", space, lambda part: 1e-3 + 1e-5 * count_part(part).macs
    )
    flags = [each for each in search if "target" not in each and "cost" not in each]
    flags += ["--cost=latency", f"--latency_table={table}", "--recompute"]
    result = run(*flags, "--target=0.5", f"--output_dir={tmp_path}/run")
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    architecture = Architecture.load(tmp_path / "run" / "architecture.json")
    predicted = sum(map(LatencyCost(table), architecture.parts()))
    assert summary["found_cost"] == pytest.approx(predicted)
    assert 0.95 * 0.5 <= predicted <= 0.5
    assert f"{predicted:.4g} ms by {table} (target 0.5)" in result.stdout
    # It prints how to measure what it found, here on a device that is not this machine.
    assert next_command(result.stdout)[0] == "export.latency"
    assert_refused(run(*next_command(result.stdout)), "is of the device {'kind': 'host', 'name'")

    too_fast = run(*flags, "--target=0.01", f"--output_dir={tmp_path}/fast")
    assert_refused(too_fast, "`target` must be from 0.1")
    other = run(*flags, "--target=0.5", "--input_size=20", f"--output_dir={tmp_path}/other")
    assert_refused(other, "the cost lacks")
    (tmp_path / "table.json").write_text("{}")
    empty = run(*flags, "--target=0.5", f"--output_dir={tmp_path}/empty")
    assert_refused(empty, "table.json is not a latency table file: the latency table lacks the key")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "table.json"]


def without_seconds(directory):
    lines = (directory / "metrics.csv").read_text().splitlines()
    return [line.rsplit(",", 1)[0] for line in lines]


def test_the_same_flags_give_the_same_search(searched, tmp_path):
    result = run(
        "fpnas_keras.search", f"--flagfile={searched[0]}/flags.txt", f"--output_dir={tmp_path}"
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "architecture.json").read_text() == (
        searched[0] / "architecture.json"
    ).read_text()

    assert without_seconds(tmp_path) == without_seconds(searched[0])


def test_a_finished_search_is_ranked_and_reported(searched, tmp_path):
    directory = shutil.copytree(searched[0], tmp_path / "run")
    probabilities = [json.loads(row) for row in (directory / "probabilities.jsonl").open()]
    assert [row["step"] for row in probabilities] == [2, 4, 6]
    first = probabilities[0]["blocks"][0]["filters"]
    # The start: near uniform, moved to the target.
    assert first.keys() == {"8", "12", "16"}
    assert list(first.values()) == pytest.approx(3 * [1 / 3], abs=0.02)
    assert sum(first.values()) == pytest.approx(1)
    assert sum(probabilities[-1]["blocks"][1]["skip"].values()) == pytest.approx(1)
    before = (directory / "report.html").read_text()
    result = run("fpnas_keras.rank", f"--search_dir={directory}", "--samples=6", "--seed=1")
    assert result.returncode == 0, result.stderr
    ranking = json.loads((directory / "ranking.json").read_text())
    names = [each["name"] for each in ranking["architectures"]]
    assert "derived" in names
    assert ranking["images"] == 360  # half of the --train_images of the search
    front = [each for each in ranking["architectures"] if each["pareto"]]
    saved = {path: Architecture.load(path) for path in (directory / "pareto").iterdir()}
    assert len(saved) == len(front)
    for path, architecture in saved.items():
        assert str(path) in result.stdout
        assert architecture.to_dict() in [each["architecture"] for each in front]
    assert (directory / "report.html").read_text() != before
    # Trainings may refer to these files: a later ranking leaves them.
    again = ["--samples=2", "--seed=2", f"--architectures={directory}/architecture.json"]
    result = run("fpnas_keras.rank", f"--search_dir={directory}", *again)
    assert result.returncode == 0, result.stderr
    assert all(Architecture.load(path) == each for path, each in saved.items())
    # The command that it prints trains one within the target.
    command = next_command(result.stdout)
    architecture = Architecture.load(command[1].removeprefix("--architecture="))
    assert architecture.macs() <= 60e3
    for arguments, message in (
        ([f"--search_dir={tmp_path}"], "summary.json"),
        ([f"--search_dir={directory}", "--architectures=nonesuch.json"], "nonesuch.json"),
        ([f"--search_dir={directory}", "--data=folder:nonesuch"], "folder:nonesuch"),
        # Which of other images trained the weights is not known.
        ([f"--search_dir={directory}", "--train_images=300"], "`train_images` must be that of"),
    ):
        assert_refused(run("fpnas_keras.rank", *arguments), message)
    (directory / "flags.txt").write_text("--train_images=many\n")
    damaged = run("fpnas_keras.rank", f"--search_dir={directory}")
    assert_refused(damaged, "flags.txt is not the flag file of a run")


def test_training_with_a_teacher_from_shared_weights(searched, trained, tmp_path):
    train = ["fpnas_keras.train", f"--architecture={searched[0]}/architecture.json", "--epochs=1"]
    train += ["--train_images=300", "--init=supernet", f"--output_dir={tmp_path}/run"]
    train += ["--mixed_precision=float16", "--mix_up=0.2", "--rand_augment=0.3"]
    train += ["--validation_split=0.2", "--learning_rate=0"]
    result = run(*train, f"--teacher={trained[0]}/model.keras")
    assert result.returncode == 0, result.stderr
    with (tmp_path / "run" / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["loss"]) > 0 and float(row["val_loss"]) > 0
    # The teacher has seen the mixed images.
    assert not (tmp_path / "run" / "teacher_logits.npy").exists()
    model = keras.saving.load_model(tmp_path / "run" / "model.keras")
    assert {layer.compute_dtype for layer in model.layers} == {"float32"}
    # With a learning rate of 0 the network keeps the shared weights.
    expected = Architecture.load(searched[0] / "architecture.json").build()
    SearchRun(searched[0]).load_search().supernet.give_weights(expected)
    for ours, theirs in zip(model.trainable_weights, expected.trainable_weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # Of the network that is left, on the images that were held out.
    images = data.load("digits", "train", 16)
    images = images.part(data.split(images.y, 299.5 / len(images.y), seed=0)[1])
    held_out = images.part(data.split(images.y, 0.2, seed=0)[1])
    right = model.predict(held_out.x.astype(np.float32), verbose=0).argmax(-1) == held_out.y
    assert len(right) == 60
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["val_accuracy"] == pytest.approx(right.mean(), abs=1e-6)
    assert f"val accuracy {right.mean():.2%} (balanced " in result.stdout
    for arguments, message in (
        (["--teacher=nonesuch.keras"], "`teacher` must be an existing .keras file"),
        (["--teacher_weights=x.weights.h5"], "--teacher_weights needs --teacher"),
        (["--init=supernet", f"--search_dir={tmp_path}"], "summary.json"),
        (["--mix_up=2"], "`mix_up` must be a finite number from 0 to 1. Received: mix_up=2"),
    ):
        bad = [*train[:2], f"--output_dir={tmp_path}/bad", *arguments]
        result = run(*bad)
        assert result.returncode == 1 and message in result.stderr, result.stderr
        assert "Traceback" not in result.stderr
        assert not (tmp_path / "bad").exists()


def test_a_finished_search_prints_its_result_again(searched):
    directory, stdout = searched
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    again = run("fpnas_keras.search", f"--flagfile={directory}/flags.txt")
    assert again.returncode == 0, again.stderr
    assert len(again.stdout) > 500
    assert stdout.endswith(again.stdout)
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before


def test_training_and_export_follow_the_printed_commands(trained):
    directory, stdout = trained
    summary = json.loads((directory / "summary.json").read_text())
    test = data.load("digits", "test", 16)
    model = keras.saving.load_model(directory / "model.keras")
    logits = model.predict(test.x.astype(np.float32), verbose=0)
    assert (logits.argmax(-1) == test.y).mean() == pytest.approx(summary["test_accuracy"], abs=1e-6)
    assert "architecture" not in summary  # which stands in a file of its own
    assert summary["macs"] == Architecture.load(directory / "architecture.json").macs()
    assert len((directory / "metrics.csv").read_text().splitlines()) == 3

    result = run_process(*next_command(stdout))
    assert result.returncode == 0, result.stderr
    assert (directory / "model_int8.tflite").is_file()
    floats = [*next_command(stdout), "--quantize=none"]
    result = run(*floats)
    assert result.returncode == 0, result.stderr
    assert (directory / "labels.txt").read_text().split() == list("0123456789")
    report = json.loads((directory / "model_report.json").read_text())
    assert report["max_difference"] <= 1e-4
    assert report["bytes"] == (directory / "model.tflite").stat().st_size
    assert report["test_images"] == 360
    assert report["tflite_accuracy"] == pytest.approx(summary["test_accuracy"], abs=1e-6)
    serve = Interpreter(str(directory / "model.tflite")).get_signature_runner("serving_default")
    image = test.x[:1].astype(np.float32)
    expected = keras.ops.softmax(logits[:1])
    np.testing.assert_allclose(serve(image=image)["probabilities"], expected, atol=1e-4)
    predicted = run_process(*next_command(result.stdout)[:-1], "--help")
    assert predicted.returncode == 0 and "usage: fpnas predict" in predicted.stdout

    again = run(*floats)
    assert_refused(again, "exists already; --overwrite replaces it")
    assert run(*floats, "--overwrite").returncode == 0
    text = (directory / "report.html").read_text()
    assert "model.tflite" in text and "model_int8.tflite" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--space=nonesuch"], "`space` must be one of fbnet_c, "),
        (["--space=/nonesuch.json"], "cannot read /nonesuch.json, which should be a space file"),
        (["--space=README.md"], "Received: space='README.md'"),
        (["--target=1e3"], "`target` must be from 112,928 to 2,943,104 MACs"),
        (["--target=1e9"], "Received: target=1,000,000,000"),
        (["--warmup_steps=4"], "`coarse_epochs` must reach beyond the 4 steps of the warm-up"),
        (
            ["--train_images=9000"],
            "below the 1437 training images of digits",
        ),
        (["--warmup_steps=6"], "`warmup_steps` must be below the 6 steps of the search"),
        (["--samples=1"], "`samples` must be at least 2"),
        (["--data=folder:/nonesuch"], "`data` names no folder. Received: data=folder:/nonesuch"),
        (["--data=nonesuch"], "`data` must be digits"),
        (["--strategy=multiworker"], "needs the environment variable TF_CONFIG"),
        (
            ["--learning_rate=nan"],
            "`learning_rate` must be a finite number from 0. Received: learning_rate=nan",
        ),
        (["--input_size=9000"], "does not fit into memory"),
    ],
)
def test_bad_flags_of_a_search_are_refused(tmp_path, arguments, message):
    directory = tmp_path / "run"
    assert_refused(run(*SEARCH, f"--output_dir={directory}", *arguments), message)
    assert not directory.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nonesuch=1"], "Unknown command line flag 'nonesuch'"),
        (["--epochs=0"], "`epochs` must be an integer from 1. Received: epochs=0"),
        (["--epochs=x"], "`epochs` must be an integer from 1. Received: epochs=x"),
        (["--epochs=1.5"], "`epochs` must be an integer from 1. Received: epochs=1.5"),
        (
            ["--cost=euros"],
            "`cost` must be one of none, macs, params, bytes, latency. Received: cost=euros",
        ),
        (["--nodownload=1"], "--nodownload=1 does not take an argument"),
        (["--download=maybe"], "download"),
        (["--target=3e6"], "--target needs --cost"),
        (["--distribution=coarse_to_fine", "--epochs=1"], "needs at least 2 --epochs"),
        (["--cost=latency", "--target=1"], "--cost=latency needs --latency_table"),
        (["--cost_coefficient=1"], "--cost_coefficient and --anneal_steps need --target"),
        (
            ["--cost=macs", "--target=5e5", "--cost_coefficient=1", "--anneal_steps=9"],
            "--anneal_steps moves the coefficient",
        ),
        (["--coarse_epochs=2"], "--coarse_epochs needs --distribution=coarse_to_fine"),
        (
            ["--distribution=coarse_to_fine", "--epochs=3", "--coarse_epochs=3"],
            "must be below --epochs",
        ),
        (["--min_samples=9", "--max_samples=8"], "--min_samples must be at most --max_samples"),
        (["--flagfile=/nonesuch"], "/nonesuch"),
        (["extra"], "unexpected argument 'extra'"),
        (["--checkpoint_every=5m"], "must be a number of seconds above 0 with an s"),
        ([], "--output_dir must be given: Directory of the run"),
    ],
)
def test_flags_that_do_not_parse_are_refused(tmp_path, arguments, message):
    output_dir = [f"--output_dir={tmp_path / 'run'}"] if arguments else []
    result = run("fpnas_keras.search", *output_dir, *arguments)
    assert_refused(result, message)
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_both_ways_to_run_a_command_end_alike():
    """What `run` gives here is what `run_process` gives."""
    for arguments in (["--space=nonesuch", "--output_dir=x"], ["--epochs=0"]):
        new, inside = (each("fpnas_keras.search", *arguments) for each in (run_process, run))
        assert (inside.returncode, inside.stdout) == (new.returncode, new.stdout) == (1, "")
        assert inside.stderr.splitlines()[-1] == new.stderr.splitlines()[-1]


def test_directories_that_hold_something_else_are_refused(searched, tmp_path):
    directory, _ = searched
    before = contents(directory)
    flags = f"--flagfile={directory}/flags.txt"
    result = run("fpnas_keras.search", flags, "--seed=6", "--target=61e3")
    assert_refused(result, "holds another run; it differs in --seed, --target")
    assert contents(directory) == before

    (tmp_path / "thesis.txt").write_text("mine")
    assert_refused(run(*SEARCH, f"--output_dir={tmp_path}"), "which holds other files")
    assert_refused(run(*SEARCH, f"--output_dir={tmp_path}/thesis.txt"), "is not a directory")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def interrupt(command, number, ready, pause=0.0):
    """Starts a command, sends a signal when it is ready; output and exit code."""
    with subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        while process.poll() is None and not ready():
            time.sleep(0.02)
        time.sleep(pause)
        process.send_signal(number)
        return process.communicate()[0], process.returncode


def assert_same_run(directory, expected):
    """Weights, logits, architecture and rows are those of another run, bit for bit."""
    ranked = (directory / "ranking.json").is_file() and (expected / "ranking.json").is_file()
    assert not ranked or json.loads((directory / "ranking.json").read_text()) == json.loads(
        (expected / "ranking.json").read_text()
    )
    for name in ("architecture.json", "search.weights.h5", "model.keras", "metrics.csv"):
        assert (directory / name).exists() == (expected / name).exists()
        if name == "metrics.csv":
            assert without_seconds(directory) == without_seconds(expected)
        elif name == "model.keras" and (expected / name).exists():
            # An archive has the time in it.
            ours, theirs = (keras.saving.load_model(each / name) for each in (directory, expected))
            weights = zip(ours.get_weights(), theirs.get_weights())
            assert all(np.array_equal(one, other) for one, other in weights)
        elif (expected / name).exists():
            assert (directory / name).read_bytes() == (expected / name).read_bytes()
    assert sorted(os.listdir(directory)) == sorted(os.listdir(expected))


def test_a_killed_search_goes_on_with_the_same_command(search, searched, tmp_path):
    command = [*search, f"--output_dir={tmp_path}/run", "--checkpoint_every=1"]
    checkpoints = tmp_path / "run" / "checkpoints"
    output, code = interrupt(command, signal.SIGKILL, lambda: list(checkpoints.glob("*.ckpt")))
    assert code == -signal.SIGKILL, output
    other = run(*search, f"--output_dir={tmp_path}/run", "--seed=6", "--warmup_steps=1")
    assert_refused(other, "holds another run; it differs in --seed, --warmup_steps")

    # SIGTERM saves, and says how to go on.
    metrics, before = tmp_path / "run" / "metrics.csv", time.time()
    command[-1] = "--checkpoint_every=2"
    output, code = interrupt(command, signal.SIGTERM, lambda: metrics.stat().st_mtime > before)
    assert code == 128 + signal.SIGTERM, output
    assert "Traceback" not in output
    go_on = next_command(output)
    flags = [f"--flagfile={tmp_path}/run/flags.txt", "--checkpoint_every=2"]
    assert go_on == ["fpnas_keras.search", *flags]
    result = run(*go_on)
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "run", searched[0])


def test_a_second_process_in_a_directory_is_refused(search, tmp_path):
    command = [*search, "--epochs=1000", f"--output_dir={tmp_path}/run"]
    with subprocess.Popen(
        [sys.executable, "-m", *command],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        while not (tmp_path / "run" / "flags.txt").exists():
            assert process.poll() is None
            time.sleep(0.1)
        second = run(*command)
        process.kill()
    assert_refused(second, f"another process is at work in `output_dir` {tmp_path}/run")


def test_a_full_disk_ends_in_one_line(search, tmp_path):
    """Files may have 30 KiB here, and a checkpoint is larger."""
    command = shlex.join([sys.executable, "-m", *search, f"--output_dir={tmp_path}/run"])
    result = subprocess.run(
        ["bash", "-c", f"trap '' XFSZ; ulimit -f 30; {command} --checkpoint_every=1"],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert_refused(result, "File too large")
    names = {path.name for path in (tmp_path / "run").rglob("*") if ".tfevents." not in path.name}
    rows = {"metrics.csv", "probabilities.jsonl"}
    first = {"flags.txt", "chosen.txt", "images.json", "space.json"}
    assert names == first | {"checkpoints", "tensorboard"} | rows


def test_a_directory_that_cannot_be_written(tmp_path):
    assert_refused(run(*SEARCH, "--output_dir=/proc/self/runs"), "/proc/self/runs")


def test_paths_may_have_any_letters(searched, tmp_path):
    directory = tmp_path / "Größe, 大きさ & co"
    directory.mkdir()
    shutil.copy(searched[0] / "architecture.json", directory)
    train = ["fpnas_keras.train", f"--architecture={directory}/architecture.json", "--epochs=1"]
    result = run(*train, "--train_images=100", f"--output_dir={directory}/trained")
    assert result.returncode == 0, result.stderr
    result = run(*next_command(result.stdout))
    assert result.returncode == 0, result.stderr
    assert (directory / "trained" / "model_int8.tflite").is_file()


def test_a_flag_file_of_the_package_is_named_in_a_plain_line(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "fpnas_keras.train", "--flagfile=configs/fashion_mnist_train.flags"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(),
    )
    first, *_, last = result.stderr.splitlines()
    assert first.startswith("configs/fashion_mnist_train.flags: taken from the package")
    assert last.startswith("error: cannot read")


def test_a_log_file_has_plain_lines(searched, tmp_path):
    """Nothing of TensorFlow, no escape codes, one line an epoch."""
    result = run_process(
        "fpnas_keras.train",
        f"--architecture={searched[0]}/architecture.json",
        "--train_images=100",
        "--epochs=3",
        f"--output_dir={tmp_path}/run",
    )
    assert result.returncode == 0
    export = run_process(*next_command(result.stdout), "--quantize=none")
    for stderr in (result.stderr, export.stderr):
        for word in (
            "tensorflow",
            "TensorFlow",
            "oneDNN",
            "cuda",
            "absl",
            "\r",
            "\x1b",
            "Sharding",
        ):
            assert word not in stderr, stderr
    lines = result.stderr.splitlines()
    assert lines[0].startswith("digits: 1,797 images (1,437 train, 360 test from a fifth of train)")
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert [line.split(":")[0] for line in epochs] == [f"epoch {n} of 3" for n in (1, 2, 3)]
    assert all(line.endswith(" left") for line in epochs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["search", "train"])
def test_killed_at_ten_random_moments(searched, tmp_path, kind):
    """Each time with SIGKILL, some time after the first checkpoint of the part."""
    commands = {"search": [*SEARCH, "--epochs=6", "--coarse_epochs=3", "--steps_per_epoch=30"]}
    commands["train"] = [*next_command(searched[1])[:-1], "--epochs=60", "--ema_momentum=0.9"]
    command = [*commands[kind], "--checkpoint_every=2"]
    result = run(*command, f"--output_dir={tmp_path}/whole")
    assert result.returncode == 0, result.stderr
    rng, kills = np.random.default_rng(0), 0
    while kills < 10:
        output, code = interrupt(
            [*command, f"--output_dir={tmp_path}/run"],
            signal.SIGKILL,
            (tmp_path / "run" / "flags.txt").exists,
            rng.uniform(0, 25),
        )
        if code == 0:  # it ended first: another directory for the kills that are left
            assert_same_run(tmp_path / "run", tmp_path / "whole")
            shutil.rmtree(tmp_path / "run")
        else:
            assert code == -signal.SIGKILL, output
            kills += 1
    result = run(*command, f"--output_dir={tmp_path}/run")
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_bad_input_of_training_is_refused(searched, tmp_path):
    out = f"--output_dir={tmp_path / 'run'}"
    missing = run("fpnas_keras.train", "--architecture=/nonesuch.json", out)
    assert_refused(missing, "cannot read /nonesuch.json, which should be an architecture file")
    (tmp_path / "bad.json").write_text("{")
    bad = run("fpnas_keras.train", f"--architecture={tmp_path}/bad.json", out)
    assert_refused(bad, "bad.json is not an architecture file")
    good = f"--architecture={searched[0]}/architecture.json"
    for flag, message in (
        ("--random_crop=16", "`random_crop` must be below the image size, 16"),
        ("--ema_momentum=0.999", "`ema_momentum` averages 1000 steps"),
    ):
        assert_refused(run("fpnas_keras.train", good, out, flag), message)
    assert not (tmp_path / "run").exists()


def test_a_training_of_another_architecture_is_not_taken_for_this_one(trained, searched, tmp_path):
    directory = tmp_path / "trained"
    shutil.copytree(trained[0], directory)
    flags = (directory / "flags.txt").read_text()
    file = tmp_path / "architecture.json"
    shutil.copy(searched[0] / "architecture.json", file)
    (directory / "flags.txt").write_text(flags.replace(str(searched[0] / file.name), str(file)))
    arguments = [f"--flagfile={directory}/flags.txt", f"--output_dir={directory}"]
    same = run("fpnas_keras.train", *arguments)
    assert same.returncode == 0, same.stderr
    changed = json.loads(file.read_text())
    changed["head"]["filters"] += 8
    file.write_text(json.dumps(changed))
    assert_refused(run("fpnas_keras.train", *arguments), "a run of another architecture")


# For networks of two epochs, which rounding changes much.
LENIENT = ("--min_agreement=0.5", "--max_accuracy_drop=0.5")


@pytest.mark.parametrize("quantize", ["dynamic", "qat"])
def test_quantized_files_are_written_and_reported(trained, tmp_path, quantize):
    shutil.copy(trained[0] / "model.keras", tmp_path)
    shutil.copy(trained[0] / "architecture.json", tmp_path)
    arguments = [f"--model={tmp_path}/model.keras", f"--quantize={quantize}", "--data=digits"]
    arguments += ["--qat_epochs=1"] if quantize == "qat" else []
    result = run("export.tflite", *arguments, *LENIENT)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / f"model_{quantize}_report.json").read_text())
    assert report["quantize"] == quantize
    assert report["agreement"] >= 0.5
    assert report["host_milliseconds"] > 0
    assert report["bytes"] == (tmp_path / f"model_{quantize}.tflite").stat().st_size
    assert (report["float_operators"] == {}) == (quantize == "qat")


def test_a_file_under_the_agreement_is_not_left(trained, tmp_path):
    result = run(
        *("export.tflite", f"--model={trained[0]}/model.keras", "--data=digits"),
        *("--quantize=int8", "--min_agreement=1", "--max_accuracy_drop=1"),
        f"--output={tmp_path}/x.tflite",
        # Ranges of a single image.
        "--representative_images=1",
    )
    assert_refused(result, "less than `min_agreement` 100.00%")
    assert not list(tmp_path.iterdir())


def test_bad_input_of_export_is_refused(trained, tmp_path):
    missing = run("export.tflite", "--model=/nonesuch.keras")
    assert_refused(missing, "`model` must be an existing .keras file")
    (tmp_path / "bad.keras").write_text("no model")
    assert_refused(
        run("export.tflite", f"--model={tmp_path}/bad.keras"), "cannot load the Keras model"
    )
    code = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Lambda(lambda x: x[:, 0, :, 0])])
    code.save(tmp_path / "code.keras")
    hostile = run("export.tflite", f"--model={tmp_path}/code.keras")
    assert_refused(hostile, "cannot load the Keras model")
    assert not list(tmp_path.glob("*.tflite"))
    output = run(
        "export.tflite", f"--model={trained[0]}/model.keras", "--output=/nonesuch/a.tflite"
    )
    assert_refused(output, "`output` must lie in an existing folder")
