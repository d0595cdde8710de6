"""From measured step times to the length of a search and of a training that fit into some time.

A probe is the job itself, with few steps, in a temporary directory. Whatever its start and its end
take, the whole job takes as well.
"""

import contextlib
import dataclasses
import math
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

from absl import logging

from fpnas_keras import data
from fpnas_keras.search import SearchSettings, run_search
from fpnas_keras.train import TrainSettings, run_training

_PROBED_STEPS = 8
# A search draws fewer architectures as it decides. Over all steps it draws about this share of
# those of its first steps: 0.35 to 0.55 in searches of 1,500 steps (benchmarks/versus.jsonl and
# few_photos.jsonl), more in shorter ones.
_MEAN_SAMPLES = 0.6
# Images of the architecture part that a finalist is judged on, about: most are out before the end.
_JUDGED_IMAGES = 1000


class Probe(NamedTuple):
    """How long a job takes.

    Attributes:
        start: Seconds before its first step and after its last.
        step: Seconds of a step.
        steps_per_epoch: Steps in an epoch of the job.
        epochs: Epochs that it has by default.
    """

    start: float
    step: float
    steps_per_epoch: int
    epochs: int

    def seconds(self, epochs: int) -> float:
        """Seconds of the job with that many epochs."""
        return self.start + epochs * self.steps_per_epoch * self.step

    def epochs_in(self, seconds: float) -> int:
        """Epochs that fit into some time; 0 or less if none does."""
        return math.floor((seconds - self.start) / (self.steps_per_epoch * self.step))


def probe_search(settings: SearchSettings, images: "data.Images") -> Probe:
    """Measures a search.

    Args:
        settings: Its settings.
        images: Its training images.
    """
    with _probing() as directory:
        whole = settings.fit_to(images)
        started = time.monotonic()
        run = run_search(
            dataclasses.replace(
                settings,
                output_dir=str(directory),
                # The first epoch is the warm-up, in which the graph is traced.
                epochs=3,
                steps_per_epoch=_PROBED_STEPS,
                warmup_steps=_PROBED_STEPS,
                coarse_epochs=None,
                tensorboard=False,
                finalists=0,
                ranked_samples=0,
            )
        )
        seconds = time.monotonic() - started
        first, _, last = run.epochs
    step = (last["seconds"] - first["seconds"]) / (2 * _PROBED_STEPS)
    start = max(0, seconds - last["seconds"] + first["seconds"] - _PROBED_STEPS * step)
    # A sample takes four forward passes: forward and backward, and forward for the logits.
    forward = step / last["samples"] / 4
    share = 1 - (whole.weights_share or data.choose_weights_share(len(images.y)))
    judged = min(share * len(images.y), _JUDGED_IMAGES)
    networks = whole.finalists + whole.ranked_samples
    start += networks * forward * judged / whole.batch_size
    fewest = whole.samples or whole.min_samples
    step *= min(1, max(fewest / last["samples"], _MEAN_SAMPLES))
    return Probe(start, step, whole.steps_per_epoch, whole.epochs)


def probe_training(settings: TrainSettings, images: "data.Images") -> Probe:
    """Measures a training.

    Args:
        settings: Its settings.
        images: Its training images.
    """
    count = len(images.y)
    with _probing():
        whole = settings.fit_to(images)
    steps_per_epoch = max(1, count // whole.batch_size)
    few = min(steps_per_epoch, _PROBED_STEPS) * whole.batch_size
    few = max(few, 2 * len(images.class_names))
    probed = dataclasses.replace(
        settings,
        epochs=2,
        batch_size=whole.batch_size,
        train_images=few if few < count else settings.train_images,
        ema_momentum=0.0,
        tensorboard=False,
    )
    start, step = _time_training(probed)
    if settings.teacher is not None:
        # It may look at every image before the first step.
        plain, _ = _time_training(dataclasses.replace(probed, teacher=None, teacher_weights=None))
        start += max(0, start - plain) * max(0, count / few - 1)
    return Probe(start, step, steps_per_epoch, whole.epochs)


def _time_training(settings):
    """Seconds of a training of two epochs without its steps, and of one of the second epoch's."""
    with _probing() as directory:
        started = time.monotonic()
        run = run_training(dataclasses.replace(settings, output_dir=str(directory)))
        seconds = time.monotonic() - started
        first, last = run.epochs
    step = (last["seconds"] - first["seconds"]) * last["epoch"] / last["step"]
    return max(seconds - last["step"] * step, 0), step


@contextlib.contextmanager
def _probing() -> Iterator[pathlib.Path]:
    """A temporary directory; inside the block, the log is off: a probe is too short for it."""
    verbosity = logging.get_verbosity()
    if verbosity < logging.DEBUG:
        logging.set_verbosity(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield pathlib.Path(folder) / "run"
    finally:
        logging.set_verbosity(verbosity)
