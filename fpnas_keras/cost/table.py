"""A cost over a whole space, evaluated inside the graph."""

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from fpnas_keras.cost.costs import MacsCost
from fpnas_keras.spaces import VARIABLES, Space

_FILTERS = VARIABLES.index("filters")


class CostTable:
    """Costs of all blocks of a space by (filters in, own choices).

    The cost of a network is the sum of its blocks' entries and of the fixed
    stem. Everything is float64: float32 loses single MACs above 16.7M.

    Args:
        space: The space.
        cost: `MacsCost`, `ParamsCost` or what has their methods.

    Example:

    ```python
    table = CostTable(space, MacsCost())
    table(distribution.sample(8, seed=0, step=0))  # float64, shape (8,)
    ```
    """

    def __init__(self, space: Space, cost: MacsCost):
        sizes = space.input_sizes()
        self.cardinalities = space.cardinalities
        self.fixed = float(cost.stem(space.stem, space.input_shape[:2], space.input_shape[2]))
        # One float64 array a block: (choices of filters in, own choices row-major).
        self.blocks = [
            np.array(
                [
                    [cost.block(each, sizes[index], filters) for each in block.all_blocks(filters)]
                    for filters in space.filters_in(index)
                ],
                np.float64,
            )
            for index, block in enumerate(space.blocks)
        ]
        # The head, by the filters that reach it.
        self.heads = np.array(
            [
                cost.head(space.head, sizes[-1], filters, space.num_classes)
                for filters in space.filters_in(len(space.blocks))
            ],
            np.float64,
        )
        # The block whose choice of filters reaches each block and, last, the head.
        self.sources = [space.filters_source(index) for index in range(len(space.blocks) + 1)]

    def __call__(self, choices: tf.Tensor) -> tf.Tensor:
        """Costs of architectures.

        Args:
            choices: Integers of shape `(samples, blocks, variables)`.

        Returns:
            float64 of shape `(samples,)`.
        """
        # Where the row of block b with filters in i begins in the flat table.
        row_sizes = np.array([block.shape[1] for block in self.blocks])
        first_rows = np.cumsum([0] + [block.size for block in self.blocks[:-1]])
        flat = np.concatenate([block.ravel() for block in self.blocks])
        ones = np.ones_like(self.cardinalities[:, :1])
        reverse = np.concatenate([self.cardinalities[:, 1:], ones], axis=1)[:, ::-1]
        place_values = np.cumprod(reverse, axis=1)[:, ::-1]
        own = tf.reduce_sum(choices * tf.constant(place_values, choices.dtype), axis=-1)
        # Column 0 stands for the stem, which has one choice.
        filters = tf.pad(tf.cast(choices[..., _FILTERS], tf.int64), [[0, 0], [1, 0]])
        sources = [0 if source is None else source + 1 for source in self.sources]
        filters_in = tf.gather(filters, sources, axis=1)
        index = first_rows + filters_in[:, :-1] * row_sizes + tf.cast(own, tf.int64)
        blocks = tf.reduce_sum(tf.gather(tf.constant(flat), index), axis=-1)
        return self.fixed + blocks + tf.gather(tf.constant(self.heads), filters_in[:, -1])

    def expected(self, block_probabilities: Sequence[tf.Tensor]) -> tf.Tensor:
        """The exact expectation of the cost, E[cost(A)] for A ~ p.

        Args:
            block_probabilities: For each block the probabilities of its own
                choices, row-major, shape `(own choices,)`; blocks are independent.

        Returns:
            A float64 scalar.
        """
        total = tf.constant(self.fixed, tf.float64)
        filters_in = tf.ones((1,), tf.float64)
        for index, (table, own) in enumerate(zip(self.blocks, block_probabilities)):
            own = tf.cast(own, tf.float64)
            total += tf.reduce_sum(filters_in[:, None] * tf.constant(table) * own[None, :])
            if self.sources[index + 1] == index:
                other_axes = [axis for axis in range(len(VARIABLES)) if axis != _FILTERS]
                own = tf.reshape(own, self.cardinalities[index])
                filters_in = tf.reduce_sum(own, axis=other_axes)
        return total + tf.reduce_sum(filters_in * tf.constant(self.heads))

    def least(self) -> float:
        """Cost of the cheapest architecture of the space."""
        return self._extreme(np.min)

    def largest(self) -> float:
        """Cost of the most expensive architecture of the space."""
        return self._extreme(np.max)

    def _extreme(self, reduce: Callable) -> float:
        """Dynamic programming over the filters between blocks."""
        best = np.zeros(1)  # by choice of filters in
        for index, (table, cardinalities) in enumerate(zip(self.blocks, self.cardinalities)):
            if self.sources[index + 1] != index:
                best = best + reduce(table, axis=1)
                continue
            costs = np.moveaxis(table.reshape(-1, *cardinalities), 1 + _FILTERS, 1)
            costs = reduce(costs.reshape(*costs.shape[:2], -1), axis=-1)
            best = reduce(best[:, None] + costs, axis=0)
        return self.fixed + float(reduce(best + self.heads))
