"""Search spaces from files of the user: plain JSON, or Python."""

import pathlib
import runpy

from fpnas_keras.architecture import Head, Stem
from fpnas_keras.errors import UserError
from fpnas_keras.files import check_format, check_keys, read_fields, read_json, read_list
from fpnas_keras.spaces.space import SearchBlock, Space

FORMAT = 1
SUFFIXES = (".json", ".py")


def load(path: str, input_shape: tuple[int, int, int], num_classes: int) -> Space:
    """Reads a space; its name is that of the file.

    A JSON file holds

        {"format": 1, "stem": {...}, "blocks": [...], "head": {...}}

    with stem and head as in `architecture.json`, and for each block the arguments of
    `SearchBlock`, with "same" for filters that are kept; what is left out has its default.
    A Python file is run, and its function `space(input_shape, num_classes)` returns the space.

    Args:
        path: The file.
        input_shape: `(height, width, channels)` of the images.
        num_classes: Number of classes.

    Raises:
        UserError: When the file holds no space; the message names it and the key.
    """
    name = pathlib.Path(path).stem

    def read(data):
        check_keys(data, ("format", "stem", "blocks", "head"), "the space")
        check_format(data, FORMAT)
        return Space(
            name,
            input_shape,
            num_classes,
            stem=read_fields(Stem, data["stem"], "stem", defaults=True),
            blocks=read_list(SearchBlock, data["blocks"], "blocks", defaults=True),
            head=read_fields(Head, data["head"], "head", defaults=True),
        )

    if path.endswith(".json"):
        return read_json(path, "a space", read)
    return _run(path, input_shape, num_classes)


def _run(path, input_shape, num_classes):
    """The space that a Python file makes."""
    if not pathlib.Path(path).is_file():
        raise UserError(f"cannot read the space file {path}: there is no such file")
    try:
        function = runpy.run_path(path).get("space")
        space = function(input_shape, num_classes) if callable(function) else None
    except (Exception, SystemExit) as error:  # Any code can be in it.
        raise UserError(f"the space file {path} fails: {type(error).__name__}: {error}") from error
    if not isinstance(space, Space):
        raise UserError(
            f"the space file {path} must have a function `space(input_shape, num_classes)` that "
            f"returns a `fpnas_keras.spaces.Space`. Received: space={function!r}"
        )
    if (space.input_shape, space.num_classes) != (tuple(input_shape), num_classes):
        raise UserError(
            f"the space file {path} must make a space for images of {tuple(input_shape)} and "
            f"{num_classes} classes. Received: {space.input_shape} and {space.num_classes}"
        )
    return space
