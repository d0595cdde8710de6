"""Architecture -> plain functional Keras model."""

import keras
from keras import layers

from fpnas_keras.architecture import (
    Architecture,
    Block,
    attention_filters,
    expanded_filters,
)
from fpnas_keras.layers import BN_EPSILON, conv_initializer, rescaling


def build(architecture: Architecture, bn_momentum: float = 0.9) -> keras.Model:
    """Builds the network of an architecture with fresh weights.

    Args:
        architecture: The architecture.
        bn_momentum: Momentum of the batch normalizations' moving statistics.

    Returns:
        A functional model: float32 images of pixels 0..255, shape
        `(batch,) + input_shape`, to logits, shape `(batch, num_classes)`.
    """
    stem, head = architecture.stem, architecture.head

    def conv_bn(x, filters, name, kernel_size=1, strides=1, activation=None):
        x = _conv(filters, kernel_size, strides, use_bias=False, name=name)(x)
        return bn(x, name, activation)

    def bn(x, name, activation=None):
        x = layers.BatchNormalization(momentum=bn_momentum, epsilon=BN_EPSILON, name=f"{name}_bn")(
            x
        )
        return layers.Activation(activation, name=f"{name}_activation")(x) if activation else x

    def block(x, block: Block, name):
        filters_in = x.shape[-1]
        agree = block.strides == 1 and filters_in == block.filters
        if block.skip:
            return x if agree else conv_bn(x, block.filters, f"{name}_skip", strides=block.strides)
        inputs, expanded = x, expanded_filters(filters_in, block.expansion)
        if block.expansion != 1:
            x = conv_bn(x, expanded, f"{name}_expand", activation=block.activation)
        x = layers.DepthwiseConv2D(
            block.kernel_size,
            block.strides,
            "same",
            use_bias=False,
            depthwise_initializer=conv_initializer(),
            name=f"{name}_depthwise",
        )(x)
        x = bn(x, f"{name}_depthwise", block.activation)
        if block.splits == 1:
            x = _squeeze_excite(x, f"{name}_attention")
        x = conv_bn(x, block.filters, f"{name}_project")
        return layers.Add(name=f"{name}_add")([x, inputs]) if agree else x

    images = keras.Input(architecture.input_shape, name="image")
    x = rescaling()(images)
    x = conv_bn(x, stem.filters, "stem", stem.kernel_size, stem.strides, stem.activation)
    for index, each in enumerate(architecture.blocks):
        x = block(x, each, f"block_{index}")
    x = conv_bn(x, head.filters, "head", activation=head.activation)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    if head.dense_units:
        x = layers.Dense(head.dense_units, head.activation, use_bias=False, name="head_dense")(x)
    logits = layers.Dense(architecture.num_classes, dtype="float32", name="classes")(x)
    return keras.Model(images, logits, name="network")


def _conv(filters, kernel_size=1, strides=1, use_bias=True, name=None):
    return layers.Conv2D(
        filters,
        kernel_size,
        strides,
        "same",
        use_bias=use_bias,
        kernel_initializer=conv_initializer(),
        name=name,
    )


def _squeeze_excite(x, name):
    """Hu et al., 2018, as MobileNetV3 has it: the gate is a hard sigmoid."""
    expanded = x.shape[-1]
    gate = layers.GlobalAveragePooling2D(keepdims=True, name=f"{name}_pool")(x)
    gate = _conv(attention_filters(expanded), name=f"{name}_reduce")(gate)
    gate = layers.Activation("relu", name=f"{name}_relu")(gate)
    gate = _conv(expanded, name=f"{name}_expand")(gate)
    gate = layers.Activation("hard_sigmoid", name=f"{name}_gate")(gate)
    return layers.Multiply(name=f"{name}_multiply")([x, gate])
