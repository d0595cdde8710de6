"""Plain functional Keras models: building, recalibrating and loading them."""

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
    DATA_FORMAT,
    check_floatx,
    make_conv_initializer,
    make_rescaling,
)


def build_network(architecture: Architecture, bn_momentum: float = 0.9) -> keras.Model:
    """Builds the network of an architecture with new weights.

    Args:
        architecture: The architecture.
        bn_momentum: Momentum of the moving statistics of the batch normalizations.

    Returns:
        A functional model. Input: float32 images of pixels 0..255, shape
        `(batch,) + input_shape`. Output: float32 logits, shape `(batch, num_classes)`.

    Raises:
        UserError: When Keras' floatx is not float32.
    """
    return NetworkBuilder(bn_momentum=bn_momentum).network(architecture)


def recalibrate(model: keras.Model, batches: Iterable[tf.Tensor]) -> None:
    """Sets the moving statistics of all batch normalizations to their mean over some images.

    This is needed when the weights of a network were replaced, by shared or by averaged weights:
    its moving statistics still belong to the weights that it had before.

    Args:
        model: The network.
        batches: Images, pixels 0..255, shape `(batch,) + input_shape` each.

    Example:

    ```python
    search.supernet.give_weights(model)
    recalibrate(model, [images])
    ```
    """
    norms = [each for each in model.layers if isinstance(each, keras.layers.BatchNormalization)]
    momenta = [norm.momentum for norm in norms]
    seen = 0
    for images in batches:
        for norm in norms:  # Each batch counts by its size: the last one may be smaller.
            norm.momentum = seen / (seen + len(images))
        model(images, training=True)
        seen += len(images)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def load_model(path: str, argument: str = "model") -> keras.Model:
    """Loads an image classifier from a `.keras` file.

    The file is read in Keras' safe mode, which does not run code that the file contains.

    Args:
        path: The file.
        argument: Name of the user's argument that holds the path, for messages.

    Returns:
        A model from `(batch, height, width, channels)` to `(batch, classes)`, not compiled.

    Raises:
        UserError: When there is no such file, or it does not hold such a model.
    """
    if not pathlib.Path(path).is_file() or not path.endswith(".keras"):
        raise UserError(
            f"`{argument}` must be an existing .keras file. Received: {argument}={path}"
        )
    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # The readers inside Keras raise errors of many classes.
        raise UserError(f"cannot load the Keras model {path}: {summarize_error(error)}") from None
    shapes = (getattr(model, "input_shape", None), getattr(model, "output_shape", None))
    ranks = [len(shape) if isinstance(shape, tuple) else None for shape in shapes]
    if ranks != [4, 2] or None in shapes[0][1:]:
        raise UserError(
            f"the model {path} must go from (batch, height, width, channels) to (batch, classes). "
            f"Received: {shapes[0]} to {shapes[1]}"
        )
    return model


def ends_in_softmax(model: keras.Model, name: str) -> bool:
    """Whether a model gives probabilities, and not logits.

    Args:
        model: The model.
        name: What it is called in the message of the error.

    Raises:
        UserError: When the model ends in neither.
    """
    last = model
    while isinstance(last, keras.Model):
        last = last.outputs[0]._keras_history.operation
    if not isinstance(last, keras.layers.Layer):
        raise UserError(
            f"{name} must end in a layer that gives logits, or in a softmax layer. "
            f"Received: it ends in the operation {type(last).__name__}"
        )
    activation = keras.activations.get(getattr(last, "activation", None))
    if isinstance(last, keras.layers.Softmax) or activation is keras.activations.softmax:
        return True
    if activation in (None, keras.activations.linear):
        return False
    raise UserError(
        f"{name} must end in logits or in a softmax. Received: its last layer has the activation "
        f"{keras.activations.serialize(activation)}"
    )


def to_logits(model: keras.Model, name: str) -> keras.Model:
    """A model without its softmax, in float32.

    Args:
        model: A model that gives logits or probabilities.
        name: What it is called in the message of the error.

    Raises:
        UserError: When the model ends in neither.
    """
    (output,) = model.outputs  # `model.output` fails for a `Sequential`.
    logits = output
    if ends_in_softmax(model, name):
        # Logits but for a constant, which a softmax ignores.
        logits = keras.ops.log(keras.ops.maximum(output, keras.config.epsilon()))
    if logits is output and logits.dtype == "float32":
        return model
    return keras.Model(model.inputs, keras.ops.cast(logits, "float32"))


class NetworkBuilder:
    """Builds networks, and parts of them, from the layers of one library.

    Args:
        library: `keras`, or `tf_keras` for tools that need it.
        bn_momentum: Momentum of the moving statistics of the batch normalizations.

    Raises:
        UserError: When the library's floatx is not float32.
    """

    def __init__(self, library: Any = keras, bn_momentum: float = 0.9):
        check_floatx(library)
        self.library = library
        self.layers = library.layers
        self.bn_momentum = bn_momentum

    def network(self, architecture: Architecture) -> keras.Model:
        """Builds a whole network; see `build_network`."""
        images = self.library.Input(architecture.input_shape, name="image")
        x = self.stem(images, architecture.stem)
        for index, block in enumerate(architecture.blocks):
            x = self.block(x, block, f"block_{index}")
        logits = self.head(x, architecture.head, architecture.num_classes)
        return self.library.Model(images, logits, name="network")

    def stem(self, images: keras.KerasTensor, stem: Stem) -> keras.KerasTensor:
        """Adds a stem: pixels 0..255 to features."""
        x = self.rescale(images)
        return self._conv_bn(
            x, stem.filters, "stem", stem.kernel_size, stem.strides, stem.activation
        )

    def block(self, x: keras.KerasTensor, block: Block, name: str) -> keras.KerasTensor:
        """Adds a block: features to features.

        Args:
            x: Features, `(batch, height, width, channels)`.
            block: The block.
            name: Prefix of the names of its layers.
        """
        inputs, filters_in = x, x.shape[-1]
        shapes_agree = block.strides == 1 and filters_in == block.filters
        if block.skip:
            if shapes_agree:
                return x
            return self._conv_bn(x, block.filters, f"{name}_skip", strides=block.strides)
        if block.expansion != 1:
            expanded = expanded_filters(filters_in, block.expansion)
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
        return self.layers.Add(name=f"{name}_add")([x, inputs]) if shapes_agree else x

    def head(self, x: keras.KerasTensor, head: Head, num_classes: int) -> keras.KerasTensor:
        """Adds a head: features to float32 logits."""
        x = self._conv_bn(x, head.filters, "head", activation=head.activation)
        x = self.layers.GlobalAveragePooling2D(data_format=DATA_FORMAT, name="pool")(x)
        if head.dense_units:
            x = self.layers.Dense(head.dense_units, use_bias=False, name="head_dense")(x)
            x = self.activation(x, head.activation, "head_dense_activation")
        return self.layers.Dense(num_classes, dtype="float32", name="classes")(x)

    def rescale(self, images: keras.KerasTensor) -> keras.KerasTensor:
        """Adds the rescaling of pixels 0..255 to -1..1."""
        return make_rescaling(self.library)(images)

    def activation(self, x: keras.KerasTensor, function: str, name: str) -> keras.KerasTensor:
        """Adds an activation layer.

        Args:
            x: Features.
            function: Name of the activation as Keras 3 defines it.
            name: Name of the layer.
        """
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
            data_format=DATA_FORMAT,
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
            data_format=DATA_FORMAT,
            use_bias=False,
            depthwise_initializer=make_conv_initializer(self.library),
            name=name,
        )(x)
        return self._bn(x, name, block.activation)

    def _squeeze_excite(self, x, name):
        """Squeeze-and-excitation (Hu et al., arXiv:1709.01507, "Squeeze-and-Excitation Blocks").

        The gate is a hard sigmoid, as in MobileNetV3 (Howard et al., arXiv:1905.02244).
        """
        gate = self._attention_bottleneck([x], name)
        gate = self._conv(x.shape[-1], f"{name}_expand")(gate)
        gate = self.activation(gate, "hard_sigmoid", f"{name}_gate")
        return self.layers.Multiply(name=f"{name}_multiply")([x, gate])

    def _split_attention(self, parts, name):
        """Split attention (ResNeSt, Zhang et al., arXiv:2004.08955, "Split-Attention Block").

        The gates are a softmax over the splits for every channel. All operators are ones that
        TFLite has for 4-D tensors.
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
        # Of shape (batch, splits, 1, channels). The softmax needs the splits on the last axis.
        gates = layers.Concatenate(axis=1, name=f"{name}_logits")(logits)
        gates = layers.Permute((2, 3, 1), name=f"{name}_splits_last")(gates)
        gates = layers.Softmax(name=f"{name}_gates")(gates)
        gates = layers.Permute((3, 1, 2), name=f"{name}_splits_first")(gates)
        gated = []
        for split, part in enumerate(parts):
            cropping = ((split, len(parts) - 1 - split), (0, 0))
            gate = layers.Cropping2D(
                cropping, data_format=DATA_FORMAT, name=f"{name}_gate_{split}"
            )(gates)
            gated.append(layers.Multiply(name=f"{name}_multiply_{split}")([part, gate]))
        return self._sum(gated, f"{name}_sum")

    def _sum(self, values, name):
        """Adds the values one by one, as TFLite does, so that int8 has a range for each sum."""
        total = values[0]
        for index, value in enumerate(values[1:], 1):
            total = self.layers.Add(name=f"{name}_{index}")([total, value])
        return total

    def _attention_bottleneck(self, parts, name):
        """Global average pooling of the sum of the parts, 1x1 convolution, ReLU."""
        # The mean of the sum is the sum of the means, which costs much less.
        pooled = [
            self.layers.GlobalAveragePooling2D(
                data_format=DATA_FORMAT, keepdims=True, name=f"{name}_pool_{split}"
            )(part)
            for split, part in enumerate(parts)
        ]
        x = self._sum(pooled, f"{name}_pooled")
        x = self._conv(attention_filters(parts[0].shape[-1]), f"{name}_reduce")(x)
        return self.activation(x, "relu", f"{name}_relu")
