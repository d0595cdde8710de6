"""Three searches with the same space, data, batches, steps and target: PARSEC, DMaskingNAS, ours.

python benchmarks/baselines.py --data_dir=DATA

Short protocol: 10,000 training images of Fashion-MNIST, `mobile_mini`, 1,000 search steps with a
target of 1.5M MACs, 3 seeds. Each result is trained from scratch for 20 epochs with the same
recipe. One job runs on each core. Finished rows are appended to --output. A run that was
interrupted continues from there.
"""

import dataclasses
import functools
import resource
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import harness
import keras
from dmasking import DMaskingNAS

import fpnas_keras as fpnas
from fpnas_keras.commands import run_command
from fpnas_keras.runs import RunDirectory
from fpnas_keras.settings import setting

METHODS = ("ours", "DMaskingNAS", "PARSEC")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaselinesSettings(harness.ProjectSettings):
    """Settings of this benchmark."""

    SMOKE: ClassVar[Mapping[str, Any]] = {
        **harness.ProjectSettings.SMOKE,
        "search_epochs": 1,
        "search_batch_size": 8,
    }

    output: str = harness.output_setting("baselines.jsonl")
    # 1,000 steps: as many rows of metrics as a training has.
    search_epochs: int = setting("Epochs of a search.", 20, least=1)
    steps_per_epoch: int = setting("Steps in an epoch of a search.", 50, least=1)
    search_batch_size: int = setting("Images in a batch of a search.", 64, least=2)
    method: str | None = setting("Search with this method alone.", None, choices=METHODS)
    seed: int = setting("Seed of that search.", 0, least=0)

    @property
    def steps(self) -> int:
        """Steps of a search."""
        return self.search_epochs * self.steps_per_epoch


def make_search(settings: BaselinesSettings, space: fpnas.spaces.Space) -> fpnas.ArchitectureSearch:
    """The search of a method. Cost, target, controller and warm-up are the same for all."""
    steps, warmup_steps = settings.steps, settings.steps // 5
    arguments = {
        "cost": fpnas.MacsCost(settings.target),
        "cost_coefficient": fpnas.CostController(anneal_steps=(steps - warmup_steps) // 3),
        "warmup_steps": warmup_steps,
        "seed": settings.seed,
    }
    if settings.method == "DMaskingNAS":
        arguments |= {"start": "uniform", "cost_window": 0.0}
        return DMaskingNAS(space, steps, **arguments)
    if settings.method == "PARSEC":
        arguments |= {**harness.PARSEC, "samples": 16}
    return fpnas.ArchitectureSearch(space, **arguments)


def search(settings: BaselinesSettings) -> None:
    """Searches with one method, and leaves the summary and the architecture in its directory."""
    runs = harness.Runs(settings)
    run = RunDirectory(runs.directory(f"search {settings.method} {settings.seed}"))
    run.directory.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(settings.seed)
    images = fpnas.data.DataSettings(**runs.data()).load_images("train", settings.input_size)
    space = fpnas.spaces.get(settings.space, images.image_shape, len(images.class_names))
    batches = fpnas.data.search_batches(
        images.x, images.y, settings.search_batch_size, settings.seed, settings.steps_per_epoch
    )
    search = make_search(settings, space)
    schedule = keras.optimizers.schedules.CosineDecay(0.1, settings.steps)
    search.compile(
        keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True), keras.optimizers.Adam(0.03)
    )
    start, cpu_start = time.perf_counter(), time.process_time()
    history = search.fit(batches, epochs=settings.search_epochs, verbose=2).history
    seconds = time.perf_counter() - start
    found = search.derivation(least_share=0.95).architecture
    found.save(run.architecture_file)
    run.write_summary(
        {
            "seconds": seconds,
            "samples": int(search.total_samples.numpy()),
            "evaluated": int(search.total_evaluated.numpy()),
            "cpu_seconds": time.process_time() - cpu_start,
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "entropy": float(search.distribution.entropy()),
            "expected_cost": history["expected_cost"][-1],
            "macs": found.macs(),
        }
    )


def phases(settings: BaselinesSettings, runs: harness.Runs) -> list[dict[str, harness.Job]]:
    """The jobs by name. Those of a phase need the results of earlier phases only."""
    searches, trainings = {}, {}
    for seed in range(settings.seeds):
        for method in METHODS:
            name = f"search {method} {seed}"
            alone = dataclasses.replace(settings, method=method, seed=seed)
            searches[name] = harness.Job(
                [__file__, *alone.to_flags()], functools.partial(search, alone)
            )
            trainings |= runs.train(f"train {method} {seed}", runs.architecture_file(name))
    for seed in range(1, settings.seeds):  # How much one training differs from the next.
        architecture = runs.architecture_file("search ours 0")
        trainings |= runs.train(f"train again {seed}", architecture, seed=seed)
    return [searches, trainings]


def report(settings: BaselinesSettings, rows: dict[str, harness.Row]) -> None:
    """Prints the table of the finished jobs."""
    columns = "seconds | CPU seconds | to ours | peak MB | samples | MACs | accuracy, % | mean"
    print(f"\n| | {columns} |\n{'|---' * 9}|")
    median = {}
    for method in METHODS:
        names = [f"search {method} {seed}" for seed in range(settings.seeds)]
        done = [rows[name] for name in names if name in rows]
        if not done:
            continue
        median[method] = statistics.median(row["cpu_seconds"] for row in done)
        trained = [rows.get(name.replace("search", "train")) for name in names]
        accuracies = [100 * row["test_accuracy"] for row in trained if row]
        cells = [" ".join(f"{row[key]:.0f}" for row in done) for key in ("seconds", "cpu_seconds")]
        cells += [f"{median[method] / median['ours']:.2f}"]
        for key in ("peak_memory_mb", "samples"):
            cells += [" ".join(f"{row[key]:,}" for row in done)]
        cells += [" ".join(f"{row['macs'] / 1e6:.2f}M" for row in done)]
        cells += [" ".join(f"{value:.2f}" for value in accuracies)]
        cells += [f"{statistics.mean(accuracies):.2f}" if accuracies else ""]
        print(f"| {method} | {' | '.join(cells)} |")
    seeds = settings.seeds
    again = [rows.get("train ours 0")] + [rows.get(f"train again {i}") for i in range(1, seeds)]
    listed = " ".join(f"{100 * row['test_accuracy']:.2f}" for row in again if row)
    print(f"\none network (ours, seed 0) trained with {seeds} seeds: {listed}")


def run(settings: BaselinesSettings) -> None:
    """Runs the jobs that have no row yet, and reports."""
    if settings.method is not None:
        search(settings)
        return
    runs = harness.Runs(settings)
    report(settings, runs.run_phases(phases(settings, runs)))


COMMAND = harness.make_command(__file__, __doc__, BaselinesSettings, run)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
