"""Keras layers of the supernet. Each call uses a slice of their weights.

A sliced layer stores its weights at the largest size that the space contains. A call uses the
leading channels and the middle of the kernel. The sizes are tensors, so one graph runs every
architecture, and a call costs what that architecture costs.
"""

import functools
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from fpnas_keras.errors import UserError
from fpnas_keras.networks.conventions import BN_EPSILON, make_conv_initializer

# Some functions below have a gradient of their own (`tf.custom_gradient`). They run in branches of
# conditionals. Each branch is a graph, nested in others, and an argument can be a tensor of a graph
# further out. If the gradient uses such a tensor, TensorFlow (2.21) fails with an AssertionError:
# it expects a tensor of the branch. So all tensors that a gradient uses go through
# `_with_gradient`, which copies them into the current graph.


class SlicedConv(keras.layers.Layer):
    """A convolution with "same" padding that uses some of its input and output channels.

    Args:
        filters_in: Largest number of input channels.
        filters: Largest number of output channels.
        kernel_size: Side of the kernel.
        strides: Stride.
        use_bias: Whether to add a bias.
    """

    def __init__(
        self,
        filters_in: int,
        filters: int,
        kernel_size: int = 1,
        strides: int = 1,
        use_bias: bool = False,
        **kwargs,
    ):
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
        """Convolves all channels of `x`.

        Args:
            x: Features, `(batch, height, width, channels)`, with at most `filters_in` channels.
            filters: Number of output channels, all of them by default.

        Returns:
            Features with `filters` channels.
        """
        filters = self.shape[-1] if filters is None else filters
        kernel_size, filters_in = self.shape[0], tf.shape(x)[-1]
        if kernel_size == self.strides == 1:
            # oneDNN's 1x1 convolutions reorder their weights. A matrix product is faster, above
            # all in the backward pass.
            kernel = _slice(tf.squeeze(self.kernel, (0, 1)), (0, 0), (filters_in, filters))
            x = multiply_channels(x, kernel, filters_in, filters)
        else:
            size = (kernel_size, kernel_size, filters_in, filters)
            x = tf.nn.conv2d(x, _slice(self.kernel, (0,) * 4, size), self.strides, "SAME")
        return x + _slice(self.bias, (0,), (filters,)) if self.use_bias else x


class SlicedDepthwiseConv(keras.layers.Layer):
    """A depthwise convolution with "same" padding that uses the middle of its kernel.

    Args:
        filters: Largest number of channels.
        kernel_size: Largest side of the kernel, odd.
        strides: Stride.
        image_size: `(height, width)` of the features, or any other size that leaves the same
            remainders when it is divided by the stride: they decide the padding. Default: that of
            the features, which must be known then.
    """

    def __init__(
        self,
        filters: int,
        kernel_size: int,
        strides: int = 1,
        image_size: tuple[int, int] | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.shape = (kernel_size, kernel_size, filters, 1)
        self.strides = strides
        self.image_size = image_size
        self.build()

    def build(self, input_shape: object = None) -> None:
        self.kernel = self.add_weight(
            name="kernel", shape=self.shape, initializer=make_conv_initializer()
        )
        self.built = True

    def call(self, x: tf.Tensor, kernel_size: tf.Tensor | int) -> tf.Tensor:
        """Convolves all channels of `x`.

        Args:
            x: Features, `(batch, height, width, channels)`, with at most `filters` channels.
            kernel_size: Side of the square in the middle of the kernel that is used, odd.

        Returns:
            Features with as many channels as `x`.
        """
        first = (self.shape[0] - kernel_size) // 2
        size = (kernel_size, kernel_size, tf.shape(x)[-1], 1)
        kernel = _slice(self.kernel, (first, first, 0, 0), size)
        sizes = range(3, self.shape[0] + 1, 2)
        return depthwise_conv2d(x, kernel, self.strides, sizes, self.image_size)


class SlicedBatchNorm(keras.layers.Layer):
    """Batch normalization that always uses the statistics of the batch.

    It has no moving averages: they would mix the statistics of different architectures.

    Args:
        filters: Largest number of channels.
        gamma_initializer: What gamma starts as: "ones" or "zeros".
    """

    def __init__(self, filters: int, gamma_initializer: str = "ones", **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        self.gamma_initializer = gamma_initializer
        self.build()

    def build(self, input_shape: object = None) -> None:
        # float32 under any dtype policy, as the fused operation requires.
        self.gamma = self.add_weight(
            name="gamma",
            shape=(self.filters,),
            initializer=self.gamma_initializer,
            autocast=False,
        )
        self.beta = self.add_weight(
            name="beta", shape=(self.filters,), initializer="zeros", autocast=False
        )
        self.built = True

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Normalizes features with at most `filters` channels."""
        size = (tf.shape(x)[-1],)
        # Keras' own layer does not use the fused operation on a CPU.
        return tf.compat.v1.nn.fused_batch_norm(
            x,
            _slice(self.gamma, (0,), size),
            _slice(self.beta, (0,), size),
            epsilon=BN_EPSILON,
            is_training=True,
        )[0]


def copy_slices(shared: keras.layers.Layer, layer: keras.layers.Layer) -> None:
    """Copies slices of a supernet layer's weights into a layer of a plain network.

    Args:
        shared: The layer of the supernet: a sliced layer, or a dense one, which is never sliced.
        layer: The layer of the plain network.

    Raises:
        UserError: When the layers have different weights, or a weight of `layer` is larger.
    """
    weights = {variable.name: variable for variable in shared.weights}
    names = [variable.name for variable in layer.trainable_variables]
    if sorted(names) != sorted(weights):
        raise UserError(
            f"the layer `{layer.name}` must have the weights {', '.join(weights)}, as in the "
            f"supernet. Received: weights={names}"
        )
    for variable in layer.trainable_variables:
        value, shape = weights[variable.name].numpy(), tuple(variable.shape)
        if len(shape) != value.ndim or any(n > m for n, m in zip(shape, value.shape)):
            raise UserError(
                f"the weight `{variable.name}` of the layer `{layer.name}` must fit into the "
                f"supernet's, which has the shape {value.shape}. Received: shape={shape}"
            )
        if value.ndim == 4:  # a convolution kernel
            first = (value.shape[0] - shape[0]) // 2
            value = value[first:, first:]
        variable.assign(value[tuple(slice(n) for n in shape)])


def multiply_channels(
    x: tf.Tensor, kernel: tf.Tensor, filters_in: tf.Tensor | int, filters: tf.Tensor | int
) -> tf.Tensor:
    """A 1x1 convolution as a matrix product.

    Args:
        x: Features, `(batch, height, width, filters_in)`.
        kernel: The kernel, `(filters_in, filters)`.
        filters_in: Number of input channels.
        filters: Number of output channels.
    """
    y = tf.matmul(tf.reshape(x, (-1, filters_in)), kernel)
    return tf.reshape(y, tf.concat([tf.shape(x)[:-1], [filters]], axis=0))


def switch(index: tf.Tensor, branches: Sequence[Callable[[], tf.Tensor]]) -> tf.Tensor:
    """Runs `branches[index]`. A single branch runs without a conditional."""
    return branches[0]() if len(branches) == 1 else tf.switch_case(index, branches)


def activate(x: tf.Tensor, index: tf.Tensor, names: Sequence[str]) -> tf.Tensor:
    """Applies the activation `names[index]`.

    The gradient is computed from `x` alone. Otherwise the conditional would keep what each
    activation keeps for the backward pass, and need much more memory.

    Args:
        x: Features.
        index: int32 scalar.
        names: Names of Keras' activations.
    """

    def activated(x, index):
        def gradient(dy):
            branches = [lambda name=name: _activation_gradient(name, x, dy) for name in names]
            return switch(index, branches), None

        branches = [lambda name=name: keras.activations.get(name)(x) for name in names]
        return switch(index, branches), gradient

    return _with_gradient(activated, x, index)


def _activation_gradient(name, x, dy):
    """Gradient with respect to `x` of an activation of `x`, given that of its output."""
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


def _with_gradient(function, *tensors):
    """Calls `tf.custom_gradient(function)` on copies of the tensors in the current graph."""
    return tf.custom_gradient(function)(*map(tf.identity, tensors))


def _slice(weight, begin, size):
    """`tf.slice` of a weight, with a faster gradient.

    The gradient pads with zeros, which is 3 to 10 times faster than TensorFlow's own gradient of
    strided slices.
    """

    def sliced(weight, begin, shape):
        def gradient(dy):
            after = shape - begin - tf.shape(dy)
            return tf.pad(dy, tf.stack([begin, after], axis=1)), None, None

        return tf.slice(weight, begin, size), gradient

    weight = tf.convert_to_tensor(weight)
    return _with_gradient(sliced, weight, tf.stack(begin), tf.shape(weight))


def depthwise_conv2d(
    x: tf.Tensor,
    kernel: tf.Tensor,
    stride: int,
    kernel_sizes: Sequence[int],
    image_size: tuple[int, int] | None = None,
) -> tf.Tensor:
    """`tf.nn.depthwise_conv2d` with "SAME" padding, and a faster gradient for large kernels.

    Args:
        x: Features.
        kernel: The kernel.
        stride: Stride.
        kernel_sizes: The sides that the kernel can have, in steps of 2. The first one also stands
            for smaller kernels.
        image_size: As for `SlicedDepthwiseConv`.
    """
    image_size = image_size or x.shape[1:3]
    strides = [1, stride, stride, 1]
    if all(size <= 3 for size in kernel_sizes):
        return tf.nn.depthwise_conv2d(x, kernel, strides, "SAME")

    def conv(x, kernel):
        def gradient(dy):
            dx = tf.nn.depthwise_conv2d_backprop_input(
                tf.shape(x), kernel, dy, strides, padding="SAME"
            )
            dw = _depthwise_backprop_filter(
                x, tf.shape(kernel), dy, stride, kernel_sizes, image_size
            )
            return dx, dw

        return tf.nn.depthwise_conv2d(x, kernel, strides, "SAME"), gradient

    return _with_gradient(conv, x, kernel)


def _depthwise_backprop_filter(x, kernel_shape, dy, stride, kernel_sizes, image_size):
    """`tf.nn.depthwise_conv2d_backprop_filter` with "SAME" padding, but faster.

    With "SAME" padding and kernels larger than 3x3, TensorFlow computes it by a grouped
    convolution of oneDNN. With explicit padding it uses its own code, which is twice as fast.
    """

    def gradient_with(padding):
        return tf.nn.depthwise_conv2d_backprop_filter(
            x, kernel_shape, dy, [1, stride, stride, 1], padding=padding
        )

    def padding_of(size):
        if size <= 3:
            return "SAME"
        height, width = (_same_padding(n, size, stride) for n in image_size)
        return [[0, 0], height, width, [0, 0]]

    # The size of the kernel is a tensor, but padding must be a constant. So each size has a branch.
    paddings = map(padding_of, kernel_sizes)
    branches = [functools.partial(gradient_with, padding) for padding in paddings]
    return switch(tf.maximum((kernel_shape[0] - kernel_sizes[0]) // 2, 0), branches)


def _same_padding(size, kernel_size, stride):
    """Pixels before and after an axis of `size` pixels under "SAME" padding."""
    size_out = -(-size // stride)  # rounded up
    total = max(0, (size_out - 1) * stride + kernel_size - size)
    return [total // 2, total - total // 2]
