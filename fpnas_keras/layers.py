"""Keras layers of the search: architecture logits, and layers that are sliced.

A sliced layer stores its weights at their largest size and uses the leading
channels (and the middle of the kernel) that tensors ask for at call time, so
that one graph runs every architecture at that architecture's price.
"""

from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from fpnas_keras.spaces.space import RELEVANT_WHEN_SKIPPED, VARIABLES, SearchBlock

BN_EPSILON = 1e-3
_SKIP = VARIABLES.index("skip")
_IRRELEVANT = np.array([name not in RELEVANT_WHEN_SKIPPED for name in VARIABLES])


def rescaling() -> keras.layers.Rescaling:
    """The first layer of every network: pixels 0..255 to -1..1."""
    return keras.layers.Rescaling(1 / 127.5, -1.0, name="rescaling")


def conv_initializer() -> keras.initializers.Initializer:
    """A fresh initializer for convolutions: variance 2 / fan_out, as MobileNets have it.

    It suits depthwise kernels too, whose fan_out Keras takes to be one channel's.
    """
    return keras.initializers.VarianceScaling(2.0, "fan_out")


class FactorizedLogits(keras.layers.Layer):
    """p(A) as a product of independent softmaxes, one for each variable of each block.

        p(A) = prod_l prod_m softmax(alpha_{l,m})[a_{l,m}]

    What a skipped block makes irrelevant does not count: its log-probability is
    that of `skip` and `filters` alone, and the entropy follows the chain rule.

    Args:
        blocks: The blocks of a space.

    Reference: FP-NAS (arXiv:2011.10949), "factorized distribution".
    """

    def __init__(self, blocks: Sequence[SearchBlock], **kwargs):
        kwargs.setdefault("name", "distribution")
        # The logits, their softmax and its logarithm stay float32 under any policy.
        super().__init__(dtype="float32", **kwargs)
        self.blocks = tuple(blocks)
        self.cardinalities = np.array([block.cardinalities for block in blocks], np.int32)
        width = self.cardinalities.max()
        # Which entries of (blocks, variables, choices) exist; fixed variables need no logit.
        self._exists = np.arange(width) < self.cardinalities[..., None]
        self._searched = self._exists & (self.cardinalities[..., None] > 1)
        skip_choices = np.zeros((len(blocks), width), bool)
        for index, block in enumerate(blocks):
            skip_choices[index, : len(block.skip)] = block.skip
        self._skip_choices = skip_choices
        self.build()

    def build(self, input_shape: object = None) -> None:
        self.logits = self.add_weight(
            name="logits",
            shape=(int(self._searched.sum()),),
            initializer="zeros",
            autocast=False,  # not even inside a model that computes in bfloat16
        )
        self.built = True

    def log_probabilities(self) -> tf.Tensor:
        """log softmax(alpha), shape `(blocks, variables, choices)`, -inf where none is."""
        positions = np.argwhere(self._searched)
        logits = tf.tensor_scatter_nd_add(
            tf.where(self._exists, 0.0, -np.inf), positions, self.logits.value
        )
        return tf.nn.log_softmax(logits)

    def probabilities(self) -> list[dict[str, dict]]:
        """For each block and each variable that is searched, the probability of each choice.

        Example:

        >>> search.distribution.probabilities()[1]["kernel_size"]
        {3: 0.5, 5: 0.5}
        """
        values = tf.exp(self.log_probabilities()).numpy()
        return [
            {
                name: dict(zip(getattr(block, name), row.tolist()))
                for name, row in zip(VARIABLES, rows)
                if len(getattr(block, name)) > 1
            }
            for block, rows in zip(self.blocks, values)
        ]

    def block_probabilities(self) -> list[tf.Tensor]:
        """For each block the probability of each combination of its choices, row-major."""
        result = []
        blocks = tf.unstack(tf.exp(self.log_probabilities()))
        for rows, cardinalities in zip(blocks, self.cardinalities):
            joint = tf.ones((1,))
            for row, cardinality in zip(tf.unstack(rows), cardinalities):
                joint = tf.reshape(joint[:, None] * row[None, :cardinality], [-1])
            result.append(joint)
        return result

    def sample(
        self, count: tf.Tensor | int, seed: tf.Tensor | int, step: tf.Tensor | int
    ) -> tf.Tensor:
        """Draws architectures; a pure function of its arguments and the logits.

        Args:
            count: Number of architectures.
            seed: Seed of the run.
            step: Step of the run.

        Returns:
            Index of the choice of each variable, int32 of shape
            `(count, blocks, variables)`; 0 for irrelevant variables.
        """
        shape = tf.concat([[count], self.cardinalities.shape], axis=0)
        key = tf.stack([tf.cast(seed, tf.int64), tf.cast(step, tf.int64)])
        uniform = tf.random.stateless_uniform(shape, key)
        cumulative = tf.cumsum(tf.exp(self.log_probabilities()), axis=-1)
        choices = tf.reduce_sum(tf.cast(uniform[..., None] >= cumulative, tf.int32), axis=-1)
        # Rounding can leave the last cumulative probability just below 1.
        choices = tf.minimum(choices, self.cardinalities - 1)
        return tf.where(self._relevant(choices), choices, 0)

    def mode(self) -> tf.Tensor:
        """The most probable architecture, int32 of shape `(blocks, variables)`."""
        log_p = self.log_probabilities()
        best = tf.argmax(log_p, axis=-1, output_type=tf.int32)
        log_best = tf.reduce_max(log_p, axis=-1)
        # Not to skip competes with its best combination, not with all of them together.
        others = tf.reduce_sum(tf.where(_IRRELEVANT, log_best, 0.0), axis=-1)
        value = log_p[:, _SKIP] + tf.where(self._skip_choices, 0.0, others[:, None])
        skip = tf.argmax(value, axis=-1, output_type=tf.int32)
        choices = tf.concat([skip[:, None], best[:, 1:]], axis=-1)
        return tf.where(self._relevant(choices), choices, 0)

    def log_prob(self, choices: tf.Tensor) -> tf.Tensor:
        """log p(A) of architectures.

        Args:
            choices: Integers of shape `(..., blocks, variables)`.

        Returns:
            float32 of shape `(...)`.
        """
        one_hot = tf.one_hot(choices, self._exists.shape[-1])
        finite = tf.where(self._exists, self.log_probabilities(), 0.0)
        log_p = tf.reduce_sum(one_hot * finite, axis=-1)
        return tf.reduce_sum(tf.where(self._relevant(choices), log_p, 0.0), axis=[-2, -1])

    def entropy(self) -> tf.Tensor:
        """H(A) = -E[log p(A)] in nats, a float32 scalar."""
        log_p = tf.where(self._exists, self.log_probabilities(), 0.0)
        p = tf.where(self._exists, tf.exp(log_p), 0.0)
        entropies = -tf.reduce_sum(p * log_p, axis=-1)
        kept = tf.reduce_sum(tf.where(self._skip_choices, 0.0, p[:, _SKIP]), axis=-1)
        return tf.reduce_sum(tf.where(_IRRELEVANT, kept[:, None] * entropies, entropies))

    def gradient(self, choices: tf.Tensor, coefficients: tf.Tensor) -> tf.Tensor:
        """sum_k c_k * d log p(A_k) / d alpha, in closed form (one-hot minus softmax).

        Args:
            choices: A_k, integers of shape `(K, blocks, variables)`.
            coefficients: c_k, float32 of shape `(K,)`.

        Returns:
            float32, shaped as `logits`.
        """
        score = tf.one_hot(choices, self._exists.shape[-1]) - tf.exp(self.log_probabilities())
        score = tf.where(self._relevant(choices)[..., None], score, 0.0)
        total = tf.reduce_sum(coefficients[:, None, None, None] * score, axis=0)
        return tf.boolean_mask(total, self._searched)

    def _relevant(self, choices):
        """Which variables of `choices` matter, bool, shaped as `choices`."""
        skipped = tf.reduce_any(
            tf.one_hot(choices[..., _SKIP], self._exists.shape[-1], True, False, dtype=tf.bool)
            & self._skip_choices,
            axis=-1,
        )
        return ~(skipped[..., None] & _IRRELEVANT)


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
