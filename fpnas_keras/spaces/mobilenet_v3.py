"""`mobilenet_v3`: networks around MobileNetV3-Large, for images of 96 to 288 pixels.

| stage | blocks | stride | filters | activation | squeeze-excite |
|---|---|---|---|---|---|
| stem | 3x3 convolution | 2 | 16 | hard swish | |
| 1 | 1 (expansion 1, 3x3, fixed) | 1 | 16 | ReLU | |
| 2 | 2 to 4 | 2 | 24 | ReLU | |
| 3 | 2 to 4 | 2 | 40 | ReLU | yes |
| 4 | 2 to 4 | 2 | 80 | hard swish | |
| 5 | 2 to 4 | 1 | 112 | hard swish | yes |
| 6 | 2 to 4 | 2 | 160 | hard swish | yes |
| head | 1x1 convolution 960, dense 1280 | 1 | | hard swish | |

Every block chooses kernel size 3, 5 or 7 and expansion 3, 4 or 6. The third and the fourth block of
a stage can be skipped, independently. It is the space of once-for-all at width 1.0, except that
once-for-all skips the third block only together with the fourth.

At 224 pixels and 1,000 classes: 3.5e19 architectures of 121M to 566M MACs.

Reference: Howard et al., "Searching for MobileNetV3", arXiv:1905.02244; Cai et al.,
"Once-for-All", arXiv:1908.09791.
"""

from fpnas_keras.architecture import Head, Stem
from fpnas_keras.spaces.search_block import SearchBlock, stage
from fpnas_keras.spaces.space import Space

# Filters, stride of the first block, activation, splits.
STAGES = (
    (24, 2, "relu", 0),
    (40, 2, "relu", 1),
    (80, 2, "hard_silu", 0),
    (112, 1, "hard_silu", 1),
    (160, 2, "hard_silu", 1),
)


def mobilenet_v3(
    input_shape: tuple[int, int, int] = (224, 224, 3), num_classes: int = 1000
) -> Space:
    """The space as in the table above."""
    blocks = [
        block
        for filters, strides, activation, splits in STAGES
        for block in stage(
            4,
            least_blocks=2,
            strides=strides,
            filters=(filters,),
            kernel_size=(3, 5, 7),
            expansion=(3, 4, 6),
            activation=(activation,),
            splits=(splits,),
        )
    ]
    return Space(
        name="mobilenet_v3",
        input_shape=input_shape,
        num_classes=num_classes,
        stem=Stem(filters=16, kernel_size=3, strides=2, activation="hard_silu"),
        blocks=(SearchBlock(filters=(16,)), *blocks),
        head=Head(filters=960, activation="hard_silu", dense_units=1280),
    )
