import csv

import keras
import numpy as np
import pytest

from fpnas_keras.callbacks import MetricsFile, StopOnDivergence


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
