"""A cost over a whole space, evaluated inside the graph."""

import math
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from fpnas_keras.architecture import Part, output_size
from fpnas_keras.errors import UserError
from fpnas_keras.spaces import VARIABLES, Space
from fpnas_keras.spaces.entries import Entries

_FILTERS = VARIABLES.index("filters")


class CostTable:
    """Costs of all blocks of a space by (filters in, entry).

    The cost of a network is the sum of its blocks' entries and of the fixed
    stem. Everything is float64: float32 loses single MACs above 16.7M.

    Args:
        space: The space.
        cost: `MacsCost`, `ParamsCost`, `LatencyCost`, or a function of your own from a `Part`.

    Raises:
        UserError: When the cost does not know all parts of the space.

    Example:

    ```python
    table = CostTable(space, MacsCost())
    table(distribution.sample(8, seed=0, step=0))  # float64, shape (8,)
    ```
    """

    def __init__(self, space: Space, cost: Callable[[Part], float]):
        missing = {}  # in order, without doubles

        def known(part):
            try:
                return cost(part)
            except KeyError as error:
                missing[error.args[0]] = part
                return math.nan

        sizes = space.input_sizes()
        self._entries = Entries(space.blocks)
        self.fixed = float(known(Part(space.stem, space.input_shape[:2], space.input_shape[2])))
        # One float64 array for each of the space's blocks: (choices of filters in, entries).
        self.blocks = [
            np.array(
                [
                    [_sum(known, own, sizes[index], filters) for own in block.all_blocks(filters)]
                    for filters in space.filters_in(index)
                ],
                np.float64,
            )
            for index, block in enumerate(space.blocks)
        ]
        # The head, by the filters that reach it.
        self.heads = np.array(
            [
                known(Part(space.head, sizes[-1], filters, space.num_classes))
                for filters in space.filters_in(len(space.blocks))
            ],
            np.float64,
        )
        if missing:
            raise UserError(
                f"the cost lacks {len(missing)} parts of the space `{space.name}` at "
                f"{space.input_shape}, the first ones: {'; '.join(list(missing)[:5])}"
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
        own = tf.cast(self._entries.index(choices), tf.int64)
        # Column 0 stands for the stem, which has one choice.
        filters = tf.pad(tf.cast(choices[..., _FILTERS], tf.int64), [[0, 0], [1, 0]])
        sources = [0 if source is None else source + 1 for source in self.sources]
        filters_in = tf.gather(filters, sources, axis=1)
        index = first_rows + filters_in[:, :-1] * row_sizes + own
        blocks = tf.reduce_sum(tf.gather(tf.constant(flat), index), axis=-1)
        return self.fixed + blocks + tf.gather(tf.constant(self.heads), filters_in[:, -1])

    def expected(self, probabilities: tf.Tensor) -> tf.Tensor:
        """The exact expectation of the cost, E[cost(A)] for A ~ p.

        Args:
            probabilities: Probability of each entry of each block, shape
                `(blocks, entries)`; blocks are independent.

        Returns:
            A float64 scalar.
        """
        total = tf.constant(self.fixed, tf.float64)
        filters_in = tf.ones((1,), tf.float64)
        for index, (table, own) in enumerate(zip(self.blocks, tf.unstack(probabilities))):
            own = tf.cast(own[: table.shape[1]], tf.float64)
            total += tf.reduce_sum(filters_in[:, None] * tf.constant(table) * own[None, :])
            if self.sources[index + 1] == index:
                filters = self.filters_of_entries(index)
                filters_in = tf.math.unsorted_segment_sum(own, filters, filters.max() + 1)
        return total + tf.reduce_sum(filters_in * tf.constant(self.heads))

    def expected_and_slope(self, probabilities: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The expectation E[cost], and p * dE / dp for each entry of each block.

        `entry_gradient` of a distribution makes of the slope the gradient of its logits.

        Args:
            probabilities: p, as in `expected`.

        Returns:
            A float64 scalar, and a tensor shaped as `probabilities`.
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

    def _extreme(self, reduce: Callable) -> float:
        """Dynamic programming over the filters between blocks."""
        best = np.zeros(1)  # by choice of filters in
        for index, table in enumerate(self.blocks):
            if self.sources[index + 1] != index:
                best = best + reduce(table, axis=1)
                continue
            filters = self.filters_of_entries(index)
            best = np.array(
                [
                    reduce(best + reduce(table[:, filters == each], axis=1))
                    for each in range(filters.max() + 1)
                ]
            )
        return self.fixed + float(reduce(best + self.heads))

    def filters_of_entries(self, index: int) -> np.ndarray:
        """The choice of filters of each entry of a block, integers of shape `(entries,)`."""
        return self._entries.choices[index, : self.blocks[index].shape[1], _FILTERS]


def _sum(cost, blocks, size, filters_in):
    """Cost of blocks in a row."""
    total = 0.0
    for block in blocks:
        total += cost(Part(block, size, filters_in))
        size, filters_in = output_size(size, block.strides), block.filters
    return total
