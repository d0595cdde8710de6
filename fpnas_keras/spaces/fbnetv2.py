"""`fbnetv2_f` and `fbnetv2_f_fine`: FBNetV2's largest space, for images of 128 to 288 pixels.

| stage | blocks | stride | filters | expansion |
|---|---|---|---|---|
| stem | 3x3 convolution | 2 | 16 | |
| 1 | 1 | 1 | 12, 16 | 1 |
| 2 | 1 + 2 | 2, 1 | 16, 20, 24, 28 | 0.75 to 4.5 |
| 3 | 1 + 2 | 2, 1 | 16, 24, 32, 40 | 0.75 to 4.5 |
| 4 | 1 + 2 | 2, 1 | 48, 56, ..., 96 | 0.75 to 4.5 |
| 5 | 4 | 1 | 72, 80, ..., 128 | 0.75 to 4.5 |
| 6 | 1 + 3 | 2, 1 | 112, 120, ..., 216 | 0.75 to 4.5 |
| head | 1x1 convolution | 1 | 1984 | |

Every block chooses its filters, kernel size 3 or 5, ReLU or hard swish, squeeze-excite or not, and,
after stage 1, its expansion in steps of 0.75. Blocks with stride 1 can be skipped. In `fbnetv2_f`
the stride-1 blocks of a stage share all choices: "1 + 2" is one block and two equal ones. In
`fbnetv2_f_fine` every block has its own choices.

At 224 pixels and 1,000 classes: 5.3e23 architectures (fine: 2.0e44) of 25M to 429M MACs.

The stages, filters and repeats are those of the paper's table and of its published supernet. The
step of the expansion is a reconstruction.

References: Wan et al., "FBNetV2: Differentiable Neural Architecture Search for Spatial and Channel
Dimensions", CVPR 2020, arXiv:2004.05565. The space "fine" is from FP-NAS, arXiv:2011.10949.
"""

from fpnas_keras.architecture import Head, Stem
from fpnas_keras.spaces.search_block import SearchBlock
from fpnas_keras.spaces.space import Space

# Filters, blocks that share their choices, stride of the first.
GROUPS = (
    (range(12, 17, 4), 1, 1),
    (range(16, 29, 4), 1, 2),
    (range(16, 29, 4), 2, 1),
    (range(16, 41, 8), 1, 2),
    (range(16, 41, 8), 2, 1),
    (range(48, 97, 8), 1, 2),
    (range(48, 97, 8), 2, 1),
    (range(72, 129, 8), 4, 1),
    (range(112, 217, 8), 1, 2),
    (range(112, 217, 8), 3, 1),
)
EXPANSIONS = (0.75, 1.5, 2.25, 3, 3.75, 4.5)


def fbnetv2_f(input_shape: tuple[int, int, int] = (224, 224, 3), num_classes: int = 1000) -> Space:
    """The space of the table above, in which equal blocks of a stage share their choices."""
    return _space("fbnetv2_f", GROUPS, input_shape, num_classes)


def fbnetv2_f_fine(
    input_shape: tuple[int, int, int] = (224, 224, 3), num_classes: int = 1000
) -> Space:
    """The space of the table above, in which every block has its own choices."""
    groups = [
        (filters, 1, strides if position == 0 else 1)
        for filters, repeats, strides in GROUPS
        for position in range(repeats)
    ]
    return _space("fbnetv2_f_fine", groups, input_shape, num_classes)


def _space(name, groups, input_shape, num_classes):
    blocks = [
        SearchBlock(
            filters=tuple(filters),
            kernel_size=(3, 5),
            expansion=EXPANSIONS if index > 0 else (1,),
            activation=("relu", "hard_silu"),
            splits=(0, 1),
            skip=(False, True) if strides == 1 else (False,),
            strides=strides,
            repeats=repeats,
        )
        for index, (filters, repeats, strides) in enumerate(groups)
    ]
    return Space(
        name=name,
        input_shape=input_shape,
        num_classes=num_classes,
        stem=Stem(filters=16, kernel_size=3, strides=2, activation="hard_silu"),
        blocks=tuple(blocks),
        head=Head(filters=1984, activation="hard_silu"),
    )
