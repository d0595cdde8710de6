"""Reads search spaces from the user's files: JSON or Python."""

import pathlib
import runpy

from fpnas_keras.architecture import Head, Stem
from fpnas_keras.errors import UserError
from fpnas_keras.files import check_format, check_keys, read_fields, read_json, read_list
from fpnas_keras.spaces.search_block import SearchBlock
from fpnas_keras.spaces.space import Space

FORMAT = 1
SUFFIXES = (".json", ".py")


def load(path: str, input_shape: tuple[int, int, int], num_classes: int) -> Space:
    """Reads a space. The name of the file is the name of the space.

    A JSON file holds

        {"format": 1, "stem": {...}, "blocks": [...], "head": {...}}

    with the stem and the head as in `architecture.json`, and the arguments of `SearchBlock` for
    each block. `"filters": ["same"]` keeps the channels. A key that is left out has its default.

    A Python file is run. Its function `space(input_shape, num_classes)` returns the space.

    Args:
        path: The file.
        input_shape: `(height, width, channels)` of the images.
        num_classes: Number of classes.

    Raises:
        UserError: If the file does not define a space; the message names the file and the key.
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
    """Runs a Python file and gets its space."""
    if not pathlib.Path(path).is_file():
        raise UserError(f"cannot read the space file {path}: there is no such file")
    try:
        function = runpy.run_path(path).get("space")
        space = function(input_shape, num_classes) if callable(function) else None
    except (Exception, SystemExit) as error:  # The file can hold any code.
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
