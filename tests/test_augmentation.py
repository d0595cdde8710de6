"""Augmentation: reproducible, within its limits, and labels that match the mixed images."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from fpnas_keras import data
from fpnas_keras.data import augmentation

CLASSES = 4
ALL = {"random_crop": 1, "random_flip": True, "rand_augment": 0.5, "mix_up": 0.4, "cut_mix": 0.6}


def batches(channels=3, first_step=0, seed=0, **changes):
    """Two epochs of two batches; an image of class c has the value 60 * c everywhere."""
    y = np.arange(16, dtype=np.int32) % CLASSES
    x = np.broadcast_to(60 * y[:, None, None, None], (16, 8, 8, channels)).astype(np.uint8)
    images = data.Images(x, y, tuple("abcd"), (8, 8, channels))
    dataset = data.train_batches(images, 8, seed, data.Augmentation(**changes), first_step)
    return list(dataset.repeat().take(4 - first_step).as_numpy_iterator())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("changes", [{"rand_augment": 0.5}, {"mix_up": 0.4}, {"cut_mix": 0.6}, ALL])
def test_a_batch_follows_from_seed_and_step(channels, changes):
    every = batches(channels, **changes)
    again = batches(channels, first_step=1, **changes)
    for (x, y), (x_again, y_again) in zip(every[1:], again, strict=True):
        np.testing.assert_array_equal(x, x_again)
        np.testing.assert_array_equal(y, y_again)
    others = batches(channels, seed=1, **changes)
    assert not any(np.array_equal(x, other) for (x, _), (other, _) in zip(every, others))


@pytest.mark.parametrize("changes", [{"rand_augment": 0.5}, {"mix_up": 0.4}, {"cut_mix": 0.6}])
def test_keras_data_format_changes_no_batch(changes):
    expected = batches(**changes)
    keras.config.set_image_data_format("channels_first")
    try:
        received = batches(**changes)
    finally:
        keras.config.set_image_data_format("channels_last")
    for ours, theirs in zip(received, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)


def test_distorted_images_are_pixels_of_the_same_shape():
    plain = np.concatenate([x for x, _ in batches()])
    for channels in (1, 3):
        x = np.concatenate([x for x, _ in batches(channels, rand_augment=0.5)])
        assert x.shape == plain.shape[:-1] + (channels,)
        assert x.dtype == np.float32
        assert x.min() >= 0 and x.max() <= 255
        assert not np.array_equal(x, plain[..., :channels])


@pytest.mark.parametrize("operation", ["solarization", "random_posterization", "random_shear"])
def test_a_weaker_distortion_changes_less(operation):
    """The operations whose strength Keras 3.15 inverts, and one other."""
    x = np.broadcast_to(np.linspace(0, 239, 16, dtype=np.float32)[:, None], (64, 16, 16, 3))
    keras.utils.set_random_seed(0)
    changes = []
    for strength in (0.01, 0.3, 1.0):
        layer = getattr(augmentation._make_rand_augment(strength), operation)
        changes.append(np.abs(layer(x, training=True) - x).mean())
    assert changes[0] < 3 and changes[0] < changes[1] < changes[2]


@pytest.mark.parametrize(
    "changes", [{"mix_up": 0.4}, {"cut_mix": 0.6}, {"mix_up": 0.4, "cut_mix": 0.6}]
)
def test_labels_are_mixed_as_the_images_are(changes):
    mixed = 0
    for x, y in batches(**changes):
        np.testing.assert_allclose(y.sum(axis=1), 1, rtol=1e-6)
        # The mean pixel tells the shares of the classes. CutMix rounds its boxes to pixels.
        expected = y @ (60 * np.arange(CLASSES))
        atol = 40 if "cut_mix" in changes else 1e-3
        np.testing.assert_allclose(x.mean(axis=(1, 2, 3)), expected, atol=atol)
        mixed += int((y.max(axis=1) < 0.999).sum())
    assert mixed > 3


def test_each_batch_is_mixed_in_one_of_the_two_ways():
    kinds = set()
    for x, _ in batches(mix_up=0.4, cut_mix=0.6):
        # After MixUp every image has one color. After CutMix some have two.
        kinds.add("mix up" if np.ptp(x, axis=(1, 2, 3)).max() < 1e-3 else "cut mix")
    assert kinds == {"mix up", "cut mix"}


def test_without_augmentation_labels_stay_indices():
    x, y = batches()[0]
    assert y.dtype == np.int32
    np.testing.assert_array_equal(x[:, 0, 0, 0], 60 * y)
    assert tf.convert_to_tensor(x).dtype == tf.float32
