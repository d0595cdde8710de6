"""The costs that a search can hold: `MacsCost` and `ParamsCost`, one interface.

A cost says what the stem, a block and the head cost on their own; the cost of a
network is their sum. `CostTable` makes a graph of it.
"""

import math
from collections.abc import Sequence

from fpnas_keras.architecture import Block, Head, Stem
from fpnas_keras.cost import count


class MacsCost:
    """Multiply-adds of convolutions and dense layers for one image.

    Args:
        target: What an architecture may cost, in MACs; `None` sets no target.

    Raises:
        ValueError: When the target is not positive.
    """

    unit = "MACs"
    counted = "macs"

    def __init__(self, target: float | None = None):
        if target is not None and not (target > 0 and math.isfinite(target)):
            raise ValueError(f"`target` must be above 0 {self.unit}. Received: target={target}")
        self.target = target

    def stem(self, stem: Stem, size: Sequence[int], channels: int) -> float:
        """Cost of the stem on images of `size` (height, width)."""
        return getattr(count.stem(stem, size, channels), self.counted)

    def block(self, block: Block, size: Sequence[int], filters_in: int) -> float:
        """Cost of a block that receives `filters_in` channels of `size`."""
        return getattr(count.block(block, size, filters_in), self.counted)

    def head(self, head: Head, size: Sequence[int], filters_in: int, num_classes: int) -> float:
        """Cost of the head that receives `filters_in` channels of `size`."""
        return getattr(count.head(head, size, filters_in, num_classes), self.counted)


class ParamsCost(MacsCost):
    """Trainable parameters; otherwise as `MacsCost`."""

    unit = "parameters"
    counted = "params"
