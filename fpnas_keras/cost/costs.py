"""The costs that a search can hold to a target: MACs, parameters, milliseconds and bytes.

A cost says what a stem, a block or a head costs on its own. The cost of a network is the sum of its
parts. `SpaceCost` evaluates a cost over a whole space inside the graph.
"""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self

from fpnas_keras.architecture import Block, Head, Part, count_part, kernels_of
from fpnas_keras.cost import latency_table, published_tables
from fpnas_keras.errors import UserError

# What the contents of an int8 file take: least squares over the files that
# `benchmarks/file_size.py` measures.
CONTENT_BYTES = {
    "weight": 1.0,
    "channel": 27.7,
    "kernel": 517.0,
    "hard_silu": 591.0,
    "squeeze_excite": 827.0,
    "2_splits": 1509.0,
    "4_splits": 5438.0,
    "class": 10.0,
    "file": 2701.0,
}


class Cost(ABC):
    """The cost of the parts of a network, and the target of a search.

    Args:
        target: Maximum cost of the architecture, in `unit`. `None` sets no target.

    Attributes:
        unit: Unit of the cost.
        target: The target.

    Raises:
        UserError: If the target is not positive.

    Example:

    ```python
    cost = MacsCost(target=5e6)
    sum(map(cost, architecture.parts()))  # As architecture.macs().
    ```
    """

    unit: str

    def __init__(self, target: float | None = None):
        if target is not None and not (target > 0 and math.isfinite(target)):
            raise UserError(f"`target` must be above 0 {self.unit}. Received: target={target}")
        self.target = target

    @abstractmethod
    def __call__(self, part: Part) -> float:
        """Cost of a part of a network, in `unit`.

        Raises:
            KeyError: If the cost of the part is not known. Its argument names the part.
        """


class MacsCost(Cost):
    """Multiply-adds of convolutions and dense layers for one image."""

    unit = "MACs"

    def __call__(self, part: Part) -> float:
        return count_part(part).macs


class ParamsCost(Cost):
    """Trainable parameters."""

    unit = "parameters"

    def __call__(self, part: Part) -> float:
        return count_part(part).params


class FileSizeCost(Cost):
    """Bytes of the int8 `.tflite` file that `fpnas export` writes, to about 1%.

    A file holds more than a byte for each weight: a bias, scales and zero points for each channel,
    and a description of each operator. In small files this is more than half of all. The names of
    classes count as ten characters each. An author or a licence in the metadata comes on top.
    """

    unit = "bytes"

    def __call__(self, part: Part) -> float:
        return sum(CONTENT_BYTES[name] * count for name, count in count_contents(part).items())


def count_contents(part: Part) -> dict[str, int]:
    """Counts what takes room in an int8 file, of a stem, a block or a head."""
    kernels, layers = kernels_of(part), part.layers
    splits = layers.splits if isinstance(layers, Block) else 0
    return {
        "weight": sum(each.inputs * each.outputs for each in kernels),
        "channel": sum(each.outputs for each in kernels),
        "kernel": len(kernels),
        "hard_silu": sum(each.activation == "hard_silu" for each in kernels),
        "squeeze_excite": int(splits == 1),
        "2_splits": int(splits == 2),
        "4_splits": int(splits == 4),
        "class": part.num_classes,
        "file": int(isinstance(layers, Head)),
    }


class LatencyCost(Cost):
    """Milliseconds on a device, from a latency table that was measured there.

    Args:
        table: A `.json` file that `export.latency` wrote, or a published table of ProxylessNAS or
            once-for-all (`.yaml`, `.json` or `.csv`); see `fpnas_keras.cost.published_tables`.
        target: Maximum latency of the architecture, in milliseconds. `None` sets no target.

    Raises:
        UserError: If the target is not positive, or the file is not a latency table.
    """

    unit = "ms"

    def __init__(self, table: str | os.PathLike, target: float | None = None):
        is_published = published_tables.is_published(table)
        module = published_tables if is_published else latency_table
        self._set_table(module.load(table), is_published, target)

    def _set_table(self, entries, is_published, target):
        super().__init__(target)
        self._entries, self._is_published = entries, is_published
        self._names = published_tables.find_names(entries) if is_published else latency_table.names

    @property
    def table(self) -> dict[str, Any]:
        """The latency table as JSON, for `from_table`."""
        return {"entries": dict(self._entries), "is_published": self._is_published}

    @classmethod
    def from_table(
        cls, entries: Mapping[str, float], is_published: bool, target: float | None = None
    ) -> Self:
        """Makes the cost from the content of a latency table, as `table` gives it.

        Args:
            entries: The milliseconds of each entry by name.
            is_published: Whether the names are those of a published table.
            target: Maximum latency of the architecture, in milliseconds. `None` sets no target.
        """
        cost = cls.__new__(cls)
        cost._set_table(entries, is_published, target)
        return cost

    def __call__(self, part: Part) -> float:
        return math.fsum(self._entries[name] for name in self._names(part))


# The costs by the value of `--cost`. "none" reports MACs, without a target.
COSTS = {
    "none": MacsCost,
    "macs": MacsCost,
    "params": ParamsCost,
    "bytes": FileSizeCost,
    "latency": LatencyCost,
}


def make_cost(
    kind: str, target: float | None = None, table: str | os.PathLike | None = None
) -> Cost:
    """Makes a cost by its name.

    Args:
        kind: One of `COSTS`.
        target: Maximum cost of the architecture. `None` sets no target.
        table: The file of a latency table, for "latency".

    Raises:
        UserError: If "latency" has no table, and as the costs raise it.
    """
    if kind == "latency" and table is None:
        raise UserError('the cost "latency" needs `table`, a latency table. Received: table=None')
    if kind == "latency":
        return LatencyCost(table, target)
    return COSTS[kind](target)


def format_cost(value: float) -> str:
    """Formats a cost for people, without its unit.

    Example:

    >>> format_cost(1234567), format_cost(3.14159)
    ('1,234,567', '3.142')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
