"""A search for milliseconds against the search for MACs of `fashion_mnist.py`.

mkdir -p runs
python -m export.latency --space=mobile_mini --input_size=28 --channels=1 --output=runs/host.json
python benchmarks/milliseconds.py --data_dir=DATA --latency_table=runs/host.json \\
    --target=0.027

Short protocol, as in `fashion_mnist.py`: the same search for --target milliseconds by a table of
this machine, float32 or int8, the same training of each result;
then all networks of both searches are timed in turn on one core, in the numbers of the table, for 3
minutes. Finished rows are in --output; a run that was cut goes on from there.
"""

import contextlib
import math
import pathlib
import statistics
import tempfile

import harness
import numpy as np
import scipy.stats
from absl import flags

import fpnas_keras as fpnas
from export import conversion, devices
from fpnas_keras.cost import latency

FLAGS = flags.FLAGS
flags.DEFINE_string("latency_table", None, "Table of this machine.", required=True)
flags.DEFINE_float("target", None, "Milliseconds to search for.", required=True)
flags.DEFINE_integer("seeds", 3, "Searches.", lower_bound=2)

MACS_ROWS = "benchmarks/fashion_mnist.jsonl"
ROUNDS, SECONDS = 100, 180


def phases(runs: harness.Runs) -> list[dict[str, list[str]]]:
    """Commands by name; those of a phase need nothing but earlier phases."""
    table = pathlib.Path(FLAGS.latency_table).absolute()
    label = _label()
    searches, trainings = {}, {}
    for seed in range(FLAGS.seeds):
        searches[f"search {label} {seed}"] = [
            *("fpnas_keras.search", *harness.FASHION_MNIST, "--space=mobile_mini"),
            *("--input_size=28", "--cost=latency", f"--latency_table={table}"),
            *(f"--target={FLAGS.target}", "--epochs=15", "--steps_per_epoch=100"),
            *("--architecture_learning_rate=0.03", f"--seed={seed}"),
        ]
        architecture = runs.directory(f"search {label} {seed}") / "architecture.json"
        trainings[f"train result {label} {seed}"] = [
            *("fpnas_keras.train", *harness.FASHION_MNIST, f"--architecture={architecture}"),
            *("--epochs=20", "--seed=0"),
        ]
    return [searches, trainings]


def _label():
    """What is searched for, as rows are named."""
    return f"{FLAGS.target} ms {latency.read(FLAGS.latency_table)['quantize']}"


def milliseconds(architectures: list[fpnas.Architecture], quantize: str) -> list[float]:
    """What networks take on one core of this machine, timed in turn."""
    pixels = np.random.default_rng(0).uniform(0, 255, (4, *architectures[0].input_shape))
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(devices.Host()) as host,
    ):
        files = {}
        for index, architecture in enumerate(architectures):
            files[str(index)] = pathlib.Path(folder) / f"{index}.tflite"
            content = conversion.convert(architecture.build(), quantize, pixels)
            files[str(index)].write_bytes(content)
        times = devices.times(host, files, ROUNDS, SECONDS)
    return [devices.typical(times[str(index)]) for index in range(len(architectures))]


def report(rows: dict[str, dict]) -> None:
    """Times all networks and prints the table."""
    cost = fpnas.LatencyCost(FLAGS.latency_table)
    groups = {
        "1.5M MACs": harness.finished(MACS_ROWS, "name"),
        _label(): rows,
    }
    trained = [
        (group, row)
        for group, own in groups.items()
        for name, row in own.items()
        if name.startswith("train result") and (own is not rows or _label() in name)
    ]
    networks = [fpnas.Architecture.from_dict(row["architecture"]) for _, row in trained]
    measured = milliseconds(networks, latency.read(FLAGS.latency_table)["quantize"])
    predicted = [math.fsum(map(cost, network.parts())) for network in networks]
    print("\n| searched for | accuracy, % | M MACs | predicted ms | measured ms | error |")
    print("|---" * 6 + "|")
    values = {group: [] for group in groups}
    for (group, row), table, device in zip(trained, predicted, measured):
        accuracy = 100 * row["test_accuracy"]
        values[group].append((accuracy, row["macs"] / 1e6, table, device))
        cells = f"{accuracy:.2f} | {row['macs'] / 1e6:.2f} | {table:.4f} | {device:.4f}"
        print(f"| {group} | {cells} | {table / device - 1:+.1%} |")
    for group, own in values.items():
        means = " | ".join(f"{statistics.mean(each):.4g}" for each in zip(*own))
        print(f"| {group}, mean of {len(own)} | {means} | |")
    one, other = (list(zip(*own)) for own in values.values())
    for name, column in (("accuracy", 0), ("milliseconds", 3)):
        test = scipy.stats.ttest_ind(one[column], other[column], equal_var=False)
        print(f"{name}: Welch's t = {test.statistic:.2f}, p = {test.pvalue:.3g}")


if __name__ == "__main__":
    harness.run_phases(__file__, phases, report)
