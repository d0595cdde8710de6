import csv

import keras
import numpy as np
import pytest

from fpnas_keras.runs.callbacks import EpochLine, MetricsFile, StopOnDivergence


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


def test_an_epoch_is_one_line_with_the_time_left(caplog):
    with caplog.at_level("INFO", logger="absl"):
        fit([EpochLine(lambda epoch, logs: f"{len(logs)} value, {epoch}")])
    lines = [record.getMessage() for record in caplog.records if record.name == "absl"]
    assert [line.split(";")[0] for line in lines] == [
        "epoch 1/3: 1 value, 0",
        "epoch 2/3: 1 value, 1",
        "epoch 3/3: 1 value, 2",
    ]
    assert lines[-1].endswith("; 0:00:00 left")
