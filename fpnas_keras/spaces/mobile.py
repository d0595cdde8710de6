"""`mobile_40`, `mobile_128`, `mobile_224`: MBConv networks of very different widths and depths.

The number is the largest image size in pixels that the space is made for.

| stage | blocks | `mobile_40` | | `mobile_128` | | `mobile_224` | |
|---|---|---|---|---|---|---|---|
| | | stride | filters | stride | filters | stride | filters |
| stem | 3x3 convolution | 1 | 8 | 2 | 8 | 2 | 16 |
| 1 | 1 or 2 | 1 | 8 to 24 | 1 | 8 to 24 | 1 | 8 to 24 |
| 2 | 1 to 4 | 2 | 12 to 48 | 2 | 12 to 48 | 2 | 16 to 48 |
| 3 | 1 to 4 | 2 | 24 to 96 | 2 | 24 to 96 | 2 | 24 to 96 |
| 4 | 1 to 4 | 2 | 32 to 128 | 2 | 48 to 192 | 2 | 48 to 160 |
| 5 | 1 to 4 | | | | | 1 | 64 to 224 |
| 6 | 1 to 4 | | | | | 2 | 96 to 320 |
| head | 1x1 convolution | | 256 | | 384 | | 1280 |

Every block chooses kernel size 3 or 5, expansion 1, 2, 3, 4 or 6, ReLU or hard swish, and
squeeze-excite or not. All blocks but the first of a stage can be skipped. The first block of a
stage chooses the filters of the stage, over a factor of 3 to 4. How many blocks stand before and
after a stride decides where the resolution falls.

`mobile_40` at 32 pixels and 10 classes: 1.7e25 architectures of 0.58M to 94M MACs; `mobile_128` at
96 pixels: 1.7e25 of 1.7M to 241M; `mobile_224` at 224 pixels and 1,000 classes: 1.1e39 of 18M to
2.0G.
"""

from fpnas_keras.architecture import Head, Stem
from fpnas_keras.spaces.search_block import stage
from fpnas_keras.spaces.space import Space

# Largest number of blocks, stride of the first, filters.
STAGES_40 = (
    (2, 1, (8, 12, 16, 24)),
    (4, 2, (12, 16, 24, 32, 48)),
    (4, 2, (24, 32, 48, 64, 96)),
    (4, 2, (32, 48, 64, 96, 128)),
)
STAGES_128 = (
    (2, 1, (8, 12, 16, 24)),
    (4, 2, (12, 16, 24, 32, 48)),
    (4, 2, (24, 32, 48, 64, 96)),
    (4, 2, (48, 64, 96, 128, 192)),
)
STAGES_224 = (
    (2, 1, (8, 12, 16, 24)),
    (4, 2, (16, 24, 32, 48)),
    (4, 2, (24, 40, 64, 96)),
    (4, 2, (48, 80, 112, 160)),
    (4, 1, (64, 112, 160, 224)),
    (4, 2, (96, 160, 224, 320)),
)


def mobile_40(input_shape: tuple[int, int, int] = (32, 32, 3), num_classes: int = 10) -> Space:
    """The space for images of up to 40 pixels."""
    stem = Stem(filters=8, kernel_size=3, strides=1, activation="hard_silu")
    return _make("mobile_40", input_shape, num_classes, stem, STAGES_40, 256)


def mobile_128(input_shape: tuple[int, int, int] = (96, 96, 3), num_classes: int = 10) -> Space:
    """The space for images of 40 to 160 pixels."""
    stem = Stem(filters=8, kernel_size=3, strides=2, activation="hard_silu")
    return _make("mobile_128", input_shape, num_classes, stem, STAGES_128, 384)


def mobile_224(input_shape: tuple[int, int, int] = (224, 224, 3), num_classes: int = 1000) -> Space:
    """The space for images of 160 to 288 pixels."""
    stem = Stem(filters=16, kernel_size=3, strides=2, activation="hard_silu")
    return _make("mobile_224", input_shape, num_classes, stem, STAGES_224, 1280)


def _make(name, input_shape, num_classes, stem, stages, head_filters):
    blocks = [
        block
        for blocks, strides, filters in stages
        for block in stage(
            blocks,
            strides=strides,
            filters=filters,
            kernel_size=(3, 5),
            expansion=(1, 2, 3, 4, 6),
            activation=("relu", "hard_silu"),
            splits=(0, 1),
        )
    ]
    return Space(
        name=name,
        input_shape=input_shape,
        num_classes=num_classes,
        stem=stem,
        blocks=tuple(blocks),
        head=Head(filters=head_filters, activation="hard_silu"),
    )
