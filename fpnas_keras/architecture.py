"""One point of a search space: what every block is, as data and as JSON."""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fpnas_keras.files import (
    check_format,
    check_keys,
    read_fields,
    read_json,
    read_list,
    replacing,
    short,
)

if TYPE_CHECKING:
    import keras

FORMAT = 1
ACTIVATIONS = ("relu", "relu6", "hard_silu")
SPLITS = (0, 1, 2, 4)
# Far above any network, low enough that no count or shape overflows.
MAX_FILTERS = 65_536
MAX_SIZE = 16_384
MAX_BLOCKS = 1_000


@dataclasses.dataclass(frozen=True)
class Stem:
    """The first convolution: `kernel_size` square, batch norm, activation."""

    filters: int
    kernel_size: int = 3
    strides: int = 2
    activation: str = "relu"

    def __post_init__(self):
        _check_integer(self, "filters", 1, MAX_FILTERS)
        _check_kernel_size(self)
        _check_integer(self, "strides", 1, 4)
        _check_choice(self, "activation", ACTIVATIONS)


@dataclasses.dataclass(frozen=True)
class Block:
    """One MBConv block of an architecture.

    A block with `skip` is the identity, or a 1x1 projection where the shapes
    differ. Its other variables are irrelevant, all but `filters`; they take
    fixed values here, so that equal networks compare as equal.

    Args:
        filters: Channels out.
        kernel_size: Side of the depthwise kernel, odd.
        expansion: Ratio of the expanded channels to the channels in.
        strides: Stride of the block.
        activation: One of `ACTIVATIONS`.
        splits: Attention. 0: none, 1: squeeze-excite, 2 or 4: split-attention
            (ResNeSt, arXiv:2004.08955) over that many depthwise convolutions.
        skip: Whether the block is skipped.

    Raises:
        ValueError: When a value is out of its range.
    """

    filters: int
    kernel_size: int = 3
    expansion: float = 1.0
    strides: int = 1
    activation: str = "relu"
    splits: int = 0
    skip: bool = False

    def __post_init__(self):
        _check_integer(self, "filters", 1, MAX_FILTERS)
        _check_integer(self, "strides", 1, 4)
        _check_kernel_size(self)
        _check_number(self, "expansion", 0.01, 100.0)
        object.__setattr__(self, "expansion", float(self.expansion))
        _check_choice(self, "activation", ACTIVATIONS)
        _check_choice(self, "splits", SPLITS)
        if not isinstance(self.skip, bool):
            raise ValueError(f"`skip` must be true or false. Received: skip={self.skip!r}")
        if self.skip:
            for field in dataclasses.fields(self):
                if field.name not in ("filters", "strides", "skip"):
                    object.__setattr__(self, field.name, field.default)


@dataclasses.dataclass(frozen=True)
class Head:
    """The last layers: 1x1 convolution, pooling, optional dense layer."""

    filters: int
    activation: str = "relu"
    dense_units: int | None = None

    def __post_init__(self):
        _check_integer(self, "filters", 1, MAX_FILTERS)
        _check_choice(self, "activation", ACTIVATIONS)
        if self.dense_units is not None:
            _check_integer(self, "dense_units", 1, MAX_FILTERS)


class Part(NamedTuple):
    """A stem, a block or a head where it stands in a network: what a cost is given.

    Attributes:
        layers: The stem, block or head.
        size: Height and width of what comes in.
        channels: Channels of what comes in.
        num_classes: Number of classes; 0 but for a head.
    """

    layers: Stem | Block | Head
    size: tuple[int, int]
    channels: int
    num_classes: int = 0


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A network as data: one choice for every variable of every block.

    Args:
        input_shape: `(height, width, channels)` of the images.
        num_classes: Number of classes.
        stem: The stem.
        blocks: The blocks, in order.
        head: The head.
        space: Name of the space it was chosen from, `None` for one that was
            written by hand.

    Raises:
        ValueError: When a value is out of its range.

    Example:

    ```python
    architecture = Architecture.load("architecture.json")
    print(architecture.macs(), architecture.params())
    model = architecture.build()
    ```
    """

    input_shape: tuple[int, int, int]
    num_classes: int
    stem: Stem
    blocks: tuple[Block, ...]
    head: Head
    space: str | None = None

    def __post_init__(self):
        check_image_shape(self.input_shape, self.num_classes)
        object.__setattr__(self, "input_shape", tuple(self.input_shape))
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if not 1 <= len(self.blocks) <= MAX_BLOCKS:
            raise ValueError(
                f"`blocks` must hold 1 to {MAX_BLOCKS} blocks. Received: {len(self.blocks)} blocks"
            )
        if self.space is not None and not isinstance(self.space, str):
            raise ValueError(f"`space` must be a name or null. Received: space={self.space!r}")

    def build(self, bn_momentum: float = 0.9) -> "keras.Model":
        """Builds the network with fresh weights.

        Args:
            bn_momentum: Momentum of the batch normalizations' moving statistics.

        Returns:
            A functional `keras.Model`: float32 images of pixels 0..255, shape
            `(batch,) + input_shape`, to logits, shape `(batch, num_classes)`.
        """
        # Imported here: an architecture is plain data and loads without Keras.
        from fpnas_keras import network

        return network.build(self, bn_momentum=bn_momentum)

    def parts(self) -> list[Part]:
        """Stem, blocks and head, each with what comes into it."""
        size, channels = self.input_shape[:2], self.input_shape[2]
        parts = []
        for each in (self.stem, *self.blocks):
            parts.append(Part(each, size, channels))
            size, channels = output_size(size, each.strides), each.filters
        return [*parts, Part(self.head, size, channels, self.num_classes)]

    def macs(self) -> int:
        """Multiply-adds of all convolutions and dense layers for one image."""
        from fpnas_keras.cost import count

        return count.architecture(self).macs

    def params(self) -> int:
        """Number of trainable parameters."""
        from fpnas_keras.cost import count

        return count.architecture(self).params

    def to_dict(self) -> dict[str, Any]:
        """The architecture as in `architecture.json`."""
        return {
            "format": FORMAT,
            "space": self.space,
            "input_shape": list(self.input_shape),
            "num_classes": self.num_classes,
            "stem": dataclasses.asdict(self.stem),
            "blocks": [dataclasses.asdict(block) for block in self.blocks],
            "head": dataclasses.asdict(self.head),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Architecture":
        """Reads what `to_dict` gives.

        Raises:
            ValueError: When a key is missing, unknown or has a bad value; the
                message names the key.
        """
        keys = ("format", "space", "input_shape", "num_classes", "stem", "blocks", "head")
        check_keys(data, keys, "the architecture")
        check_format(data, FORMAT)
        return cls(
            input_shape=data["input_shape"],
            num_classes=data["num_classes"],
            stem=read_fields(Stem, data["stem"], "stem"),
            blocks=read_list(Block, data["blocks"], "blocks"),
            head=read_fields(Head, data["head"], "head"),
            space=data["space"],
        )

    def save(self, path: str | os.PathLike) -> None:
        """Writes the architecture as JSON."""
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Architecture":
        """Reads an architecture file.

        Raises:
            ValueError: When the file is not an architecture; the message names
                the file and the key.
        """
        return read_json(path, "an architecture", cls.from_dict)


def make_divisible(value: float, divisor: int = 8) -> int:
    """Rounds a number of channels to a multiple of `divisor`, as MobileNet does.

    At least `divisor`, and never more than 10% below `value`.
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def expanded_filters(filters_in: int, expansion: float) -> int:
    """Channels of a block between its expand and its project convolution."""
    return filters_in if expansion == 1 else make_divisible(filters_in * expansion)


def attention_filters(expanded: int) -> int:
    """Channels of the bottleneck of a block's attention."""
    return make_divisible(0.25 * expanded)


def output_size(size: Sequence[int], strides: int) -> tuple[int, int]:
    """Height and width after a layer with "same" padding."""
    return tuple(-(-side // strides) for side in size)


def check_image_shape(input_shape: Sequence[int], num_classes: int) -> None:
    """Raises `ValueError` unless the shape is `(height, width, channels)`."""
    is_shape = isinstance(input_shape, (list, tuple)) and len(input_shape) == 3
    if not is_shape or not all(_is_integer(n) and 1 <= n <= MAX_SIZE for n in input_shape):
        raise ValueError(
            "`input_shape` must be (height, width, channels), each an integer from 1 to "
            f"{MAX_SIZE}. Received: input_shape={short(input_shape)}"
        )
    if not _is_integer(num_classes) or not 2 <= num_classes <= MAX_FILTERS:
        raise ValueError(
            f"`num_classes` must be an integer from 2 to {MAX_FILTERS}. "
            f"Received: num_classes={short(num_classes)}"
        )


def _is_integer(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _check_integer(owner, name, low, high):
    value = getattr(owner, name)
    if not _is_integer(value) or not low <= value <= high:
        raise ValueError(
            f"`{name}` must be an integer from {low} to {high}. Received: {name}={short(value)}"
        )


def _check_number(owner, name, low, high):
    value = getattr(owner, name)
    is_number = _is_integer(value) or isinstance(value, float)
    if not is_number or not low <= value <= high:  # nan is in no range
        raise ValueError(
            f"`{name}` must be a number from {low} to {high}. Received: {name}={short(value)}"
        )


def _check_kernel_size(owner):
    _check_integer(owner, "kernel_size", 1, 31)
    if owner.kernel_size % 2 == 0:
        raise ValueError(f"`kernel_size` must be odd. Received: kernel_size={owner.kernel_size}")


def _check_choice(owner, name, choices):
    value = getattr(owner, name)
    if type(value) is not type(choices[0]) or value not in choices:
        raise ValueError(
            f"`{name}` must be one of {', '.join(map(str, choices))}. "
            f"Received: {name}={short(value)}"
        )
