"""Keras layers that are sliced: the parts of the shared weights.

A sliced layer stores its weights at their largest size and uses the leading
channels (and the middle of the kernel) that tensors ask for at call time, so
that one graph runs every architecture at that architecture's price.
"""

from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

BN_EPSILON = 1e-3


def rescaling() -> keras.layers.Rescaling:
    """The first layer of every network: pixels 0..255 to -1..1."""
    return keras.layers.Rescaling(1 / 127.5, -1.0, name="rescaling")


def conv_initializer() -> keras.initializers.Initializer:
    """A fresh initializer for convolutions: variance 2 / fan_out, as MobileNets have it.

    It suits depthwise kernels too, whose fan_out Keras takes to be one channel's.
    """
    return keras.initializers.VarianceScaling(2.0, "fan_out")


class SlicedConv(keras.layers.Layer):
    """A convolution that uses as many input and output channels as it is asked for.

    Args:
        filters_in: Most channels in.
        filters: Most channels out.
        kernel_size: Side of the kernel.
        strides: Stride.
        use_bias: Whether a bias is added.
    """

    def __init__(self, filters_in, filters, kernel_size=1, strides=1, use_bias=False, **kwargs):
        super().__init__(**kwargs)
        self.shape = (kernel_size, kernel_size, filters_in, filters)
        self.strides = strides
        self.use_bias = use_bias
        self.build()

    def build(self, input_shape: object = None) -> None:
        self.kernel = self.add_weight(
            name="kernel", shape=self.shape, initializer=conv_initializer()
        )
        if self.use_bias:
            self.bias = self.add_weight(name="bias", shape=self.shape[-1:], initializer="zeros")
        self.built = True

    def call(self, x: tf.Tensor, filters: tf.Tensor | int | None = None) -> tf.Tensor:
        """Convolves the channels that `x` has to the first `filters` outputs (all if `None`)."""
        kernel = self.kernel[:, :, : tf.shape(x)[-1], :filters]
        x = tf.nn.conv2d(x, kernel, self.strides, "SAME")
        return x + self.bias[:filters] if self.use_bias else x


class SlicedDepthwiseConv(keras.layers.Layer):
    """A depthwise convolution with the middle of its kernel, on the channels it gets.

    Args:
        filters: Most channels.
        kernel_size: Largest side of the kernel, odd.
        strides: Stride.
    """

    def __init__(self, filters, kernel_size, strides=1, **kwargs):
        super().__init__(**kwargs)
        self.shape = (kernel_size, kernel_size, filters, 1)
        self.strides = strides
        self.build()

    def build(self, input_shape: object = None) -> None:
        self.kernel = self.add_weight(
            name="kernel", shape=self.shape, initializer=conv_initializer()
        )
        self.built = True

    def call(self, x: tf.Tensor, kernel_size: tf.Tensor | int) -> tf.Tensor:
        """Convolves with the middle `kernel_size` square of the kernel."""
        first = (self.shape[0] - kernel_size) // 2
        last = first + kernel_size
        kernel = self.kernel[first:last, first:last, : tf.shape(x)[-1], :]
        strides = [1, self.strides, self.strides, 1]
        return tf.nn.depthwise_conv2d(x, kernel, strides, "SAME")


class SlicedBatchNorm(keras.layers.Layer):
    """Batch normalization with the batch's statistics, always.

    Moving averages would mix the statistics of different architectures.

    Args:
        filters: Most channels.
    """

    def __init__(self, filters, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        self.build()

    def build(self, input_shape: object = None) -> None:
        # float32 under any policy: the fused op wants its scale and offset so.
        self.gamma = self.add_weight(
            name="gamma", shape=(self.filters,), initializer="ones", autocast=False
        )
        self.beta = self.add_weight(
            name="beta", shape=(self.filters,), initializer="zeros", autocast=False
        )
        self.built = True

    def call(self, x: tf.Tensor) -> tf.Tensor:
        filters = tf.shape(x)[-1]
        # Keras' own layer is not the fused op on CPU.
        return tf.compat.v1.nn.fused_batch_norm(
            x, self.gamma[:filters], self.beta[:filters], epsilon=BN_EPSILON, is_training=True
        )[0]


def switch(index: tf.Tensor, branches: Sequence[Callable[[], tf.Tensor]]) -> tf.Tensor:
    """Runs branch number `index`, without a conditional where there is only one."""
    return branches[0]() if len(branches) == 1 else tf.switch_case(index, branches)
