"""What training changes in its images: moved, mirrored, distorted, mixed.

Every batch of it is a pure function of a key, so that a training that was broken off goes on with
the very same images.
"""

import math

import keras
import tensorflow as tf


class Augmentation:
    """Changes a batch of images, at random, and its labels where images are mixed.

    Args:
        random_crop: Pixels that an image may move in each direction; what moves in is 0.
        random_flip: Whether half of the images are mirrored left to right.
        rand_augment: Strength s of RandAugment's two operations, 0 (off) to 1: up to a turn by
            360 s degrees, a shift by s of the size, solarization of what is above 255 (1 - s).
        mix_up: alpha of MixUp, 0 (off) to 1: images are added to each other.
        cut_mix: alpha of CutMix, 0 (off) to 1: parts of images are replaced by those of others.
            With `mix_up` too, each batch takes one of the two.

    References: RandAugment (arXiv:1909.13719), MixUp (arXiv:1710.09412), CutMix (arXiv:1905.04899),
    as `keras.layers` has them.
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
        self._rand_augment = None
        if rand_augment:
            self._rand_augment = self._keyed(_rand_augment(rand_augment))
        self._mixing = []
        if mix_up:
            self._mixing.append(self._keyed(keras.layers.MixUp(alpha=mix_up)))
        if cut_mix:
            self._mixing.append(self._keyed(keras.layers.CutMix(factor=(cut_mix, cut_mix))))

    def _keyed(self, layer):
        layer.generator = self._seeds
        return layer

    @property
    def mixes(self) -> bool:
        """Whether images of several classes are mixed, so that labels must be one-hot."""
        return bool(self._mixing)

    def __call__(self, x: tf.Tensor, y: tf.Tensor, key: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Changes a batch.

        Args:
            x: Pixels 0..255, float32 of shape `(batch, height, width, channels)`.
            y: Labels; shares of the classes, float32 of shape `(batch, classes)`, if `mixes`.
            key: What all that is random follows from, int64 of shape `(2,)`.
        """
        if self.random_crop:
            x = _random_crop(x, self.random_crop, key)
        if self.random_flip:
            x = tf.image.stateless_random_flip_left_right(x, key)
        self._seeds.start(key)
        if self._rand_augment is not None:
            x = self._distorted(x)
        if self._mixing:
            x, y = self._mixed(x, y)
        return x, y

    def _distorted(self, x):
        shape = x.shape
        if shape[-1] == 1:  # some of its operations are for colours
            x = tf.image.grayscale_to_rgb(x)
        x = self._rand_augment(x, training=True)
        return tf.ensure_shape(x[..., : shape[-1]], shape)

    def _mixed(self, x, y):
        def mix(layer):
            mixed = layer({"images": x, "labels": y}, training=True)
            return mixed["images"], mixed["labels"]

        results = [mix(layer) for layer in self._mixing]
        if len(results) == 1:
            return results[0]
        first = tf.random.stateless_uniform((), self._seeds.next()) < 0.5
        return tuple(tf.where(first, *each) for each in zip(*results))


def _rand_augment(strength):
    layer = keras.layers.RandAugment(factor=strength)
    # Keras 3.15 turns these two round: the smaller the factor, the stronger they are.
    layer.solarization = _Solarization(addition_factor=strength, threshold_factor=strength)
    # Bits that are kept, the second number excluded: 7, down to 4 at full strength as in the paper.
    layer.random_posterization = keras.layers.RandomPosterization((8 - math.ceil(4 * strength), 8))
    return layer


class _Solarization(keras.layers.Solarization):
    """Inverts pixels above a threshold that is at most `threshold_factor` below white."""

    def get_random_transformation(self, data, training=True, seed=None):
        transformation = super().get_random_transformation(data, training, seed)
        return transformation | {"thresholds": 255 - transformation["thresholds"]}


class _KeyedSeeds(keras.random.SeedGenerator):
    """Seeds for Keras' layers that follow from a key; Keras' own are a state that nothing saves."""

    def start(self, key):
        self._key, self._drawn = key, 0

    def next(self, ordered=True):
        # While the graph is made: the number of a draw is a constant of its place in it.
        self._drawn += 1
        return tf.random.experimental.stateless_fold_in(self._key, self._drawn)


def _random_crop(x, pixels, key):
    batch, height, width = x.shape[0], x.shape[1], x.shape[2]
    x = tf.pad(x, [[0, 0], [pixels, pixels], [pixels, pixels], [0, 0]])
    first = tf.random.stateless_uniform((batch, 2), key, 0, 2 * pixels + 1, tf.int32)
    x = tf.gather(x, first[:, :1] + tf.range(height), axis=1, batch_dims=1)
    return tf.gather(x, first[:, 1:] + tf.range(width), axis=2, batch_dims=1)
