"""Trains the best finalists of a search: the shared weights tell them apart poorly."""

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np
from absl import logging

from fpnas_keras import data
from fpnas_keras.architecture import Architecture
from fpnas_keras.building.planning import Probe
from fpnas_keras.runs import BuildRun, TrainingRun
from fpnas_keras.runs.search_run import KEPT_FINALISTS
from fpnas_keras.train import TrainSettings, run_training

# With fewer training images, those held out are too few to tell two networks apart.
LEAST_IMAGES = 5_000
# Share of the training images that are held out to compare the finalists.
_HELD_OUT = 0.2


def count_that_fit(probe: Probe, seconds: float) -> int:
    """How many finalists can be trained in some time; 0 instead of a single one.

    Args:
        probe: What a training of the first one takes.
        seconds: The time.
    """
    one = probe.seconds(probe.epochs) - probe.teaching
    count = int(max(0.0, seconds) // one)
    return min(count, KEPT_FINALISTS) if count > 1 else 0


def shorten(settings: TrainSettings, images: "data.Images") -> TrainSettings:
    """The settings of the training of a finalist, which has the usual epochs unless they are given.

    Args:
        settings: Those of the whole training.
        images: All training images. What depends on their number is chosen as for the whole
            training.
    """
    if settings.validation_split:
        images = images.part(data.split(images.y, settings.validation_split, settings.seed)[0])
    return dataclasses.replace(
        settings.fit_to(images),
        validation_split=max(settings.validation_split, _HELD_OUT),
        # A teacher takes minutes. An average of the weights needs more steps.
        teacher=None,
        teacher_weights=None,
        ema_momentum=0.0,
    )


def train_and_choose(
    run: BuildRun, settings_of: Callable[[TrainingRun, pathlib.Path], TrainSettings]
) -> str:
    """Trains the finalists of a build that are not trained yet, and writes the best one.

    Args:
        run: The build.
        settings_of: Makes the settings of the training of an architecture file in a directory.

    Returns:
        What was found, in a sentence.
    """
    files, trained = run.search.finalist_files, []
    for training, file in zip(run.trained_finalists, files):
        logging.info("finalist %d of %d", len(trained) + 1, len(run.trained_finalists))
        trained.append(run_training(settings_of(training, file)).summary)
    accuracies = [each["val_accuracy"] for each in trained]
    best = int(np.argmax(accuracies))
    Architecture.load(files[best]).save(run.architecture_file)
    note = (
        f"training: of {len(trained)} finalists, trained for {trained[0]['epochs']} epochs, number "
        f"{best + 1} is the best on the images held out: {accuracies[best]:.2%}"
    )
    if best:
        note += f"; the first one has {accuracies[0]:.2%}"
    return note
