"""A `.tflite` file and its Keras model on the same images."""

import math
from typing import NamedTuple

import keras
import numpy as np
from absl import logging

import export
from fpnas_keras import data
from fpnas_keras.errors import UserError
from fpnas_keras.progress import track

# Largest difference of a score between Keras and a float32 file, on the test set.
MAX_DIFFERENCE = 1e-4
_OTHER_RANGES = ((-1.0, 1.0), (0.0, 1.0))
# Images on which other ranges are tried, and how many more of them must be right.
_FEW_IMAGES, _CLEAR = 200, 0.1


class Comparison(NamedTuple):
    """What a file and its Keras model give for the same images.

    Attributes:
        max_difference: Largest difference of a score: of a probability or a logit.
        agreement: Share of the images that both give the same class.
        kept: Share of the images that the Keras model gets right which the file gets right too.
        keras_accuracy: Accuracy of the Keras model.
        tflite_accuracy: Accuracy of the file.
        keras_balanced_accuracy: Mean of the accuracies of the classes that have images.
        tflite_balanced_accuracy: The same of the file.
        class_changes: Accuracy of the file minus that of the Keras model, for each class that has
            images.
    """

    max_difference: float
    agreement: float
    kept: float
    keras_accuracy: float
    tflite_accuracy: float
    keras_balanced_accuracy: float
    tflite_balanced_accuracy: float
    class_changes: dict[str, float]


def compare(model: keras.Model, content: bytes, images: data.Images) -> Comparison:
    """Runs a model and its file on all images.

    Args:
        model: Pixels 0..255 to the scores that the file gives.
        content: The flat buffer.
        images: The images.
    """
    runner = export.conversion.Runner(content)
    classes = len(images.class_names)
    difference, agreed, both, right = 0.0, 0, 0, np.zeros((2, classes))
    with track(len(images.y), "comparing", "images") as progress:
        for x, y in data.test_batches(images).as_numpy_iterator():
            expected, received = model.predict_on_batch(x), runner(x)
            # np.maximum keeps a NaN, max() would drop it.
            difference = float(np.maximum(difference, np.abs(expected - received).max()))
            given = np.stack([expected.argmax(-1), received.argmax(-1)])
            agreed += int((given[0] == given[1]).sum())
            both += int((given == y).all(axis=0).sum())
            right += [np.bincount(y[each == y], minlength=classes) for each in given]
            progress.update(len(y))
    counts = np.bincount(images.y, minlength=classes)
    shares = right[:, counts > 0] / counts[counts > 0]
    names = [name for name, count in zip(images.class_names, counts) if count]
    return Comparison(
        difference,
        agreed / len(images.y),
        both / right[0].sum() if right[0].any() else 1.0,
        *(right.sum(axis=1) / len(images.y)).tolist(),
        *shares.mean(axis=1).tolist(),
        dict(zip(names, (shares[1] - shares[0]).tolist())),
    )


def check(
    comparison: Comparison,
    max_difference: float | None,
    min_agreement: float,
    max_accuracy_drop: float,
    recorded_accuracy: float | None = None,
    count: float = math.inf,
) -> None:
    """Raises `UserError` unless a file does what its Keras model does.

    Few images cannot tell a file that keeps a limit from one that does not. What exceeds a limit by
    less than two standard deviations, which may be chance, is a warning.

    Args:
        comparison: The comparison.
        max_difference: Largest difference of a score; `None` for files with rounded numbers.
        min_agreement: Least `agreement` or `kept`, whichever is larger: a file that is better than
            Keras gives other classes.
        max_accuracy_drop: Largest loss of accuracy.
        recorded_accuracy: Accuracy of the Keras model on these images, as its training has it.
        count: Number of images.
    """
    keras_accuracy, tflite_accuracy = comparison.keras_accuracy, comparison.tflite_accuracy
    accuracies = (
        f"Accuracy on the test images: {tflite_accuracy:.2%}, with Keras {keras_accuracy:.2%}. "
        "No .tflite file is written"
    )
    if recorded_accuracy is not None and not (
        keras_accuracy >= recorded_accuracy - max_accuracy_drop
    ):
        raise UserError(
            f"the Keras model has an accuracy of {keras_accuracy:.2%} on the test images, and its "
            f"training recorded {recorded_accuracy:.2%}: the images or the model have changed. "
            "--max_accuracy_drop allows it. No .tflite file is written"
        )
    if max_difference is not None and not comparison.max_difference <= max_difference:
        raise UserError(
            f"the converted file differs from Keras by {comparison.max_difference:.2g} in a score, "
            f"more than {max_difference:.0e}. {accuracies}"
        )
    lost = keras_accuracy - tflite_accuracy
    _limit(
        lost - max_accuracy_drop,
        _chance(max_accuracy_drop, count),
        f"the converted file loses {lost:.2%} of accuracy, more than `max_accuracy_drop` "
        f"{max_accuracy_drop:.2%}",
        accuracies,
    )
    _limit(
        min_agreement - max(comparison.agreement, comparison.kept),
        _chance(min_agreement, count),
        f"the converted file gives the class of Keras for {comparison.agreement:.2%} of the test "
        f"images, and is right for {comparison.kept:.2%} of those for which Keras is right, less "
        f"than `min_agreement` {min_agreement:.2%}",
        accuracies,
    )


def _chance(share, count):
    """Two standard deviations of a share of so many images."""
    return 2 * math.sqrt(share * (1 - share) / count)


def _limit(excess, chance, message, accuracies):
    """Refuses what exceeds a limit by more than chance, and warns of what exceeds it by less."""
    if not excess <= chance:
        raise UserError(f"{message}. {accuracies}")
    if excess > 0:
        logging.warning("%s; with so few test images this may be chance", message)


def warn_of_range(model: keras.Model, images: data.Images) -> None:
    """Says if a model reaches clearly more with pixels of another range than 0..255."""
    few = images.part(
        np.linspace(0, len(images.y) - 1, min(_FEW_IMAGES, len(images.y))).astype(int)
    )
    x, y = next(data.test_batches(few, len(few.y)).as_numpy_iterator())

    def accuracy(low, high):
        scores = model.predict_on_batch(low + x * ((high - low) / 255))
        return float((scores.argmax(-1) == y).mean())

    own = accuracy(0.0, 255.0)
    best, (low, high) = max((accuracy(*each), each) for each in _OTHER_RANGES)
    if best > own + _CLEAR:
        logging.warning(
            "the model is right for %.0f%% of %d test images with pixels of 0..255, and for %.0f%% "
            "with %g..%g: it seems to want --input_range=%g,%g",
            *(100 * own, len(y), 100 * best, low, high, low, high),
        )
