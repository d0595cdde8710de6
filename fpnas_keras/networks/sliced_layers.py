"""Keras layers that are sliced: the parts of the shared weights.

A sliced layer stores its weights at their largest size and uses the leading
channels (and the middle of the kernel) that tensors ask for at call time, so
that one graph runs every architecture at that architecture's price.
"""

import functools
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from fpnas_keras.networks.conventions import BN_EPSILON, make_conv_initializer


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
            name="kernel", shape=self.shape, initializer=make_conv_initializer()
        )
        if self.use_bias:
            self.bias = self.add_weight(name="bias", shape=self.shape[-1:], initializer="zeros")
        self.built = True

    def call(self, x: tf.Tensor, filters: tf.Tensor | int | None = None) -> tf.Tensor:
        """Convolves the channels that `x` has to the first `filters` outputs (all if `None`)."""
        filters = self.shape[-1] if filters is None else filters
        kernel_size, filters_in = self.shape[0], tf.shape(x)[-1]
        if kernel_size == self.strides == 1:
            # oneDNN's 1x1 convolutions reorder their weights and are slower, most of all backwards.
            kernel = _cut(tf.reshape(self.kernel, self.shape[2:]), (0, 0), (filters_in, filters))
            y = tf.matmul(tf.reshape(x, (-1, filters_in)), kernel)
            x = tf.reshape(y, (-1, *x.shape[1:3], filters))
        else:
            size = (kernel_size, kernel_size, filters_in, filters)
            x = tf.nn.conv2d(x, _cut(self.kernel, (0,) * 4, size), self.strides, "SAME")
        return x + _cut(self.bias, (0,), (filters,)) if self.use_bias else x


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
            name="kernel", shape=self.shape, initializer=make_conv_initializer()
        )
        self.built = True

    def call(self, x: tf.Tensor, kernel_size: tf.Tensor | int) -> tf.Tensor:
        """Convolves with the middle `kernel_size` square of the kernel."""
        first = (self.shape[0] - kernel_size) // 2
        size = (kernel_size, kernel_size, tf.shape(x)[-1], 1)
        kernel = _cut(self.kernel, (first, first, 0, 0), size)
        return _depthwise_conv(x, kernel, self.strides, self.shape[0])


def _depthwise_conv(x, kernel, stride, largest_kernel_size):
    """`tf.nn.depthwise_conv2d` whose gradient is faster for kernels larger than 3.

    For the gradient of those oneDNN takes a grouped convolution, twice as slow as TensorFlow's
    own code, which is the one that runs where the padding is explicit.
    """
    strides = [1, stride, stride, 1]

    def conv(x, kernel):
        return tf.nn.depthwise_conv2d(x, kernel, strides, "SAME")

    if largest_kernel_size <= 3:
        return conv(x, kernel)

    @tf.custom_gradient
    def conv_with_gradient(x, kernel):
        def kernel_gradient(dy, padding):
            return tf.nn.depthwise_conv2d_backprop_filter(
                x, tf.shape(kernel), dy, strides, padding=padding
            )

        def gradient(dy):
            dx = tf.nn.depthwise_conv2d_backprop_input(
                tf.shape(x), kernel, dy, strides, padding="SAME"
            )
            # The size of the kernel is a tensor; its padding must be known beforehand.
            paddings = ["SAME"] + [
                [[0, 0], *(_same_padding(n, size, stride) for n in x.shape[1:3]), [0, 0]]
                for size in range(5, largest_kernel_size + 1, 2)
            ]
            branches = [functools.partial(kernel_gradient, dy, each) for each in paddings]
            return dx, switch(tf.maximum(tf.shape(kernel)[0] // 2 - 1, 0), branches)

        return conv(x, kernel), gradient

    # Identities, since tensors of other graphs must not get into the gradient.
    return conv_with_gradient(tf.identity(x), tf.identity(kernel))


def _same_padding(size, kernel_size, stride):
    """Pixels before and after, as "SAME" has it."""
    total = max(0, (-(-size // stride) - 1) * stride + kernel_size - size)
    return [total // 2, total - total // 2]


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
        scale, offset = (_cut(each, (0,), (tf.shape(x)[-1],)) for each in (self.gamma, self.beta))
        # Keras' own layer is not the fused op on CPU.
        return tf.compat.v1.nn.fused_batch_norm(
            x, scale, offset, epsilon=BN_EPSILON, is_training=True
        )[0]


def activate(x: tf.Tensor, index: tf.Tensor, names: Sequence[str]) -> tf.Tensor:
    """The activation `names[index]`.

    Its gradient starts from `x` alone: what a conditional keeps for the backward pass costs
    memory, in the graph most of all.
    """

    @tf.custom_gradient
    def activated(x, index):
        def gradient(dy):
            branches = [functools.partial(_activation_gradient, name, x, dy) for name in names]
            return switch(index, branches), None

        functions = [keras.activations.get(name) for name in names]
        return switch(index, [functools.partial(each, x) for each in functions]), gradient

    # Identities, since tensors of other graphs must not get into the gradient.
    return activated(tf.identity(x), tf.identity(index))


def _activation_gradient(name, x, dy):
    if name == "relu":
        return tf.raw_ops.ReluGrad(gradients=dy, features=x)
    if name == "relu6":
        return tf.raw_ops.Relu6Grad(gradients=dy, features=x)
    if name == "hard_silu":  # x * relu6(x + 3) / 6
        shifted = x + 3.0
        slope = tf.nn.relu6(shifted) + tf.raw_ops.Relu6Grad(gradients=x, features=shifted)
        return dy * slope * (1 / 6)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = keras.activations.get(name)(x)
    return tape.gradient(y, x, dy)


def _cut(weight, begin, size):
    """A part of a weight. Its gradient is padded, 3 to 10 times faster than `StridedSliceGrad`."""
    begin = tf.stack(begin)  # a tensor of this graph, as in `activate`

    @tf.custom_gradient
    def cut(weight):
        def gradient(dy):
            dw = tf.pad(dy, tf.stack([begin, weight.shape - begin - tf.shape(dy)], axis=1))
            dw.set_shape(weight.shape)
            return dw

        return tf.slice(weight, begin, size), gradient

    return cut(tf.convert_to_tensor(weight))


def switch(index: tf.Tensor, branches: Sequence[Callable[[], tf.Tensor]]) -> tf.Tensor:
    """Runs branch number `index`, without a conditional where there is only one."""
    return branches[0]() if len(branches) == 1 else tf.switch_case(index, branches)
