"""Layers that compute what Keras' own do, in less time where they are trained on CPUs.

`build_for_training` makes a network of them. Its weights are those of the plain network, in the
same order.
"""

import types

import keras
import tensorflow as tf

from fpnas_keras.architecture import Architecture
from fpnas_keras.networks import sliced_layers
from fpnas_keras.networks.plain_network import NetworkBuilder


def build_for_training(architecture: Architecture) -> keras.Model:
    """Builds the network of an architecture from the layers of this file, in float32.

    It is there to be trained, not to be saved: give its weights to `architecture.build()`.

    Args:
        architecture: The architecture.

    Example:

    ```python
    network = build_for_training(architecture)
    network.compile("sgd", loss, jit_compile=False)
    network.fit(batches)
    model = architecture.build()
    model.set_weights(network.get_weights())
    ```
    """
    return _TrainingBuilder().network(architecture)


class _TrainingBuilder(NetworkBuilder):
    def __init__(self):
        super().__init__()
        own = {
            "Activation": _Activation,
            "BatchNormalization": _BatchNormalization,
            "Conv2D": _Conv2D,
            "DepthwiseConv2D": _DepthwiseConv2D,
        }
        self.layers = types.SimpleNamespace(**vars(keras.layers) | own)


class _BatchNormalization(keras.layers.BatchNormalization):
    """Uses TensorFlow's fused operation, which Keras' layer does not use on a CPU."""

    def call(self, x, training=None):
        moving = {"mean": self.moving_mean, "variance": self.moving_variance}
        is_training = bool(training) and self.trainable
        y, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            x,
            self.gamma,
            self.beta,
            epsilon=self.epsilon,
            is_training=is_training,
            **({} if is_training else moving),
        )
        if is_training:
            # The operation gives the estimate for the population. Keras averages the variance of
            # the batch.
            count = tf.cast(tf.size(x) // x.shape[-1], tf.float32)
            self._move(self.moving_mean, mean)
            self._move(self.moving_variance, variance * ((count - 1) / count))
        return y

    def _move(self, moving, value):
        moving.assign(moving * self.momentum + value * (1 - self.momentum))


class _Conv2D(keras.layers.Conv2D):
    """Computes 1x1 convolutions as matrix products in training, where the backward pass gains."""

    def call(self, x, training=None):
        if not training or self.kernel_size != (1, 1) or self.strides != (1, 1):
            return super().call(x)
        kernel = tf.reshape(self.kernel, self.kernel.shape[2:])
        y = sliced_layers.multiply_channels(x, kernel, *kernel.shape)
        return y + self.bias if self.use_bias else y


class _DepthwiseConv2D(keras.layers.DepthwiseConv2D):
    """Has the faster gradient of `SlicedDepthwiseConv`."""

    def call(self, x):
        (size, _), (stride, _) = self.kernel_size, self.strides
        return sliced_layers.depthwise_conv2d(x, self.kernel.value, stride, [size])


class _Activation(keras.layers.Activation):
    """Computes the gradient of hard swish from its input alone."""

    def call(self, x):
        if self.activation is not keras.activations.hard_silu:
            return super().call(x)
        return sliced_layers.activate(x, tf.constant(0), ["hard_silu"])
