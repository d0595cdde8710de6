"""Published latency tables: those of ProxylessNAS and of once-for-all.

They name the parts of networks in three ways. A line of each:

    ProxylessNAS, `mobile_trim.yaml`:
        expanded_conv-input:16x16x16-output:8x8x24-expand:3-kernel:5-stride:2-idskip:0
    once-for-all, tables of MobileNetV3 such as `note10.yaml`:
        expanded_conv-input:16x16x16-output:8x8x24-expand:48-kernel:5-stride:2-idskip:0-se:0-hs:0
    once-for-all, tables of one image size such as `224_lookup_table.yaml`:
        MBConv-input:16x16x16-output:8x8x24-expand:3-kernel:5-stride:2-idskip:0-se:0

In the second, `expand` is the number of expanded channels. In the others it is their ratio.

References: ProxylessNAS (Cai et al., arXiv:1812.00332) and once-for-all (Cai et al.,
arXiv:1908.09791).
"""

import csv
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import yaml

from fpnas_keras.architecture import Block, Part, Stem, expanded_filters, output_size
from fpnas_keras.cost import latency_table
from fpnas_keras.cost.latency_table import Names, check_entries, format_shape, names
from fpnas_keras.errors import UserError

SUFFIXES = (".yaml", ".yml", ".csv")
_MERGE = "tag:yaml.org,2002:merge"


def is_published(path: str | os.PathLike) -> bool:
    """Whether a file is one of these tables, by its ending and content.

    Tables of `fpnas latency` are JSON files with a key `format`. Once-for-all's tables are also
    found as JSON.
    """
    path = pathlib.Path(path)
    if path.suffix.lower() != ".json":
        return path.suffix.lower() in SUFFIXES
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):  # The other reader says what is wrong.
        return False
    return isinstance(content, dict) and any("-input:" in name for name in content)


def read_own(path: str | os.PathLike) -> dict[str, Any] | None:
    """Reads a table of `fpnas latency` with all of its keys; `None` for a published table.

    Args:
        path: The file.

    Raises:
        UserError: If the file is neither; the message names the file.
    """
    return None if is_published(path) else latency_table.read(path)


def load(path: str | os.PathLike) -> Mapping[str, float]:
    """Reads a published table.

    Args:
        path: A `.yaml` or `.json` file of `{name: {mean: milliseconds}}`, or a `.csv` file with the
            columns `name` and `mean`.

    Returns:
        The milliseconds of each entry by name.

    Raises:
        UserError: If the file is not such a table; the message names the file.
    """
    path = pathlib.Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # Excel begins files with a mark.
        is_csv = path.suffix.lower() == ".csv"
        # JSON is YAML too.
        rows = _read_csv(text) if is_csv else yaml.load(text, _Loader)
        if not isinstance(rows, dict) or not all(
            isinstance(row, dict) and "mean" in row for row in rows.values()
        ):
            raise UserError("it must hold an object `name: {mean: milliseconds}` for each entry")
        entries = {str(name): row["mean"] for name, row in rows.items()}
        check_entries(entries, "`mean`")
        zeros = [name for name, value in entries.items() if value == 0]
        if zeros:
            raise UserError(
                f"`mean` must be above 0: no part takes no time. Received: {zeros[0]}: 0"
                + (f", and {len(zeros) - 1} more" if len(zeros) > 1 else "")
            )
        find_names(entries)
        return entries
    except OSError as error:
        raise UserError(f"cannot read the latency table {path}: {error.strerror}") from None
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())  # YAML's messages have several lines.
        raise UserError(f"{path} is not a latency table: {reason}") from None


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which keeps the last of the values of a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """The mapping of a node."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                if key.value in seen:
                    raise UserError(f"line {key.start_mark.line + 1}: {key.value} stands twice")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_csv(text):
    rows = csv.DictReader(text.splitlines())
    if not {"name", "mean"} <= set(rows.fieldnames or ()):
        raise UserError(f"it must have the columns name and mean. Received: {rows.fieldnames}")
    result = {}
    for row in rows:
        if row["name"] is None or row["mean"] is None:  # The row is too short.
            values = [value for value in row.values() if value is not None]
            raise UserError(
                f"line {rows.line_num} must have the columns {', '.join(rows.fieldnames)}. "
                f"Received: {','.join(values)}"
            )
        if row["name"] in result:
            raise UserError(f"line {rows.line_num}: {row['name']} stands twice")
        result[row["name"]] = {"mean": float(row["mean"])}
    return result


def find_names(entries: Mapping[str, float]) -> Names:
    """The function that gives the names of the entries of a part, in a table with these entries.

    Raises:
        UserError: If no entry has a name of a known table.
    """
    blocks = [name for name in entries if name.startswith(("MBConv-", "expanded_conv-"))]
    if any(name.startswith("MBConv-") for name in blocks):
        return _once_for_all_one_size
    # ProxylessNAS begins names in the same way. Only once-for-all has `-se:`.
    if any("-se:" in name for name in blocks):
        return _once_for_all_mobilenet_v3
    if blocks:
        return _proxylessnas
    raise UserError("no entry is named `expanded_conv-input:...` or `MBConv-input:...`")


def _proxylessnas(part: Part) -> list[str]:
    """Names in the tables of ProxylessNAS. These have no attention and no hard swish."""
    layers = part.layers
    if isinstance(layers, Block):
        if not layers.skip and _attention_and_activation(part) != ("se:0", "hs:0"):
            raise KeyError(f"{names(part)[0]} (the table has neither attention nor hard swish)")
        return _block("expanded_conv", part, f"{layers.expansion:g}")
    if isinstance(layers, Stem):
        return [_conv("Conv", part, layers.strides)]
    features = format_shape(part.size, layers.filters)
    return [_conv("Conv_1", part), f"Logits-input:{features}-output:{part.num_classes}"]


def _once_for_all_mobilenet_v3(part: Part) -> list[str]:
    """Names in once-for-all's tables of MobileNetV3."""
    layers = part.layers
    if isinstance(layers, Block):
        expanded = expanded_filters(part.channels, layers.expansion)
        return _block("expanded_conv", part, expanded, *_attention_and_activation(part))
    if isinstance(layers, Stem):
        return [_conv("Conv", part, layers.strides)]
    filters, units = layers.filters, layers.dense_units
    return [
        _conv("Conv_1", part),
        f"AvgPool2D-input:{format_shape(part.size, filters)}-output:1x1x{filters}",
        *([f"Conv_2-input:1x1x{filters}-output:1x1x{units}"] if units else []),
        f"Logits-input:1x1x{units or filters}-output:{part.num_classes}",
    ]


def _once_for_all_one_size(part: Part) -> list[str]:
    """Names in once-for-all's tables of one image size."""
    layers = part.layers
    if isinstance(layers, Block):
        attention, _ = _attention_and_activation(part)
        return _block("MBConv", part, f"{layers.expansion:g}", attention)
    if isinstance(layers, Stem):
        return [_conv("first_conv", part, layers.strides)]
    filters, units = layers.filters, layers.dense_units
    return [
        _conv("final_expand_layer", part),
        *([f"feature_mix_layer-input:1x1x{filters}-output:1x1x{units}"] if units else []),
        f"classifier-input:{units or filters}-output:{part.num_classes}",
    ]


def _conv(kind, part, strides=1):
    """The name of a convolution of the part's input to the part's filters."""
    shape_out = format_shape(output_size(part.size, strides), part.layers.filters)
    return f"{kind}-input:{format_shape(part.size, part.channels)}-output:{shape_out}"


def _block(kind, part, expansion, *more):
    """The names of a block: one, or none for an identity."""
    block = part.layers
    if block.skip and part.keeps_shape:
        return []
    if block.skip:
        raise KeyError(f"{names(part)[0]} (the table has no projections)")
    fields = (
        _conv(kind, part, block.strides),
        f"expand:{expansion}",
        f"kernel:{block.kernel_size}",
        f"stride:{block.strides}",
        f"idskip:{int(part.keeps_shape)}",
    )
    return ["-".join([*fields, *more])]


def _attention_and_activation(part):
    block = part.layers
    if block.splits > 1:
        raise KeyError(f"{names(part)[0]} (the table has no split-attention)")
    return f"se:{block.splits}", f"hs:{int(block.activation == 'hard_silu')}"
