"""`fpnas`: FBNetV2's space made wider and deeper, with split-attention; up to 3.0G MACs.

For images of 128 to 288 pixels; MACs at 224.

| stage | blocks | stride | filters | expansion |
|---|---|---|---|---|
| stem | 3x3 convolution | 2 | 24 | |
| 1 | 2 | 1 | 16, 20, 24 | 1 |
| 2 | 4 | 2 | 24, 28, ..., 40 | 0.75 to 6 |
| 3 | 5 | 2 | 40, 48, ..., 72 | 0.75 to 6 |
| 4 | 5 | 2 | 80, 88, ..., 136 | 0.75 to 6 |
| 5 | 6 | 1 | 112, 120, ..., 184 | 0.75 to 6 |
| 6 | 6 | 2 | 192, 208, ..., 320 | 0.75 to 6 |
| head | 1x1 convolution | 1 | 1984 | |

Every block chooses kernel size 3, 5 or 7, expansion (0.75, 1.5, 2.25, 3, 3.75, 4.5, 6), ReLU or
hard swish, and 0, 1, 2 or 4 splits. All blocks but the first of a stage can be skipped. The first
block of a stage chooses the filters of the stage, and has the stride of the stage.

At 224 pixels and 1,000 classes: 2.7e65 architectures of 51M to 3.03G MACs.

This is a reconstruction. The paper says that its space is that of FBNetV2, made wider and deeper,
with a searched number of splits. Its exact table was not available. The shared filters of a stage
are a decision of this project: if every block chose its own filters, most blocks could not add
their input to their output, and the shared weights would learn several times slower (measured on
mobile_mini).

Reference: Yan et al., "FP-NAS: Fast Probabilistic Neural Architecture Search", CVPR 2021,
arXiv:2011.10949.
"""

from fpnas_keras.architecture import Head, Stem
from fpnas_keras.spaces.search_block import stage
from fpnas_keras.spaces.space import Space

# Filters, blocks, stride of the first.
STAGES = (
    (range(16, 25, 4), 2, 1),
    (range(24, 41, 4), 4, 2),
    (range(40, 73, 8), 5, 2),
    (range(80, 137, 8), 5, 2),
    (range(112, 185, 8), 6, 1),
    (range(192, 321, 16), 6, 2),
)
EXPANSIONS = (0.75, 1.5, 2.25, 3, 3.75, 4.5, 6)


def fpnas(input_shape: tuple[int, int, int] = (224, 224, 3), num_classes: int = 1000) -> Space:
    """The space as in the table above."""
    blocks = [
        block
        for index, (filters, blocks, strides) in enumerate(STAGES)
        for block in stage(
            blocks,
            strides=strides,
            filters=tuple(filters),
            kernel_size=(3, 5, 7),
            expansion=EXPANSIONS if index > 0 else (1,),
            activation=("relu", "hard_silu"),
            splits=(0, 1, 2, 4),
        )
    ]
    return Space(
        name="fpnas",
        input_shape=input_shape,
        num_classes=num_classes,
        stem=Stem(filters=24, kernel_size=3, strides=2, activation="hard_silu"),
        blocks=tuple(blocks),
        head=Head(filters=1984, activation="hard_silu"),
    )
