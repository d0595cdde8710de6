"""Searches of Fashion-MNIST side by side, and how much the result of a search depends on its seed.

python benchmarks/fashion_mnist.py --data_dir=DATA

Short protocol: 10,000 training images, networks of at most 1.5M MACs, 1,500 search steps, 20 epochs
of training. PARSEC, FP-NAS factorized and FP-NAS coarse-to-fine each search with 3 seeds.
The factorized search runs with 5 seeds, and its 5 results are trained from scratch. The first
of these networks is trained with 5 seeds. One job runs on each core. Finished rows are appended to
--output. A run that was interrupted continues from there.
"""

import dataclasses
import statistics
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import harness

from fpnas_keras.commands import run_command
from fpnas_keras.settings import setting

METHODS = {
    "factorized": {},
    "coarse to fine": {"distribution": "coarse_to_fine"},
    "PARSEC": {**harness.PARSEC, "samples": 16},
}
RELIABLE = "factorized"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FashionMnistSettings(harness.ProjectSettings):
    """Settings of this benchmark."""

    SMOKE: ClassVar[Mapping[str, Any]] = {**harness.ProjectSettings.SMOKE, "reliable_seeds": 1}

    output: str = harness.output_setting("fashion_mnist.jsonl")
    reliable_seeds: int = setting(f"Seeds of the {RELIABLE} search.", 5, least=1)


def phases(settings: FashionMnistSettings, runs: harness.Runs) -> list[dict[str, harness.Job]]:
    """The jobs by name. Those of a phase need the results of earlier phases only."""

    def search(method, seed):
        return runs.search(f"search {method} {seed}", **METHODS[method], seed=seed)

    def train(name, searched, seed):
        return runs.train(name, runs.architecture_file(f"search {RELIABLE} {searched}"), seed=seed)

    reliable, trained, others = {}, {}, {}
    for seed in range(settings.reliable_seeds):
        reliable |= search(RELIABLE, seed)
        trained |= train(f"train result {seed}", seed, 0)
    for seed in range(1, settings.reliable_seeds):
        trained |= train(f"train again {seed}", 0, seed)
    for method in METHODS:
        for seed in range(settings.seeds):
            others |= search(method, seed)
    return [reliable, trained, others]


def report(settings: FashionMnistSettings, rows: dict[str, harness.Row]) -> None:
    """Prints the tables of the finished jobs."""
    columns = "samples | evaluated | s | CPU s | loss of the mode | its MACs | MACs | of target"
    print(f"\n| search | {columns} |\n{'|---' * 9}|")
    for name, row in rows.items():
        if name.startswith("search"):
            share = row["macs"] / settings.target
            values = [f"{row[key]:,}" for key in ("total_samples", "total_evaluated")]
            values += [f"{row[key]:.0f}" for key in ("wall_seconds", "cpu_seconds")]
            values += [f"{row['mode_validation_loss']:.3f}"]
            values += [f"{row['mode_macs']:,}", f"{row['macs']:,}", f"{share:.1%}"]
            print(f"| {name.removeprefix('search ')} | {' | '.join(values)} |")
    seeds = settings.reliable_seeds
    results = [rows.get(f"train result {seed}") for seed in range(seeds)]
    again = [results[0]] + [rows.get(f"train again {seed}") for seed in range(1, seeds)]
    print("\n| trained from scratch | accuracies | mean | standard deviation |\n|---|---|---|---|")
    for name, trained in (
        (f"results of {seeds} searches", results),
        (f"one network, {seeds} seeds", again),
    ):
        accuracies = [100 * row["test_accuracy"] for row in trained if row]
        if len(accuracies) > 1:
            listed = " ".join(f"{value:.2f}" for value in accuracies)
            mean, spread = statistics.mean(accuracies), statistics.stdev(accuracies)
            print(f"| {name} | {listed} | {mean:.2f} | {spread:.2f} |")


def run(settings: FashionMnistSettings) -> None:
    """Runs the jobs that have no row yet, and reports."""
    runs = harness.Runs(settings)
    report(settings, runs.run_phases(phases(settings, runs)))


COMMAND = harness.make_command(__file__, __doc__, FashionMnistSettings, run)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
