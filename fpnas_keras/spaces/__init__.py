"""What can be chosen: search spaces as plain data, by name."""

from collections.abc import Callable

from fpnas_keras.spaces.mobile_mini import mobile_mini
from fpnas_keras.spaces.nas_bench_macro import nas_bench_macro
from fpnas_keras.spaces.space import SAME, VARIABLES, SearchBlock, Space

__all__ = ["SAME", "VARIABLES", "SearchBlock", "Space", "get", "names"]

_SPACES: dict[str, Callable[..., Space]] = {
    "mobile_mini": mobile_mini,
    "nas_bench_macro": nas_bench_macro,
}


def names() -> list[str]:
    """Names of the spaces that `get` knows."""
    return sorted(_SPACES)


def get(name: str, input_shape: tuple[int, int, int] = (32, 32, 3), num_classes: int = 10) -> Space:
    """The space of that name for images of a given shape.

    Args:
        name: One of `names()`.
        input_shape: `(height, width, channels)` of the images.
        num_classes: Number of classes.

    Raises:
        ValueError: When there is no space of that name.

    Example:

    >>> get("mobile_mini", input_shape=(28, 28, 1)).num_architectures
    """
    if name not in _SPACES:
        raise ValueError(f"`space` must be one of {', '.join(names())}. Received: space={name!r}")
    return _SPACES[name](input_shape=input_shape, num_classes=num_classes)
