"""FBNetV2's DMaskingNAS, built from the layers of the supernet, for comparisons.

Every step computes every choice of every block, weighted by a Gumbel-softmax of its logits. Kernel
sizes, activations, attention and skipping are computed side by side. Filters and expansions are
masks over the widest tensor. Where the paper leaves it open, this code does what is cheaper: all
choices share one set of weights, and all expansions share one convolution.

Reference: Wan et al., "FBNetV2: Differentiable Neural Architecture Search for Spatial and Channel
Dimensions", CVPR 2020, arXiv:2004.05565; temperature as in FBNet, arXiv:1812.03443.
"""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

import fpnas_keras as fpnas
from fpnas_keras.networks.supernet import Supernet, SupernetBlock
from fpnas_keras.spaces import Space

# From 5 down by exp(-0.045) in each of 90 epochs.
FIRST_TEMPERATURE, DECAY = 5.0, 0.045 * 90


class DMaskingNAS(fpnas.ArchitectureSearch):
    """A search whose step trains the weights, and then the logits, through all choices at once.

    The gradient of the cost, its controller, the derivation and the warm-up are those of
    `ArchitectureSearch`.

    Args:
        space: The space.
        total_steps: Steps of the search, over which the temperature falls.
        **kwargs: As in `ArchitectureSearch`.
    """

    def __init__(self, space: Space, total_steps: int, **kwargs: Any):
        super().__init__(space, distribution="factorized", **kwargs)
        if any(set(block.search_block.splits) - {0, 1} for block in self.supernet.blocks):
            raise ValueError("the masks here are for squeeze-excite, not for split-attention")
        self.total_steps = total_steps

    def train_step(self, data) -> dict[str, tf.Tensor]:
        """One update of the weights on the first batch and of the logits on the second."""
        train_batch, validation_batch = data
        variables = self.supernet.stem_variables + self.supernet.body_variables
        weights = [variable.value for variable in variables]
        with tf.GradientTape() as tape:
            train_loss, train_accuracy = self._evaluate_masked(train_batch, part=0)
        gradients = tape.gradient(train_loss, weights, unconnected_gradients="zero")
        logits = self.distribution.logits.value
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(logits)
            loss, accuracy = self._evaluate_masked(validation_batch, part=1)
        logits_gradient = tape.gradient(loss, logits)
        self.optimizer.apply(gradients, variables)
        expected_cost, slope = self.space_cost.expected_and_slope(
            self.distribution.entry_probabilities()
        )
        coefficient = tf.constant(0.0)
        if self.cost.target is not None:
            coefficient = self._cost_coefficient(expected_cost)
            logits_gradient += coefficient * self._cost_gradient(None, slope)
        tf.cond(
            self._is_warming_up(),
            lambda: None,
            lambda: self._update_logits(logits_gradient),
        )
        self.step.assign_add(1)
        self._track(
            train_loss=train_loss,
            train_accuracy=train_accuracy,
            validation_loss=loss,
            validation_accuracy=accuracy,
            entropy=self.distribution.entropy(),
            expected_cost=expected_cost,
            cost_coefficient=coefficient,
        )
        return {name: tracker.result() for name, tracker in self._trackers.items()}

    def _evaluate_masked(self, batch, part):
        images, labels = batch
        logits = masked_network(self.supernet, images, self.choice_weights(part))
        loss = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
        accuracy = keras.metrics.sparse_categorical_accuracy(labels, logits)
        return tf.reduce_mean(loss), tf.reduce_mean(accuracy)

    def choice_weights(self, part: int) -> list[dict[str, tf.Tensor]]:
        """Gumbel-softmax weights of the choices of each variable, for each block."""
        log_p = self.distribution.log_softmax()
        done = tf.cast(self.step, tf.float32) / self.total_steps
        temperature = FIRST_TEMPERATURE * tf.exp(-DECAY * done)
        key = tf.stack([tf.cast(self.seed, tf.int64), 2 * self.step + part])
        uniform = tf.random.stateless_uniform(log_p.shape, key, np.finfo(np.float32).tiny)
        weights = tf.nn.softmax((log_p - tf.math.log(-tf.math.log(uniform))) / temperature)
        return [
            {
                name: weights[row, column, : len(choices)]
                for column, (name, (choices, _)) in enumerate(block.variables.items())
            }
            for row, block in enumerate(self.space.blocks)
        ]


def masked_network(
    supernet: Supernet, images: tf.Tensor, weights: list[dict[str, tf.Tensor]]
) -> tf.Tensor:
    """Logits of the weighted sum of all architectures.

    Args:
        supernet: The shared weights.
        images: Pixels 0..255.
        weights: For each block of the space, the weight of each choice of each variable.
    """
    x, filters_in = supernet.features(images), tf.ones(1)
    for block, index in zip(supernet.blocks, supernet.search_block_indices):
        x = masked_block(block, x, weights[index], filters_in)
        if not block.search_block.keeps_filters:
            filters_in = weights[index]["filters"]
    x = supernet.head_activation(supernet.head_bn(supernet.head(x)))
    return supernet.classes(tf.reduce_mean(x, axis=[1, 2]))


def masked_block(
    block: SupernetBlock, inputs: tf.Tensor, weights: dict[str, tf.Tensor], filters_in: tf.Tensor
) -> tf.Tensor:
    """The weighted sum of the outputs of all choices of a block.

    Args:
        block: The block.
        inputs: Features with the largest number of input channels, masked.
        weights: The weight of each choice of each variable.
        filters_in: The weight of each number of input channels.
    """
    choices = block.search_block
    # Of each pair of input channels and expansion, which decide the expanded channels.
    pair_weights = filters_in[:, None] * weights["expansion"]

    def activate(x):
        functions = [keras.activations.get(name) for name in choices.activation]
        return _sum(weights["activation"], [function(x) for function in functions])

    x = _expand(block, inputs, weights, pair_weights, activate)
    parts = [block.depthwise[0](x, kernel_size=size) for size in choices.kernel_size]
    parts = [activate(block.depthwise_bn[0](part)) for part in parts]
    x = _mask(pair_weights, block.expanded) * _sum(weights["kernel_size"], parts)
    gated = [x * _gate(block, x, pair_weights) if splits else x for splits in choices.splits]
    x = _sum(weights["splits"], gated)
    x = block.project_bn(block.project(x, filters=block.project.shape[-1]))
    # The numbers of output channels, and their weights.
    options = (block.filters_in, filters_in)
    if not choices.keeps_filters:
        options = (choices.filters, weights["filters"])
    mask = _mask(options[1], np.array(options[0]))
    x = mask * x
    added = _added(block, inputs, filters_in, options)
    if added is not None:
        x += added
    if True in choices.skip:
        skipped = inputs if block.shapes_always_match else mask * block.skip_bn(block.skip(inputs))
        x = _sum(weights["skip"], [skipped if skip else x for skip in choices.skip])
    return x


def _expand(block, inputs, weights, pair_weights, activate):
    """The weighted sum of the expansions. An expansion of 1 has no convolution."""
    expansions, widest = block.search_block.expansion, int(block.expanded.max())
    x = 0.0
    if 1 in expansions:
        unused = widest - inputs.shape[-1]
        weight = weights["expansion"][expansions.index(1)]
        x += weight * tf.pad(inputs, [[0, 0], [0, 0], [0, 0], [0, unused]])
    if set(expansions) != {1}:
        convolved = pair_weights * np.not_equal(expansions, 1).astype(np.float32)
        expanded = activate(block.expand_bn(block.expand(inputs, filters=widest)))
        x += _mask(convolved, block.expanded) * expanded
    return x


def _added(block, inputs, filters_in, options):
    """The residual connection, weighted by how much input and output have the same channels."""
    if block.shapes_always_match or not block.shapes_can_match:
        return inputs if block.shapes_always_match else None
    equal = np.equal.outer(block.filters_in, options[0]).astype(np.float32)
    agree = tf.reduce_sum(filters_in[:, None] * options[1] * equal)
    filters = block.project.shape[-1]
    inputs = inputs[..., :filters]
    return agree * tf.pad(inputs, [[0, 0], [0, 0], [0, 0], [0, filters - inputs.shape[-1]]])


def _gate(block, x, pair_weights):
    """The gate of squeeze-excite."""
    pooled = tf.reduce_mean(x, axis=[1, 2], keepdims=True)
    widest = int(block.bottleneck.max())
    bottleneck = tf.nn.relu(block.attention_reduce(pooled, filters=widest))
    bottleneck *= _mask(pair_weights, block.bottleneck)
    return keras.activations.hard_sigmoid(block.attention_expand(bottleneck, filters=x.shape[-1]))


def _mask(weights, widths):
    """The sum of w * (1 for the first `width` channels, else 0), of shape `(widest,)`."""
    masks = (np.arange(widths.max()) < widths[..., None]).astype(np.float32)
    return tf.reduce_sum(weights[..., None] * masks, axis=list(range(widths.ndim)))


def _sum(weights, values):
    """The weighted sum. The weight of a single choice is 1."""
    if len(values) == 1:
        return values[0]
    return tf.add_n([weight * value for weight, value in zip(tf.unstack(weights), values)])
