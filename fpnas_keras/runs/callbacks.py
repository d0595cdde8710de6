"""Keras callbacks of the command lines."""

import csv
import datetime
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


class CoarseToFine(keras.callbacks.Callback):
    """Turns the factorized logits of an `ArchitectureSearch` into joint ones.

    Args:
        epoch: Number of epochs that the search stays factorized.

    Raises:
        UserError: When training begins with a search that has no joint logits to go to.

    Example:

    ```python
    search = fpnas.ArchitectureSearch(space, distribution="coarse_to_fine")
    search.compile("sgd", "adam")
    search.fit(batches, epochs=30, callbacks=[fpnas.CoarseToFine(epoch=15)])
    ```

    Reference: FP-NAS (arXiv:2011.10949), "coarse-to-fine search".
    """

    def __init__(self, epoch: int):
        super().__init__()
        self.epoch = epoch

    def on_train_begin(self, logs: dict | None = None) -> None:
        if len(self.model.distributions) == 1:
            raise UserError(
                "`CoarseToFine` needs a search with distribution='coarse_to_fine'. "
                f"Received: {type(self.model.distribution).__name__} alone"
            )

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        refined = self.model.distribution is self.model.distributions[-1]
        if epoch >= self.epoch and not refined:
            self.model.refine()


class EpochLine(keras.callbacks.Callback):
    """Logs a line an epoch that a person can read, with the time that is left.

    Args:
        line: From the index of the epoch and its logs to what the line says.
    """

    def __init__(self, line: Callable[[int, dict], str]):
        super().__init__()
        self.line = line
        self.seconds = []
        self.message = None

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._log()
        self.start = time.monotonic()

    def on_train_end(self, logs: dict | None = None) -> None:
        self._log()

    def _log(self):
        # Not at the end of the epoch: Keras' progress bar has not ended its line then.
        if self.message:
            logging.info("%s", self.message)
            self.message = None

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self.seconds.append(time.monotonic() - self.start)
        epochs = self.params["epochs"]
        # Of the last few: the first traces, and later ones draw fewer samples.
        left = statistics.median(self.seconds[-5:]) * (epochs - epoch - 1)
        left = datetime.timedelta(seconds=round(left))
        self.message = f"epoch {epoch + 1}/{epochs}: {self.line(epoch, logs)}; {left} left"


class MetricsFile(keras.callbacks.Callback):
    """Writes a file with a row an epoch, complete after every epoch.

    `keras.callbacks.CSVLogger` sorts its columns and knows neither steps nor time.

    Args:
        path: The file, made anew: CSV, or, ending in .jsonl, a JSON object a line.
        row: From the index of the epoch and its logs to the row. A column
            `seconds`, since training began, is added.
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
        """Goes on from what `get_state` gave."""
        with replacing(self.path) as temporary:
            temporary.write_text(state["text"])
        self.start = time.monotonic() - state["seconds"]


class TensorBoardFile(keras.callbacks.Callback):
    """Writes rows for TensorBoard: scalars, histograms of probabilities, hyper-parameters.

    `keras.callbacks.TensorBoard` counts epochs, not steps, and knows no logits.

    Args:
        directory: Folder of the event files.
        row: From the index of the epoch and its logs to the scalars, `step` among them.
        hyperparameters: Their values by name.
        probabilities: Gives for each block the probabilities of all that can be chosen there.
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
