"""`mobile_mini`: small MBConv networks for images of 28 to 96 pixels.

| stage | blocks | stride | filters | skip |
|---|---|---|---|---|
| stem | 3x3 convolution | 1 | 16 | |
| 1 | 2 | 2, 1 | 12, 16, 20 | second block |
| 2 | 3 | 2, 1, 1 | 24, 28, 32 | second and third |
| 3 | 3 | 2, 1, 1 | 40, 48, 56, 64 | second and third |
| head | 1x1 convolution | 1 | 256 | |

Every block chooses kernel size 3 or 5, expansion 1, 3 or 6, ReLU or hard swish, and squeeze-excite
or not. The first block of a stage chooses the filters of the stage. If every block chose its own
filters, most stride-1 blocks could not add their input to their output, and the shared weights
would learn several times slower.

At 32 pixels and 10 classes: 4.9e12 architectures of 0.74M to 11.4M MACs.
"""

from fpnas_keras.architecture import Head, Stem
from fpnas_keras.spaces.search_block import stage
from fpnas_keras.spaces.space import Space

STAGES = (
    (2, (12, 16, 20)),
    (3, (24, 28, 32)),
    (3, (40, 48, 56, 64)),
)


def mobile_mini(input_shape: tuple[int, int, int] = (32, 32, 3), num_classes: int = 10) -> Space:
    """The space as in the table above."""
    blocks = [
        block
        for blocks, filters in STAGES
        for block in stage(
            blocks,
            strides=2,
            filters=filters,
            kernel_size=(3, 5),
            expansion=(1, 3, 6),
            activation=("relu", "hard_silu"),
            splits=(0, 1),
        )
    ]
    return Space(
        name="mobile_mini",
        input_shape=input_shape,
        num_classes=num_classes,
        stem=Stem(filters=16, kernel_size=3, strides=1, activation="hard_silu"),
        blocks=tuple(blocks),
        head=Head(filters=256, activation="hard_silu"),
    )
