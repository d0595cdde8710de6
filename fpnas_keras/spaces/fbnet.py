"""`fbnet_c`: the space of FBNet with the head of FBNet-C, for images of 96 to 288 pixels.

| stage | blocks | stride | filters |
|---|---|---|---|
| stem | 3x3 convolution | 2 | 16 |
| 1 | 1 | 1 | 16 |
| 2 | 4 | 2 | 24 |
| 3 | 4 | 2 | 32 |
| 4 | 4 | 2 | 64 |
| 5 | 4 | 1 | 112 |
| 6 | 4 | 2 | 184 |
| 7 | 1 | 1 | 352 |
| head | 1x1 convolution | 1 | 1984 |

Every block is one of the operations k3_e1, k3_e3, k3_e6, k5_e1, k5_e3, k5_e6 (kernel size,
expansion) with ReLU. Blocks that keep the shape of their input can be skipped. The two operations
of FBNet with grouped 1x1 convolutions are missing.

At 224 pixels and 1,000 classes: 1.6e18 architectures of 50M to 573M MACs.

Reference: Wu et al., "FBNet: Hardware-Aware Efficient ConvNet Design via Differentiable Neural
Architecture Search", CVPR 2019, arXiv:1812.03443.
"""

from fpnas_keras.architecture import Head, Stem
from fpnas_keras.spaces.search_block import SearchBlock
from fpnas_keras.spaces.space import Space

# Filters, blocks, stride of the first.
STAGES = ((16, 1, 1), (24, 4, 2), (32, 4, 2), (64, 4, 2), (112, 4, 1), (184, 4, 2), (352, 1, 1))
OPERATIONS = tuple({"kernel_size": k, "expansion": e} for k in (3, 5) for e in (1, 3, 6))


def fbnet_c(input_shape: tuple[int, int, int] = (224, 224, 3), num_classes: int = 1000) -> Space:
    """The space as in the table above."""
    blocks, filters_in = [], 16
    for filters, repeats, strides in STAGES:
        for position in range(repeats):
            keeps_shape = filters == filters_in and (position > 0 or strides == 1)
            blocks.append(
                SearchBlock(
                    filters=(filters,),
                    operation=OPERATIONS + ({"skip": True},) * keeps_shape,
                    strides=strides if position == 0 else 1,
                )
            )
            filters_in = filters
    return Space(
        name="fbnet_c",
        input_shape=input_shape,
        num_classes=num_classes,
        stem=Stem(filters=16, kernel_size=3, strides=2, activation="relu"),
        blocks=tuple(blocks),
        head=Head(filters=1984, activation="relu"),
    )
