"""Latency tables: milliseconds of the parts of networks, measured on one device.

`export.latency` measures and writes them. Some published tables can be read too.
"""

import csv
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from fpnas_keras.architecture import Block, Part, Stem, expanded_filters, output_size
from fpnas_keras.errors import UserError
from fpnas_keras.files import abbreviate, check_format, check_keys, read_json

FORMAT = 1
KEYS = (
    *("format", "complete", "space", "input_shape", "num_classes", "device", "quantize"),
    *("versions", "created", "fit", "proof", "measured", "entries"),
)
# Gives, for a part of a network, the names of the entries whose sum is its latency.
Names = Callable[[Part], list[str]]


def load(path: str | os.PathLike) -> tuple[Mapping[str, float], Names]:
    """Reads a latency table.

    Args:
        path: A `.json` file of `export.latency`, or a look-up table of ProxylessNAS or
            once-for-all: a `.yaml` file of `{name: {mean: ms}}`, or a `.csv` file with the
            columns `name` and `mean`.

    Returns:
        The milliseconds of each entry by name, and a function that gives the names of the entries
        of a part.

    Raises:
        UserError: If the file is not a latency table, or not a complete one; the message names
            the file.
    """
    suffix = pathlib.Path(path).suffix
    if suffix in (".yaml", ".yml", ".csv"):
        return _load_published(path, suffix)
    table = read(path)
    if not table["complete"]:
        raise UserError(
            f"the latency table {path} is not finished: run the command that measured it again to "
            "continue"
        )
    return table["entries"], names


def read(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a `.json` table with all of its keys. It can be unfinished.

    Args:
        path: The file.

    Raises:
        UserError: If the file is not a latency table; the message names the file.
    """

    def checked(data):
        check_keys(data, KEYS, "the latency table")
        check_format(data, FORMAT)
        _check_entries(data["entries"], "`entries`")
        if not isinstance(data["measured"], dict):
            raise UserError(
                f"`measured` must be an object with keys. Received: {abbreviate(data['measured'])}"
            )
        for name, times in data["measured"].items():
            if not isinstance(times, list):
                raise UserError(
                    f"`measured` must hold lists. Received: {abbreviate(name)}: {times}"
                )
            _check_entries(dict(enumerate(times)), f"`measured` of {abbreviate(name)}")
        return data

    return read_json(path, "a latency table", checked)


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
    layers, comes_in = part.layers, f"{_shape(part.size, part.channels)}"
    if isinstance(layers, Stem):
        own = f"k{layers.kernel_size} f{layers.filters} s{layers.strides} {layers.activation}"
        return [f"stem {comes_in} {own}"]
    if not isinstance(layers, Block):
        dense = f" d{layers.dense_units}" if layers.dense_units else ""
        own = f"f{layers.filters} {layers.activation}{dense} c{part.num_classes}"
        return [f"head {comes_in} {own}"]
    if _is_identity(part):
        return []
    out = f"f{layers.filters} s{layers.strides}"
    if layers.skip:
        return [f"skip {comes_in} {out}"]
    # "e-" is a block without an expand convolution.
    expanded = "-" if layers.expansion == 1 else expanded_filters(part.channels, layers.expansion)
    own = f"k{layers.kernel_size} e{expanded} {out} {layers.activation} splits{layers.splits}"
    return [f"block {comes_in} {own}"]


def _is_identity(part):
    layers = part.layers
    return layers.skip and layers.strides == 1 and layers.filters == part.channels


def _shape(size, channels):
    return f"{size[0]}x{size[1]}x{channels}"


def _check_entries(entries, where):
    if not isinstance(entries, Mapping):
        raise UserError(f"{where} must be an object with keys. Received: {abbreviate(entries)}")
    for name, value in entries.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 <= value < math.inf:
            raise UserError(
                f"{where} must be milliseconds of at least 0. "
                f"Received: {abbreviate(name)}: {abbreviate(value)}"
            )


def _load_published(path, suffix):
    """Reads a table of ProxylessNAS or once-for-all."""
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
        rows = _csv_rows(text) if suffix == ".csv" else yaml.safe_load(text)
        if not isinstance(rows, dict) or not all(
            isinstance(row, dict) and "mean" in row for row in rows.values()
        ):
            raise UserError("it must hold an object `name: {mean: milliseconds}` for each entry")
        entries = {str(name): row["mean"] for name, row in rows.items()}
        _check_entries(entries, "`mean`")
        for kind, is_of_kind in _PUBLISHED.items():
            if any(is_of_kind(name) for name in entries):
                return entries, kind
        raise UserError("no entry is named `expanded_conv-input:...` or `MBConv-input:...`")
    except OSError as error:
        raise UserError(f"cannot read the latency table {path}: {error.strerror}") from None
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())  # YAML's messages have several lines.
        raise UserError(f"{path} is not a latency table: {reason}") from None


def _csv_rows(text):
    rows = csv.DictReader(text.splitlines())
    if not {"name", "mean"} <= set(rows.fieldnames or ()):
        raise UserError(f"it must have the columns name and mean. Received: {rows.fieldnames}")
    return {row["name"]: {"mean": float(row["mean"])} for row in rows}


def _mobile_trim(part: Part) -> list[str]:
    """Names in the tables of ProxylessNAS (mobile_trim.yaml). No attention, no hard swish."""
    layers = part.layers
    if isinstance(layers, Block) and not layers.skip and _extras(part) != "se:0-hs:0":
        raise KeyError(f"{names(part)[0]} (the table has neither attention nor hard swish)")
    if isinstance(layers, Block):
        ratio = f"{layers.expansion:g}"
        return [] if _is_identity(part) else [_block_name("expanded_conv", part, ratio)]
    if isinstance(layers, Stem):
        return [_name("Conv", part, layers.filters, layers.strides)]
    after = _shape(part.size, layers.filters)
    return [
        _name("Conv_1", part, layers.filters),
        f"Logits-input:{after}-output:{part.num_classes}",
    ]


def _once_for_all(part: Part) -> list[str]:
    """Names in once-for-all's tables of MobileNetV3. They contain the expanded channels."""
    layers = part.layers
    if isinstance(layers, Block):
        if _is_identity(part):
            return []
        expanded = expanded_filters(part.channels, layers.expansion)
        return [f"{_block_name('expanded_conv', part, expanded)}-{_extras(part)}"]
    if isinstance(layers, Stem):
        return [_name("Conv", part, layers.filters, layers.strides)]
    filters, units = layers.filters, layers.dense_units
    return [
        _name("Conv_1", part, filters),
        f"AvgPool2D-input:{_shape(part.size, filters)}-output:1x1x{filters}",
        *([f"Conv_2-input:1x1x{filters}-output:1x1x{units}"] if units else []),
        f"Logits-input:1x1x{units or filters}-output:{part.num_classes}",
    ]


def _once_for_all_resolutions(part: Part) -> list[str]:
    """Names in once-for-all's tables of single resolutions (`MBConv-...`)."""
    layers = part.layers
    if isinstance(layers, Block):
        if _is_identity(part):
            return []
        squeeze_excite = _extras(part).split("-")[0]
        return [f"{_block_name('MBConv', part, f'{layers.expansion:g}')}-{squeeze_excite}"]
    if isinstance(layers, Stem):
        return [_name("first_conv", part, layers.filters, layers.strides)]
    filters, units = layers.filters, layers.dense_units
    return [
        _name("final_expand_layer", part, filters),
        *([f"feature_mix_layer-input:1x1x{filters}-output:1x1x{units}"] if units else []),
        f"classifier-input:{units or filters}-output:{part.num_classes}",
    ]


# The published kinds of tables, each with a test of the name of an entry.
_PUBLISHED = {
    _once_for_all_resolutions: lambda name: name.startswith("MBConv-"),
    _once_for_all: lambda name: name.startswith("expanded_conv-") and "-se:" in name,
    _mobile_trim: lambda name: name.startswith("expanded_conv-"),
}


def _name(kind, part, filters, strides=1):
    after = _shape(output_size(part.size, strides), filters)
    return f"{kind}-input:{_shape(part.size, part.channels)}-output:{after}"


def _block_name(kind, part, expanded):
    block = part.layers
    if block.skip:
        raise KeyError(f"{names(part)[0]} (the table has no projections)")
    identity = int(block.strides == 1 and block.filters == part.channels)
    return (
        f"{_name(kind, part, block.filters, block.strides)}-expand:{expanded}"
        f"-kernel:{block.kernel_size}-stride:{block.strides}-idskip:{identity}"
    )


def _extras(part):
    block = part.layers
    if block.splits > 1:
        raise KeyError(f"{names(part)[0]} (the table has no split-attention)")
    return f"se:{block.splits}-hs:{int(block.activation == 'hard_silu')}"
