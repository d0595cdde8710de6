"""How close a sample comes to what this machine can do, and where the rest of its time goes.

python benchmarks/limits.py

For random architectures of each space: multiply-adds a second of the weight half of a sample,
against its convolutions called alone in a loop, forward and both gradients, and against a large
matrix product; then the time by kind of operation, from TensorFlow's profiler.
"""

import collections
import functools
import pathlib
import tempfile

import harness
import numpy as np
import tensorflow as tf

# TensorFlow has no public reader of its profiler's files.
from tensorflow.tsl.profiler.protobuf import xplane_pb2

import fpnas_keras as fpnas
from fpnas_keras.architecture import expanded_filters, output_size
from fpnas_keras.networks.sliced_layers import SlicedConv, SlicedDepthwiseConv

ARCHITECTURES, COPIES, REPEATS = 6, 4, 7
# Rows of the matrix product that is taken for the ceiling.
MATRIX = 2048


def convolutions(architecture: fpnas.Architecture) -> list[tuple]:
    """The convolutions of stem, blocks and head: layer, input size, filters in, arguments."""
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


def alone(layer, size: tuple[int, int], channels: int, batch: int) -> float:
    """Seconds of a convolution, forward and both gradients, in a loop of its own."""
    x = tf.random.stateless_normal((batch, *size, channels), (0, 0))
    own = layer.func if isinstance(layer, functools.partial) else layer

    @tf.function
    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        return tape.gradient(y, [x, own.kernel.value], y)

    return harness.in_turn({"run": lambda: run(x)[0].numpy()}, REPEATS)["run"]


def against_kernels(name: str) -> dict[str, list[float]]:
    """Seconds of samples, and of their convolutions called alone."""
    space, batch_size = harness.get_space(name), harness.SIZES[name][1]
    search = fpnas.ArchitectureSearch(space)
    batch = harness.noise(space, batch_size, 0)
    sample = harness.sample_steps(search, batch, COPIES)
    matrix = tf.random.stateless_normal((MATRIX, MATRIX), (0, 0))
    product = tf.function(lambda: tf.matmul(matrix, matrix))
    rows = collections.defaultdict(list)
    for choices in search.distribution.sample(ARCHITECTURES, seed=0, step=0):
        architecture = space.architecture(choices.numpy())
        runs = {
            "sample": functools.partial(sample, choices),
            "matrix_product": lambda: product().numpy(),
        }
        seconds = harness.in_turn(runs, REPEATS)
        rows["sample"].append(seconds["sample"] / COPIES)
        rows["kernels"].append(sum(alone(*each, batch_size) for each in convolutions(architecture)))
        rows["macs"].append(architecture.macs() * batch_size)
        rows["matrix_macs_per_second"].append(MATRIX**3 / seconds["matrix_product"])
    return rows


def by_operation(name: str) -> dict[str, dict[str, float]]:
    """Milliseconds and calls a sample of each kind of operation, and the wall time."""
    space, batch_size = harness.get_space(name), harness.SIZES[name][1]
    search = fpnas.ArchitectureSearch(space)
    run = harness.sample_steps(search, harness.noise(space, batch_size, 0), COPIES)
    drawn = search.distribution.sample(ARCHITECTURES, seed=0, step=0)
    for choices in [*drawn, *drawn]:  # traced, and shapes met
        run(choices)
    wall = harness.in_turn({"all": lambda: [run(choices) for choices in drawn]}, REPEATS)["all"]
    samples = ARCHITECTURES * COPIES
    with tempfile.TemporaryDirectory() as directory:
        with tf.profiler.experimental.Profile(directory):
            for choices in drawn:
                run(choices)
        (file,) = pathlib.Path(directory).rglob("*.xplane.pb")
        spaces = xplane_pb2.XSpace.FromString(file.read_bytes())
    milliseconds, calls = collections.Counter(), collections.Counter()
    for plane in spaces.planes:
        for event in (event for line in plane.lines for event in line.events):
            # "scope/name:Kind" are operations; what else there is encloses them.
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


JOBS = {f"kernels of {name}": functools.partial(against_kernels, name) for name in harness.SIZES}
JOBS |= {f"operations of {name}": functools.partial(by_operation, name) for name in harness.SIZES}


def report(rows: dict[str, dict]) -> None:
    """Prints both tables."""
    print("\nGMAC a second, medians, forward and backward counted as 3 times the MACs:\n")
    columns = "sample | its convolutions alone | matrix product | time alone / sample"
    print(f"| | {columns} |\n{'|---' * 5}|")
    for name in harness.SIZES:
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
    for name in harness.SIZES:
        row = rows[f"operations of {name}"]
        wall, total = row["wall_ms"], row["sum_ms"]
        print(f"\n`{name}`: {wall:.1f} ms a sample, {total:.1f} ms of operations (2 run at a time)")
        print("\n| operation | ms | calls | share |\n|---|---|---|---|")
        for kind, own in row["operations"].items():
            print(f"| {kind} | {own['ms']:.2f} | {own['calls']:.1f} | {own['ms'] / total:.1%} |")


if __name__ == "__main__":
    harness.run_jobs(__file__, JOBS, report)
