"""Networks to compare with: published shapes scaled to a target, random ones, the largest one."""

import numpy as np

import fpnas_keras as fpnas
from fpnas_keras.architecture import Block, Head, Stem, make_divisible
from fpnas_keras.cost import SpaceCost
from fpnas_keras.method import FactorizedLogits
from fpnas_keras.spaces import Space

LEAST_SHARE = 0.95
# (kernel size, expansion, filters, squeeze-excite, hard swish, stride) of the published blocks. For
# 28 pixels, three of the five halvings of the size are kept, as in `mobile_mini`. MobileNetV3 keeps
# the last three. EfficientNet keeps the middle ones; otherwise no width is within the target.
MOBILENET_V3_SMALL = (
    (3, 1, 16, 1, 0, 1),
    (3, 4.5, 24, 0, 0, 2),
    (3, 3.67, 24, 0, 0, 1),
    (5, 4, 40, 1, 1, 2),
    *2 * ((5, 6, 40, 1, 1, 1),),
    *2 * ((5, 3, 48, 1, 1, 1),),
    (5, 6, 96, 1, 1, 2),
    *2 * ((5, 6, 96, 1, 1, 1),),
)
EFFICIENTNET_B0 = (
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
MOBILENET_V2 = (
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
    "MobileNetV3-Small": (MOBILENET_V3_SMALL, 16, 576),
    "MobileNetV2": (MOBILENET_V2, 32, 1280),
    "EfficientNet-B0": (EFFICIENTNET_B0, 32, 1280),
}


def scale_published(
    name: str,
    input_shape: tuple[int, int, int],
    num_classes: int,
    target: float,
    stem_strides: int = 1,
    most_blocks: int = 20,
) -> fpnas.Architecture:
    """A published network at the largest width within a target in MACs, in steps of 4 channels.

    Args:
        name: One of `PUBLISHED`.
        input_shape: Shape of the images.
        num_classes: Number of classes.
        target: Most MACs.
        stem_strides: Stride of the stem.
        most_blocks: The blocks after these are left out.
    """
    blocks, stem, head = PUBLISHED[name]

    def at_width(width):
        def filters(count):
            return make_divisible(width * count, 4)

        return fpnas.Architecture(
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

    networks = (at_width(width) for width in np.arange(2.0, 0.05, -0.005))
    return next(each for each in networks if each.macs() <= target)


def largest_network(space: Space) -> fpnas.Architecture:
    """The architecture of most MACs in a space whose last choices are the largest ones."""
    choices = space.cardinalities - 1
    choices[:, fpnas.spaces.VARIABLES.index("skip")] = 0
    return space.architecture(choices)


def draw_random_networks(space: Space, target: float, count: int) -> list[fpnas.Architecture]:
    """Uniformly drawn networks that cost 95% to 100% of a target in MACs."""
    found, distribution = [], FactorizedLogits(space)
    cost = SpaceCost(space, fpnas.MacsCost())
    for step in range(1000):
        drawn = distribution.sample(1000, seed=0, step=step)
        costs = cost(drawn).numpy()
        is_near = (costs >= LEAST_SHARE * target) & (costs <= target)
        found += map(space.architecture, space.entries.to_choices(drawn.numpy()[is_near]))
        if len(found) >= count:
            return found[:count]
    raise RuntimeError("the space has too few networks that use the target")
