"""Keras callbacks of searches and trainings that have a run directory."""

import csv
import json
import math
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from fpnas_keras.errors import UserError
from fpnas_keras.files import replacing
from fpnas_keras.progress import describe_left, track


class StopOnDivergence(keras.callbacks.Callback):
    """Ends training with a `UserError` when a metric is no longer finite.

    `keras.callbacks.TerminateOnNaN` stops too, but as if training had ended well.
    """

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        for name, value in (logs or {}).items():
            if not math.isfinite(value):
                raise UserError(
                    f"training diverged: {name} is {value} in epoch {epoch + 1}; try a lower "
                    "`learning_rate`"
                )


class Progress(keras.callbacks.Callback):
    """Logs one line after each epoch, with the time that is left, and shows where an epoch is.

    Args:
        line: Makes the text of the line from the index of the epoch and its logs.
        cost_of_steps: What the steps from one to before another cost, by their indices in the run,
            relative to other steps. By default all cost the same.
        first_step: Steps that are already made. `fit` counts them without making them.
    """

    def __init__(
        self,
        line: Callable[[int, dict], str],
        cost_of_steps: Callable[[int, int], float] = lambda first, end: end - first,
        first_step: int = 0,
    ):
        super().__init__()
        self.line = line
        self.cost_of_steps = cost_of_steps
        self.first_step = first_step
        self.rates = []  # seconds for a cost of 1, in each epoch

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        epochs, self.steps = self.params["epochs"], self.params["steps"]
        self.bar = track(self.steps, f"epoch {epoch + 1} of {epochs}", "steps", 30)
        self.start = time.monotonic()
        # The first step that is made is traced, which is no measure of the others.
        self.first = max(0, self.first_step - epoch * self.steps) + (0 if self.rates else 1)
        self.first = min(self.first, self.steps - 1)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.bar.update(1)
        if batch + 1 == self.first:
            self.start = time.monotonic()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self.bar.close()
        end = (epoch + 1) * self.steps
        done = self.cost_of_steps(epoch * self.steps + self.first, end)
        self.rates.append((time.monotonic() - self.start) / done)
        # The last few epochs: the load of the machine changes.
        left = self.cost_of_steps(end, self.params["epochs"] * self.steps)
        left *= statistics.median(self.rates[-5:])
        logging.info(
            "epoch %d of %d: %s; %s",
            *(epoch + 1, self.params["epochs"], self.line(epoch, logs), describe_left(left)),
        )


class MetricsFile(keras.callbacks.Callback):
    """Writes a file with one row for each epoch. The file is complete after every epoch.

    `keras.callbacks.CSVLogger` sorts its columns and knows neither steps nor time.

    Args:
        path: The file, which is replaced: a CSV file, or one JSON object in each line of a .jsonl
            file.
        row: Makes the row from the index of the epoch and its logs. A column `seconds`, since
            training began, is added.
    """

    def __init__(self, path: str | os.PathLike, row: Callable[[int, dict], dict[str, Any]]):
        super().__init__()
        self.path = pathlib.Path(path)
        self.row = row

    def on_train_begin(self, logs: dict | None = None) -> None:
        self.set_state({"text": "", "seconds": 0.0})

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        row = self.row(epoch, logs) | {"seconds": round(time.monotonic() - self.start, 2)}
        with self.path.open("a", newline="") as file:
            if self.path.suffix == ".jsonl":
                file.write(json.dumps(row) + "\n")
                return
            writer = csv.DictWriter(file, row.keys(), lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)

    def get_state(self) -> dict[str, Any]:
        """The file so far and the seconds, for a checkpoint."""
        return {"text": self.path.read_text(), "seconds": time.monotonic() - self.start}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restores the state that `get_state` returned."""
        with replacing(self.path) as temporary:
            temporary.write_text(state["text"])
        self.start = time.monotonic() - state["seconds"]


class TensorBoardFile(keras.callbacks.Callback):
    """Writes rows for TensorBoard: scalars, histograms of probabilities, hyper-parameters.

    `keras.callbacks.TensorBoard` counts epochs, not steps, and knows no logits.

    Args:
        directory: Folder of the event files.
        row: Makes the scalars, `step` among them, from the index of the epoch and its logs.
        hyperparameters: Their values by name.
        probabilities: Gives the probabilities of the entries of each block.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        row: Callable[[int, dict], dict[str, Any]],
        hyperparameters: dict[str, bool | int | float | str],
        probabilities: Callable[[], Iterable[np.ndarray]] = tuple,
    ):
        super().__init__()
        self.directory = os.fspath(directory)
        self.row = row
        self.hyperparameters = hyperparameters
        self.probabilities = probabilities

    def on_train_begin(self, logs: dict | None = None) -> None:
        from tensorboard.plugins.hparams import api  # which takes a second to import

        self.writer = tf.summary.create_file_writer(self.directory)
        with self.writer.as_default():
            api.hparams(self.hyperparameters)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        row = self.row(epoch, logs)
        with self.writer.as_default(step=row.pop("step")):
            for name, value in row.items():
                if not isinstance(value, str):
                    tf.summary.scalar(name, value)
            for block, values in enumerate(self.probabilities()):
                tf.summary.histogram(f"probabilities/block_{block}", values)
        self.writer.flush()

    def on_train_end(self, logs: dict | None = None) -> None:
        self.writer.close()
