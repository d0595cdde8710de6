"""`nas_bench_macro`: the space of NAS-Bench-Macro. The accuracy of all its networks is published.

| stage | blocks | stride | filters |
|---|---|---|---|
| stem | 3x3 convolution | 1 | 32 |
| 1 | 2 | 2, 1 | 64 |
| 2 | 3 | 2, 1, 1 | 128 |
| 3 | 3 | 2, 1, 1 | 256 |
| head | 1x1 convolution | 1 | 1280 |

Every block has one of three operations, all with ReLU: 0 is skipped, 1 is kernel size 3 with
expansion 3, 2 is kernel size 5 with expansion 6. These are 3^8 = 6,561 networks. In the published
table, the code of an architecture is the digits of its operations.

At 32 pixels and 10 classes: 7.7M to 105.7M MACs.

Reference: Su et al., "Prioritized Architecture Sampling with Monto-Carlo Tree Search",
CVPR 2021, arXiv:2103.11922.
"""

from fpnas_keras.architecture import Head, Stem
from fpnas_keras.spaces.search_block import SearchBlock
from fpnas_keras.spaces.space import Space

STAGES = ((2, 64), (3, 128), (3, 256))
OPERATIONS = (
    {"skip": True},
    {"kernel_size": 3, "expansion": 3},
    {"kernel_size": 5, "expansion": 6},
)


def nas_bench_macro(
    input_shape: tuple[int, int, int] = (32, 32, 3), num_classes: int = 10
) -> Space:
    """The space as in the table above."""
    blocks = [
        SearchBlock(filters=(filters,), operation=OPERATIONS, strides=2 if position == 0 else 1)
        for repeats, filters in STAGES
        for position in range(repeats)
    ]
    return Space(
        name="nas_bench_macro",
        input_shape=input_shape,
        num_classes=num_classes,
        stem=Stem(filters=32, kernel_size=3, strides=1, activation="relu"),
        blocks=tuple(blocks),
        head=Head(filters=1280, activation="relu"),
    )
