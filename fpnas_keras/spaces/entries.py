"""The entries of all search blocks of a space as arrays of one shape."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fpnas_keras.spaces.search_block import VARIABLES, SearchBlock


class Entries:
    """Assigns an index to everything that can be chosen in each search block of a space.

    An entry is one of the different blocks that a search block can become; see `SearchBlock`. An
    architecture is one entry for each search block: integers of shape `(blocks,)`. Distributions,
    samples and costs work on entries. Networks need choices, the index of the choice of each
    variable: integers of shape `(blocks, variables)`.

    The arrays are padded to the search block with the most entries. Graph code gathers from them:

    ```python
    flat_choices = tf.constant(entries.choices.reshape(-1, len(VARIABLES)))
    tf.gather(flat_choices, drawn + entries.offsets)
    ```

    Args:
        search_blocks: The search blocks.

    Attributes:
        choices: Choices of each entry, int32 of shape `(blocks, entries, variables)`; 0 in the
            padding and for irrelevant variables.
        counts: Number of entries of each search block, int32 of shape `(blocks,)`.
        mask: True for an entry, False for padding; bool of shape `(blocks, entries)`.
        offsets: Where each search block begins in a flattened array of shape `(blocks, entries)`,
            int32 of shape `(blocks,)`.

    Example:

    >>> entries = Entries([SearchBlock(filters=(8, 16), kernel_size=(3, 5))])
    >>> entries.to_choices([2])  # 16 filters, kernel size 3
    array([[0, 1, 0, 0, 0, 0]], dtype=int32)
    >>> entries.from_choices([[0, 1, 0, 0, 0, 0]])
    array([2], dtype=int32)
    """

    def __init__(self, search_blocks: Sequence[SearchBlock]):
        self.counts = np.array([len(block.entries) for block in search_blocks], np.int32)
        max_entries = int(self.counts.max())
        self.choices = np.zeros((len(search_blocks), max_entries, len(VARIABLES)), np.int32)
        for padded, search_block in zip(self.choices, search_blocks):
            padded[: len(search_block.entries)] = search_block.entries
        self.mask = np.arange(max_entries) < self.counts[:, None]
        self.offsets = np.arange(len(search_blocks), dtype=np.int32) * max_entries
        self._cardinalities = [block.cardinalities for block in search_blocks]

    def to_choices(self, entries: npt.ArrayLike) -> np.ndarray:
        """The choices of architectures.

        Args:
            entries: Integers of shape `(..., blocks)`.

        Returns:
            int32 of shape `(..., blocks, variables)`.
        """
        return self.choices[np.arange(len(self.choices)), np.asarray(entries)]

    def from_choices(self, choices: npt.ArrayLike) -> np.ndarray:
        """The inverse of `to_choices`.

        Args:
            choices: Integers of shape `(..., blocks, variables)`, 0 for irrelevant variables.

        Returns:
            int32 of shape `(..., blocks)`.

        Raises:
            ValueError: If there is no entry with these choices.
        """
        choices = np.asarray(choices)
        entries = np.zeros(choices.shape[:-1], np.int32)
        for index, (cardinalities, count) in enumerate(zip(self._cardinalities, self.counts)):
            # Entries are in row-major order, so the row-major numbers of their choices are sorted.
            known = np.ravel_multi_index(self.choices[index, :count].T, cardinalities)
            given = np.ravel_multi_index(np.moveaxis(choices[..., index, :], -1, 0), cardinalities)
            entries[..., index] = np.minimum(np.searchsorted(known, given), count - 1)
        if not np.array_equal(self.to_choices(entries), choices):
            raise ValueError("`choices` must be choices of entries, 0 for irrelevant variables.")
        return entries
