"""What Keras users give to `fit`, as `Images`: arrays, datasets, labels of several kinds."""

import warnings
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from fpnas_keras.data.reading import MEMORY_LIMIT, Images
from fpnas_keras.errors import UserError

_WAY = "`fpnas_keras.data.search_batches` makes batches of images on the disk"


def to_images(
    x: Any,
    y: Any,
    sample_weight: Any,
    class_weight: dict[int, float] | None,
    image_shape: tuple[int, int, int],
    num_classes: int,
) -> Images:
    """Makes `Images` of the arguments of `keras.Model.fit`.

    Args:
        x: Pixels 0..255; or a `tf.data.Dataset` or `keras.utils.PyDataset` of pixels, labels and
            maybe weights, which is read into memory.
        y: Index of the class of each image, or one-hot rows; `None` for a dataset.
        sample_weight: Weight of each image, or `None`.
        class_weight: Weight of each class by its index, or `None`.
        image_shape: `(height, width, channels)` that is needed.
        num_classes: Number of classes that is needed.

    Raises:
        UserError: When an argument does not fit; the message names it.
    """
    if isinstance(x, (tf.data.Dataset, keras.utils.PyDataset)):
        if y is not None or sample_weight is not None:
            raise UserError("`y` and `sample_weight` must not be given: the dataset `x` has them")
        x, y, *weights = _collect(x)
        sample_weight = weights[0] if weights else None
    elif y is None:
        raise UserError(
            "`x` must be an array, with the labels in `y`, or a dataset of images and labels. "
            f"Received: x of class {type(x).__name__} without `y`; {_WAY}"
        )
    x, y = _pixels(x, image_shape), _labels(y, num_classes)
    if len(x) != len(y):
        raise UserError(
            f"`x` and `y` must be of the same length. Received: {len(x)} images, {len(y)} labels"
        )
    weights = _weights(sample_weight, class_weight, y)
    names = tuple(map(str, range(num_classes)))
    return Images(x, y, names, image_shape, weights=weights)


def _collect(dataset):
    """The images, labels and weights of a dataset, as arrays."""
    if isinstance(dataset, tf.data.Dataset):
        if dataset.cardinality() == tf.data.INFINITE_CARDINALITY:
            raise UserError(f"`x` must be a dataset that ends, without `repeat()`; {_WAY}")
        spec = dataset.element_spec
        is_pair = isinstance(spec, tuple) and len(spec) in (2, 3)
        if not is_pair or not all(isinstance(each, tf.TensorSpec) for each in spec):
            raise UserError(
                "`x` must be a dataset of images and labels, `(x, y)` or `(x, y, sample_weight)`. "
                f"Received: {spec}"
            )
        if spec[0].shape.rank == 3:
            dataset = dataset.batch(100)
        elements = dataset.as_numpy_iterator()
    else:
        elements = (dataset[index] for index in range(len(dataset)))
    columns, size = [], 0
    for element in elements:
        columns.append([np.asarray(each) for each in element])
        size += columns[-1][0].nbytes
        if size > MEMORY_LIMIT:
            raise UserError(
                f"the dataset `x` must fit into {MEMORY_LIMIT / 2**30:.0f} GiB of memory; {_WAY}"
            )
    if not columns:
        raise UserError("`x` must have images. Received: a dataset without any")
    return [np.concatenate(column) for column in zip(*columns)]


def _pixels(x, image_shape):
    x = np.asarray(x)
    if x.ndim != 4 or x.shape[1:] != tuple(image_shape):
        hint = ""
        if x.ndim == 3 and image_shape[-1] == 1:
            hint = "; x[..., None] adds the channel"
        elif x.ndim == 4 and x.shape[-1] == image_shape[-1]:
            hint = "; tf.image.resize(x, size, antialias=True) changes the size"
        raise UserError(
            f"`x` must be of shape (n, {', '.join(map(str, image_shape))}), as the space needs it. "
            f"Received: x of shape {x.shape}{hint}"
        )
    if x.dtype.kind not in "uif":
        raise UserError(f"`x` must be pixels, 0..255. Received: x of dtype {x.dtype}")
    if not len(x):
        raise UserError("`x` must have images. Received: none")
    least, most = x.min(), x.max()
    if not np.isfinite(most - least):
        raise UserError("`x` must be finite. Received: x with NaN or infinity")
    if most <= 1 or most > 255 or least < 0:
        warnings.warn(
            f"`x` has pixels from {least:g} to {most:g}; the networks are made for 0..255",
            stacklevel=5,
        )
    return x if x.dtype == np.uint8 else x.astype(np.float32)


def _labels(y, num_classes):
    y = np.asarray(y)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim == 2 and y.shape[1] == num_classes and y.dtype.kind in "uifb":
        if not ((y == 0) | (y == 1)).all() or (y.sum(axis=1) != 1).any():
            raise UserError("`y` must have one class an image: rows with a single 1")
        y = y.argmax(axis=1)
    if y.dtype.kind not in "uif":
        raise UserError(
            "`y` must be the indices of the classes; names, y = np.unique(y, return_inverse=True) "
            f"makes them. Received: y of dtype {y.dtype}"
        )
    if y.ndim != 1 or (y != np.round(y)).any():
        raise UserError(
            "`y` must be the index of the class of each image, or one-hot rows. "
            f"Received: y of shape {y.shape} and dtype {y.dtype}"
        )
    if len(y) and (y.min() < 0 or y.max() >= num_classes):
        hint = "; subtract 1" if y.min() == 1 and y.max() == num_classes else ""
        raise UserError(
            f"`y` must be from 0 to {num_classes - 1}, as the space has {num_classes} classes. "
            f"Received: y from {y.min():g} to {y.max():g}{hint}"
        )
    return y.astype(np.int32)


def _weights(sample_weight, class_weight, y):
    if sample_weight is None and class_weight is None:
        return None
    weights = np.ones(len(y), np.float32)
    if sample_weight is not None:
        weights = np.asarray(sample_weight, np.float32).reshape(-1)
        if len(weights) != len(y):
            raise UserError(
                "`sample_weight` must have one weight an image. "
                f"Received: {len(weights)} weights, {len(y)} images"
            )
    if class_weight is not None:
        missing = sorted(set(y.tolist()) - class_weight.keys())
        if missing:
            raise UserError(f"`class_weight` must have every class. Missing: {missing}")
        weights = weights * np.array([class_weight[label] for label in y.tolist()], np.float32)
    return weights
