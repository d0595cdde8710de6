"""The costs that a search can hold: `MacsCost`, `ParamsCost` and `LatencyCost`, one interface.

A cost says what a stem, a block or a head costs on its own; the cost of a network is the sum
of its parts. `CostTable` makes a graph of it.
"""

import math
import os

from fpnas_keras.architecture import Part
from fpnas_keras.cost import count, latency


class MacsCost:
    """Multiply-adds of convolutions and dense layers for one image.

    Args:
        target: What an architecture may cost, in MACs; `None` sets no target.

    Raises:
        ValueError: When the target is not positive.
    """

    unit = "MACs"

    def __init__(self, target: float | None = None):
        if target is not None and not (target > 0 and math.isfinite(target)):
            raise ValueError(f"`target` must be above 0 {self.unit}. Received: target={target}")
        self.target = target

    def __call__(self, part: Part) -> float:
        """Cost of a part of a network.

        Raises:
            KeyError: When it is not known.
        """
        return count.part(part).macs


class ParamsCost(MacsCost):
    """Trainable parameters; otherwise as `MacsCost`."""

    unit = "parameters"

    def __call__(self, part: Part) -> float:
        return count.part(part).params


class LatencyCost(MacsCost):
    """Milliseconds on a device, by a table of what was measured there.

    Args:
        table: A table of `export.latency`, or one of those that `fpnas_keras.cost.latency.load`
            reads too.
        target: What an architecture may take, in milliseconds; `None` sets no target.

    Raises:
        ValueError: When the target is not positive, or the file is no latency table.
    """

    unit = "ms"

    def __init__(self, table: str | os.PathLike, target: float | None = None):
        super().__init__(target)
        self._entries, self._names = latency.load(table)

    def __call__(self, part: Part) -> float:
        return math.fsum(self._entries[name] for name in self._names(part))


# The costs by name; "none" is one that nothing is held to.
COSTS = {"none": MacsCost, "macs": MacsCost, "params": ParamsCost, "latency": LatencyCost}


def make_cost(
    kind: str, target: float | None = None, table: str | os.PathLike | None = None
) -> MacsCost:
    """A cost by its name.

    Args:
        kind: One of `COSTS`.
        target: What an architecture may cost.
        table: Latency table, for "latency".

    Raises:
        ValueError: As the costs themselves.
    """
    if kind == "latency":
        return LatencyCost(table, target)
    return COSTS[kind](target)


def text(value: float) -> str:
    """A cost as it is shown, without its unit."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
