"""How good a network is on a set of images: accuracies, confusion matrix, the worst mistakes."""

import base64
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import scipy.special
import tensorflow as tf

from fpnas_keras.data import Images, test_batches
from fpnas_keras.progress import track

# Summaries hold no larger confusion matrix: it would be most of the file.
_MOST_CLASSES = 100
_MISTAKES = 20


class Score(NamedTuple):
    """What a network gives for a set of images.

    Attributes:
        confusion: Numbers of images, int64 of shape `(classes, classes)`: true classes in rows,
            classes that the network gives in columns.
        mistakes: The images that are most wrong, as JSON objects: `true` and `given` are names of
            classes, `probability` is that of the given class, and `image` is a PNG as a data URL.
    """

    confusion: np.ndarray
    mistakes: list[dict[str, Any]]


def score(model: keras.Model, images: Images) -> Score:
    """Evaluates a network from pixels to logits on all images."""
    classes = len(images.class_names)
    confusion, mistakes = np.zeros((classes, classes), np.int64), []
    with track(len(images.y), "testing", "images") as progress:
        for x, y, *_ in test_batches(images).as_numpy_iterator():
            probabilities = scipy.special.softmax(model.predict_on_batch(x), axis=-1)
            given = probabilities.argmax(axis=-1)
            np.add.at(confusion, (y, given), 1)
            confidence = np.where(given != y, probabilities.max(axis=-1), 0)
            for index in np.argsort(-confidence, kind="stable")[:_MISTAKES]:
                if confidence[index] > 0:
                    found = (y[index], given[index], float(confidence[index]))
                    mistakes.append((*found, x[index].astype(np.uint8)))
            progress.update(len(y))
    mistakes.sort(key=lambda each: -each[2])
    names = images.class_names
    return Score(
        confusion,
        [
            {"true": names[y], "given": names[g], "probability": round(p, 4), "image": _png(x)}
            for y, g, p, x in mistakes[:_MISTAKES]
        ],
    )


def describe_confusion(matrix: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """What a summary says about a confusion matrix.

    Args:
        matrix: As in `Score`.
        class_names: Names of the classes.

    Returns:
        `accuracy`; `balanced_accuracy`, the mean of the accuracies of the classes that have images;
        `class_accuracy`, by name, `None` for a class without images; and, for at most 100 classes,
        `confusion_matrix`, as lists.
    """
    counts, right = matrix.sum(axis=1), np.diagonal(matrix)
    shares = [int(r) / int(n) if n else None for r, n in zip(right, counts)]
    known = [share for share in shares if share is not None]
    described = {
        "accuracy": int(right.sum()) / int(counts.sum()),
        "balanced_accuracy": sum(known) / len(known),
        "class_accuracy": dict(zip(class_names, shares)),
    }
    if len(class_names) <= _MOST_CLASSES:
        described["confusion_matrix"] = matrix.tolist()
    return described


def _png(pixels):
    """Pixels, uint8, as a PNG in a data URL."""
    encoded = tf.io.encode_png(pixels).numpy()
    return f"data:image/png;base64,{base64.b64encode(encoded).decode()}"
