"""Batches of images, for searching, training and testing.

A batch is a pure function of (seed, step). A dataset continues to count its steps from one
iteration to the next. Every image is decoded once, or once per batch if the images do not fit into
memory.
"""

import math
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from fpnas_keras.data.augmentation import Augmentation
from fpnas_keras.data.image_files import decode, decode_file
from fpnas_keras.data.reading import Images, choose_weights_share, split
from fpnas_keras.errors import UserError

_AUTOTUNE = tf.data.AUTOTUNE


def search_batches(
    x: np.ndarray | Images,
    y: np.ndarray | None = None,
    batch_size: int = 64,
    seed: int = 0,
    steps_per_epoch: int | None = None,
    architecture_batch_size: int | None = None,
    first_step: int = 0,
    weights_share: float | None = None,
    augmentation: Augmentation | None = None,
    whole_epochs: bool = False,
) -> tf.data.Dataset:
    """Batches for `ArchitectureSearch.fit`: `((x_t, y_t), (x_v, y_v))`.

    Images that have weights give `((x_t, y_t, weights_t), (x_v, y_v, weights_v))`.

    The images are split, stratified, into the weights part (t), which trains the shared weights,
    and the architecture part (v), which the architecture is chosen on.

    Args:
        x: Pixels 0..255 of shape `(n, height, width, channels)`; or `Images`, which hold the
            labels too and may be on the disk.
        y: Index of the class, integers of shape `(n,)`. `None` if `x` holds the labels.
        batch_size: Images of each part in a batch.
        seed: Seed of the split and of the order.
        steps_per_epoch: Batches in an epoch. Default: one pass over the weights part.
        architecture_batch_size: Images of the architecture part in a batch. Default: `batch_size`.
        first_step: Number of steps that are already done. If it is inside an epoch, the first
            iteration yields the rest of that epoch, and the cardinality of the dataset is unknown.
        weights_share: Share of the images in the weights part. Default: `choose_weights_share`.
        augmentation: What is changed at random in the images of the weights part. It must not mix
            images.
        whole_epochs: Whether the first iteration is the first whole epoch after `first_step`,
            instead of the rest of an epoch.

    Returns:
        A dataset of one epoch. Each iteration over it yields the next epoch.

    Raises:
        UserError: When the parts cannot both have images of every class, when the share is not
            from 0.05 to 0.95, or when the augmentation mixes images.

    Example:

    ```python
    search.fit(fpnas.data.search_batches(x, y, batch_size=64), epochs=30)
    images = fpnas.data.load("folder:photos", image_size=64)
    search.fit(fpnas.data.search_batches(images), epochs=30)
    ```
    """
    images = x if isinstance(x, Images) else Images(x, y, (), x.shape[1:])
    weights_share = weights_share or choose_weights_share(len(images.y))
    if not 0.05 <= weights_share <= 0.95:
        raise UserError(
            f"`weights_share` must be from 0.05 to 0.95. Received: weights_share={weights_share}"
        )
    if augmentation is not None and augmentation.mixes:
        raise UserError(
            "`augmentation` must not mix images in a search. Received: one with mix_up or cut_mix"
        )
    weights, architecture = split(images.y, 1 - weights_share, seed)
    steps = steps_per_epoch or max(1, len(weights) // batch_size)
    if whole_epochs:
        first_step = math.ceil(first_step / steps) * steps
    read = _in_memory(images)
    read_t = _reader(read, weights, batch_size, seed)
    read_v = _reader(read, architecture, architecture_batch_size or batch_size, seed + 1)
    if augmentation is not None:
        read_t = _augmented(read_t, augmentation, seed)
    return _epochs(lambda step: (read_t(step), read_v(step)), steps, first_step)


def train_batches(
    images: Images,
    batch_size: int = 128,
    seed: int = 0,
    augmentation: Augmentation | None = None,
    first_step: int = 0,
) -> tf.data.Dataset:
    """Batches to train one network with: `(pixels, labels)`, or `(pixels, labels, weights)`.

    An epoch is one pass over the images.

    Args:
        images: The images.
        batch_size: Images in a batch.
        seed: Seed of the order and of the augmentation.
        augmentation: What is changed in the images, at random.
        first_step: Steps that are already made, as for `search_batches`.

    Returns:
        A dataset of one epoch. Each iteration over it yields the next epoch. Labels are the index
        of the class. If the augmentation mixes images, they are the share of each class, float32 of
        shape `(batch, classes)`.
    """
    read = _reader(_in_memory(images), np.arange(len(images.y)), batch_size, seed)
    if augmentation is not None:
        read = _augmented(read, augmentation, seed, len(images.class_names))
    return _epochs(read, max(1, len(images.y) // batch_size), first_step)


def test_batches(images: Images, batch_size: int = 500) -> tf.data.Dataset:
    """All images once, in order: `(pixels, labels)`, the last batch smaller."""
    dataset = tf.data.Dataset.range(len(images.y)).batch(batch_size)
    return dataset.map(_in_memory(images), num_parallel_calls=_AUTOTUNE).prefetch(_AUTOTUNE)


def _epochs(batch: Callable[[tf.Tensor], tuple], steps: int, first_step: int) -> tf.data.Dataset:
    """`batch(step)` to the end of an epoch of `steps` steps; a new iteration is the next epoch."""
    # Not a generator: TensorFlow 2.21 makes malloc give all large buffers back when it meets one
    # (M_TRIM_THRESHOLD), and each step of training then pays for fresh pages.
    following = tf.Variable(first_step, dtype=tf.int64, trainable=False)

    def epoch_steps(_):
        first = tf.identity(following)
        end = (first // steps + 1) * steps
        with tf.control_dependencies([first]):
            following.assign(end)
        return tf.data.Dataset.range(first, end)

    dataset = tf.data.Dataset.range(1).flat_map(epoch_steps)
    if first_step % steps == 0:
        dataset = dataset.apply(tf.data.experimental.assert_cardinality(steps))
    return dataset.map(batch, num_parallel_calls=_AUTOTUNE).prefetch(_AUTOTUNE)


def _in_memory(images):
    """From indices to float32 pixels, int32 labels and, if the images have them, weights."""
    # One copy in TensorFlow's memory, captured by the graph instead of copied into it.
    x, others = tf.constant(images.x), [_labels(images)]
    if images.weights is not None:
        others.append(tf.constant(images.weights, tf.float32))

    def read(indices):
        return _pixels(tf.gather(x, indices), images), *(
            tf.gather(each, indices) for each in others
        )

    return read


def _labels(images):
    labels = tf.constant(images.y, tf.int32)
    if images.logits is None:
        return labels
    return tf.concat([tf.one_hot(labels, len(images.class_names)), images.logits], axis=1)


def _reader(read, part, batch_size, seed):
    """From a step to its batch of the images `part`: pass after pass, each in its own order."""
    n, part = len(part), tf.constant(part)

    def read_step(step):
        positions = step * batch_size + tf.range(batch_size, dtype=tf.int64)
        seeds = tf.stack(
            [tf.fill([batch_size], tf.constant(seed, tf.int64)), positions // n, positions * 0], 1
        )
        # tf.random.experimental.index_shuffle takes no seed for each index in 2.21, and its 4
        # rounds leave successive passes correlated by 0.3 to 0.9.
        indices = tf.raw_ops.RandomIndexShuffle(
            index=positions % n, seed=seeds, max_index=tf.constant(n - 1, tf.int64), rounds=16
        )
        return read(tf.gather(part, tf.ensure_shape(indices, (batch_size,))))

    return read_step


def _augmented(read, augmentation, seed, num_classes=None):
    """From a step to its batch, changed at random by the key (seed, step)."""

    def read_augmented(step):
        x, y, *weights = read(step)
        if augmentation.mixes:
            y = tf.one_hot(y, num_classes)
        return *augmentation(x, y, tf.stack([tf.constant(seed, tf.int64), step])), *weights

    return read_augmented


def _pixels(x, images):
    """float32 pixels of a batch of images, of file names or of TFRecords."""
    if x.dtype == tf.string:
        shape, resize = images.image_shape, images.resize
        decoded = decode_file if x.shape.rank == 1 else _decode_record
        x = tf.map_fn(lambda place: decoded(place, shape, resize), x, fn_output_signature=tf.uint8)
        x = tf.ensure_shape(x, (None, *shape))
    return tf.cast(x, tf.float32)


def _decode_record(place, image_shape, resize):
    """The image in the TFRecord at (file, "offset:length:key")."""

    def read(place):
        path, rest = (each.decode() for each in place)
        offset, length, key = rest.split(":", 2)
        with tf.io.gfile.GFile(path, "rb") as file:
            file.seek(int(offset))
            example = tf.train.Example.FromString(file.read(int(length)))
        return example.features.feature[key].bytes_list.value[0]

    encoded = tf.ensure_shape(tf.numpy_function(read, [place], tf.string), ())
    return decode(encoded, image_shape, resize)
