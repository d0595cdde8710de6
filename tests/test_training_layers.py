"""Networks of faster layers against the same networks of Keras' own."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import EVERYTHING

from fpnas_keras.architecture import Block
from fpnas_keras.networks import build_for_training

# Also odd sizes of features, and large kernels and projections with stride 2.
MORE = dataclasses.replace(
    EVERYTHING,
    input_shape=(18, 18, 3),
    blocks=(*EVERYTHING.blocks, Block(16, skip=True, strides=2), Block(16, 5, 2, 2, "relu", 0)),
)


def fit(model, steps):
    x = 255 * tf.random.stateless_uniform((16 * steps, 18, 18, 3), (0, 1))
    y = tf.random.stateless_uniform((16 * steps,), (0, 2), 0, 5, tf.int32)
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    return model.fit(x, y, batch_size=16, shuffle=False, verbose=0).history["loss"]


@pytest.fixture(scope="module")
def trained():
    """The network of Keras' layers and that of ours, after the same steps."""
    plain, fast = MORE.build(), build_for_training(MORE)
    fast.set_weights(plain.get_weights())
    losses = fit(plain, 8), fit(fast, 8)
    return plain, fast, losses


def test_training_is_the_same_to_rounding(trained):
    plain, fast, losses = trained
    np.testing.assert_allclose(*losses, rtol=1e-4)
    for one, other in zip(plain.weights, fast.weights, strict=True):
        assert one.path.split("/")[1:] == other.path.split("/")[1:]
        np.testing.assert_allclose(one, other, rtol=1e-2, atol=1e-3, err_msg=one.path)


def test_the_plain_network_takes_the_weights(trained):
    _, fast, _ = trained
    model = MORE.build()
    model.set_weights(fast.get_weights())
    x = 255 * tf.random.stateless_uniform((8, 18, 18, 3), (3, 4))
    np.testing.assert_allclose(
        model(x, training=False), fast(x, training=False), rtol=1e-4, atol=1e-4
    )


def test_frozen_norms_stay(trained):
    _, fast, _ = trained
    norm = next(each for each in fast.layers if each.name == "stem_bn")
    before = [each.numpy() for each in norm.weights]
    x = tf.random.stateless_normal((4, 9, 9, 8), (5, 6))
    norm.trainable = False
    frozen = norm(x, training=True)
    norm.trainable = True
    np.testing.assert_array_equal(frozen, norm(x, training=False))
    for one, other in zip(before, norm.weights):
        np.testing.assert_array_equal(one, other)
    norm(x, training=True)
    momentum, mean = norm.momentum, tf.reduce_mean(x, (0, 1, 2))
    variance = tf.math.reduce_variance(x, (0, 1, 2))
    np.testing.assert_allclose(
        norm.moving_mean, momentum * before[2] + (1 - momentum) * mean, atol=1e-5
    )
    np.testing.assert_allclose(
        norm.moving_variance, momentum * before[3] + (1 - momentum) * variance, atol=1e-5
    )
