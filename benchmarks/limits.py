"""How close a sample comes to the peak of this machine, and where the rest of its time goes.

python benchmarks/limits.py

For random architectures of each space, it measures the multiply-adds per second of the weight half
of a search step, with one sample. It compares them with the convolutions of the same architecture
alone, forward and both gradients, and with a large matrix product. Then it splits the time by kind
of operation with TensorFlow's profiler.
"""

import collections
import dataclasses
import functools
import pathlib
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import harness
import numpy as np
import tensorflow as tf

# TensorFlow has no public reader for the files of its profiler.
from tensorflow.tsl.profiler.protobuf import xplane_pb2

import fpnas_keras as fpnas
from fpnas_keras.architecture import expanded_filters, output_size
from fpnas_keras.commands import run_command
from fpnas_keras.networks.sliced_layers import SlicedConv, SlicedDepthwiseConv
from fpnas_keras.settings import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class LimitsSettings(harness.SpeedSettings):
    """Settings of this benchmark."""

    SMOKE: ClassVar[Mapping[str, Any]] = {
        **harness.SpeedSettings.SMOKE,
        "architectures": 1,
        "copies": 1,
        "matrix_size": 64,
    }

    output: str = harness.output_setting("limits.jsonl")
    architectures: int = setting("Random architectures of a space.", 6, least=1)
    copies: int = setting("Samples in a timed call, which share its overhead.", 4, least=1)
    matrix_size: int = setting("Rows and columns of the matrices of the product.", 2048, least=1)


def convolutions(
    architecture: fpnas.Architecture,
) -> list[tuple[Callable[[tf.Tensor], tf.Tensor], tuple[int, int], int]]:
    """The convolutions of stem, blocks and head.

    Returns:
        Layer, input size and input channels of each.
    """
    stem, size = architecture.stem, architecture.input_shape[:2]
    channels = architecture.input_shape[2]
    found = [(SlicedConv(channels, stem.filters, stem.kernel_size, stem.strides), size, channels)]
    size, filters = output_size(size, stem.strides), stem.filters
    for block in architecture.blocks:
        if not block.skip:
            expanded = expanded_filters(filters, block.expansion)
            if block.expansion != 1:
                found.append((SlicedConv(filters, expanded), size, filters))
            for _ in range(max(1, block.splits)):
                layer = SlicedDepthwiseConv(expanded, block.kernel_size, block.strides)
                found.append(
                    (functools.partial(layer, kernel_size=block.kernel_size), size, expanded)
                )
            found.append(
                (SlicedConv(expanded, block.filters), output_size(size, block.strides), expanded)
            )
        size = output_size(size, block.strides)
        filters = block.filters
    found.append((SlicedConv(filters, architecture.head.filters), size, filters))
    return found


def alone(
    layer: Callable[[tf.Tensor], tf.Tensor],
    size: tuple[int, int],
    channels: int,
    batch_size: int,
    repeats: int,
) -> float:
    """Seconds of a convolution alone, forward and both gradients.

    Args:
        layer: The convolution.
        size: Height and width of its input.
        channels: Channels of its input.
        batch_size: Images in a batch.
        repeats: Timed calls.
    """
    x = tf.random.stateless_normal((batch_size, *size, channels), (0, 0))
    own = layer.func if isinstance(layer, functools.partial) else layer

    @tf.function
    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        return tape.gradient(y, [x, own.kernel.value], y)

    # The gradient of the kernel is small: a copy of the other one would take as long as a kernel.
    return harness.in_turn({"run": lambda: run(x)[1].numpy()}, repeats)["run"]


def against_kernels(settings: LimitsSettings, name: str) -> dict[str, list[float]]:
    """Seconds of samples, and of their convolutions called alone."""
    space, batch_size = settings.measured_space(name)
    repeats, side = settings.repeats, settings.matrix_size
    search = fpnas.ArchitectureSearch(space)
    batch = harness.noise(space, batch_size, 0)
    sample = harness.sample_steps(search, batch, settings.copies)
    matrix = tf.random.stateless_normal((side, side), (0, 0))
    product = tf.function(lambda: tf.matmul(matrix, matrix)[0, 0])
    rows = collections.defaultdict(list)
    for entries, architecture in harness.draw_networks(search, settings.architectures):
        runs = {
            "sample": functools.partial(sample, entries),
            "matrix_product": lambda: product().numpy(),  # One number: see `alone`.
        }
        seconds = harness.in_turn(runs, repeats)
        rows["sample"].append(seconds["sample"] / settings.copies)
        kernels = [alone(*each, batch_size, repeats) for each in convolutions(architecture)]
        rows["kernels"].append(sum(kernels))
        rows["macs"].append(architecture.macs() * batch_size)
        rows["matrix_macs_per_second"].append(side**3 / seconds["matrix_product"])
    return rows


def by_operation(settings: LimitsSettings, name: str) -> harness.Row:
    """Milliseconds and calls per sample of each kind of operation, and the wall time."""
    space, batch_size = settings.measured_space(name)
    search = fpnas.ArchitectureSearch(space)
    run = harness.sample_steps(search, harness.noise(space, batch_size, 0), settings.copies)
    drawn = [entries for entries, _ in harness.draw_networks(search, settings.architectures)]
    for entries in [*drawn, *drawn]:  # The first calls trace and meet new shapes.
        run(entries)
    runs = {"all": lambda: [run(entries) for entries in drawn]}
    wall = harness.in_turn(runs, settings.repeats)["all"]
    samples = settings.architectures * settings.copies
    with tempfile.TemporaryDirectory() as directory:
        with tf.profiler.experimental.Profile(directory):
            for entries in drawn:
                run(entries)
        (file,) = pathlib.Path(directory).rglob("*.xplane.pb")
        spaces = xplane_pb2.XSpace.FromString(file.read_bytes())
    milliseconds, calls = collections.Counter(), collections.Counter()
    for plane in spaces.planes:
        for event in (event for line in plane.lines for event in line.events):
            # Operations are called "scope/name:Kind". Other events enclose them.
            scope, _, kind = plane.event_metadata[event.metadata_id].name.rpartition(":")
            if "CPU" in plane.name and scope and not scope.endswith((":", "EagerLocalExecute")):
                kind = kind.removeprefix("_MklNative").removeprefix("_Mkl")
                milliseconds[kind] += event.duration_ps / 1e9 / samples
                calls[kind] += 1 / samples
    return {
        "wall_ms": 1000 * wall / samples,
        "sum_ms": sum(milliseconds.values()),
        "operations": {
            kind: {"ms": ms, "calls": calls[kind]} for kind, ms in milliseconds.most_common(16)
        },
    }


def report(settings: LimitsSettings, rows: dict[str, harness.Row]) -> None:
    """Prints both tables."""
    print("\nGMAC per second, medians, forward and backward counted as 3 times the MACs:\n")
    columns = "sample | its convolutions alone | matrix product | time alone / sample"
    print(f"| | {columns} |\n{'|---' * 5}|")
    for name in settings.spaces:
        row = {
            key: np.array(value)
            for key, value in rows[f"kernels of {name}"].items()
            if key != "job"
        }
        rates = [3e-9 * row["macs"] / row[key] for key in ("sample", "kernels")]
        rates.append(1e-9 * row["matrix_macs_per_second"])
        share = np.median(row["kernels"] / row["sample"])
        cells = " | ".join(f"{np.median(rate):.1f}" for rate in rates)
        print(f"| `{name}` | {cells} | {share:.2f} |")
    for name in settings.spaces:
        row = rows[f"operations of {name}"]
        wall, total = row["wall_ms"], row["sum_ms"]
        print(f"\n`{name}`: {wall:.1f} ms a sample, {total:.1f} ms of operations (2 run at a time)")
        print("\n| operation | ms | calls | share |\n|---|---|---|---|")
        for kind, own in row["operations"].items():
            print(f"| {kind} | {own['ms']:.2f} | {own['calls']:.1f} | {own['ms'] / total:.1%} |")


def run(settings: LimitsSettings) -> None:
    """Runs the jobs that have no row yet, and reports."""
    jobs = {
        f"{kind} of {name}": functools.partial(function, settings, name)
        for kind, function in (("kernels", against_kernels), ("operations", by_operation))
        for name in settings.spaces
    }
    harness.run_jobs(__file__, settings, jobs, functools.partial(report, settings))


COMMAND = harness.make_command(__file__, __doc__, LimitsSettings, run)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
