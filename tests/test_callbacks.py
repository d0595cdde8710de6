import contextlib
import csv
import logging as stdlib_logging

import keras
import numpy as np
import pytest
from absl import logging

from export import latency, predict, tflite
from fpnas_keras import rank, search, train
from fpnas_keras.building import build
from fpnas_keras.commands import visible_log
from fpnas_keras.progress import describe_left, part_of, track
from fpnas_keras.runs.callbacks import MetricsFile, Progress, StopOnDivergence


def fit(callbacks, learning_rate=0.1):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(learning_rate), "mse")
    x = np.ones((8, 2), np.float32)
    return model.fit(x, x[:, :1], epochs=3, verbose=0, callbacks=callbacks).history


def test_metrics_file_has_a_row_an_epoch(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("left by an earlier run\n")
    history = fit([MetricsFile(path, lambda epoch, logs: {"epoch": epoch + 1} | logs)])
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "loss", "seconds"]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [float(row["loss"]) for row in rows] == pytest.approx(history["loss"])
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)


def test_a_diverging_training_ends_with_a_message():
    fit([StopOnDivergence()])
    with pytest.raises(ValueError, match=r"diverged: loss is .* in epoch .*`learning_rate`"):
        fit([StopOnDivergence()], learning_rate=1e30)


def lines_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "absl"]


def test_an_epoch_is_one_line_with_the_time_left(caplog):
    with caplog.at_level("INFO", logger="absl"):
        fit([Progress(lambda epoch, logs: f"{len(logs)} value, {epoch}")])
    lines = lines_of(caplog)
    assert [line.split(";")[0] for line in lines] == [
        "epoch 1 of 3: 1 value, 0",
        "epoch 2 of 3: 1 value, 1",
        "epoch 3 of 3: 1 value, 2",
    ]
    assert lines[-1].endswith("; 0:00:00 left")


def test_the_time_left_counts_steps_for_what_they_cost(caplog, monkeypatch):
    """The first two of four epochs of 10 steps are a warm-up, whose steps take 1 s, not 4 s."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = Progress(
        lambda epoch, logs: "",
        lambda first, end: sum(1 if step < 20 else 4 for step in range(first, end)),
    )
    progress.set_params({"epochs": 4, "steps": 10})
    with caplog.at_level("INFO", logger="absl"):
        for epoch in range(4):
            progress.on_epoch_begin(epoch)
            for step in range(10):
                now[0] += (30 if epoch == step == 0 else 0) + (1 if epoch < 2 else 4)
                progress.on_train_batch_end(step)
            progress.on_epoch_end(epoch)
    lefts = [line.split("; ")[1] for line in lines_of(caplog) if "; " in line]
    assert lefts == ["0:01:30 left", "0:01:20 left", "0:00:40 left", "0:00:00 left"]


def test_a_long_epoch_gives_lines_in_a_log_file(caplog, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with caplog.at_level("INFO", logger="absl"), track(100, "reading", "images") as progress:
        for _ in range(100):
            now[0] += 1
            progress.update()
    assert lines_of(caplog) == [
        "reading: 5 of 100 images, 0:01:35 left",
        "reading: 35 of 100 images, 0:01:05 left",
        "reading: 65 of 100 images, 0:00:35 left",
        "reading: 95 of 100 images, 0:00:05 left",
    ]


def test_what_is_left_of_a_whole_is_said_with_what_is_left_of_its_part():
    assert describe_left(90) == "0:01:30 left"
    with part_of(lambda left: f"step 1 of 2, {left + 30:.0f} s in all"):
        assert describe_left(90) == "0:01:30 left; step 1 of 2, 120 s in all"
        with part_of(lambda left: "inner"):
            assert describe_left(1) == "0:00:01 left; inner"
        assert "step 1 of 2" in describe_left(1)
    assert describe_left(90) == "0:01:30 left"


@contextlib.contextmanager
def nothing_set_up():
    """absl's log as it is when nobody has set it up, as in a notebook."""
    root, verbosity = stdlib_logging.getLogger(), logging.get_verbosity()
    handlers, root.handlers[:] = root.handlers[:], []
    logging.set_verbosity(logging.WARNING)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        logging.set_verbosity(verbosity)


def test_the_log_is_visible_unless_the_user_wants_silence(capsys):
    with nothing_set_up(), visible_log():
        logging.info("seen %d", 1)
    with nothing_set_up():
        logging.info("unseen")  # absl now has a handler of its own.
        with visible_log():
            logging.info("seen %d", 2)
    with nothing_set_up():
        logging.set_verbosity(logging.ERROR)
        with visible_log():
            logging.info("unseen")
    assert capsys.readouterr().err == "seen 1\nINFO:absl:seen 2\n"


@pytest.mark.parametrize(
    "module, job, work, settings",
    [
        (search, "search_architecture", "run_search", {"output_dir": "x"}),
        (train, "train_architecture", "run_training", {"architecture": "a", "output_dir": "x"}),
        (rank, "rank_architectures", "run_ranking", {"search_dir": "x"}),
        (build, "build", "run_build", {"target": "8M", "output_dir": "x"}),
        (tflite, "export_tflite", "run_export", {"model": "m.keras"}),
        (latency, "measure_latency", "run_measuring", {"space": "mobile_mini", "output": "x.json"}),
        (
            latency,
            "compare_latency",
            "run_comparison",
            {"architecture": "a", "latency_table": "x.json"},
        ),
        (predict, "classify_images", "run_prediction", {"model": "m", "images": ("x.png",)}),
    ],
)
def test_a_job_in_python_says_what_it_does(capsys, monkeypatch, module, job, work, settings):
    """In a notebook, hours would be silent."""
    monkeypatch.setattr(module, work, lambda _: logging.info("seen"))
    with nothing_set_up():
        getattr(module, job)(**settings)
        logging.info("unseen")
    assert capsys.readouterr().err == "seen\n"
