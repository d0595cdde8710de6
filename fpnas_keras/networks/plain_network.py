"""Architecture -> plain functional Keras model, and what is done with such models."""

import pathlib
from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf

from fpnas_keras.architecture import (
    Architecture,
    Block,
    Head,
    Stem,
    attention_filters,
    expanded_filters,
)
from fpnas_keras.errors import UserError
from fpnas_keras.files import summarize_error
from fpnas_keras.networks.conventions import (
    BN_EPSILON,
    check_floatx,
    make_conv_initializer,
    make_rescaling,
)


def build_network(architecture: Architecture, bn_momentum: float = 0.9) -> keras.Model:
    """Builds the network of an architecture with fresh weights.

    Args:
        architecture: The architecture.
        bn_momentum: Momentum of the batch normalizations' moving statistics.

    Returns:
        A functional model: float32 images of pixels 0..255, shape
        `(batch,) + input_shape`, to logits, shape `(batch, num_classes)`.
    """
    check_floatx()
    return NetworkBuilder(bn_momentum=bn_momentum).network(architecture)


def recalibrate(model: keras.Model, batches: Iterable[tf.Tensor]) -> None:
    """Sets the moving statistics of all batch normalizations to their mean over the images.

    After its weights were taken from elsewhere (shared weights, averaged ones), a network's
    statistics belong to others.

    Args:
        model: The network.
        batches: Images, pixels 0..255, `(batch,) + input_shape` each.
    """
    norms = [each for each in model.layers if isinstance(each, keras.layers.BatchNormalization)]
    momenta = [norm.momentum for norm in norms]
    seen = 0
    for images in batches:
        for norm in norms:  # the last batch may be smaller, and counts less
            norm.momentum = seen / (seen + len(images))
        model(images, training=True)
        seen += len(images)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def load_model(path: str, flag: str = "model") -> keras.Model:
    """Loads a classifier from a `.keras` file in safe mode: no code in it is run.

    Args:
        path: The file.
        flag: Name of the flag that named it, for messages.

    Raises:
        UserError: When it is no Keras file, or not one from images to classes.
    """
    if not pathlib.Path(path).is_file() or not path.endswith(".keras"):
        raise UserError(f"`{flag}` must be an existing .keras file. Received: {flag}={path}")
    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # Keras raises what its many readers raise.
        raise UserError(f"cannot load the Keras model {path}: {summarize_error(error)}") from None
    shapes = (getattr(model, "input_shape", None), getattr(model, "output_shape", None))
    ranks = [len(shape) if isinstance(shape, tuple) else None for shape in shapes]
    if ranks != [4, 2] or None in shapes[0][1:]:
        raise UserError(
            f"the model {path} must go from (batch, height, width, channels) to (batch, classes). "
            f"Received: {shapes[0]} to {shapes[1]}"
        )
    return model


class NetworkBuilder:
    """Makes networks, and parts of them, of the layers of one library.

    Args:
        library: `keras`, or `tf_keras` for what only that can do.
        bn_momentum: Momentum of the batch normalizations' moving statistics.
    """

    def __init__(self, library: Any = keras, bn_momentum: float = 0.9):
        self.library = library
        self.layers = library.layers
        self.bn_momentum = bn_momentum

    def network(self, architecture: Architecture) -> keras.Model:
        """A whole network; see `build_network`."""
        images = self.library.Input(architecture.input_shape, name="image")
        x = self.stem(images, architecture.stem)
        for index, block in enumerate(architecture.blocks):
            x = self.block(x, block, f"block_{index}")
        logits = self.head(x, architecture.head, architecture.num_classes)
        return self.library.Model(images, logits, name="network")

    def stem(self, images: keras.KerasTensor, stem: Stem) -> keras.KerasTensor:
        """Pixels 0..255 -> features."""
        return self._conv_bn(
            self.rescale(images),
            stem.filters,
            "stem",
            stem.kernel_size,
            stem.strides,
            stem.activation,
        )

    def block(self, x: keras.KerasTensor, block: Block, name: str) -> keras.KerasTensor:
        """Features -> features."""
        filters_in = x.shape[-1]
        agree = block.strides == 1 and filters_in == block.filters
        if block.skip:
            if agree:
                return x
            return self._conv_bn(x, block.filters, f"{name}_skip", strides=block.strides)
        inputs, expanded = x, expanded_filters(filters_in, block.expansion)
        if block.expansion != 1:
            x = self._conv_bn(x, expanded, f"{name}_expand", activation=block.activation)
        parts = [
            self._depthwise(x, block, f"{name}_depthwise_{split}")
            for split in range(max(1, block.splits))
        ]
        x = parts[0]
        if block.splits == 1:
            x = self._squeeze_excite(x, f"{name}_attention")
        elif block.splits:
            x = self._split_attention(parts, f"{name}_attention")
        x = self._conv_bn(x, block.filters, f"{name}_project")
        return self.layers.Add(name=f"{name}_add")([x, inputs]) if agree else x

    def head(self, x: keras.KerasTensor, head: Head, num_classes: int) -> keras.KerasTensor:
        """Features -> logits."""
        x = self._conv_bn(x, head.filters, "head", activation=head.activation)
        x = self.layers.GlobalAveragePooling2D(name="pool")(x)
        if head.dense_units:
            x = self.layers.Dense(head.dense_units, use_bias=False, name="head_dense")(x)
            x = self.activation(x, head.activation, "head_dense_activation")
        return self.layers.Dense(num_classes, dtype="float32", name="classes")(x)

    def rescale(self, images: keras.KerasTensor) -> keras.KerasTensor:
        """Pixels 0..255 -> -1..1."""
        return make_rescaling(self.library)(images)

    def activation(self, x: keras.KerasTensor, function: str, name: str) -> keras.KerasTensor:
        """Applies an activation, which has Keras 3's meaning, as a layer of that name."""
        return self.layers.Activation(function, name=name)(x)

    def _conv_bn(self, x, filters, name, kernel_size=1, strides=1, activation=None):
        x = self._conv(filters, name, kernel_size, strides, use_bias=False)(x)
        return self._bn(x, name, activation)

    def _conv(self, filters, name, kernel_size=1, strides=1, use_bias=True):
        return self.layers.Conv2D(
            filters,
            kernel_size,
            strides,
            "same",
            use_bias=use_bias,
            kernel_initializer=make_conv_initializer(self.library),
            name=name,
        )

    def _bn(self, x, name, activation=None):
        x = self.layers.BatchNormalization(
            momentum=self.bn_momentum, epsilon=BN_EPSILON, name=f"{name}_bn"
        )(x)
        return self.activation(x, activation, f"{name}_activation") if activation else x

    def _depthwise(self, x, block, name):
        x = self.layers.DepthwiseConv2D(
            block.kernel_size,
            block.strides,
            "same",
            use_bias=False,
            depthwise_initializer=make_conv_initializer(self.library),
            name=name,
        )(x)
        return self._bn(x, name, block.activation)

    def _squeeze_excite(self, x, name):
        """Hu et al., 2018, as MobileNetV3 has it: the gate is a hard sigmoid."""
        gate = self._attention_bottleneck([x], name)
        gate = self._conv(x.shape[-1], f"{name}_expand")(gate)
        gate = self.activation(gate, "hard_sigmoid", f"{name}_gate")
        return self.layers.Multiply(name=f"{name}_multiply")([x, gate])

    def _split_attention(self, parts, name):
        """ResNeSt (Zhang et al., arXiv:2004.08955): a softmax over the splits for every channel.

        Spelled in operators that TFLite has for 4-D tensors.
        """
        layers, bottleneck = self.layers, self._attention_bottleneck(parts, name)
        logits = [
            self._conv(part.shape[-1], f"{name}_split_{split}")(bottleneck)
            for split, part in enumerate(parts)
        ]
        if len(parts) == 2:  # softmax([a, b])[0] = sigmoid(a - b)
            gate = layers.Subtract(name=f"{name}_logit")(logits)
            gate = self.activation(gate, "sigmoid", f"{name}_gate")
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
        return self._sum(gated, f"{name}_sum")

    def _sum(self, values, name):
        """One after the other, as TFLite adds: so that int8 knows the range of each sum."""
        total = values[0]
        for index, value in enumerate(values[1:], 1):
            total = self.layers.Add(name=f"{name}_{index}")([total, value])
        return total

    def _attention_bottleneck(self, parts, name):
        """What the gates are made of: the pooled sum of the parts, 1x1 convolution, ReLU."""
        pooled = [
            self.layers.GlobalAveragePooling2D(keepdims=True, name=f"{name}_pool_{split}")(part)
            for split, part in enumerate(parts)
        ]
        # Pooled first and then added: the same, and a fraction of the work.
        x = self._sum(pooled, f"{name}_pooled")
        x = self._conv(attention_filters(parts[0].shape[-1]), f"{name}_reduce")(x)
        return self.activation(x, "relu", f"{name}_relu")
