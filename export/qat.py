"""Quantization-aware training: fine-tuning with weights and activations rounded as in int8.

tensorflow-model-optimization works on models of tf_keras only. So the network is built again from
tf_keras layers. It gets the weights of the Keras model, is fine-tuned, and is then converted.
"""

import sys

import keras
import numpy as np
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras
from absl import logging
from tensorflow_model_optimization.python.core.quantization.keras.default_8bit import (
    default_8bit_quantize_registry,
)

from fpnas_keras.architecture import Architecture
from fpnas_keras.errors import UserError
from fpnas_keras.networks import NetworkBuilder

_quantize = tfmot.quantization.keras
# Of hard swish. Of 3 itself the converter makes HARD_SWISH, unless there is rounding in between.
_SHIFT = 3.000001
_CALIBRATION_BATCHES = 50
# Ranges are settled when no end moves by more than this share.
_NEAR, _MOST_REPEATS = 0.01, 30
_NO_RANGE = 1e-6
# Largest difference of a logit between a model and its twin, relative to the largest logit.
_MAX_DIFFERENCE = 1e-3
# Of tfmot's moving averages of ranges.
_DECAY = 0.999
# The layers need no AutoGraph, which takes as long as all else: it rewrites each call of each.
_without_autograph = tf.autograph.experimental.do_not_convert


class TwinBuilder(NetworkBuilder):
    """Builds networks of tf_keras layers that tfmot can quantize, for the same function."""

    def __init__(self):
        super().__init__(library=tf_keras)

    def rescale(self, images: object) -> object:
        """As in `NetworkBuilder`; in two steps, so that what is between them is rounded too."""
        x = self.layers.Rescaling(1 / 127.5, name="rescaling")(images)
        return self.layers.Rescaling(1.0, -1.0, name="rescaling_shift")(x)

    def activation(self, x: object, function: str, name: str) -> object:
        """As in `NetworkBuilder`."""
        layers = self.layers
        if function == "relu6":
            return layers.ReLU(6.0, name=name)(x)
        if function not in ("hard_silu", "hard_sigmoid"):
            return super().activation(x, function, name)
        # As in Keras 3: tf_keras has no hard_silu, and its hard_sigmoid is different. XNNPACK runs
        # these simple layers in int8, but not HARD_SWISH.
        gate = layers.Rescaling(1.0, _SHIFT, name=f"{name}_shift")(x)
        gate = layers.ReLU(6.0, name=f"{name}_relu6")(gate)
        gate = layers.Rescaling(1 / 6, name=f"{name}_scale")(gate)
        return gate if function == "hard_sigmoid" else layers.Multiply(name=name)([x, gate])


@_without_autograph
def twin(model: keras.Model, architecture: Architecture) -> tf_keras.Model:
    """The network of a Keras model in tf_keras, with the same weights.

    Args:
        model: The Keras model, or one that has it as a part: pixels to logits.
        architecture: Its architecture.

    Raises:
        UserError: When the model computes something else than its architecture.
    """
    built = TwinBuilder().network(architecture)
    # Both build their layers in one order, but some of tf_keras' weights stand in another.
    plain = architecture.build()
    plain.set_weights(model.get_weights())
    for layer in plain.layers:
        if layer.weights:
            built.get_layer(layer.name).set_weights(layer.get_weights())
    x = np.random.default_rng(0).uniform(0, 255, (4, *architecture.input_shape)).astype(np.float32)
    # A softmax in the model leaves its logits but for a constant.
    expected, received = (
        logits - logits.mean(axis=-1, keepdims=True)
        for logits in (model.predict_on_batch(x), built.predict_on_batch(x))
    )
    difference = np.abs(expected - received).max()
    if not difference <= _MAX_DIFFERENCE * max(1.0, np.abs(expected).max()):
        raise UserError(
            "the model must compute what its architecture says, to be fine-tuned: something stands "
            "before or behind its network. --quantize=int8 works for any model. Received: logits "
            f"that differ by {difference:.2g}"
        )
    return built


def tuned_network(tuned: tf_keras.Model, architecture: Architecture) -> keras.Model:
    """The network of Keras with the weights of a fine-tuned one.

    Args:
        tuned: The result of `fine_tune`.
        architecture: Its architecture.
    """
    network = architecture.build()
    values = {each.name: each.numpy() for each in tuned.weights}
    for layer in network.layers:
        own = [f"{layer.name}/{each.name}:0" for each in layer.weights]
        # tf_keras has another name for depthwise kernels.
        own = [name if name in values else name.replace("/", "/depthwise_") for name in own]
        layer.set_weights([values[name] for name in own])
    return network


def with_softmax(model: tf_keras.Model) -> tf_keras.Model:
    """A model of tf_keras that gives probabilities instead of logits."""
    softmax = tf_keras.layers.Softmax(name="probabilities")
    # A fixed name: the same model gives the same file.
    return tf_keras.Model(model.input, softmax(model.output), name="scores")


def fine_tune(
    network: tf_keras.Model,
    batches: tf.data.Dataset,
    epochs: int = 3,
    learning_rate: float = 0.01,
    sparsity: float = 0.0,
) -> tf_keras.Model:
    """Fine-tunes a network, with weights and activations rounded as in the int8 file.

    Args:
        network: The `twin` of a trained model.
        batches: Pixels and labels; a new iteration is a new epoch.
        epochs: Epochs.
        learning_rate: Peak learning rate, cosine to 0.
        sparsity: Share of the weights of 1x1 convolutions to set to 0. This takes another `epochs`
            epochs, before the fine-tuning.

    Returns:
        A model of tf_keras, to be converted as "int8" without representative images.
    """
    if sparsity:
        network = _prune(network, batches, epochs, learning_rate, sparsity)
    quantized = quantize(network, batches.take(_CALIBRATION_BATCHES), keeps_zeros=sparsity > 0)
    _fit(quantized, batches, epochs, learning_rate)
    return quantized


@_without_autograph
def quantize(
    network: tf_keras.Model,
    batches: tf.data.Dataset,
    keeps_zeros: bool = False,
) -> tf_keras.Model:
    """A network whose weights and activations are rounded as in the int8 file.

    Args:
        network: A network of a `TwinBuilder`.
        batches: Inputs and labels, from which the ranges of activations are taken.
        keeps_zeros: Whether weights that are 0 stay 0.
    """
    annotated = tf_keras.models.clone_model(network, clone_function=_annotate)
    annotated.set_weights(network.get_weights())
    with _quantize.quantize_scope({"_OutputOnly": _OutputOnly}):
        if keeps_zeros:
            scheme = tfmot.experimental.combine.Default8BitPrunePreserveQuantizeScheme()
            quantized = _quantize.quantize_apply(annotated, scheme)
        else:
            quantized = _quantize.quantize_apply(annotated)
    _calibrate(quantized, batches)
    return quantized


def _calibrate(model, batches):
    """Sets the ranges of activations to the least and largest value on some batches.

    tfmot starts them at -6 to 6 and moves them by a thousandth a step, so that a short training
    would end far from the ranges of its activations.
    """
    pixels, moving = _range_variables(model)
    for each, value in zip(pixels, (0.0, 255.0), strict=True):
        each.assign(value)
    # Else training=True, which moves the ranges, would also take the statistics of the batch.
    norms = [
        each.layer
        for each in model.layers
        if isinstance(getattr(each, "layer", None), tf_keras.layers.BatchNormalization)
    ]
    for norm in norms:
        norm.trainable = False

    @tf.function(reduce_retracing=True, autograph=False)
    def observe(x):
        """The ends of the ranges on a batch. The ranges stay as they are."""
        before = [tf.identity(each) for each in moving]
        model(x, training=True)
        found = [(new - _DECAY * old) / (1 - _DECAY) for new, old in zip(moving, before)]
        for each, value in zip(moving, before):
            each.assign(value)
        return tf.stack(found)

    # What a layer takes is right as soon as all ranges before it are.
    (first, _), *_ = batches.take(1)
    for _ in range(_MOST_REPEATS):
        ranges = np.array([each.numpy() for each in moving])
        found = observe(first).numpy()
        for each, value in zip(moving, found):
            each.assign(value)
        if np.allclose(found, ranges, rtol=_NEAR, atol=_NEAR):
            break
    ranges = np.array([observe(x).numpy() for x, _ in batches])
    least, largest = ranges.min(axis=0), ranges.max(axis=0)
    bounds = _useful_ranges(model)
    ends = zip(moving[::2], moving[1::2], least[::2], largest[1::2], strict=True)
    for low, high, low_value, high_value in ends:
        bound = bounds.get(low.name.split("/")[-2], (-np.inf, np.inf))
        low_value, high_value = np.clip((low_value, high_value), *bound)
        low.assign(low_value)
        # XNNPACK refuses a layer that always gives 0.
        high.assign(high_value if high_value - low_value > _NO_RANGE else low_value + 1.0)
    for norm in norms:
        norm.trainable = True


def _range_variables(model):
    """The ends of the range of the pixels, and those of all activations: least, largest, ..."""
    pixels, activations = [], []
    for each in model.non_trainable_variables:
        layer, name = each.name.removesuffix(":0").split("/")[-2:]
        if name.endswith(("_min", "_max")) and "kernel" not in name:
            (pixels if layer.startswith("quantize_layer") else activations).append(each)
    return pixels, activations


def _useful_ranges(model):
    """Ranges of layers outside of which a hard swish or hard sigmoid gives the same anyway.

    Both add 3 and clip to 0..6. So a hard swish is 0 for everything below -3.
    """
    bounds = {}
    for layer in model.layers:
        if not layer.name.endswith(("_activation_shift", "_gate_shift")):
            continue
        bounds[layer.name] = (0.0, 6.0)
        source = layer.inbound_nodes[0].inbound_layers
        bounds[source.name] = (-3.0, 3.0 if layer.name.endswith("_gate_shift") else np.inf)
    return bounds


def _fit(model, batches, epochs, learning_rate, callbacks=()):
    steps = int(batches.cardinality()) * epochs
    schedule = tf_keras.optimizers.schedules.CosineDecay(learning_rate, steps)
    model.compile(
        optimizer=tf_keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True),
        loss=tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    # A bar would fill a log file.
    verbose = 1 if sys.stderr.isatty() else 2
    model.fit(batches, epochs=epochs, callbacks=list(callbacks), verbose=verbose)


class _OutputOnly(_quantize.QuantizeConfig):
    """Rounds what a layer gives, which tfmot would not touch."""

    def get_weights_and_quantizers(self, layer):
        return []

    def get_activations_and_quantizers(self, layer):
        return []

    def set_quantize_weights(self, layer, quantize_weights):
        pass

    def set_quantize_activations(self, layer, quantize_activations):
        pass

    def get_output_quantizers(self, layer):
        return [
            _quantize.quantizers.MovingAverageQuantizer(
                num_bits=8, per_axis=False, symmetric=False, narrow_range=False
            )
        ]

    def get_config(self):
        return {}


_REGISTRY = default_8bit_quantize_registry.Default8BitQuantizeRegistry()


def _annotate(layer):
    known = isinstance(layer, tf_keras.layers.BatchNormalization) or _REGISTRY.supports(layer)
    if isinstance(layer, tf_keras.layers.InputLayer):
        return layer
    is_sigmoid = isinstance(layer, tf_keras.layers.Activation) and layer.name.endswith("_gate")
    if known and not is_sigmoid:
        return _quantize.quantize_annotate_layer(layer)
    return _quantize.quantize_annotate_layer(layer, _OutputOnly())


def _prune(network, batches, epochs, learning_rate, sparsity):
    """Sets the smallest weights of the 1x1 convolutions to 0, step by step."""
    steps = int(batches.cardinality()) * epochs
    schedule = tfmot.sparsity.keras.PolynomialDecay(
        0.0, sparsity, 0, max(1, steps * 2 // 3), frequency=max(1, steps // 50)
    )

    def prunable(layer):
        if isinstance(layer, tf_keras.layers.Conv2D) and layer.kernel_size == (1, 1):
            return tfmot.sparsity.keras.prune_low_magnitude(layer, pruning_schedule=schedule)
        return layer

    pruned = tf_keras.models.clone_model(network, clone_function=prunable)
    for layer in network.layers:
        if layer.weights:
            own = next(each for each in pruned.layers if each.name.endswith(layer.name))
            own.set_weights(layer.get_weights() + own.get_weights()[len(layer.weights) :])
    logging.info("pruning to %.0f%%", 100 * sparsity)
    _fit(pruned, batches, epochs, learning_rate, [tfmot.sparsity.keras.UpdatePruningStep()])
    return tfmot.sparsity.keras.strip_pruning(pruned)
