"""What can be chosen in one position of a network: the variables of a block and their choices."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fpnas_keras.architecture import MAX_BLOCKS, Block
from fpnas_keras.errors import UserError

# The variables of a block, in the order of the last axis of all arrays of choices.
VARIABLES = ("skip", "filters", "kernel_size", "expansion", "activation", "splits")
# The variables that a skipped block still has.
RELEVANT_WHEN_SKIPPED = ("skip", "filters")
_IRRELEVANT_WHEN_SKIPPED = np.array([name not in RELEVANT_WHEN_SKIPPED for name in VARIABLES])
# The only choice of `filters` in a block that has as many channels out as in.
SAME = "same"


@dataclasses.dataclass(frozen=True)
class SearchBlock:
    """The choices of every variable of a block.

    A variable with one choice is fixed. The choices of `skip` are `False` and, if the block can
    be skipped, `True`.

    A block whose `filters` are `(SAME,)` has as many channels out as in. Use it for all blocks of a
    stage but the first: the first block then chooses the filters of the stage, and the later
    blocks, which have stride 1, always add their input to their output.

    With `repeats`, one search block stands for several blocks in a row that share all choices.
    Every block but the first has stride 1.

    Each combination of choices that makes a different block is an *entry*. All combinations that
    skip the block and have the same filters are one entry, because the other variables of a skipped
    block are irrelevant.

    Args:
        filters: Choices of the channels out, or `(SAME,)`.
        kernel_size: Choices of the side of the depthwise kernel.
        expansion: Choices of the ratio of the expanded channels to the channels in.
        activation: Choices of the activation.
        splits: Choices of the attention; see `fpnas_keras.architecture.Block`.
        skip: `(False,)`, or `False` and `True` in any order.
        strides: Stride of the first block. It is not searched.
        repeats: Number of blocks that share the choices.
        operation: Choices of a compound variable. Each choice is either an object that sets some of
            the variables, the same ones in every choice, or `{"skip": True}`. The variables that
            it sets must not be given as arguments too.

    Raises:
        UserError: If a variable has no choices, or a choice that no block can have.

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
            self._check_operations()
            self._set_choices_of_operations()
        for name in VARIABLES:
            self._check_choices(name)
        if type(self.repeats) is not int or not 1 <= self.repeats <= MAX_BLOCKS:
            raise UserError(
                f"`repeats` must be an integer from 1 to {MAX_BLOCKS}. "
                f"Received: repeats={self.repeats!r}"
            )
        if False not in self.skip:
            raise UserError(f"`skip` must have the choice False. Received: skip={self.skip}")

    def _check_choices(self, name):
        choices = getattr(self, name)
        if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
            raise UserError(
                f"`{name}` must be a list of at least one choice. Received: {name}={choices!r}"
            )
        object.__setattr__(self, name, tuple(choices))
        if name == "filters" and self.keeps_filters:
            return
        for choice in choices:  # `Block` knows which values are legal.
            Block(**{"filters": 1, "strides": self.strides, name: choice})
        if len(set(choices)) != len(choices):
            raise UserError(f"`{name}` must have no choice twice. Received: {name}={choices}")

    def _set_choices_of_operations(self):
        """Derives the choices of the variables that the operations set."""
        operations = self._block_operations
        derived = {
            # Each value once, in the order of the operations.
            name: tuple(dict.fromkeys(operation[name] for operation in operations))
            for name in operations[0]
        }
        can_be_skipped = len(operations) < len(self.operation)
        derived["skip"] = (False, True) if can_be_skipped else (False,)
        for name, choices in derived.items():
            if getattr(self, name) not in (choices, type(self).__dataclass_fields__[name].default):
                raise UserError(
                    f"`{name}` is set by `operation` and must not be given too. "
                    f"Received: {name}={getattr(self, name)}"
                )
            object.__setattr__(self, name, choices)

    def _check_operations(self):
        is_list = isinstance(self.operation, (list, tuple))
        if not is_list or not all(isinstance(choice, Mapping) for choice in self.operation):
            raise UserError(
                f"`operation` must be a list of objects with keys. Received: {self.operation}"
            )
        object.__setattr__(self, "operation", tuple(map(dict, self.operation)))
        operations = self._block_operations
        names = operations[0].keys() if operations else set()
        if not names or names - set(VARIABLES[2:]):
            raise UserError(
                "`operation` must set some of the variables "
                f"{', '.join(VARIABLES[2:])}, or be {{'skip': True}}. Received: {self.operation}"
            )
        if any(operation.keys() != names for operation in operations):
            raise UserError(
                f"every `operation` must set the same variables. Received: {self.operation}"
            )
        for operation in operations:
            Block(filters=1, **operation)
        different = {tuple(sorted(operation.items())) for operation in self.operation}
        if len(different) < len(self.operation):
            raise UserError(f"`operation` must have no choice twice. Received: {self.operation}")

    @property
    def _block_operations(self):
        """The choices of `operation` that do not skip the block."""
        return [choice for choice in self.operation if not _skips(choice)]

    @property
    def keeps_filters(self) -> bool:
        """Whether the block has as many channels out as in."""
        return self.filters == (SAME,)

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """Number of choices of each variable, in the order of `VARIABLES`."""
        return tuple(len(getattr(self, name)) for name in VARIABLES)

    @functools.cached_property
    def entries(self) -> np.ndarray:
        """Index of the choice of each variable, for each entry.

        The entries are in row-major order. Irrelevant variables of a skipped block have choice 0,
        so that every entry occurs once. int32 of shape `(entries, variables)`.
        """
        combinations = np.indices(self.cardinalities, np.int32).reshape(len(VARIABLES), -1).T
        irrelevant = self._is_skipped(combinations)[:, None] & _IRRELEVANT_WHEN_SKIPPED
        entries = np.unique(np.where(irrelevant, 0, combinations), axis=0)
        return entries[self._operation_of(entries) >= 0] if self.operation else entries

    @functools.cached_property
    def variables(self) -> dict[str, tuple[tuple, np.ndarray]]:
        """The variables to choose, by name: their choices, and the choice of each entry.

        The variables that `operation` sets are replaced by the variable "operation". The choice of
        each entry is int32 of shape `(entries,)`. It is -1 where the variable is irrelevant.
        """
        variables, replaced = {}, set()
        if self.operation:
            labels = [", ".join(f"{k}={v}" for k, v in choice.items()) for choice in self.operation]
            variables["operation"] = (tuple(labels), self._operation_of(self.entries))
            replaced = {"skip"}.union(*self.operation)
        for column, name in enumerate(VARIABLES):
            if name not in replaced:
                irrelevant = self._is_skipped(self.entries) & _IRRELEVANT_WHEN_SKIPPED[column]
                chosen = np.where(irrelevant, -1, self.entries[:, column])
                variables[name] = (getattr(self, name), chosen)
        return variables

    def _is_skipped(self, choices):
        return np.array(self.skip)[choices[:, VARIABLES.index("skip")]]

    def _operation_of(self, choices):
        """Index of the operation that makes each row of choices, or -1 if none does."""
        skipped = self._is_skipped(choices)
        result = np.full(len(choices), -1, np.int32)
        for index, operation in enumerate(self.operation):
            matches = skipped == _skips(operation)
            for name, value in operation.items():
                matches &= choices[:, VARIABLES.index(name)] == getattr(self, name).index(value)
            result[matches] = index
        return result

    @functools.cached_property
    def unrolled(self) -> tuple["SearchBlock", ...]:
        """A search block for each of the `repeats` blocks, all but the first with (SAME,) filters.

        Their choices are the same: they are not chosen independently.
        """
        if self.repeats == 1:
            return (self,)
        first = dataclasses.replace(self, repeats=1)
        later = dataclasses.replace(first, filters=(SAME,), strides=1)
        return (first,) + (later,) * (self.repeats - 1)

    def make_blocks(self, choices: Sequence[int], filters_in: int) -> tuple[Block, ...]:
        """Makes the `repeats` blocks of an architecture with the given choices.

        Args:
            choices: Index of the choice of each variable, in the order of `VARIABLES`.
            filters_in: Channels that come into the first block.
        """
        blocks = []
        for search_block in self.unrolled:
            values = {name: getattr(self, name)[i] for name, i in zip(VARIABLES, choices)}
            if search_block.keeps_filters:
                values["filters"] = filters_in
            blocks.append(Block(strides=search_block.strides, **values))
            filters_in = blocks[-1].filters
        return tuple(blocks)


def stage(
    blocks: int, least_blocks: int = 1, strides: int = 1, **choices: Any
) -> list[SearchBlock]:
    """Search blocks in a row that have the same choices, but choose independently.

    The first block chooses the filters of the stage.

    Args:
        blocks: Largest number of blocks.
        least_blocks: Smallest number of blocks. The blocks beyond it can be skipped.
        strides: Stride of the first block. The others have stride 1.
        **choices: Arguments of `SearchBlock`. `filters` are the choices of the first block.

    Returns:
        The search blocks, `blocks` of them.

    Example:

    >>> [block.strides for block in stage(3, strides=2, filters=(24, 32))]
    [2, 1, 1]
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


def _skips(operation):
    return len(operation) == 1 and operation.get("skip") is True
