"""Networks that people made by hand, as architectures of any width."""

import bisect
from collections.abc import Callable

import numpy as np

from fpnas_keras.architecture import Architecture, Block, Head, Stem, make_divisible
from fpnas_keras.cost import format_cost
from fpnas_keras.errors import UserError

# (kernel size, expansion, filters, squeeze-excite, hard swish, stride) of the published blocks. For
# 28 pixels, three of the five halvings of the size are kept, as in `mobile_mini`; a stride of the
# stem adds the others. MobileNetV3 keeps the last three. EfficientNet keeps the middle ones;
# otherwise no width is within the target.
_MOBILENET_V3_SMALL = (
    (3, 1, 16, 1, 0, 1),
    (3, 4.5, 24, 0, 0, 2),
    (3, 3.67, 24, 0, 0, 1),
    (5, 4, 40, 1, 1, 2),
    *2 * ((5, 6, 40, 1, 1, 1),),
    *2 * ((5, 3, 48, 1, 1, 1),),
    (5, 6, 96, 1, 1, 2),
    *2 * ((5, 6, 96, 1, 1, 1),),
)
_EFFICIENTNET_B0 = (
    (3, 1, 16, 1, 1, 1),
    (3, 6, 24, 1, 1, 2),
    (3, 6, 24, 1, 1, 1),
    (5, 6, 40, 1, 1, 2),
    (5, 6, 40, 1, 1, 1),
    (3, 6, 80, 1, 1, 2),
    *2 * ((3, 6, 80, 1, 1, 1),),
    *3 * ((5, 6, 112, 1, 1, 1),),
    *4 * ((5, 6, 192, 1, 1, 1),),
    (3, 6, 320, 1, 1, 1),
)
_MOBILENET_V2 = (
    (3, 1, 16, 0, 0, 1),
    *2 * ((3, 6, 24, 0, 0, 1),),
    (3, 6, 32, 0, 0, 2),
    *2 * ((3, 6, 32, 0, 0, 1),),
    (3, 6, 64, 0, 0, 2),
    *3 * ((3, 6, 64, 0, 0, 1),),
    *3 * ((3, 6, 96, 0, 0, 1),),
    (3, 6, 160, 0, 0, 2),
    *2 * ((3, 6, 160, 0, 0, 1),),
    (3, 6, 320, 0, 0, 1),
)
# Blocks, filters of the stem and of the head.
PUBLISHED = {
    "MobileNetV3-Small": (_MOBILENET_V3_SMALL, 16, 576),
    "MobileNetV2": (_MOBILENET_V2, 32, 1280),
    "EfficientNet-B0": (_EFFICIENTNET_B0, 32, 1280),
}
_WIDTHS = np.arange(0.055, 2.0025, 0.005)


def scale_published(
    name: str,
    input_shape: tuple[int, int, int],
    num_classes: int,
    target: float,
    stem_strides: int = 1,
    most_blocks: int = 20,
    cost: Callable[[Architecture], float] = Architecture.macs,
) -> Architecture:
    """A published network at the largest width within a target, in steps of 4 channels.

    Args:
        name: One of `PUBLISHED`.
        input_shape: Shape of the images.
        num_classes: Number of classes.
        target: Highest cost.
        stem_strides: How much the stem halves: 1 for images of up to 40 pixels, 2 for larger ones.
            With 4 the first block halves too, as in the published MobileNetV3-Small for 224 pixels.
        most_blocks: The blocks after these are left out.
        cost: Gives the cost of a network: its MACs, unless another one is given. It is higher for
            wider networks.

    Raises:
        UserError: When not even the narrowest network is within the target.

    Example:

    >>> scale_published("MobileNetV3-Small", (64, 64, 3), 5, 2e6, stem_strides=2).macs()
    1960524
    """

    def network(width):
        return _at_width(name, width, input_shape, num_classes, stem_strides, most_blocks)

    # Index of the first width that does not fit.
    end = bisect.bisect_right(_WIDTHS, target, key=lambda width: cost(network(width)))
    if end == 0:
        raise UserError(
            f"the target must be at least {format_cost(cost(network(_WIDTHS[0])))}, the cost of "
            f"the narrowest {name}. Received: {format_cost(target)}"
        )
    return network(_WIDTHS[end - 1])


def _at_width(name, width, input_shape, num_classes, stem_strides, most_blocks):
    blocks, stem, head = PUBLISHED[name]
    if stem_strides == 4:
        blocks, stem_strides = ((*blocks[0][:-1], 2), *blocks[1:]), 2

    def filters(count):
        return make_divisible(width * count, 4)

    return Architecture(
        input_shape=input_shape,
        num_classes=num_classes,
        stem=Stem(filters(stem), 3, stem_strides, "hard_silu"),
        blocks=[
            Block(
                filters=filters(out),
                kernel_size=kernel_size,
                expansion=expansion,
                strides=strides,
                activation="hard_silu" if hard_silu else "relu",
                splits=splits,
            )
            for kernel_size, expansion, out, splits, hard_silu, strides in blocks[:most_blocks]
        ],
        head=Head(filters(head), "hard_silu"),
    )
