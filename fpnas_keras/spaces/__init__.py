"""Search spaces as plain data, by name or from a file. Loads without TensorFlow and Keras."""

import os
from collections.abc import Callable

from fpnas_keras.errors import UserError
from fpnas_keras.files import find_file
from fpnas_keras.spaces.entries import Entries
from fpnas_keras.spaces.fbnet import fbnet_c
from fpnas_keras.spaces.fbnetv2 import fbnetv2_f, fbnetv2_f_fine
from fpnas_keras.spaces.fpnas import fpnas
from fpnas_keras.spaces.load import SUFFIXES, load
from fpnas_keras.spaces.mobile import mobile_40, mobile_128, mobile_224
from fpnas_keras.spaces.mobile_mini import mobile_mini
from fpnas_keras.spaces.mobilenet_v3 import mobilenet_v3
from fpnas_keras.spaces.nas_bench_macro import nas_bench_macro
from fpnas_keras.spaces.search_block import SAME, VARIABLES, SearchBlock, stage
from fpnas_keras.spaces.space import Space

__all__ = [
    "SAME",
    "SUFFIXES",
    "VARIABLES",
    "Entries",
    "SearchBlock",
    "Space",
    "get",
    "names",
    "stage",
]

_SPACES: dict[str, Callable[..., Space]] = {
    each.__name__: each
    for each in (
        fbnet_c,
        fbnetv2_f,
        fbnetv2_f_fine,
        fpnas,
        mobile_40,
        mobile_128,
        mobile_224,
        mobile_mini,
        mobilenet_v3,
        nas_bench_macro,
    )
}


def names() -> list[str]:
    """Names of the spaces that `get` knows."""
    return sorted(_SPACES)


def get(
    name: str | os.PathLike,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    num_classes: int = 10,
) -> Space:
    """Makes a space for images of a given shape.

    Args:
        name: One of `names()`, or the path of a `.json` or `.py` file that defines a space.
            A Python file is run. It must define a function
            `space(input_shape, num_classes)` that returns a `Space`.
        input_shape: `(height, width, channels)` of the images.
        num_classes: Number of classes.

    Raises:
        UserError: If there is no space of that name, or the file does not define one.

    Example:

    >>> get("mobile_mini", input_shape=(28, 28, 1)).num_architectures
    4860000000000
    """
    name = find_file(os.fspath(name))
    if name.endswith(SUFFIXES):
        space = load(name, input_shape, num_classes)
        if space.name in _SPACES:
            raise UserError(
                f"the space file {name} must not have the name of a built-in space, one of "
                f"{', '.join(names())}. Received: space={name!r}"
            )
        return space
    if name not in _SPACES:
        raise UserError(
            f"`space` must be one of {', '.join(names())} or the path of a {' or '.join(SUFFIXES)} "
            f"file. Received: space={name!r}"
        )
    return _SPACES[name](input_shape=input_shape, num_classes=num_classes)
