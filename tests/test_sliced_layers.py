import numpy as np
import tensorflow as tf

from fpnas_keras.networks.sliced_layers import (
    SlicedBatchNorm,
    SlicedConv,
    SlicedDepthwiseConv,
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
    layer.kernel.assign(layer.kernel.value - rest)  # a 5x5 kernel that is 0 but for its middle
    np.testing.assert_allclose(small, layer(x, tf.constant(5)), atol=1e-5)


def test_sliced_batch_norm_uses_the_statistics_of_the_batch():
    layer = SlicedBatchNorm(6)
    x = 3 + 2 * tf.random.stateless_normal((64, 5, 5, 4), (0, 1))
    y = layer(x).numpy()
    np.testing.assert_allclose(y.mean(axis=(0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(y.std(axis=(0, 1, 2)), 1, atol=1e-2)
