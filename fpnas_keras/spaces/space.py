"""Search spaces as plain data: a stem, blocks with their variables, a head."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from fpnas_keras.architecture import (
    Architecture,
    Block,
    Head,
    Stem,
    check_image_shape,
    output_size,
)

# The variables of a block, in the order of all tensors and tables.
VARIABLES = ("skip", "filters", "kernel_size", "expansion", "activation", "splits")
# Those that a skipped block still has.
RELEVANT_WHEN_SKIPPED = ("skip", "filters")
# The only choice of `filters` of a block that keeps the channels it gets.
SAME = "same"


@dataclasses.dataclass(frozen=True)
class SearchBlock:
    """One position in the network: for every variable, its choices.

    A variable with one choice is fixed. `skip` holds `False` and, where the
    block may be skipped, `True`. A block whose `filters` are `(SAME,)` keeps the
    channels it gets, so that the blocks of a stage share what its first one chose
    and, at stride 1, always have their input added.

    Raises:
        ValueError: When a variable has no choices, or a choice that no block
            can have.
    """

    filters: tuple[int | str, ...]
    kernel_size: tuple[int, ...] = (3,)
    expansion: tuple[float, ...] = (1,)
    activation: tuple[str, ...] = ("relu",)
    splits: tuple[int, ...] = (0,)
    skip: tuple[bool, ...] = (False,)
    strides: int = 1

    def __post_init__(self):
        for name in VARIABLES:
            choices = tuple(getattr(self, name))
            object.__setattr__(self, name, choices)
            if not choices or len(set(choices)) != len(choices):
                raise ValueError(
                    f"`{name}` must have at least one choice and none twice. "
                    f"Received: {name}={choices}"
                )
            if name == "filters" and choices == (SAME,):
                continue
            for choice in choices:  # Block knows which values are legal.
                Block(**{"filters": 1, "strides": self.strides, name: choice})
        if False not in self.skip:
            raise ValueError(f"`skip` must have the choice False. Received: skip={self.skip}")

    @property
    def keeps_filters(self) -> bool:
        """Whether the block has as many channels out as it gets."""
        return self.filters == (SAME,)

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """Number of choices of each variable, in the order of `VARIABLES`."""
        return tuple(len(getattr(self, name)) for name in VARIABLES)

    @property
    def num_choices(self) -> int:
        """Number of different blocks that can be chosen here."""
        kept = math.prod(len(getattr(self, name)) for name in RELEVANT_WHEN_SKIPPED[1:])
        others = math.prod(self.cardinalities) // kept // len(self.skip)
        return kept * (others + (True in self.skip))

    def block(self, choices: Sequence[int], filters_in: int) -> Block:
        """The block with the given index for each variable, on `filters_in` channels."""
        values = {
            name: getattr(self, name)[index] for name, index in zip(VARIABLES, choices, strict=True)
        }
        if self.keeps_filters:
            values["filters"] = filters_in
        return Block(strides=self.strides, **values)

    def all_blocks(self, filters_in: int) -> list[Block]:
        """All combinations of choices, row-major in the order of `VARIABLES`."""
        every = itertools.product(*map(range, self.cardinalities))
        return [self.block(choices, filters_in) for choices in every]


@dataclasses.dataclass(frozen=True)
class Space:
    """Everything that a search can choose from.

    Args:
        name: Name in the registry.
        input_shape: `(height, width, channels)` of the images.
        num_classes: Number of classes.
        stem: The stem, fixed.
        blocks: The blocks to choose, in order.
        head: The head, fixed.

    Raises:
        ValueError: When a value is out of its range.
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
        if not self.blocks:
            raise ValueError(f"The space `{self.name}` has no blocks.")

    @property
    def num_architectures(self) -> int:
        """Number of different architectures; skipped blocks count once."""
        return math.prod(block.num_choices for block in self.blocks)

    @property
    def cardinalities(self) -> np.ndarray:
        """Number of choices, int32 of shape `(blocks, variables)`."""
        return np.array([block.cardinalities for block in self.blocks], np.int32)

    def filters_source(self, index: int) -> int | None:
        """The block that chooses the channels that reach block `index`, or `None`: the stem."""
        earlier = range(index - 1, -1, -1)
        return next((each for each in earlier if not self.blocks[each].keeps_filters), None)

    def filters_in(self, index: int) -> tuple[int, ...]:
        """The numbers of channels that may reach block `index` (or, last, the head)."""
        source = self.filters_source(index)
        return (self.stem.filters,) if source is None else self.blocks[source].filters

    def input_sizes(self) -> list[tuple[int, int]]:
        """Height and width that reach each block and, last, the head."""
        sizes = [output_size(self.input_shape[:2], self.stem.strides)]
        for block in self.blocks:
            sizes.append(output_size(sizes[-1], block.strides))
        return sizes

    def architecture(self, choices: np.ndarray) -> Architecture:
        """The architecture with the given choices.

        Args:
            choices: Index of the choice of each variable of each block, integers
                of shape `(blocks, variables)`.
        """
        blocks, filters = [], self.stem.filters
        for search_block, row in zip(self.blocks, choices, strict=True):
            blocks.append(search_block.block(row, filters))
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
        """The inverse of `architecture`: int32 of shape `(blocks, variables)`.

        Variables that a skipped block makes irrelevant get choice 0.

        Raises:
            ValueError: When the architecture is not in the space.
        """
        for name in ("input_shape", "num_classes", "stem", "head"):
            mine, theirs = getattr(self, name), getattr(architecture, name)
            if mine != theirs:
                raise ValueError(
                    f"`{name}` must be {mine} in the space `{self.name}`. Received: {name}={theirs}"
                )
        if len(architecture.blocks) != len(self.blocks):
            raise ValueError(
                f"The space `{self.name}` has {len(self.blocks)} blocks. "
                f"Received: {len(architecture.blocks)} blocks"
            )
        choices = np.zeros((len(self.blocks), len(VARIABLES)), np.int32)
        filters = self.stem.filters
        for index, (search_block, block) in enumerate(zip(self.blocks, architecture.blocks)):
            if block.strides != search_block.strides:
                raise ValueError(
                    f"`strides` of block {index} must be {search_block.strides}. "
                    f"Received: strides={block.strides}"
                )
            names = RELEVANT_WHEN_SKIPPED if block.skip else VARIABLES
            for name in names:
                value, legal = getattr(block, name), getattr(search_block, name)
                if legal == (SAME,):
                    legal = (filters,)
                if value not in legal:
                    raise ValueError(
                        f"`{name}` of block {index} must be one of {legal} in the space "
                        f"`{self.name}`. Received: {name}={value}"
                    )
                choices[index, VARIABLES.index(name)] = legal.index(value)
            filters = block.filters
        return choices
