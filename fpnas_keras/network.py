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

    def depthwise(x, block: Block, name):
        x = layers.DepthwiseConv2D(
            block.kernel_size,
            block.strides,
            "same",
            use_bias=False,
            depthwise_initializer=conv_initializer(),
            name=name,
        )(x)
        return bn(x, name, block.activation)

    def block(x, block: Block, name):
        filters_in = x.shape[-1]
        agree = block.strides == 1 and filters_in == block.filters
        if block.skip:
            return x if agree else conv_bn(x, block.filters, f"{name}_skip", strides=block.strides)
        inputs, expanded = x, expanded_filters(filters_in, block.expansion)
        if block.expansion != 1:
            x = conv_bn(x, expanded, f"{name}_expand", activation=block.activation)
        parts = [
            depthwise(x, block, f"{name}_depthwise_{split}")
            for split in range(max(1, block.splits))
        ]
        x = parts[0]
        if block.splits == 1:
            x = _squeeze_excite(x, f"{name}_attention")
        elif block.splits:
            x = _split_attention(parts, f"{name}_attention")
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
    gate = _attention_bottleneck([x], name)
    gate = _conv(x.shape[-1], name=f"{name}_expand")(gate)
    gate = layers.Activation("hard_sigmoid", name=f"{name}_gate")(gate)
    return layers.Multiply(name=f"{name}_multiply")([x, gate])


def _split_attention(parts, name):
    """ResNeSt (Zhang et al., arXiv:2004.08955): a softmax over the splits for every channel.

    Spelled in operators that TFLite has for 4-D tensors.
    """
    bottleneck = _attention_bottleneck(parts, name)
    logits = [
        _conv(part.shape[-1], name=f"{name}_split_{split}")(bottleneck)
        for split, part in enumerate(parts)
    ]
    if len(parts) == 2:  # softmax([a, b])[0] = sigmoid(a - b)
        gate = layers.Subtract(name=f"{name}_logit")(logits)
        gate = layers.Activation("sigmoid", name=f"{name}_gate")(gate)
        difference = layers.Subtract(name=f"{name}_difference")(parts)
        gated = layers.Multiply(name=f"{name}_multiply")([difference, gate])
        return layers.Add(name=f"{name}_sum")([parts[1], gated])
    # (batch, splits, 1, channels), and the splits last for the softmax.
    gates = layers.Concatenate(axis=1, name=f"{name}_logits")(logits)
    gates = layers.Permute((2, 3, 1), name=f"{name}_splits_last")(gates)
    gates = layers.Softmax(name=f"{name}_gates")(gates)
    gates = layers.Permute((3, 1, 2), name=f"{name}_splits_first")(gates)
    gated = []
    for split, part in enumerate(parts):
        others = ((split, len(parts) - 1 - split), (0, 0))
        gate = layers.Cropping2D(others, name=f"{name}_gate_{split}")(gates)
        gated.append(layers.Multiply(name=f"{name}_multiply_{split}")([part, gate]))
    return layers.Add(name=f"{name}_sum")(gated)


def _attention_bottleneck(parts, name):
    """What the gates are made of: the pooled sum of the parts, 1x1 convolution, ReLU."""
    pooled = [
        layers.GlobalAveragePooling2D(keepdims=True, name=f"{name}_pool_{split}")(part)
        for split, part in enumerate(parts)
    ]
    # Pooled first and then added: the same, and a fraction of the work.
    x = layers.Add(name=f"{name}_pool")(pooled) if len(pooled) > 1 else pooled[0]
    x = _conv(attention_filters(parts[0].shape[-1]), name=f"{name}_reduce")(x)
    return layers.Activation("relu", name=f"{name}_relu")(x)
