"""The entries of several blocks as one array, for distributions and tables in the graph."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from fpnas_keras.spaces.space import VARIABLES, SearchBlock


class RowMajor:
    """Numbers all combinations of choices, row-major in a block and block after block.

    Args:
        cardinalities: Number of choices, integers of shape `(blocks, variables)`.
    """

    def __init__(self, cardinalities: np.ndarray):
        ones = np.ones_like(cardinalities[:, :1])
        reverse = np.concatenate([cardinalities[:, 1:], ones], axis=1)[:, ::-1]
        self.place_values = np.cumprod(reverse, axis=1)[:, ::-1].astype(np.int32)
        self.sizes = cardinalities.prod(axis=1)
        self.first = np.cumsum([0, *self.sizes[:-1]]).astype(np.int32)

    def __call__(self, choices: tf.Tensor) -> tf.Tensor:
        """Numbers, int32 of shape `(..., blocks)`, of choices `(..., blocks, variables)`."""
        return self.first + tf.reduce_sum(tf.cast(choices, tf.int32) * self.place_values, axis=-1)


class Entries:
    """What can be chosen in each of some blocks, padded to one shape.

    Args:
        blocks: The blocks.

    Attributes:
        choices: Index of the choice of each variable in each entry, int32 of
            shape `(blocks, entries, variables)`, 0 where there is no entry.
        exists: bool of shape `(blocks, entries)`.
    """

    def __init__(self, blocks: Sequence[SearchBlock]):
        counts = np.array([len(block.entries) for block in blocks])
        self.choices = np.zeros((len(blocks), counts.max(), len(VARIABLES)), np.int32)
        for own, block in zip(self.choices, blocks):
            own[: len(block.entries)] = block.entries
        self.exists = np.arange(counts.max()) < counts[:, None]
        self._row_major = RowMajor(np.array([block.cardinalities for block in blocks]))
        self._entry_of_row = np.zeros(self._row_major.sizes.sum(), np.int32)
        for block, (own, count) in enumerate(zip(self.choices, counts)):
            rows = own[:count] @ self._row_major.place_values[block] + self._row_major.first[block]
            self._entry_of_row[rows] = np.arange(count)

    def index(self, choices: tf.Tensor) -> tf.Tensor:
        """Number of the entry with the given choices in each block.

        Args:
            choices: Integers of shape `(..., blocks, variables)`, 0 where
                irrelevant.

        Returns:
            int32 of shape `(..., blocks)`.
        """
        return tf.gather(tf.constant(self._entry_of_row), self._row_major(choices))

    def flat(self, index: tf.Tensor) -> tf.Tensor:
        """Positions of entries in a flattened array of shape `(blocks, entries)`."""
        blocks, entries = self.exists.shape
        return index + np.arange(blocks, dtype=np.int32) * entries

    def gather(self, index: tf.Tensor) -> tf.Tensor:
        """The inverse of `index`: the choices of entries."""
        choices = self.choices.reshape(self.exists.size, -1)
        return tf.gather(tf.constant(choices), self.flat(index))
