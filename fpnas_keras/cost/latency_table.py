"""Latency tables of `export.latency`: milliseconds of the parts of networks on one device.

`published_tables` reads the tables of others.
"""

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from fpnas_keras.architecture import Block, Part, Stem, expanded_filters
from fpnas_keras.errors import UserError
from fpnas_keras.files import abbreviate, check_format, check_keys, read_json

FORMAT = 1
KEYS = (
    *("format", "complete", "space", "input_shape", "num_classes", "device", "quantize"),
    *("versions", "created", "fit", "proof", "measured", "shares", "entries"),
)
DEVICE_KEYS = ("kind", "name", "threads")
# Gives, for a part of a network, the names of the entries whose sum is its latency.
Names = Callable[[Part], list[str]]


def load(path: str | os.PathLike) -> Mapping[str, float]:
    """Reads a finished `.json` table.

    Args:
        path: The file.

    Returns:
        The milliseconds of each entry by name.

    Raises:
        UserError: If the file is not a latency table, or not a complete one; the message names
            the file.
    """
    table = read(path)
    if not table["complete"]:
        raise UserError(
            f"the latency table {path} is not finished: run the command that measured it again to "
            "continue"
        )
    return table["entries"]


def read(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a `.json` table with all of its keys. It can be unfinished.

    Args:
        path: The file.

    Raises:
        UserError: If the file is not a latency table; the message names the file.
    """

    def checked(data):
        data = _of_today(data)
        check_keys(data, KEYS, "the latency table")
        check_format(data, FORMAT)
        device = data["device"]
        if not isinstance(device, dict) or not set(DEVICE_KEYS) <= device.keys():
            raise UserError(
                f"`device` must be an object with the keys {', '.join(DEVICE_KEYS)}. "
                f"Received: device={abbreviate(device)}"
            )
        check_entries(data["entries"], "`entries`")
        for key in ("measured", "shares"):
            if not isinstance(data[key], dict):
                raise UserError(
                    f"`{key}` must be an object with keys. Received: {abbreviate(data[key])}"
                )
        for name, times in data["measured"].items():
            if not isinstance(times, list):
                raise UserError(
                    f"`measured` must hold lists. Received: {abbreviate(name)}: {times}"
                )
            check_entries(dict(enumerate(times)), f"`measured` of {abbreviate(name)}")
        return data

    return read_json(path, "a latency table", checked)


def _of_today(table):
    """A table as it would be written now. Earlier versions wrote some keys differently."""
    if not isinstance(table, dict):
        return table
    table = {"shares": {}, **table}
    device = table.get("device")
    if isinstance(device, dict) and device.get("kind") == "adb":
        device = {"core_mask": "", "gpu": False, **device}
        delegate = "gpu" if device.pop("gpu") else "xnnpack"
        table["device"] = {"delegate": delegate, **device}
    return table


def names(part: Part) -> list[str]:
    """Names of the entries of a part in a table of `export.latency`.

    There is one entry for each part, and none for an identity. Parts that compute the same function
    have the same name, in any network.

    Args:
        part: The part.

    Example:

    >>> names(Part(Block(24, kernel_size=5, expansion=3, strides=2), (16, 16), 16))
    ['block 16x16x16 k5 e48 f24 s2 relu splits0']
    """
    layers, shape_in = part.layers, format_shape(part.size, part.channels)
    if isinstance(layers, Stem):
        stem = f"k{layers.kernel_size} f{layers.filters} s{layers.strides} {layers.activation}"
        return [f"stem {shape_in} {stem}"]
    if not isinstance(layers, Block):
        dense = f" d{layers.dense_units}" if layers.dense_units else ""
        head = f"f{layers.filters} {layers.activation}{dense} c{part.num_classes}"
        return [f"head {shape_in} {head}"]
    out = f"f{layers.filters} s{layers.strides}"
    if layers.skip:
        return [] if part.keeps_shape else [f"skip {shape_in} {out}"]
    # "e-" is a block without an expand convolution.
    expanded = "-" if layers.expansion == 1 else expanded_filters(part.channels, layers.expansion)
    block = f"k{layers.kernel_size} e{expanded} {out} {layers.activation} splits{layers.splits}"
    return [f"block {shape_in} {block}"]


def format_shape(size: tuple[int, int], channels: int) -> str:
    """A shape as in the names of entries: "16x16x24"."""
    return f"{size[0]}x{size[1]}x{channels}"


def check_entries(entries: Any, where: str) -> None:
    """Raises `UserError` unless the entries are milliseconds by name.

    Args:
        entries: What a table holds.
        where: Where it holds them, for the message.
    """
    if not isinstance(entries, Mapping):
        raise UserError(f"{where} must be an object with keys. Received: {abbreviate(entries)}")
    for name, value in entries.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 <= value < math.inf:
            raise UserError(
                f"{where} must be milliseconds of at least 0. "
                f"Received: {abbreviate(name)}: {abbreviate(value)}"
            )
