"""From measured step times to the length of a search and of a training that fit into some time.

A probe is the job itself, with few steps, in a temporary directory. What its start and its end
take, the whole job takes too.
"""

import contextlib
import dataclasses
import math
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from absl import logging

from fpnas_keras import data, runs
from fpnas_keras.search import SearchSettings, run_search
from fpnas_keras.train import TrainSettings, load_teacher_seeing_images_once, run_training

# Steps of an epoch of a probe of a search, and of one of a training, whose steps are shorter. Two
# epochs of them are timed.
_PROBED_STEPS, _TRAINED_STEPS = 8, 24
# A search draws fewer architectures as it decides. Over all steps it draws about this share of
# those of its first steps: 0.35 to 0.55 in searches of 1,500 steps (benchmarks/versus.jsonl and
# few_photos.jsonl), more in shorter ones.
_MEAN_SAMPLES = 0.6
# Images of the architecture part that a finalist is judged on, about: most are out before the end.
# A ranked sample is judged on all.
_JUDGED_IMAGES = 1000
# Images that say how long a teacher takes for all.
_TAUGHT_IMAGES = 64
# A training has at most so many times the usual epochs, even if there is time for more.
_MOST_EPOCHS = 4
# The files of metrics have hundredths of a second.
_LEAST_STEP = 1e-4


class Probe(NamedTuple):
    """How long a job takes.

    Attributes:
        start: Seconds before its first step and after its last, without a teacher.
        step: Seconds of a step.
        steps_per_epoch: Steps in an epoch of the job.
        epochs: Epochs that it has by default.
        batch_size: Images in a step.
        teaching: Seconds that a teacher takes for all images, before the first step.
    """

    start: float
    step: float
    steps_per_epoch: int
    epochs: int
    batch_size: int
    teaching: float = 0.0

    def seconds(self, epochs: int) -> float:
        """Seconds of the job with that many epochs."""
        return self.start + self.teaching + epochs * self.steps_per_epoch * self.step

    def epochs_in(self, seconds: float) -> int:
        """Epochs that fit into some time; 0 or less if none does."""
        left = seconds - self.start - self.teaching
        return math.floor(left / (self.steps_per_epoch * self.step))

    @property
    def most_epochs(self) -> int:
        """Epochs of a training that has all the time: 4 times the default."""
        return _MOST_EPOCHS * self.epochs

    def epochs_to_train(self, seconds: float) -> int:
        """Epochs of a training that has some time: at least 1, at most `most_epochs`."""
        return min(max(1, self.epochs_in(seconds)), self.most_epochs)


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
                distribution="factorized",  # Joint logits take as long, and need more epochs.
                coarse_epochs=None,
                tensorboard=False,
                finalists=0,
                ranked_samples=0,
            )
        )
        seconds = time.monotonic() - started
        first, _, last = run.epochs
    step = max((last["seconds"] - first["seconds"]) / (2 * _PROBED_STEPS), _LEAST_STEP)
    start = max(0, seconds - last["seconds"] + first["seconds"] - _PROBED_STEPS * step)
    # A sample takes four forward passes: forward and backward, and forward for the logits.
    forward = step / last["samples"] / 4
    share = 1 - (whole.weights_share or data.choose_weights_share(len(images.y)))
    count = share * len(images.y)
    judged = whole.finalists * min(count, _JUDGED_IMAGES) + whole.ranked_samples * count
    start += forward * judged / whole.batch_size
    fewest = whole.samples or whole.min_samples
    step *= min(1, max(fewest / last["samples"], _MEAN_SAMPLES))
    return Probe(start, step, whole.steps_per_epoch, whole.epochs, whole.batch_size)


def probe_training(settings: TrainSettings, images: "data.Images") -> Probe:
    """Measures a training.

    Args:
        settings: Its settings.
        images: Its training images, those that it holds out among them.
    """
    if settings.validation_split:
        images = images.part(data.split(images.y, settings.validation_split, settings.seed)[0])
    num_classes = len(images.class_names)
    # A teacher that sees each image once takes no time in a step.
    began = time.monotonic()
    teacher = None
    if settings.teacher:
        teacher, _ = load_teacher_seeing_images_once(settings, images.image_shape, num_classes)
    loading = time.monotonic() - began
    count = len(images.y)
    with _probing() as directory:
        whole = settings.fit_to(images)
        steps_per_epoch = max(1, count // whole.batch_size)
        steps = min(steps_per_epoch, _TRAINED_STEPS)
        few = max(steps * whole.batch_size, 2 * num_classes)
        started = time.monotonic()
        run = run_training(
            dataclasses.replace(
                settings,
                output_dir=str(directory),
                epochs=1 + math.ceil(2 * _TRAINED_STEPS / steps),
                batch_size=whole.batch_size,
                mix_up=whole.mix_up,
                train_images=few if few < count else settings.train_images,
                validation_split=0.0,
                ema_momentum=0.0,
                tensorboard=False,
                **({"teacher": None, "teacher_weights": None} if teacher else {}),
            )
        )
        seconds = time.monotonic() - started
        first, last = run.epochs[0], run.epochs[-1]
    step = (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])
    step = max(step, _LEAST_STEP)
    start = max(0, seconds - last["step"] * step)
    teaching = loading + _time_teaching(settings, teacher, count) if teacher else 0.0
    return Probe(start, step, steps_per_epoch, whole.epochs, whole.batch_size, teaching)


def _time_teaching(settings, teacher, count):
    """Seconds until a teacher has seen all images."""
    started = time.monotonic()
    seen = settings.load_images("train", teacher.input_shape[1], again=True)
    few = seen.part(np.arange(min(_TAUGHT_IMAGES, len(seen.y))))
    runs.compute_outputs(teacher, few)  # The first call traces.
    start = time.monotonic() - started
    started = time.monotonic()
    runs.compute_outputs(teacher, few)
    return start + (time.monotonic() - started) * count / len(few.y)


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
