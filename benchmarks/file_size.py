"""Bytes of int8 files, and what their contents take: the constants of `fpnas_keras.FileSizeCost`.

python benchmarks/file_size.py

Random networks of several spaces, with random weights and biases as after a training, are exported.
Their sizes are fitted by least squares of the relative errors. A weight takes one byte.
"""

import collections
import dataclasses
import json
import pathlib
import sys
import tempfile
from collections.abc import Mapping
from typing import Any, ClassVar

import harness
import keras
import numpy as np

from export import export_tflite
from export.latency_parts import random_networks
from fpnas_keras import Architecture, spaces
from fpnas_keras.commands import run_command
from fpnas_keras.cost.costs import CONTENT_BYTES, count_contents
from fpnas_keras.settings import setting

# A small space with everything that takes room.
_EVERYTHING = "everything"
_BLOCK = {
    "filters": [8, 12, 16],
    "kernel_size": [3, 5],
    "expansion": [1, 3, 6],
    "activation": ["relu", "hard_silu"],
    "splits": [0, 1, 2, 4],
}
_CONTENTS = {
    "format": 1,
    "stem": {"filters": 8, "kernel_size": 3, "strides": 2, "activation": "hard_silu"},
    "blocks": [{**_BLOCK, "strides": 2}, {**_BLOCK, "skip": [False, True]}],
    "head": {"filters": 64, "activation": "hard_silu"},
}
# Networks of each space. The size of the images does not matter.
_NETWORKS = {
    str(harness.SMALL_SPACE.relative_to(harness.ROOT)): 12,
    _EVERYTHING: 12,
    "configs/spaces/example.json": 4,
    "mobile_mini": 5,
    "mobile_40": 4,
    "mobile_128": 2,
    "nas_bench_macro": 2,
    "fbnetv2_f": 1,
    "fpnas": 1,
}
_SHAPE, _CLASSES = (32, 32, 1), 10
# Names of classes are assumed to have ten characters with their line end. Those of the digits have
# two, and so many more are assumed.
_MORE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileSizeSettings(harness.BenchmarkSettings):
    """Settings of this benchmark."""

    SMOKE: ClassVar[Mapping[str, Any]] = {"spaces": (next(iter(_NETWORKS)),)}

    output: str = harness.output_setting("file_size.jsonl")
    spaces: tuple[str, ...] = setting("Spaces.", tuple(_NETWORKS))


def _make_space(name):
    if name != _EVERYTHING:
        return spaces.get(name, _SHAPE, _CLASSES)
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, f"{name}.json")
        file.write_text(json.dumps(_CONTENTS))
        return spaces.get(str(file), _SHAPE, _CLASSES)


def measure(architecture: Architecture) -> int:
    """Bytes of the file of a network."""
    network, rng = architecture.build(), np.random.default_rng(0)
    for variable in network.variables:  # Equal numbers stand in a file once.
        if not variable.path.endswith("kernel"):
            middle = 0.0 if variable.path.endswith("mean") else 0.5
            variable.assign(middle + rng.uniform(-0.1, 0.1, variable.shape))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        network.save(folder / "model.keras")
        architecture.save(folder / "architecture.json")
        exported = export_tflite(
            model=folder / "model.keras",
            data="digits",
            quantize="int8",
            representative_images=50,
            min_agreement=0,
            max_accuracy_drop=1,
        )
        keras.backend.clear_session()
        return exported.path.stat().st_size


def report(rows: Mapping[str, harness.Row]) -> None:
    """Prints the constants, and the errors of `FileSizeCost` as it is."""
    names = [name for name in next(iter(rows.values()))["contents"] if name != "weight"]
    table = np.array([[row["contents"][name] for name in names] for row in rows.values()], float)
    weights = np.array([row["contents"]["weight"] for row in rows.values()])
    sizes = np.array([row["bytes"] for row in rows.values()], float)
    # Each file has as many classes, so that theirs cannot be told from those of the file.
    free = [index for index, name in enumerate(names) if name != "class"]
    known = weights + 10.0 * table[:, names.index("class")]
    scaled = table[:, free] / sizes[:, None]
    found, *_ = np.linalg.lstsq(scaled, (sizes - known) / sizes, rcond=None)
    print("\n| contents | bytes |\n|---|---|")
    for index, value in zip(free, found):
        print(f"| {names[index]} | {value:.1f} |")
    print("\n| bytes of the files | networks | largest error, % |\n|---|---|---|")
    predicted = weights + table @ [CONTENT_BYTES[name] for name in names]
    errors = 100 * np.abs(predicted / sizes - 1)
    for low, high in ((0, 30e3), (30e3, 100e3), (100e3, np.inf)):
        own = (sizes >= low) & (sizes < high)
        if own.any():
            least, most = sizes[own].min(), sizes[own].max()
            print(f"| {least:,.0f} to {most:,.0f} | {own.sum()} | {errors[own].max():.2f} |")


def run(settings: FileSizeSettings) -> None:
    """Measures the networks that have no row yet, and reports."""
    rows = harness.finished(settings.output, "name")
    for space_name in settings.spaces:
        space = _make_space(space_name)
        count = 2 if settings.smoke else _NETWORKS.get(space_name, 2)
        for index, architecture in enumerate(random_networks(space, count, seed=0)):
            name = f"{space_name} {index}"
            if name in rows:
                continue
            contents = collections.Counter()
            for part in architecture.parts():
                contents.update(count_contents(part))
            rows[name] = {
                "name": name,
                "contents": dict(contents),
                "bytes": measure(architecture) + _MORE * _CLASSES,
            }
            harness.append(settings.output, rows[name])
    report(rows)


COMMAND = harness.make_command(__file__, __doc__, FileSizeSettings, run)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
