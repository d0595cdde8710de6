"""A search for milliseconds, compared with the search for MACs of `fashion_mnist.py`.

mkdir -p runs
python -m export.latency --space=mobile_mini --input_size=28 --channels=1 --output=runs/host.json
python benchmarks/milliseconds.py --data_dir=DATA --latency_table=runs/host.json \\
    --target=0.027

The protocol is that of `fashion_mnist.py`. The search holds --target milliseconds by a latency
table of this machine, float32 or int8. Each result is trained in the same way. Then all networks of
both searches are timed in turn on one core for 3 minutes, in the format of the table. Finished rows
are appended to --output. A run that was interrupted continues from there.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import harness
import numpy as np
import scipy.stats

import fpnas_keras as fpnas
from export import conversion, devices
from fpnas_keras.commands import run_command
from fpnas_keras.cost import latency_table
from fpnas_keras.errors import UserError
from fpnas_keras.settings import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class MillisecondsSettings(harness.ProjectSettings):
    """Settings of this benchmark."""

    SMOKE: ClassVar[Mapping[str, Any]] = {
        **harness.ProjectSettings.SMOKE,
        "seeds": 2,
        "target": 0.027,
        "rounds": 1,
        "seconds": 0.0,
    }

    output: str = harness.output_setting("milliseconds.jsonl")
    latency_table: str | None = setting("Latency table of this machine.", None, basic=True)
    target: float | None = setting("Milliseconds to search for.", None, least=0, basic=True)
    macs_rows: str = setting(
        "Rows of the search for MACs, from fashion_mnist.py.", "benchmarks/fashion_mnist.jsonl"
    )
    seeds: int = setting("Searches.", 3, least=2)
    rounds: int = setting("Least rounds in which all networks are timed.", 100, least=1)
    seconds: float = setting("Least seconds for which all networks are timed.", 180.0, least=0)

    def check(self) -> None:
        """Raises `UserError` when the table or the target is missing."""
        if not self.smoke and None in (self.latency_table, self.target):
            raise UserError("--latency_table and --target must be given")

    def shrink(self, folder: pathlib.Path) -> Self:
        """The settings of the smoke run, with a latency table and rows that stand in."""
        smallest = super().shrink(folder)
        table, rows = write_stand_ins(smallest, folder)
        return dataclasses.replace(smallest, latency_table=str(table), macs_rows=str(rows))

    @property
    def label(self) -> str:
        """What is searched for, as the names of rows say it."""
        return f"{self.target} ms {self.quantize}"

    @property
    def quantize(self) -> str:
        """The format of the files that the table was measured with."""
        return latency_table.read(self.latency_table)["quantize"]


def write_stand_ins(
    settings: MillisecondsSettings, folder: pathlib.Path
) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes a latency table in which --target is 1.5M MACs, and rows of two networks."""
    shape = (settings.input_size, settings.input_size, 1)
    space, macs = fpnas.spaces.get(settings.space, shape, 10), fpnas.MacsCost()
    table = {key: {} for key in latency_table.KEYS} | {
        "format": latency_table.FORMAT,
        "complete": True,
        "device": {"kind": "host", "name": "stand-in", "threads": 1},
        "quantize": "none",
        "entries": {
            name: macs(part) * settings.target / 1.5e6
            for part in space.parts()
            for name in latency_table.names(part)
        },
    }
    table_file, rows_file = folder / "latency_table.json", folder / "fashion_mnist.jsonl"
    table_file.write_text(json.dumps(table))
    for seed in range(2):
        network = space.architecture(space.entries.to_choices(np.full(len(space.blocks), seed)))
        row = {"test_accuracy": 0.1 * seed, "macs": network.macs()}
        row |= {"name": f"train result {seed}", "architecture": network.to_dict()}
        harness.append(rows_file, row)
    return table_file, rows_file


def phases(settings: MillisecondsSettings, runs: harness.Runs) -> list[dict[str, harness.Job]]:
    """The jobs by name. Those of a phase need the results of earlier phases only."""
    cost = {
        "cost": "latency",
        "latency_table": str(pathlib.Path(settings.latency_table).absolute()),
    }
    searches, trainings = {}, {}
    for seed in range(settings.seeds):
        name = f"search {settings.label} {seed}"
        searches |= runs.search(name, **cost, seed=seed)
        trainings |= runs.train(
            f"train result {settings.label} {seed}", runs.architecture_file(name)
        )
    return [searches, trainings]


def time_networks(
    settings: MillisecondsSettings, architectures: list[fpnas.Architecture]
) -> list[float]:
    """Milliseconds of networks on one core of this machine, timed in turn."""
    pixels = np.random.default_rng(0).uniform(0, 255, (4, *architectures[0].input_shape))
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(devices.Host()) as host,
    ):
        files = {}
        for index, architecture in enumerate(architectures):
            files[str(index)] = pathlib.Path(folder) / f"{index}.tflite"
            content = conversion.convert(architecture.build(), settings.quantize, pixels)
            files[str(index)].write_bytes(content)
        times = devices.times(host, files, settings.rounds, settings.seconds)
    return [devices.tenth_percentile(times[name]) for name in files]


def report(settings: MillisecondsSettings, rows: dict[str, harness.Row]) -> None:
    """Times all networks and prints the table."""
    cost = fpnas.LatencyCost(settings.latency_table)
    groups = {
        "1.5M MACs": harness.finished(settings.macs_rows, "name"),
        settings.label: {name: row for name, row in rows.items() if settings.label in name},
    }
    trained = [
        (group, row)
        for group, own in groups.items()
        for name, row in own.items()
        if name.startswith("train result")
    ]
    networks = [fpnas.Architecture.from_dict(row["architecture"]) for _, row in trained]
    measured = time_networks(settings, networks)
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


def run(settings: MillisecondsSettings) -> None:
    """Runs the jobs that have no row yet, and reports."""
    runs = harness.Runs(settings)
    report(settings, runs.run_phases(phases(settings, runs)))


COMMAND = harness.make_command(__file__, __doc__, MillisecondsSettings, run)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
