"""Files: written whole or not at all, JSON read strictly; values and errors in messages."""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import logging

from fpnas_keras.errors import UserError

# Inside the installed package, and beside it in a checkout.
_CONFIGS = [folder / "configs" for folder in pathlib.Path(__file__).parents[:2]]
# What the values of `check_fields` are called in messages.
KINDS = {int: "an integer", float: "a number", str: "text", bool: "true or false", list: "a list"}


def find_file(path: str) -> str:
    """The path of a file of the user, or else of one of that name that comes with the package.

    `configs/quickstart.flags` is found from every folder; so is `quickstart.flags`.
    """
    if not path or pathlib.Path(path).exists():
        return path
    name = pathlib.PurePath(path)
    name = name.relative_to("configs") if name.parts[0] == "configs" else name
    for folder in _CONFIGS:  # Joined to a folder, an absolute path stays what it is.
        if (folder / name).is_file():
            logging.info("%s: taken from the package, %s", path, folder / name)
            return str(folder / name)
    return path


def is_of_package(path: str | os.PathLike) -> bool:
    """Whether a file is one of those that come with the package."""
    return any(folder in pathlib.Path(path).resolve().parents for folder in _CONFIGS)


def check_output(output: pathlib.Path) -> None:
    """Raises `UserError` unless a file of the argument `output` lies in an existing folder."""
    if not output.parent.is_dir():
        raise UserError(f"`output` must lie in an existing folder. Received: output={output}")


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary path, and renames that file to `path` if no exception is raised.

    The temporary file is in the folder of `path` and has the same suffix, from which Keras reads
    the format. If an exception is raised, the temporary file is removed and `path` does not change.

    Args:
        path: The file to write.

    Yields:
        The path to write to.

    Example:

    ```python
    with replacing("model.keras") as temporary:
        model.save(temporary)
    ```
    """
    path = pathlib.Path(path)
    # The suffix stays last, in full: Keras wants ".weights.h5" for weights.
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        # Flush to the disk before the rename: the power may fail in between.
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, contents: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike, kind: str, read: Callable[[Any], Any]) -> Any:
    """Reads a JSON file.

    Args:
        path: The file.
        kind: What the file should be ("an architecture"), for the message of the error.
        read: Makes the result of the file's content, or raises `UserError`.

    Raises:
        UserError: When the file is not what it should be; the message names it.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
        return read(json.loads(text, object_pairs_hook=_unique_keys))
    except OSError as error:
        raise UserError(
            f"cannot read {path}, which should be {kind} file: {error.strerror}"
        ) from None
    except RecursionError:
        raise UserError(f"{path} is not {kind} file: nested too deeply") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError too
        raise UserError(f"{path} is not {kind} file: {error}") from None


def read_fields(cls: type, data: Any, where: str, defaults: bool = False) -> Any:
    """A dataclass from an object of JSON.

    Args:
        cls: The dataclass.
        data: The object; its keys are the fields.
        where: Name of the object, for the message of the error.
        defaults: Whether fields that have a default may be missing.

    Raises:
        UserError: When a key is missing or unknown or has a bad value.
    """
    fields = dataclasses.fields(cls)
    optional = [each.name for each in fields if each.default is not dataclasses.MISSING]
    check_keys(data, [each.name for each in fields], f"`{where}`", optional if defaults else ())
    try:
        return cls(**data)
    except ValueError as error:
        raise UserError(f"in `{where}`: {error}") from None


def read_list(cls: type, data: Any, where: str, defaults: bool = False) -> tuple:
    """Dataclasses from a list of JSON objects, each as `read_fields` does."""
    if not isinstance(data, list):
        raise UserError(f"`{where}` must be a list. Received: {abbreviate(data)}")
    return tuple(
        read_fields(cls, each, f"{where}[{index}]", defaults) for index, each in enumerate(data)
    )


def check_keys(
    data: Any, expected: Sequence[str], where: str, optional: Sequence[str] = ()
) -> None:
    """Raises `UserError` unless `data` is an object with the expected keys."""
    if not isinstance(data, dict):
        raise UserError(f"{where} must be an object with keys. Received: {abbreviate(data)}")
    for key in expected:
        if key not in data and key not in optional:
            raise UserError(f"{where} lacks the key `{key}`")
    for key in data:
        if key not in expected:
            raise UserError(
                f"{where} has the unknown key {_quote(key)}. Expected: {', '.join(expected)}"
            )


def check_fields(data: Any, where: str, **kinds: type) -> None:
    """Raises `UserError` unless `data` is an object with values of these kinds."""
    if not isinstance(data, dict):
        raise UserError(f"{where} must be an object with keys. Received: {abbreviate(data)}")
    for name, kind in kinds.items():
        if name not in data:
            raise UserError(f"{where} lacks the key `{name}`")
        value = data[name]
        is_kind = type(value) is kind or (kind is float and type(value) is int)
        # Finite, and integers too no more than a float holds.
        if not is_kind or (kind in (int, float) and not abs(value) < 1e300):
            raise UserError(
                f"`{name}` of {where} must be {KINDS[kind]}. Received: {abbreviate(value)}"
            )


def check_format(data: dict[str, Any], expected: int) -> None:
    """Raises `UserError` unless the key `format` is the expected number."""
    if data["format"] != expected or isinstance(data["format"], bool):
        raise UserError(f"`format` must be {expected}. Received: format={data['format']!r}")


def abbreviate(value: Any) -> str:
    """A value as it is shown in messages."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def summarize_error(error: Exception, line: int = 0) -> str:
    """One line of an exception, for messages: by default its first."""
    lines = str(error).strip().splitlines()
    return lines[line] if lines else type(error).__name__


def _quote(key):
    """A key of a file as it is shown in messages: line breaks are escaped."""
    return f"`{repr(key)[1:-1]}`"


def _unique_keys(pairs):
    found = {}
    for key, value in pairs:
        if key in found:
            raise UserError(f"the key {_quote(key)} appears twice in one object")
        found[key] = value
    return found
