"""Augmentation: random changes of the training images, and of their labels when images are mixed.

A batch is a pure function of a key. So a training that is interrupted and resumed sees the same
images as one that is not.
"""

import math

import keras
import tensorflow as tf

from fpnas_keras.networks.conventions import DATA_FORMAT


class Augmentation:
    """Changes a batch of images at random, and their labels when images are mixed.

    Args:
        random_crop: Largest shift of an image in each direction, in pixels. The border is filled
            with 0.
        random_flip: Whether to mirror half of the images left to right.
        rand_augment: Strength s of the two operations of RandAugment, 0 (off) to 1. For example,
            images are rotated by up to 360 s degrees, shifted by up to s of their size, or
            solarized above a threshold of at least 255 (1 - s).
        mix_up: alpha of MixUp, 0 (off) to 1: two images are averaged with random weights.
        cut_mix: alpha of CutMix, 0 (off) to 1: a box of each image is replaced by that of another.
            With both `mix_up` and `cut_mix`, one of them is drawn for each batch.

    References: RandAugment (arXiv:1909.13719), MixUp (arXiv:1710.09412) and CutMix
    (arXiv:1905.04899), as implemented in `keras.layers`.

    Example:

    ```python
    augmentation = Augmentation(random_crop=2, mix_up=0.2)
    x, y = augmentation(x, keras.ops.one_hot(y, 10), key=tf.constant([0, 1], tf.int64))
    ```
    """

    def __init__(
        self,
        random_crop: int = 0,
        random_flip: bool = False,
        rand_augment: float = 0.0,
        mix_up: float = 0.0,
        cut_mix: float = 0.0,
    ):
        self.random_crop = random_crop
        self.random_flip = random_flip
        self._seeds = _KeyedSeeds(0)
        self._rand_augment = _make_rand_augment(rand_augment) if rand_augment else None
        self._mixing = []
        if mix_up:
            self._mixing.append(keras.layers.MixUp(mix_up, data_format=DATA_FORMAT))
        if cut_mix:
            self._mixing.append(keras.layers.CutMix((cut_mix, cut_mix), data_format=DATA_FORMAT))
        for layer in [self._rand_augment, *self._mixing]:
            if layer is not None:
                layer.generator = self._seeds

    @property
    def mixes(self) -> bool:
        """Whether images of several classes are mixed. Labels must then be one-hot."""
        return bool(self._mixing)

    def __call__(self, x: tf.Tensor, y: tf.Tensor, key: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Changes a batch.

        Args:
            x: Images, pixels 0..255, float32 of shape `(batch, height, width, channels)`.
            y: Labels. If `mixes`, the shares of the classes: float32 of shape `(batch, classes)`.
            key: The seed of all random changes, int64 of shape `(2,)`.

        Returns:
            Images and labels, of the same shapes and dtypes.
        """
        if self.random_crop:
            x = _random_crop(x, self.random_crop, key)
        if self.random_flip:
            x = tf.image.stateless_random_flip_left_right(x, key)
        self._seeds.start(key)
        if self._rand_augment is not None:
            x = self._apply_rand_augment(x)
        if self._mixing:
            x, y = self._mix(x, y)
        return x, y

    def _apply_rand_augment(self, x):
        shape = x.shape
        if shape[-1] == 1:  # Some of its operations need three channels.
            x = tf.image.grayscale_to_rgb(x)
        x = self._rand_augment(x, training=True)
        return tf.ensure_shape(x[..., : shape[-1]], shape)

    def _mix(self, x, y):
        mixed = [layer({"images": x, "labels": y}, training=True) for layer in self._mixing]
        results = [(result["images"], result["labels"]) for result in mixed]
        if len(results) == 1:
            return results[0]
        first = tf.random.stateless_uniform((), self._seeds.next()) < 0.5
        return tuple(tf.where(first, *pair) for pair in zip(*results))


def _make_rand_augment(strength):
    layer = keras.layers.RandAugment(factor=strength, data_format=DATA_FORMAT)
    # In Keras 3.15, a smaller factor makes these two operations stronger. They are replaced.
    layer.solarization = _Solarization(
        addition_factor=strength, threshold_factor=strength, data_format=DATA_FORMAT
    )
    # Number of bits that are kept, the upper bound excluded: 7, and 4 to 7 at full strength, as in
    # the paper.
    layer.random_posterization = keras.layers.RandomPosterization(
        (8 - math.ceil(4 * strength), 8), data_format=DATA_FORMAT
    )
    return layer


class _Solarization(keras.layers.Solarization):
    """Inverts pixels above a threshold that is at least `255 * (1 - threshold_factor)`."""

    def get_random_transformation(self, data, training=True, seed=None):
        transformation = super().get_random_transformation(data, training, seed)
        return transformation | {"thresholds": 255 - transformation["thresholds"]}


class _KeyedSeeds(keras.random.SeedGenerator):
    """Seeds for Keras' layers, derived from a key.

    Keras' own generator has a state, which no checkpoint of a training saves.
    """

    def start(self, key):
        self._key, self._drawn = key, 0

    def next(self, ordered=True):
        # Runs while the graph is traced, so each draw has a number that is a constant in the graph.
        self._drawn += 1
        return tf.random.experimental.stateless_fold_in(self._key, self._drawn)


def _random_crop(x, pixels, key):
    batch, height, width = x.shape[0], x.shape[1], x.shape[2]
    x = tf.pad(x, [[0, 0], [pixels, pixels], [pixels, pixels], [0, 0]])
    first = tf.random.stateless_uniform((batch, 2), key, 0, 2 * pixels + 1, tf.int32)
    x = tf.gather(x, first[:, :1] + tf.range(height), axis=1, batch_dims=1)
    return tf.gather(x, first[:, 1:] + tf.range(width), axis=2, batch_dims=1)
