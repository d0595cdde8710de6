"""A network as data: its stem, blocks and head, as JSON, with its MACs and parameters.

Only `Architecture.build` needs Keras, and imports it.

MACs are the multiply-adds of convolutions and dense layers for one image, which the papers call
FLOPS. Batch normalizations, activations, pooling and the gates of attention do not count.
"""

import dataclasses
import html
import itertools
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fpnas_keras.errors import UserError
from fpnas_keras.files import (
    abbreviate,
    check_format,
    check_keys,
    find_file,
    read_fields,
    read_json,
    read_list,
    write_json,
)

if TYPE_CHECKING:
    import keras

FORMAT = 1
ACTIVATIONS = ("relu", "relu6", "hard_silu")
SPLITS = (0, 1, 2, 4)
# Far above any real network, but low enough that no count or shape overflows.
MAX_FILTERS = 65_536
MAX_SIZE = 16_384
MAX_BLOCKS = 1_000


@dataclasses.dataclass(frozen=True)
class Stem:
    """The first layers: a convolution, a batch normalization, an activation.

    Args:
        filters: Channels out.
        kernel_size: Side of the kernel, odd.
        strides: Stride of the convolution.
        activation: One of `ACTIVATIONS`.

    Raises:
        UserError: If a value is out of its range.
    """

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

    A block with `skip` is the identity, or a 1x1 projection if the shapes of input and output
    differ. Its other variables but `filters` are irrelevant. They are set to their defaults, so
    that equal networks compare as equal.

    Args:
        filters: Channels out.
        kernel_size: Side of the depthwise kernel, odd.
        expansion: Ratio of the expanded channels to the channels in.
        strides: Stride of the block.
        activation: One of `ACTIVATIONS`.
        splits: The attention. 0 is none, 1 is squeeze-excite, 2 or 4 is split-attention
            (ResNeSt, arXiv:2004.08955) over that many depthwise convolutions.
        skip: Whether the block is skipped.

    Raises:
        UserError: If a value is out of its range.

    Example:

    >>> Block(24, kernel_size=5, skip=True) == Block(24, kernel_size=3, skip=True)
    True
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
            raise UserError(f"`skip` must be true or false. Received: skip={self.skip!r}")
        if self.skip:
            for field in dataclasses.fields(self):
                if field.name not in ("filters", "strides", "skip"):
                    object.__setattr__(self, field.name, field.default)


@dataclasses.dataclass(frozen=True)
class Head:
    """The last layers: a 1x1 convolution, pooling, optionally a dense layer, and the classes.

    Args:
        filters: Channels out of the convolution.
        activation: One of `ACTIVATIONS`.
        dense_units: Units of the hidden dense layer, `None` for no such layer.

    Raises:
        UserError: If a value is out of its range.
    """

    filters: int
    activation: str = "relu"
    dense_units: int | None = None

    def __post_init__(self):
        _check_integer(self, "filters", 1, MAX_FILTERS)
        _check_choice(self, "activation", ACTIVATIONS)
        if self.dense_units is not None:
            _check_integer(self, "dense_units", 1, MAX_FILTERS)


class Part(NamedTuple):
    """A stem, a block or a head, with the shape of its input. Costs are functions of parts.

    Attributes:
        layers: The stem, block or head.
        size: Height and width of the input.
        channels: Channels of the input.
        num_classes: Number of classes of a head; 0 for a stem or a block.
    """

    layers: Stem | Block | Head
    size: tuple[int, int]
    channels: int
    num_classes: int = 0

    @property
    def keeps_shape(self) -> bool:
        """Whether the output of a block has the shape of its input.

        Then the block adds its input to its output. If it is skipped, it is the identity.
        """
        return self.layers.strides == 1 and self.layers.filters == self.channels


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A network as data: one choice for every variable of every block.

    Args:
        input_shape: `(height, width, channels)` of the images.
        num_classes: Number of classes.
        stem: The stem.
        blocks: The blocks, in order.
        head: The head.
        space: Name of the space that it was chosen from. `None` if it was written by hand.

    Raises:
        UserError: If a value is out of its range.

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
            raise UserError(
                f"`blocks` must hold 1 to {MAX_BLOCKS} blocks. Received: {len(self.blocks)} blocks"
            )
        if self.space is not None and not isinstance(self.space, str):
            raise UserError(f"`space` must be a name or null. Received: space={self.space!r}")

    def __repr__(self) -> str:
        count = self.count()
        return (
            f"Architecture(space={self.space!r}, input_shape={self.input_shape}, num_classes="
            f"{self.num_classes}, {len(self.blocks)} blocks, {count.macs:,} MACs, "
            f"{count.params:,} parameters)"
        )

    def __str__(self) -> str:
        rows = [["block", "stride", "filters", "kernel", "expansion", "activation", "splits"]]
        rows += [[str(index), *_block_cells(block)] for index, block in enumerate(self.blocks)]
        return format_table(rows)

    def _repr_html_(self) -> str:
        """The table of a notebook."""
        return f"<p>{html.escape(repr(self))}</p><pre>{html.escape(str(self))}</pre>"

    def build(self, bn_momentum: float = 0.9) -> "keras.Model":
        """Builds the network with fresh weights.

        Args:
            bn_momentum: Momentum of the moving statistics of batch normalization.

        Returns:
            A functional `keras.Model`. It takes images with pixels 0..255, float32 of shape
            `(batch,) + input_shape`, and returns logits of shape `(batch, num_classes)`.
        """
        # Imported here: an architecture is plain data and loads without Keras.
        from fpnas_keras.networks import build_network

        return build_network(self, bn_momentum=bn_momentum)

    def fit_to(self, input_shape: tuple[int, int, int], num_classes: int) -> "Architecture":
        """The same stem, blocks and head for other images and classes."""
        return dataclasses.replace(self, input_shape=tuple(input_shape), num_classes=num_classes)

    def parts(self) -> list[Part]:
        """Stem, blocks and head, each with the shape of its input."""
        size, channels = self.input_shape[:2], self.input_shape[2]
        parts = []
        for layers in (self.stem, *self.blocks):
            parts.append(Part(layers, size, channels))
            size, channels = output_size(size, layers.strides), layers.filters
        return [*parts, Part(self.head, size, channels, self.num_classes)]

    def count(self) -> "Count":
        """MACs and trainable parameters of the whole network."""
        return sum(map(count_part, self.parts()), Count())

    def macs(self) -> int:
        """Multiply-adds of all convolutions and dense layers for one image."""
        return self.count().macs

    def params(self) -> int:
        """Number of trainable parameters, without the moving statistics of batch normalization."""
        return self.count().params

    def to_dict(self) -> dict[str, Any]:
        """The architecture as plain data, as in `architecture.json`."""
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
        """The inverse of `to_dict`.

        Raises:
            UserError: If a key is missing, unknown or has a bad value; the message names the key.
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
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Architecture":
        """Reads an architecture file, of yours or one that comes with the package.

        Raises:
            UserError: If the file is not an architecture; the message names the file and the key.
        """
        return read_json(find_file(os.fspath(path)), "an architecture", cls.from_dict)


class Count(NamedTuple):
    """MACs and trainable parameters of a part of a network or of a whole network."""

    macs: int = 0
    params: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(self.macs + other.macs, self.params + other.params)


class Kernel(NamedTuple):
    """The kernel of a convolution or of a dense layer.

    Attributes:
        inputs: Inputs of each output: kernel height times width times channels in.
        outputs: Channels out.
        positions: Height times width of the output.
        other_params: Further ones of each output: 2 of batch normalization, or a bias.
        activation: What follows it, one of `ACTIVATIONS`; "linear" for none. The gates of attention
            count as linear.
    """

    inputs: int
    outputs: int
    positions: int
    other_params: int
    activation: str = "linear"


def kernels_of(part: Part) -> list[Kernel]:
    """The kernels of a stem, a block or a head."""
    if isinstance(part.layers, Stem):
        return _stem_kernels(part)
    return _block_kernels(part) if isinstance(part.layers, Block) else _head_kernels(part)


def count_part(part: Part) -> Count:
    """Counts the MACs and the trainable parameters of a stem, a block or a head."""
    kernels = kernels_of(part)
    return Count(
        sum(each.positions * each.inputs * each.outputs for each in kernels),
        sum((each.inputs + each.other_params) * each.outputs for each in kernels),
    )


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of texts as a table with aligned columns."""
    widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    lines = [" ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _block_cells(block):
    cells = [str(block.strides), str(block.filters)]
    if block.skip:
        return [*cells, "skip"]
    kernel = f"{block.kernel_size}x{block.kernel_size}"
    return [*cells, kernel, f"{block.expansion:g}", block.activation, str(block.splits)]


def make_divisible(value: float, divisor: int = 8) -> int:
    """Rounds a number of channels to a multiple of `divisor`, as MobileNet does.

    The result is at least `divisor`, and never more than 10% below `value`.

    Example:

    >>> make_divisible(19), make_divisible(11)  # 8 would be more than 10% below 11.
    (24, 16)
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def expanded_filters(filters_in: int, expansion: float) -> int:
    """Channels between the expand and the project convolution of a block."""
    return filters_in if expansion == 1 else make_divisible(filters_in * expansion)


def attention_filters(expanded: int) -> int:
    """Channels of the bottleneck of the attention of a block."""
    return make_divisible(0.25 * expanded)


def output_size(size: Sequence[int], strides: int) -> tuple[int, int]:
    """Height and width of the output of a layer with "same" padding."""
    return tuple(-(-side // strides) for side in size)


def check_image_shape(input_shape: Sequence[int], num_classes: int) -> None:
    """Raises `UserError` unless the shape is `(height, width, channels)`."""
    is_shape = isinstance(input_shape, (list, tuple)) and len(input_shape) == 3
    if not is_shape or not all(_is_integer(n) and 1 <= n <= MAX_SIZE for n in input_shape):
        raise UserError(
            "`input_shape` must be (height, width, channels), each an integer from 1 to "
            f"{MAX_SIZE}. Received: input_shape={abbreviate(input_shape)}"
        )
    if not _is_integer(num_classes) or not 2 <= num_classes <= MAX_FILTERS:
        raise UserError(
            f"`num_classes` must be an integer from 2 to {MAX_FILTERS}. "
            f"Received: num_classes={abbreviate(num_classes)}"
        )


def _stem_kernels(part):
    stem, size_out = part.layers, output_size(part.size, part.layers.strides)
    return [_conv_kernel(size_out, stem.kernel_size, part.channels, stem.filters, stem.activation)]


def _block_kernels(part):
    block, size_out = part.layers, output_size(part.size, part.layers.strides)
    if block.skip:
        projection = _conv_kernel(size_out, 1, part.channels, block.filters)
        return [] if part.keeps_shape else [projection]
    expanded, kernels = expanded_filters(part.channels, block.expansion), []
    if block.expansion != 1:
        kernels.append(_conv_kernel(part.size, 1, part.channels, expanded, block.activation))
    # A depthwise kernel has one input channel.
    depthwise = _conv_kernel(size_out, block.kernel_size, 1, expanded, block.activation)
    kernels += [depthwise] * max(1, block.splits)
    if block.splits:
        bottleneck = attention_filters(expanded)
        kernels.append(_dense_kernel(expanded, bottleneck, activation="relu"))
        kernels += [_dense_kernel(bottleneck, expanded)] * block.splits
    return [*kernels, _conv_kernel(size_out, 1, expanded, block.filters)]


def _head_kernels(part):
    head = part.layers
    kernels = [_conv_kernel(part.size, 1, part.channels, head.filters, head.activation)]
    features = head.filters
    if head.dense_units:
        kernels.append(_dense_kernel(features, head.dense_units, False, head.activation))
        features = head.dense_units
    return [*kernels, _dense_kernel(features, part.num_classes)]


def _conv_kernel(size_out, kernel_size, filters_in, filters_out, activation="linear"):
    # Batch normalization has a scale and an offset for each channel.
    return Kernel(kernel_size**2 * filters_in, filters_out, math.prod(size_out), 2, activation)


def _dense_kernel(units_in, units_out, use_bias=True, activation="linear"):
    return Kernel(units_in, units_out, 1, int(use_bias), activation)


def _is_integer(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _check_integer(owner, name, low, high):
    value = getattr(owner, name)
    if not _is_integer(value) or not low <= value <= high:
        raise UserError(
            f"`{name}` must be an integer from {low} to {high}. "
            f"Received: {name}={abbreviate(value)}"
        )


def _check_number(owner, name, low, high):
    value = getattr(owner, name)
    is_number = _is_integer(value) or isinstance(value, float)
    if not is_number or not low <= value <= high:  # nan is in no range.
        raise UserError(
            f"`{name}` must be a number from {low} to {high}. Received: {name}={abbreviate(value)}"
        )


def _check_kernel_size(owner):
    _check_integer(owner, "kernel_size", 1, 31)
    if owner.kernel_size % 2 == 0:
        raise UserError(f"`kernel_size` must be odd. Received: kernel_size={owner.kernel_size}")


def _check_choice(owner, name, choices):
    value = getattr(owner, name)
    if type(value) is not type(choices[0]) or value not in choices:
        raise UserError(
            f"`{name}` must be one of {', '.join(map(str, choices))}. "
            f"Received: {name}={abbreviate(value)}"
        )
