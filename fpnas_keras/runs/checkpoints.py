"""Checkpoints: a run that is killed at any moment can be continued exactly.

A checkpoint holds every variable (weights, logits, optimizer slots, metrics of the epoch), the
rows of the metrics files, and the time that the run has used. Nothing else is needed: batches and
drawn architectures are pure functions of seed and step.
"""

import contextlib
import hashlib
import io
import json
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from fpnas_keras.errors import Interrupted, UserError
from fpnas_keras.files import replacing
from fpnas_keras.runs.callbacks import MetricsFile
from fpnas_keras.runs.session import Session

_KEPT = 2
_DIGEST = hashlib.sha256().digest_size


class Checkpoints(keras.callbacks.Callback):
    """Saves the state of a run, and continues from the last checkpoint that is whole.

    A checkpoint file is a SHA-256 digest followed by an `.npz` archive. It gets its name only when
    it is whole. The last two are kept.

    Args:
        session: The session that makes the run; its settings say how often to save.

    Example:

    ```python
    checkpoints = Checkpoints(session)
    batches = data.train_batches(images, first_step=checkpoints.step)
    checkpoints.fit(model, batches, epochs=20, files=[metrics_file])
    ```
    """

    def __init__(self, session: Session):
        super().__init__()
        self.session = session
        self.directory = session.run.checkpoint_folder
        self.save_every_seconds, self.save_every_steps = session.settings.checkpoint_interval()
        self.step = 0
        self.steps_per_epoch = None
        self._whole_steps = []  # of the checkpoints that are known to be whole
        # What the last checkpoint holds, until the model has it.
        self._restored_arrays = self._restored_state = None
        self._signal = None
        self._interruptions = 0
        self._find_latest()
        self._saved_step, self._saved_at = self.step, time.monotonic()

    def _find_latest(self):
        found = self.session.run.checkpoints
        for step, path in found.items():
            try:
                self._restored_arrays, self._restored_state = _read(path)
            except ValueError as error:
                logging.warning("the checkpoint %s is damaged: %s", path, error)
                continue
            self.step, self.steps_per_epoch = step, self._restored_state["steps_per_epoch"]
            self._whole_steps = [step]
            logging.info("continuing after step %d, from %s", step, path)
            return
        if self.session.goes_on_from_end:
            raise UserError(
                f"the run in `output_dir` {self.session.run.directory} cannot go on: it is "
                "finished and its last checkpoint is gone or damaged. Choose another directory."
            )
        if found:
            logging.warning("no checkpoint is whole: the run starts from the beginning")

    def fit(
        self,
        model: keras.Model,
        batches: tf.data.Dataset,
        epochs: int,
        files: Sequence[MetricsFile] = (),
        callbacks: Sequence[keras.callbacks.Callback] = (),
        **kwargs: Any,
    ) -> None:
        """Calls `model.fit` from where the last checkpoint was.

        Args:
            model: The model, compiled. Its optimizer and metrics have their variables.
            batches: A dataset of one epoch, made with `first_step=step`.
            epochs: Epochs of the whole run.
            files: The files that get a row for each epoch.
            callbacks: Further callbacks. They may end the run at the end of an epoch.
            **kwargs: As for `fit`.

        Raises:
            Interrupted: After SIGTERM or SIGINT, when the state is saved.
            UserError: When a weight is no longer finite.
        """
        if self.steps_per_epoch is None:
            self.steps_per_epoch = int(batches.cardinality())
        self.epochs, self.files = epochs, files
        # One iterator for all epochs, and no batch read beyond the last.
        batches = batches.repeat().take(epochs * self.steps_per_epoch - self.step)
        with self._saving_at_signals():
            model.fit(
                # Of unknown cardinality: Keras would count the steps that are skipped.
                batches.filter(lambda *_: True),
                epochs=epochs,
                initial_epoch=self.step // self.steps_per_epoch,
                steps_per_epoch=self.steps_per_epoch,
                shuffle=False,
                verbose=0,  # `Progress` shows it.
                callbacks=[*files, *callbacks, self],
                **kwargs,
            )
            self._end_if_interrupted()

    @contextlib.contextmanager
    def _saving_at_signals(self):
        """Makes SIGTERM and Ctrl-C wait, inside the block, until the state is saved."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Only the main thread may handle signals.
            return
        handlers = {
            number: signal.signal(number, self._interrupt)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _interrupt(self, number, frame):
        if self._interruptions:
            raise Interrupted(number=number)
        self._interruptions += 1
        if self.session.writes:
            self._signal = number
            logging.info("interrupted: saving after this step (interrupt again to end now)")
        else:  # The workers can finish a step only together: this one waits for the chief.
            logging.info("interrupted: waiting for the chief to save (interrupt again to end now)")

    # Keras calls, in this order: `set_model`; `on_train_begin` of the files, then of this callback;
    # at the first epoch it resets the metrics and calls `on_epoch_begin`. So the variables are
    # restored first, then the files, and the metrics of an unfinished epoch last.

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        if self._restored_arrays is not None:
            variables = _variables(model)
            shapes = [tuple(variable.shape) for variable in variables]
            if shapes != [array.shape for array in self._restored_arrays]:
                raise UserError(
                    f"the checkpoint of step {self.step} in {self.directory} is of another version "
                    "of the program or of other data. Remove it or choose another directory."
                )
            for variable, value in zip(variables, self._restored_arrays):
                variable.assign(value)

    def on_train_begin(self, logs: dict | None = None) -> None:
        if self._restored_state is not None:
            self.session.set_earlier_usage(self._restored_state["usage"])
            for file in self.files:
                file.set_state(self._restored_state["files"][file.path.name])

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._epoch, self._skipped = epoch, 0
        if self._restored_arrays is None:
            return
        metrics = self.model.metrics_variables
        for variable, value in zip(metrics, self._restored_arrays[-len(metrics) :]):
            variable.assign(value)
        self._restored_arrays = None
        self._skipped = self.step % self.steps_per_epoch
        if self._skipped:
            self._skip(self._skipped)

    def _skip(self, count):
        """Makes the next `count` steps of `fit` do nothing: the checkpoint holds their results."""
        function, left = self.model.train_function, count

        def skip(_):
            nonlocal left
            left -= 1
            if not left:
                self.model.train_function = function
            return {}

        self.model.train_function = skip

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if batch < self._skipped:
            return
        self.step = self._epoch * self.steps_per_epoch + batch + 1
        if batch + 1 < self.steps_per_epoch and self._is_due():
            self._save()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if self._is_due() or epoch + 1 == self.epochs:
            self.model.reset_metrics()  # as the next epoch begins
            self._save()

    def _is_due(self):
        return (
            self._signal is not None
            or self.step - self._saved_step >= self.save_every_steps
            or time.monotonic() - self._saved_at >= self.save_every_seconds
        )

    def _save(self):
        if self.session.writes:
            self._write()
        self._saved_step, self._saved_at = self.step, time.monotonic()
        self._end_if_interrupted()

    def _end_if_interrupted(self):
        if self._signal is not None:
            raise Interrupted(f"interrupted after step {self.step}, which is saved", self._signal)

    def _write(self):
        variables = _variables(self.model)
        arrays = [keras.ops.convert_to_numpy(variable) for variable in variables]
        for variable, value in zip(variables, arrays):
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise UserError(
                    f"training diverged: {variable.path} is not finite at step {self.step}; try a "
                    "lower `learning_rate`" + self._describe_last()
                )
        state = {
            "steps_per_epoch": self.steps_per_epoch,
            "files": {file.path.name: file.get_state() for file in self.files},
            "usage": self.session.usage(),
        }
        self.directory.mkdir(exist_ok=True)
        archive = io.BytesIO()
        np.savez(archive, np.array(json.dumps(state)), *arrays)
        content = archive.getvalue()
        with replacing(self.directory / f"step_{self.step}.ckpt") as temporary:
            temporary.write_bytes(hashlib.sha256(content).digest() + content)
        self._whole_steps = [*self._whole_steps, self.step][-_KEPT:]
        kept = {f"step_{step}.ckpt" for step in self._whole_steps}
        for path in self.directory.iterdir():
            if path.name not in kept:  # older, damaged, or of a process that was killed
                path.unlink()

    def _describe_last(self):
        if not self._whole_steps:
            return ""
        return f". The last good checkpoint is {self.directory}/step_{self._whole_steps[-1]}.ckpt"


def _variables(model):
    """All that a training changes; the metrics last."""
    optimizers = [model.optimizer, getattr(model, "architecture_optimizer", None)]
    metrics = model.metrics_variables
    others = [*model.variables, *(v for each in optimizers if each for v in each.variables)]
    known = {id(variable): variable for variable in others}
    for variable in metrics:
        known.pop(id(variable), None)
    return [*known.values(), *metrics]


def _read(path):
    """The arrays and the state of a checkpoint, or a `UserError` when it is damaged."""
    # An `OSError` is not damage: it ends the run, and nothing is lost.
    content = path.read_bytes()
    if hashlib.sha256(content[_DIGEST:]).digest() != content[:_DIGEST]:
        raise UserError("its content is not what was written")
    with np.load(io.BytesIO(content[_DIGEST:]), allow_pickle=False) as archive:
        state, *arrays = [archive[f"arr_{index}"] for index in range(len(archive.files))]
    return arrays, json.loads(str(state))
