"""Distributions over the architectures of a space: Keras layers that hold the logits.

    FactorizedLogits:  p(A) = prod_l prod_m softmax(alpha_{l,m})[a_{l,m}]
    JointLogits:       p(A) = prod_l softmax(alpha_l)[entry(a_l)]

over blocks l and their variables m. Blocks are independent in both, and each entry of a
block (the blocks that can be chosen there, each once) has its probability; so all but
drawing and the gradient is written once. What a skipped block makes irrelevant does not
count: it has the log-probability of its `skip` and `filters` alone.

Reference: Yan et al., "FP-NAS: Fast Probabilistic Neural Architecture Search",
CVPR 2021, arXiv:2011.10949.
"""

from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from fpnas_keras.spaces import SearchBlock
from fpnas_keras.spaces.entries import Entries, RowMajor


class BlockLogits(keras.layers.Layer):
    """What both distributions share: they choose one entry in each block, independently.

    Args:
        blocks: The blocks of a space.
    """

    def __init__(self, blocks: Sequence[SearchBlock], **kwargs):
        # The logits, their softmax and its logarithm stay float32 under any policy.
        super().__init__(dtype="float32", **kwargs)
        self.blocks = tuple(blocks)
        self.entries = Entries(blocks)

    def log_probabilities(self) -> tf.Tensor:
        """log p of each entry, float32 of shape `(blocks, entries)`, -inf where none is."""
        raise NotImplementedError

    def entry_probabilities(self) -> tf.Tensor:
        """p of each entry, float32 of shape `(blocks, entries)`, 0 where none is."""
        return tf.exp(self.log_probabilities())

    def entry_gradient(self, weights: tf.Tensor) -> tf.Tensor:
        """sum_{l,j} w_{l,j} * d log p_l(j) / d alpha, in closed form (one-hot minus softmax).

        Args:
            weights: w, float32 of shape `(blocks, entries)`, 0 where none is.

        Returns:
            float32, shaped as `logits`.
        """
        raise NotImplementedError

    def _draw(self, count, uniforms):
        """Numbers of the entries of `count` samples, int32 of shape `(count, blocks)`."""
        raise NotImplementedError

    def sample(
        self,
        count: tf.Tensor | int,
        seed: tf.Tensor | int,
        step: tf.Tensor | int,
        stratified: bool = False,
    ) -> tf.Tensor:
        """Draws architectures; a pure function of its arguments and the logits.

        Stratified draws take, for each variable (for each block under joint logits),
        one sample from each of `count` equal parts of [0, 1), in a random order of its
        own. Every single sample still follows p(A); a choice of probability p comes
        floor(count * p) or ceil(count * p) times.

        Args:
            count: Number of architectures.
            seed: Seed of the run.
            step: Step of the run.
            stratified: Whether the draws of a step are stratified or independent.

        Returns:
            Index of the choice of each variable, int32 of shape
            `(count, blocks, variables)`; 0 for irrelevant variables.
        """
        key = tf.stack([tf.cast(seed, tf.int64), 2 * tf.cast(step, tf.int64)])

        def uniforms(width):
            values = tf.random.stateless_uniform([count, width], key)
            if not stratified:
                return values
            order = tf.cast(tf.argsort(values, axis=0), tf.float32)
            offset = tf.random.stateless_uniform([width], key + [0, 1])
            return (order + offset) / tf.cast(count, tf.float32)

        return self.entries.gather(self._draw(count, uniforms))

    def mode(self) -> tf.Tensor:
        """The most probable architecture, int32 of shape `(blocks, variables)`."""
        best = tf.argmax(self.log_probabilities(), axis=-1, output_type=tf.int32)
        return self.entries.gather(best)

    def log_prob(self, choices: tf.Tensor) -> tf.Tensor:
        """log p(A) of architectures.

        Args:
            choices: Integers of shape `(..., blocks, variables)`.

        Returns:
            float32 of shape `(...)`.
        """
        index = self.entries.flat(self.entries.index(choices))
        log_p = tf.gather(tf.reshape(self.log_probabilities(), [-1]), index)
        return tf.reduce_sum(log_p, axis=-1)

    def entropy(self) -> tf.Tensor:
        """H(A) = -E[log p(A)] in nats, a float32 scalar."""
        log_p = self.log_probabilities()
        return -tf.reduce_sum(tf.math.multiply_no_nan(log_p, tf.exp(log_p)))

    def gradient(self, choices: tf.Tensor, coefficients: tf.Tensor) -> tf.Tensor:
        """sum_k c_k * d log p(A_k) / d alpha, in closed form.

        Args:
            choices: A_k, integers of shape `(K, blocks, variables)`.
            coefficients: c_k, float32 of shape `(K,)`.

        Returns:
            float32, shaped as `logits`.
        """
        shape = self.entries.exists.shape
        index = self.entries.flat(self.entries.index(choices))
        each = tf.broadcast_to(coefficients[:, None], tf.shape(index))
        weights = tf.math.unsorted_segment_sum(each, index, self.entries.exists.size)
        return self.entry_gradient(tf.reshape(weights, shape))

    def probabilities(self) -> list[dict[str, dict]]:
        """For each block and each of its variables, the probability of each choice.

        That of a variable which a skipped block lacks is that where it is not skipped.

        Example:

        >>> search.distribution.probabilities()[1]["kernel_size"]
        {3: 0.5, 5: 0.5}
        """
        p = np.exp(self.log_probabilities().numpy().astype(np.float64))
        result = []
        for block, row in zip(self.blocks, p):
            result.append({})
            for name, (choices, chosen) in block.variables.items():
                if len(choices) > 1:
                    sums = np.bincount(chosen + 1, row[: len(chosen)], len(choices) + 1)[1:]
                    result[-1][name] = dict(zip(choices, (sums / sums.sum()).tolist()))
        return result


class FactorizedLogits(BlockLogits):
    """p(A) as a product of independent softmaxes, one for each variable of each block.

    One flat weight `logits` holds those of all variables that have more than one choice.

    Args:
        blocks: The blocks of a space.

    Reference: FP-NAS (arXiv:2011.10949), "factorized distribution".
    """

    def __init__(self, blocks: Sequence[SearchBlock], **kwargs):
        kwargs.setdefault("name", "factorized_logits")
        super().__init__(blocks, **kwargs)
        own = [
            [(len(choices), chosen) for choices, chosen in block.variables.values()]
            for block in self.blocks
        ]
        width, entries = max(map(len, own)), self.entries.exists.shape[1]
        # By (block, variable); a fixed variable has one choice and needs no logit.
        self.cardinalities = np.ones((len(own), width), np.int32)
        # The choice of each variable in each entry, -1 where it is irrelevant or missing.
        chosen = np.full((len(own), width, entries), -1, np.int32)
        for block, variables in enumerate(own):
            for variable, (cardinality, values) in enumerate(variables):
                self.cardinalities[block, variable] = cardinality
                chosen[block, variable, : len(values)] = values
        self._exists = np.arange(self.cardinalities.max()) < self.cardinalities[..., None]
        self._searched = self._exists & (self.cardinalities[..., None] > 1)
        # Positions of an entry's choices in the flattened array of all; irrelevant: past its end.
        starts = np.arange(0, self._exists.size, self._exists.shape[2], dtype=np.int32)
        positions = chosen + starts.reshape(len(own), width, 1)
        self._positions = np.where(chosen < 0, self._exists.size, positions)
        self._row_major = RowMajor(self.cardinalities)
        self._entry_of_row = np.concatenate(
            [self._lookup(*each) for each in zip(self.cardinalities, chosen)]
        )
        self.build()

    @staticmethod
    def _lookup(cardinalities, chosen):
        """The entry of each combination of choices, row-major."""
        table = np.zeros(cardinalities, np.int32)
        for entry in np.flatnonzero((chosen >= 0).any(axis=0)):
            # An irrelevant variable makes no difference: the entry is there for all its choices.
            column = tuple(slice(None) if each < 0 else each for each in chosen[:, entry])
            table[column] = entry
        return table.ravel()

    def build(self, input_shape: object = None) -> None:
        self.logits = self.add_weight(
            name="logits",
            shape=(int(self._searched.sum()),),
            initializer="zeros",
            autocast=False,  # not even inside a model that computes in bfloat16
        )
        self.built = True

    def log_probabilities(self) -> tf.Tensor:
        flat = tf.reshape(self.log_softmax(), [-1])
        log_p = tf.gather(tf.concat([flat, [0.0]], axis=0), self._positions)
        return tf.where(self.entries.exists, tf.reduce_sum(log_p, axis=1), -np.inf)

    def entry_gradient(self, weights: tf.Tensor) -> tf.Tensor:
        each = tf.broadcast_to(weights[:, None], self._positions.shape)
        size = self._exists.size
        sums = tf.math.unsorted_segment_sum(each, self._positions, size + 1)[:size]
        sums = tf.reshape(sums, self._exists.shape)
        softmax = tf.exp(self.log_softmax())
        gradient = sums - softmax * tf.reduce_sum(sums, axis=-1, keepdims=True)
        return tf.boolean_mask(gradient, self._searched)

    def log_softmax(self) -> tf.Tensor:
        """log p of each choice of each variable: float32, -inf where there is none.

        Its shape is `(blocks, variables, choices)`; the variables are those of
        `SearchBlock.variables`, in their order.
        """
        logits = tf.tensor_scatter_nd_add(
            tf.where(self._exists, 0.0, -np.inf), np.argwhere(self._searched), self.logits.value
        )
        return tf.nn.log_softmax(logits)

    def _draw(self, count, uniforms):
        rows = tf.reshape(tf.exp(self.log_softmax()), (-1, self._exists.shape[2]))
        drawn = _inverse_cumulative(rows, uniforms(rows.shape[0]), self.cardinalities.ravel())
        choices = tf.reshape(drawn, (count, *self.cardinalities.shape))
        return tf.gather(tf.constant(self._entry_of_row), self._row_major(choices))


class JointLogits(BlockLogits):
    """p(A) as a product of one softmax for each block, over all of its entries.

    Args:
        blocks: The blocks of a space.

    Reference: FP-NAS (arXiv:2011.10949), "joint distribution"; PARSEC (Casale et
    al., arXiv:1902.05116) has the same.
    """

    def __init__(self, blocks: Sequence[SearchBlock], **kwargs):
        kwargs.setdefault("name", "joint_logits")
        super().__init__(blocks, **kwargs)
        self.build()

    def build(self, input_shape: object = None) -> None:
        self.logits = self.add_weight(
            name="logits",
            shape=(int(self.entries.exists.sum()),),
            initializer="zeros",
            autocast=False,
        )
        self.built = True

    def assign(self, distribution: BlockLogits) -> None:
        """Makes p(A) that of another distribution over the same blocks, exactly."""
        self.logits.assign(tf.boolean_mask(distribution.log_probabilities(), self.entries.exists))

    def log_probabilities(self) -> tf.Tensor:
        logits = tf.tensor_scatter_nd_update(
            tf.fill(self.entries.exists.shape, -np.inf),
            np.argwhere(self.entries.exists),
            self.logits.value,
        )
        return tf.nn.log_softmax(logits)

    def entry_gradient(self, weights: tf.Tensor) -> tf.Tensor:
        softmax = tf.exp(self.log_probabilities())
        gradient = weights - softmax * tf.reduce_sum(weights, axis=-1, keepdims=True)
        return tf.boolean_mask(gradient, self.entries.exists)

    def _draw(self, count, uniforms):
        rows = tf.exp(self.log_probabilities())
        return _inverse_cumulative(rows, uniforms(rows.shape[0]), self.entries.exists.sum(axis=1))


def _inverse_cumulative(probabilities, uniforms, counts):
    """Draws from categorical distributions.

    Args:
        probabilities: One distribution a row, shape `(rows, choices)`.
        uniforms: In [0, 1), shape `(samples, rows)`.
        counts: Number of choices of each row.

    Returns:
        int32 of shape `(samples, rows)`.
    """
    cumulative = tf.cumsum(probabilities, axis=-1)
    drawn = tf.searchsorted(cumulative, tf.transpose(uniforms), side="right")
    # Rounding can leave the last cumulative probability just below 1.
    return tf.minimum(tf.transpose(drawn), counts - 1)
