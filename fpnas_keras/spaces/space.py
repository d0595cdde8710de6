"""Search spaces as plain data: a stem, search blocks, a head."""

import dataclasses
import functools
import html
import itertools
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fpnas_keras.architecture import (
    MAX_BLOCKS,
    Architecture,
    Block,
    Head,
    Part,
    Stem,
    check_image_shape,
    format_table,
    output_size,
)
from fpnas_keras.errors import UserError
from fpnas_keras.files import abbreviate
from fpnas_keras.spaces.entries import Entries
from fpnas_keras.spaces.search_block import RELEVANT_WHEN_SKIPPED, SAME, VARIABLES, SearchBlock


@dataclasses.dataclass(frozen=True)
class Space:
    """Everything that a search can choose from.

    Args:
        name: Name in the registry, or of the file that defines the space.
        input_shape: `(height, width, channels)` of the images.
        num_classes: Number of classes.
        stem: The stem. It is not searched.
        blocks: The search blocks, in order. One with `repeats` stands for several blocks.
        head: The head. It is not searched.

    Raises:
        UserError: If a value is out of its range.

    Example:

    ```python
    space = Space(
        name="mine",
        input_shape=(32, 32, 3),
        num_classes=10,
        stem=Stem(16),
        blocks=stage(3, strides=2, filters=(24, 32), kernel_size=(3, 5)),
        head=Head(256),
    )
    ```
    """

    name: str
    input_shape: tuple[int, int, int]
    num_classes: int
    stem: Stem
    blocks: tuple[SearchBlock, ...]
    head: Head

    def __post_init__(self):
        check_image_shape(self.input_shape, self.num_classes)
        object.__setattr__(self, "input_shape", tuple(self.input_shape))
        object.__setattr__(self, "blocks", tuple(self.blocks))
        for name, expected in (("name", str), ("stem", Stem), ("head", Head)):
            if not isinstance(getattr(self, name), expected):
                raise UserError(
                    f"`{name}` of a space must be a {expected.__name__}. "
                    f"Received: {name}={abbreviate(getattr(self, name))}"
                )
        if not all(isinstance(each, SearchBlock) for each in self.blocks):
            raise UserError(
                f"`blocks` of a space must be a list of SearchBlock. "
                f"Received: blocks={abbreviate(self.blocks)}"
            )
        if not 1 <= self.num_blocks <= MAX_BLOCKS:
            raise UserError(
                f"the space `{self.name}` must have 1 to {MAX_BLOCKS} blocks. "
                f"Received: {self.num_blocks} blocks"
            )

    def __repr__(self) -> str:
        return (
            f"Space(name={self.name!r}, input_shape={self.input_shape}, num_classes="
            f"{self.num_classes}, {self.num_blocks} blocks, {self.num_architectures:.2e} "
            "architectures)"
        )

    def __str__(self) -> str:
        rows = [["block", "repeats", "stride", "choices"]]
        for index, block in enumerate(self.blocks):
            choices = "; ".join(
                f"{name} {', '.join(map(str, getattr(block, name)))}"
                for name in VARIABLES
                if len(getattr(block, name)) > 1 or name == "filters"
            )
            rows.append([str(index), str(block.repeats), str(block.strides), choices])
        return format_table(rows)

    def _repr_html_(self) -> str:
        """The table of a notebook."""
        return f"<p>{html.escape(repr(self))}</p><pre>{html.escape(str(self))}</pre>"

    @property
    def num_blocks(self) -> int:
        """Number of blocks of each architecture. A search block counts `repeats` times."""
        return sum(search_block.repeats for search_block in self.blocks)

    @property
    def num_architectures(self) -> int:
        """Number of different architectures."""
        return math.prod(len(search_block.entries) for search_block in self.blocks)

    @property
    def cardinalities(self) -> np.ndarray:
        """Number of choices of each variable, int32 of shape `(blocks, variables)`."""
        return np.array([search_block.cardinalities for search_block in self.blocks], np.int32)

    @functools.cached_property
    def entries(self) -> Entries:
        """The entries of all search blocks, and the way from entries to choices and back."""
        return Entries(self.blocks)

    def filters_source(self, index: int) -> int | None:
        """The search block that sets the input channels of block `index`; `None` for the stem.

        For `index = len(blocks)`, the one whose filters come into the head.
        """
        earlier = range(index - 1, -1, -1)
        return next((each for each in earlier if not self.blocks[each].keeps_filters), None)

    def filters_in(self, index: int) -> tuple[int, ...]:
        """The numbers of channels that can come into search block `index`, as `filters_source`."""
        source = self.filters_source(index)
        return (self.stem.filters,) if source is None else self.blocks[source].filters

    def input_sizes(self) -> list[tuple[int, int]]:
        """Height and width of what comes into each search block and, last, into the head."""
        sizes = [output_size(self.input_shape[:2], self.stem.strides)]
        for search_block in self.blocks:
            sizes.append(output_size(sizes[-1], search_block.strides))
        return sizes

    def stem_part(self) -> Part:
        """The stem with what comes into it."""
        return Part(self.stem, self.input_shape[:2], self.input_shape[2])

    def block_parts(self, index: int) -> Iterator[list[tuple[Part, ...]]]:
        """The parts of search block `index`.

        Yields:
            For each of `filters_in(index)`, a list with one tuple for each entry: its `repeats`
            parts in a row.
        """
        size, search_block = self.input_sizes()[index], self.blocks[index]
        for filters_in in self.filters_in(index):
            yield [
                _parts_in_a_row(search_block.make_blocks(choices, filters_in), size, filters_in)
                for choices in search_block.entries
            ]

    def head_parts(self) -> list[Part]:
        """The head with what comes into it, for each of `filters_in(len(blocks))`."""
        size = self.input_sizes()[-1]
        filters_in = self.filters_in(len(self.blocks))
        return [Part(self.head, size, filters, self.num_classes) for filters in filters_in]

    def parts(self) -> Iterator[Part]:
        """Every part that an architecture of the space can have.

        Yields:
            Each different part once, always in the same order: the stem, the blocks from the first
            search block to the last, the heads.
        """
        blocks = (
            part
            for index in range(len(self.blocks))
            for entries in self.block_parts(index)
            for parts in entries
            for part in parts
        )
        seen = set()
        for part in itertools.chain([self.stem_part()], blocks, self.head_parts()):
            if part not in seen:
                seen.add(part)
                yield part

    def architecture(self, choices: npt.ArrayLike) -> Architecture:
        """The architecture with the given choices.

        Args:
            choices: Index of the choice of each variable of each search block, integers
                of shape `(blocks, variables)`.
        """
        blocks, filters = [], self.stem.filters
        for search_block, row in zip(self.blocks, choices, strict=True):
            blocks.extend(search_block.make_blocks(row, filters))
            filters = blocks[-1].filters
        return Architecture(
            input_shape=self.input_shape,
            num_classes=self.num_classes,
            stem=self.stem,
            blocks=tuple(blocks),
            head=self.head,
            space=self.name,
        )

    def choices(self, architecture: Architecture) -> np.ndarray:
        """The inverse of `architecture`.

        Returns:
            int32 of shape `(blocks, variables)`; 0 for irrelevant variables.

        Raises:
            UserError: If the architecture is not in the space.
        """
        for name in ("input_shape", "num_classes", "stem", "head"):
            expected, received = getattr(self, name), getattr(architecture, name)
            if expected != received:
                raise UserError(
                    f"`{name}` must be {expected} in the space `{self.name}`. "
                    f"Received: {name}={received}"
                )
        if len(architecture.blocks) != self.num_blocks:
            raise UserError(
                f"architectures of the space `{self.name}` have {self.num_blocks} blocks. "
                f"Received: {len(architecture.blocks)} blocks"
            )
        rows, first, filters = [], 0, self.stem.filters
        for search_block in self.blocks:
            blocks = architecture.blocks[first : first + search_block.repeats]
            rows.append(self._choices_of(search_block, blocks, first, filters))
            first += search_block.repeats
            filters = blocks[-1].filters
        return np.array(rows, np.int32)

    def entries_of(self, architecture: Architecture) -> np.ndarray:
        """The entries of an architecture, int32 of shape `(blocks,)`.

        Raises:
            UserError: If the architecture is not in the space.
        """
        return self.entries.from_choices(self.choices(architecture))

    def _choices_of(
        self, search_block: SearchBlock, blocks: tuple[Block, ...], position: int, filters_in: int
    ) -> np.ndarray:
        """The choices of `search_block` that make these blocks.

        Args:
            search_block: Its `repeats` is the number of blocks.
            blocks: The blocks, in a row.
            position: Position of the first one in the architecture, for messages.
            filters_in: Channels that come into the first one.
        """
        first = blocks[0]
        if first.strides != search_block.strides:
            raise UserError(
                f"`strides` of block {position} must be {search_block.strides}. "
                f"Received: strides={first.strides}"
            )
        row = np.zeros(len(VARIABLES), np.int32)
        for name in RELEVANT_WHEN_SKIPPED if first.skip else VARIABLES:
            value, legal = getattr(first, name), getattr(search_block, name)
            if legal == (SAME,):
                legal = (filters_in,)
            if value not in legal:
                raise UserError(
                    f"`{name}` of block {position} must be one of {legal} in the space "
                    f"`{self.name}`. Received: {name}={value}"
                )
            row[VARIABLES.index(name)] = legal.index(value)
        if not (search_block.entries == row).all(axis=1).any():
            raise UserError(
                f"block {position} must be one of the operations {search_block.operation} of the "
                f"space `{self.name}`. Received: {first}"
            )
        expected = search_block.make_blocks(row, filters_in)
        for index, (block, shared) in enumerate(zip(blocks, expected), position):
            if block != shared:
                raise UserError(
                    f"block {index} must be {shared} in the space `{self.name}`, where it shares "
                    f"the choices of block {position}. Received: {block}"
                )
        return row


def _parts_in_a_row(blocks, size, filters_in):
    parts = []
    for block in blocks:
        parts.append(Part(block, size, filters_in))
        size, filters_in = output_size(size, block.strides), block.filters
    return tuple(parts)
