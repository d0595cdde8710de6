"""The costs of all architectures of a space, evaluated inside the graph."""

import math
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from fpnas_keras.cost.costs import Cost
from fpnas_keras.errors import UserError
from fpnas_keras.spaces import VARIABLES, Space

_FILTERS = VARIABLES.index("filters")


class SpaceCost:
    """A cost over a whole space.

    The cost of an architecture is the sum of the costs of its parts. What a block costs depends on
    its own entry and on the filters that come into it. So the costs of all blocks, by filters in
    and entry, give the cost of every architecture.

    All costs are float64. In float32, single MACs are lost above 16.7M.

    Args:
        space: The space.
        cost: The cost of a part.

    Attributes:
        space: The space.
        stem_cost: Cost of the stem.
        block_costs: For each search block, float64 of shape `(filters in, entries)`: the cost on
            each of `space.filters_in(index)`.
        head_costs: Cost of the head, by the filters that come into it: float64 of shape
            `(filters in,)`.

    Raises:
        UserError: If the cost does not know all parts of the space.

    Example:

    ```python
    space_cost = SpaceCost(space, MacsCost())
    space_cost(distribution.sample(8, seed=0, step=0))  # float64, shape (8,)
    ```
    """

    def __init__(self, space: Space, cost: Cost):
        self.space = space
        missing = {}  # As an ordered set.

        def cost_of(part):
            try:
                return float(cost(part))
            except KeyError as error:
                missing[error.args[0]] = None
                return math.nan

        self.stem_cost = cost_of(space.stem_part())
        self.block_costs = [
            np.array(
                [
                    [sum(map(cost_of, parts)) for parts in entries]
                    for entries in space.block_parts(index)
                ],
                np.float64,
            )
            for index in range(len(space.blocks))
        ]
        self.head_costs = np.array([cost_of(part) for part in space.head_parts()], np.float64)
        if missing:
            raise UserError(
                f"the cost lacks {len(missing)} parts of the space `{space.name}` at "
                f"{space.input_shape}, the first ones: {'; '.join(list(missing)[:5])}"
            )

    def __call__(self, entries: tf.Tensor) -> tf.Tensor:
        """Costs of architectures.

        Args:
            entries: Entry of each search block, integers of shape `(samples, blocks)`.

        Returns:
            float64 of shape `(samples,)`.
        """
        entries = tf.cast(entries, tf.int64)
        filters_in = self._filters_in(entries)
        # The cost of a block is `block_costs[block][filters in, entry]`. The arrays have different
        # shapes, so they are gathered from one flat array. With shapes (1, 2) and (3, 4), block 0
        # begins at 0 and block 1 at 2; its cost for filters in 1 and entry 3 is at 2 + 1 * 4 + 3.
        flat_costs = np.concatenate([costs.ravel() for costs in self.block_costs])
        starts = np.cumsum([0] + [costs.size for costs in self.block_costs[:-1]])
        indices = starts + filters_in[:, :-1] * self.space.entries.counts + entries
        blocks = tf.reduce_sum(tf.gather(tf.constant(flat_costs), indices), axis=-1)
        return self.stem_cost + blocks + tf.gather(tf.constant(self.head_costs), filters_in[:, -1])

    def _filters_in(self, entries):
        """Index of the filters that come into each search block and, last, into the head.

        Args:
            entries: int64 of shape `(samples, blocks)`.

        Returns:
            int64 of shape `(samples, blocks + 1)`.
        """
        space = self.space
        filters_of_entries = tf.constant(space.entries.choices[..., _FILTERS].ravel())
        filters = tf.gather(filters_of_entries, entries + space.entries.offsets)
        # Column 0 is the stem, which has one choice of filters.
        filters = tf.pad(tf.cast(filters, tf.int64), [[0, 0], [1, 0]])
        sources = [space.filters_source(index) for index in range(len(space.blocks) + 1)]
        columns = [0 if source is None else source + 1 for source in sources]
        return tf.gather(filters, columns, axis=1)

    def expected(self, probabilities: tf.Tensor) -> tf.Tensor:
        """The exact expectation E[cost(A)] for A ~ p.

        Args:
            probabilities: p of each entry of each search block, shape `(blocks, entries)`. Search
                blocks are independent.

        Returns:
            A float64 scalar.
        """
        total = tf.constant(self.stem_cost, tf.float64)
        filters_p = tf.ones((1,), tf.float64)  # p of each of the filters in
        for index, (costs, p) in enumerate(zip(self.block_costs, tf.unstack(probabilities))):
            p = tf.cast(p[: costs.shape[1]], tf.float64)
            total += tf.reduce_sum(filters_p[:, None] * tf.constant(costs) * p[None, :])
            if not self.space.blocks[index].keeps_filters:
                filters = self._filters_of_entries(index)
                filters_p = tf.math.unsorted_segment_sum(p, filters, filters.max() + 1)
        return total + tf.reduce_sum(filters_p * tf.constant(self.head_costs))

    def expected_and_slope(self, probabilities: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The expectation E = E[cost], and p * dE / dp of each entry of each search block.

        The latter are the coefficients for which `BlockLogits.entry_gradient` returns dE / d alpha:
        dE / d alpha = sum dE / dp * dp / d alpha = sum (p * dE / dp) * d log p / d alpha.

        Args:
            probabilities: p, as for `expected`.

        Returns:
            E, a float64 scalar, and the coefficients, of the shape and dtype of `probabilities`.
        """
        with tf.GradientTape() as tape:
            tape.watch(probabilities)
            expected = self.expected(probabilities)
        return expected, probabilities * tape.gradient(expected, probabilities)

    def least(self) -> float:
        """Cost of the cheapest architecture of the space."""
        return self._extreme(np.min)

    def largest(self) -> float:
        """Cost of the most expensive architecture of the space."""
        return self._extreme(np.max)

    def filters_out(self, index: int) -> np.ndarray:
        """Index of the filters that leave search block `index`, among those that can.

        Returns:
            Integers of shape `(filters in, entries)`, as `block_costs[index]`.
        """
        shape = self.block_costs[index].shape
        if self.space.blocks[index].keeps_filters:
            return np.broadcast_to(np.arange(shape[0])[:, None], shape)
        return np.broadcast_to(self._filters_of_entries(index), shape)

    def _extreme(self, reduce: Callable) -> float:
        """Dynamic programming: the extreme up to each search block, by the filters that leave."""
        extremes = np.zeros(1)
        for index, costs in enumerate(self.block_costs):
            filters_out, totals = self.filters_out(index), extremes[:, None] + costs
            choices = range(filters_out.max() + 1)
            extremes = np.array([reduce(totals[filters_out == choice]) for choice in choices])
        return self.stem_cost + float(reduce(extremes + self.head_costs))

    def _filters_of_entries(self, index):
        """The choice of filters of each entry of a search block that chooses them."""
        return self.space.blocks[index].entries[:, _FILTERS]
