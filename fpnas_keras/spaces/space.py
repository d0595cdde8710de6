"""Search spaces as plain data: a stem, blocks with their variables, a head."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fpnas_keras.architecture import (
    MAX_BLOCKS,
    Architecture,
    Block,
    Head,
    Stem,
    check_image_shape,
    output_size,
)
from fpnas_keras.errors import UserError
from fpnas_keras.files import abbreviate

# The variables of a block, in the order of all tensors and tables.
VARIABLES = ("skip", "filters", "kernel_size", "expansion", "activation", "splits")
# Those that a skipped block still has.
RELEVANT_WHEN_SKIPPED = ("skip", "filters")
_SKIP = VARIABLES.index("skip")
_IRRELEVANT_WHEN_SKIPPED = np.array([name not in RELEVANT_WHEN_SKIPPED for name in VARIABLES])
# The only choice of `filters` of a block that keeps the channels it gets.
SAME = "same"


@dataclasses.dataclass(frozen=True)
class SearchBlock:
    """For every variable of a block, its choices; one block or several in a row.

    A variable with one choice is fixed. `skip` holds `False` and, where the
    block may be skipped, `True`. A block whose `filters` are `(SAME,)` keeps the
    channels it gets, so that the blocks of a stage share what its first one chose
    and, at stride 1, always have their input added.

    With `repeats`, that many blocks in a row share one set of choices; all but the
    first have stride 1.

    Args:
        filters, kernel_size, expansion, activation, splits, skip: The choices
            of each variable.
        strides: Stride of the (first) block, fixed.
        repeats: Number of blocks that share the choices.
        operation: A compound variable. Each of its choices sets the same
            variables (which are then not given otherwise), or is `{"skip": True}`.

    Raises:
        UserError: When a variable has no choices, or a choice that no block
            can have.

    Example:

    ```python
    SearchBlock(filters=(24, 32), kernel_size=(3, 5), expansion=(3, 6), skip=(False, True))
    operations = ({"skip": True}, {"kernel_size": 3, "expansion": 3})
    SearchBlock(filters=(SAME,), activation=("relu", "hard_silu"), operation=operations)
    ```
    """

    filters: tuple[int | str, ...]
    kernel_size: tuple[int, ...] = (3,)
    expansion: tuple[float, ...] = (1,)
    activation: tuple[str, ...] = ("relu",)
    splits: tuple[int, ...] = (0,)
    skip: tuple[bool, ...] = (False,)
    strides: int = 1
    repeats: int = 1
    operation: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self):
        if self.operation != ():
            self._set_by_operation()
        for name in VARIABLES:
            choices = getattr(self, name)
            if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
                raise UserError(
                    f"`{name}` must be a list of at least one choice. Received: {name}={choices!r}"
                )
            object.__setattr__(self, name, tuple(choices))
            if name == "filters" and self.keeps_filters:
                continue
            for choice in choices:  # Block knows which values are legal.
                Block(**{"filters": 1, "strides": self.strides, name: choice})
            if len(set(choices)) != len(choices):
                raise UserError(f"`{name}` must have no choice twice. Received: {name}={choices}")
        if type(self.repeats) is not int or not 1 <= self.repeats <= MAX_BLOCKS:
            raise UserError(
                f"`repeats` must be an integer from 1 to {MAX_BLOCKS}. "
                f"Received: repeats={self.repeats!r}"
            )
        if False not in self.skip:
            raise UserError(f"`skip` must have the choice False. Received: skip={self.skip}")

    @property
    def keeps_filters(self) -> bool:
        """Whether the block has as many channels out as it gets."""
        return self.filters == (SAME,)

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """Number of choices of each variable, in the order of `VARIABLES`."""
        return tuple(len(getattr(self, name)) for name in VARIABLES)

    def _set_by_operation(self):
        """Makes the choices of the variables that the operations set."""
        is_list = isinstance(self.operation, (list, tuple))
        if not is_list or not all(isinstance(each, Mapping) for each in self.operation):
            raise UserError(
                f"`operation` must be a list of objects with keys. Received: {self.operation}"
            )
        object.__setattr__(self, "operation", tuple(map(dict, self.operation)))
        others = [each for each in self.operation if each.get("skip") is not True or len(each) > 1]
        names = others[0].keys() if others else set()
        if not names or names - set(VARIABLES[2:]):
            raise UserError(
                "`operation` must set some of the variables "
                f"{', '.join(VARIABLES[2:])}, or be {{'skip': True}}. Received: {self.operation}"
            )
        if any(each.keys() != names for each in others):
            raise UserError(
                f"every `operation` must set the same variables. Received: {self.operation}"
            )
        for each in others:
            Block(filters=1, **each)
        if len({tuple(sorted(each.items())) for each in self.operation}) < len(self.operation):
            raise UserError(f"`operation` must have no choice twice. Received: {self.operation}")
        derived = {name: tuple(dict.fromkeys(each[name] for each in others)) for name in names}
        derived["skip"] = (False,) + (True,) * (len(others) < len(self.operation))
        for name, choices in derived.items():
            if getattr(self, name) not in (choices, type(self).__dataclass_fields__[name].default):
                raise UserError(
                    f"`{name}` is set by `operation` and must not be given too. "
                    f"Received: {name}={getattr(self, name)}"
                )
            object.__setattr__(self, name, choices)

    @functools.cached_property
    def entries(self) -> np.ndarray:
        """Every block that can be chosen here, as the index of the choice of each variable.

        Row-major; what a skipped block makes irrelevant is 0, so that each occurs
        once. int32 of shape `(entries, variables)`.
        """
        every = np.indices(self.cardinalities, np.int32).reshape(len(VARIABLES), -1).T
        irrelevant = self._skipped(every)[:, None] & _IRRELEVANT_WHEN_SKIPPED
        every = np.unique(np.where(irrelevant, 0, every), axis=0)
        return every[(self._operations(every) >= 0)] if self.operation else every

    @functools.cached_property
    def variables(self) -> dict[str, tuple[tuple, np.ndarray]]:
        """The variables to choose here: name -> (choices, choice of each entry).

        Those that `operation` sets are part of it. The choice of an entry is -1 where
        it is skipped and the variable is irrelevant.
        """
        found, own = {}, set()
        if self.operation:
            labels = [", ".join(f"{k}={v}" for k, v in each.items()) for each in self.operation]
            found["operation"] = (tuple(labels), self._operations(self.entries))
            own = {"skip"}.union(*self.operation)
        for column, name in enumerate(VARIABLES):
            if name not in own:
                irrelevant = self._skipped(self.entries) & _IRRELEVANT_WHEN_SKIPPED[column]
                found[name] = (
                    getattr(self, name),
                    np.where(irrelevant, -1, self.entries[:, column]),
                )
        return found

    def _skipped(self, choices):
        return np.array(self.skip)[choices[:, _SKIP]]

    def _operations(self, choices):
        """Index of the operation in each row of choices; -1 where none does that."""
        skipped = self._skipped(choices)
        result = np.full(len(choices), -1, np.int32)
        for index, operation in enumerate(self.operation):
            if operation == {"skip": True}:
                result[skipped] = index
                continue
            same = ~skipped
            for name, value in operation.items():
                column = choices[:, VARIABLES.index(name)]
                same &= column == getattr(self, name).index(value)
            result[same] = index
        return result

    @functools.cached_property
    def positions(self) -> tuple["SearchBlock", ...]:
        """Each of the `repeats` blocks on its own; all but the first keep their filters."""
        if self.repeats == 1:
            return (self,)
        first = dataclasses.replace(self, repeats=1)
        later = dataclasses.replace(first, filters=(SAME,), strides=1)
        return (first,) + (later,) * (self.repeats - 1)

    def blocks(self, choices: Sequence[int], filters_in: int) -> tuple[Block, ...]:
        """The `repeats` blocks with the given index for each variable, on `filters_in` channels."""
        blocks = []
        for position in self.positions:
            values = {name: getattr(self, name)[i] for name, i in zip(VARIABLES, choices)}
            if position.keeps_filters:
                values["filters"] = filters_in
            blocks.append(Block(strides=position.strides, **values))
            filters_in = blocks[-1].filters
        return tuple(blocks)

    def all_blocks(self, filters_in: int) -> list[tuple[Block, ...]]:
        """The `repeats` blocks of each of `entries`, on `filters_in` channels."""
        return [self.blocks(choices, filters_in) for choices in self.entries]


def stage(blocks: int, least_blocks: int = 1, strides: int = 1, **choices) -> list[SearchBlock]:
    """Blocks in a row with equal choices, each made on its own; the first chooses the filters.

    Args:
        blocks: Most blocks.
        least_blocks: Fewest; those after them may be skipped.
        strides: Stride of the first block; the others have 1.
        **choices: As for `SearchBlock`; what it has as `filters` is the first block's.
    """
    later = choices | {"filters": (SAME,)}
    return [
        SearchBlock(
            **(later if position else choices),
            strides=1 if position else strides,
            skip=(False, True) if position >= least_blocks else (False,),
        )
        for position in range(blocks)
    ]


@dataclasses.dataclass(frozen=True)
class Space:
    """Everything that a search can choose from.

    Args:
        name: Name in the registry, or of its file.
        input_shape: `(height, width, channels)` of the images.
        num_classes: Number of classes.
        stem: The stem, fixed.
        blocks: The blocks to choose, in order; those that share their choices once.
        head: The head, fixed.

    Raises:
        UserError: When a value is out of its range.
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
        if not all(isinstance(block, SearchBlock) for block in self.blocks):
            raise UserError(f"`blocks` must be of SearchBlock. Received: {abbreviate(self.blocks)}")
        count = sum(block.repeats for block in self.blocks)
        if not 1 <= count <= MAX_BLOCKS:
            raise UserError(
                f"The space `{self.name}` must have 1 to {MAX_BLOCKS} blocks. "
                f"Received: {count} blocks"
            )

    @property
    def num_architectures(self) -> int:
        """Number of different architectures; skipped blocks count once."""
        return math.prod(len(block.entries) for block in self.blocks)

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
            blocks.extend(search_block.blocks(row, filters))
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
            UserError: When the architecture is not in the space.
        """
        for name in ("input_shape", "num_classes", "stem", "head"):
            mine, theirs = getattr(self, name), getattr(architecture, name)
            if mine != theirs:
                raise UserError(
                    f"`{name}` must be {mine} in the space `{self.name}`. Received: {name}={theirs}"
                )
        count = sum(block.repeats for block in self.blocks)
        if len(architecture.blocks) != count:
            raise UserError(
                f"The space `{self.name}` has {count} blocks. "
                f"Received: {len(architecture.blocks)} blocks"
            )
        rows, first, filters = [], 0, self.stem.filters
        for search_block in self.blocks:
            blocks = architecture.blocks[first : first + search_block.repeats]
            rows.append(self._choices_of(search_block, blocks, first, filters))
            first += search_block.repeats
            filters = blocks[-1].filters
        return np.array(rows, np.int32)

    def _choices_of(self, search_block, blocks, index, filters_in):
        """A row of `choices`: of the blocks from number `index`, on `filters_in` channels."""
        block = blocks[0]
        if block.strides != search_block.strides:
            raise UserError(
                f"`strides` of block {index} must be {search_block.strides}. "
                f"Received: strides={block.strides}"
            )
        row = np.zeros(len(VARIABLES), np.int32)
        for name in RELEVANT_WHEN_SKIPPED if block.skip else VARIABLES:
            value, legal = getattr(block, name), getattr(search_block, name)
            if legal == (SAME,):
                legal = (filters_in,)
            if value not in legal:
                raise UserError(
                    f"`{name}` of block {index} must be one of {legal} in the space "
                    f"`{self.name}`. Received: {name}={value}"
                )
            row[VARIABLES.index(name)] = legal.index(value)
        if not (search_block.entries == row).all(axis=1).any():
            raise UserError(
                f"block {index} must be one of the operations {search_block.operation} of the "
                f"space `{self.name}`. Received: {block}"
            )
        for other, (own, expected) in enumerate(
            zip(blocks, search_block.blocks(row, filters_in)), index
        ):
            if own != expected:
                raise UserError(
                    f"block {other} must be {expected} in the space `{self.name}`, where it shares "
                    f"the choices of block {index}. Received: {own}"
                )
        return row
