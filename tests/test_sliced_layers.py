"""Sliced layers against plain convolutions and their gradients, and the slices they give."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from fpnas_keras import UserError
from fpnas_keras.networks.sliced_layers import (
    SlicedBatchNorm,
    SlicedConv,
    SlicedDepthwiseConv,
    copy_slices,
)


def test_sliced_conv_is_a_convolution_with_the_leading_channels():
    layer = SlicedConv(6, 8, 3, 2, use_bias=True)
    layer.bias.assign(np.arange(8.0))
    x = tf.random.stateless_normal((2, 7, 7, 4), (0, 1))
    expected = tf.nn.conv2d(x, layer.kernel.value[:, :, :4, :5], 2, "SAME") + np.arange(5.0)
    np.testing.assert_allclose(layer(x, tf.constant(5)), expected, atol=1e-5)


def test_sliced_depthwise_conv_uses_the_middle_of_its_kernel():
    layer = SlicedDepthwiseConv(6, 5)
    x = tf.random.stateless_normal((2, 7, 7, 4), (0, 1))
    small = layer(x, tf.constant(3))
    rest = layer.kernel.value.numpy()
    rest[1:4, 1:4] = 0
    layer.kernel.assign(layer.kernel.value - rest)  # 5x5, but 0 around the middle 3x3
    np.testing.assert_allclose(small, layer(x, tf.constant(5)), atol=1e-5)


def test_sliced_batch_norm_uses_the_statistics_of_the_batch():
    layer = SlicedBatchNorm(6)
    x = 3 + 2 * tf.random.stateless_normal((64, 5, 5, 4), (0, 1))
    y = layer(x).numpy()
    np.testing.assert_allclose(y.mean(axis=(0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(y.std(axis=(0, 1, 2)), 1, atol=1e-2)


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
@pytest.mark.parametrize("strides", [1, 2])
def test_gradients_of_a_sliced_depthwise_conv(kernel_size, strides):
    layer = SlicedDepthwiseConv(6, 7, strides)
    x = tf.random.stateless_normal((2, 9, 8, 4), (0, 1))
    first = (7 - kernel_size) // 2
    middle = slice(first, first + kernel_size)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        received = tf.reduce_sum(layer(x, tf.constant(kernel_size)) ** 2)
        kernel = layer.kernel.value[middle, middle, :4]
        steps = [1, strides, strides, 1]
        expected = tf.reduce_sum(tf.nn.depthwise_conv2d(x, kernel, steps, "SAME") ** 2)
    variables = [x, layer.kernel.value]
    for ours, theirs in zip(tape.gradient(received, variables), tape.gradient(expected, variables)):
        assert np.any(theirs)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def build(layer, channels=4):
    layer.build((None, 7, 7, channels))
    return layer


def test_plain_layers_get_their_slices():
    conv, depthwise = SlicedConv(6, 8, use_bias=True), SlicedDepthwiseConv(6, 5)
    conv.bias.assign(np.arange(8.0))
    plain = build(keras.layers.Conv2D(5, 1))
    copy_slices(conv, plain)
    np.testing.assert_array_equal(plain.kernel, conv.kernel.numpy()[:, :, :4, :5])
    np.testing.assert_array_equal(plain.bias, np.arange(5.0))
    plain = build(keras.layers.DepthwiseConv2D(3, use_bias=False))
    copy_slices(depthwise, plain)
    np.testing.assert_array_equal(plain.kernel, depthwise.kernel.numpy()[1:4, 1:4, :4])
    norm, plain = SlicedBatchNorm(6), build(keras.layers.BatchNormalization())
    norm.gamma.assign(np.arange(6.0))
    norm.beta.assign(-np.arange(6.0))
    copy_slices(norm, plain)
    np.testing.assert_array_equal(plain.gamma, np.arange(4.0))
    np.testing.assert_array_equal(plain.beta, -np.arange(4.0))
    np.testing.assert_array_equal(plain.moving_variance, np.ones(4))


def test_layers_that_do_not_match_are_refused():
    frozen = build(keras.layers.Conv2D(5, 1, name="frozen"))
    frozen.trainable = False
    for message, plain in (
        ("`mine` must have the weights kernel", build(keras.layers.Conv2D(5, 1, name="mine"))),
        ("`norm` must have the weights", build(keras.layers.BatchNormalization(name="norm"))),
        (r"`frozen` must have the weights kernel.* Received: weights=\[\]", frozen),
        (
            r"`wide` must fit into .* \(1, 1, 6, 8\). Received: shape=\(1, 1, 7, 8\)",
            build(keras.layers.Conv2D(8, 1, use_bias=False, name="wide"), channels=7),
        ),
    ):
        with pytest.raises(UserError, match=message):
            copy_slices(SlicedConv(6, 8), plain)
