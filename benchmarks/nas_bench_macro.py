"""The search against the truth: NAS-Bench-Macro, 6,561 networks of known accuracy.

python benchmarks/nas_bench_macro.py --data_dir=FOLDER

The log-likelihood of a sample is -3.5 * (1 - accuracy), with the accuracy of the table, plus
Gaussian noise of 0.02. Distribution, draws, estimator, schedules, controller and derivation are
those of the project. Finished rows are appended to --output. A run that was interrupted continues
from there.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import harness
import keras
import numpy as np
import tensorflow as tf
from networks import LEAST_SHARE

import fpnas_keras as fpnas
from fpnas_keras.commands import run_command
from fpnas_keras.errors import UserError
from fpnas_keras.settings import setting

TABLE_FILE = "nas-bench-macro_cifar10.json"
SLOPE, NOISE = 3.5, 0.02
BUDGETS = (30e6, 40e6, 60e6, 80e6)
LEVELS = (92.85, 92.90, 92.95, 93.00)
CHECKPOINTS = (*range(50, 500, 25), *range(500, 1_000, 50), *range(1_000, 5_001, 100))
# With budgets: points of accuracy below the best network within the budget, averaged over them.
DISTANCES = (0.60, 0.50, 0.40, 0.30, 0.25)
BUDGET_CHECKPOINTS = (*range(100, 500, 50), *range(500, 1_000, 100), *range(1_000, 5_001, 500))

CONTROLLER = fpnas.CostController(anneal_steps=100)
# The two last settings of a search are rows of their own.
OURS = {
    "start": "uniform",
    "cost_window": 0.0,
    "samples": fpnas.AdaptiveSamples(scale=0.25),
    "cost_coefficient": CONTROLLER,
    "learning_rate": 0.1,
}
# What each switch is worth: one thing changes at a time.
SWITCHES = {
    "as it is": {},
    "no control variate (the paper)": {"control_variate": False},
    "independent draws": {"stratified": False},
    "equal samples evaluated again": {"deduplicate": False},
    "fixed K = 4": {"samples": 4},
    "fixed K = 16": {"samples": 16},
    "one-sided controller": {
        "cost_coefficient": fpnas.CostController(two_sided=False, anneal_steps=100)
    },
    "controller without annealing": {"cost_coefficient": fpnas.CostController(anneal_steps=0)},
    "controller on the hinge": {"cost_penalty": "hinge"},
    "fixed coefficient 0.1": {"cost_coefficient": 0.1},
    "fixed coefficient 0.3": {"cost_coefficient": 0.3},
    "fixed coefficient 0.3 on the hinge (the paper)": {
        "cost_coefficient": 0.3,
        "cost_penalty": "hinge",
    },
    "fixed coefficient 0.3 on the log hinge": {"cost_coefficient": 0.3, "cost_penalty": "log"},
    "result costs at least 95% of the budget": {"least_share": 0.95},
    "starts at the target": {"start": "target", "least_share": 0.95},
    "samples near the target": {"cost_window": 0.2, "least_share": 0.95},
    "starts and samples near the target": {
        "start": "target",
        "cost_window": 0.2,
        "least_share": 0.95,
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NasBenchMacroSettings(harness.BenchmarkSettings):
    """Settings of this benchmark."""

    SMOKE: ClassVar[Mapping[str, Any]] = {
        "seeds": 1,
        "samples": 20,
        "checkpoints": 1,
        "rows_of_a_kind": 1,
        "compared_networks": 10,
    }

    output: str = harness.output_setting("nas_bench_macro.jsonl")
    data_dir: str | None = setting(f"Folder of {TABLE_FILE}.", None, basic=True)
    seeds: int = setting("Runs of each row.", 24, least=1)
    samples: int = setting("Samples of a search.", 1000, least=1)
    checkpoints: int = setting(
        "Numbers of samples after which a network is derived: the first ones of the list.",
        len(CHECKPOINTS),
        least=1,
    )
    rows_of_a_kind: int = setting("Rows of each kind: the first ones of the list.", 100, least=1)
    compared_networks: int = setting(
        "Networks whose MACs and parameters are compared with the table.", 3**8, least=1
    )

    def check(self) -> None:
        """Raises `UserError` when the table is missing."""
        if self.data_dir is None and not self.smoke:
            raise UserError(f"--data_dir must be given: the folder of {TABLE_FILE}")

    def shrink(self, folder: pathlib.Path) -> Self:
        """The settings of the smoke run, with a table of random accuracies that stands in."""
        smallest = super().shrink(folder)
        if self.data_dir is None:
            write_stand_in(folder)
            smallest = dataclasses.replace(smallest, data_dir=str(folder))
        return smallest


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableSettings(harness.ProjectSettings):
    """Settings of a benchmark that compares with the table on images of CIFAR-10."""

    SMOKE: ClassVar[Mapping[str, Any]] = {
        "data": "digits",
        "targets": ("40",),
        "batch_size": 2,
        "train_images": 40,
        "input_size": 8,
    }

    table_dir: str | None = setting(f"Folder of {TABLE_FILE}.", None, basic=True)
    data: str = setting("Images of CIFAR-10.", "folder:cifar10", basic=True)
    targets: tuple[str, ...] = setting("Targets in millions of MACs.", ("30", "40", "60"))
    input_size: int = setting("Height and width of the images.", 32, least=1)
    train_images: int | None = setting("Training images. Default: all.", None, least=2)

    def check(self) -> None:
        """Raises `UserError` when the table is missing."""
        if self.table_dir is None and not self.smoke:
            raise UserError(f"--table_dir must be given: the folder of {TABLE_FILE}")

    def shrink(self, folder: pathlib.Path) -> Self:
        """The settings of the smoke run, with a table of random accuracies that stands in."""
        write_stand_in(folder)
        return dataclasses.replace(super().shrink(folder), table_dir=str(folder))


def write_stand_in(folder: pathlib.Path) -> None:
    """Writes a table of random accuracies. Costs are those of the project."""
    space, rng = fpnas.spaces.get("nas_bench_macro"), np.random.default_rng(0)
    entries = all_entries()
    macs = fpnas.cost.SpaceCost(space, fpnas.MacsCost())(entries).numpy()
    params = fpnas.cost.SpaceCost(space, fpnas.ParamsCost())(entries).numpy()
    rows = {
        code: {"mean_acc": rng.uniform(80, 93), "flops": int(flops), "params": int(count)}
        for code, flops, count in zip(table_keys(space), macs, params)
    }
    (folder / TABLE_FILE).write_text(json.dumps(rows))


def all_entries() -> np.ndarray:
    """All networks of the space, row-major: integers of shape `(6561, 8)`."""
    return np.array(list(itertools.product(range(3), repeat=8)))


def table_keys(space: fpnas.spaces.Space) -> list[str]:
    """What the published table calls the networks of `all_entries`."""
    digits = space.blocks[0].variables["operation"][1]
    return ["".join(str(digits[entry]) for entry in entries) for entries in all_entries()]


class Table:
    """The published table, by architecture and inside the graph.

    Args:
        data_dir: The folder of the published file.

    Attributes:
        accuracy: Mean accuracy of each network of `all_entries`, in percent.
        macs: Multiply-adds of each network of `all_entries`.
        params: Trainable parameters of each network of `all_entries`.
        blocks: Number of blocks of each network of `all_entries` that are not skipped.
    """

    def __init__(self, data_dir: str):
        self.space = fpnas.spaces.get("nas_bench_macro")
        rows = json.loads((pathlib.Path(data_dir) / TABLE_FILE).read_text())
        keys = table_keys(self.space)
        self.rows = [rows[key] for key in keys]
        self.blocks = np.array([len(key) - key.count("0") for key in keys])
        self.accuracy = np.array([row["mean_acc"] for row in self.rows])
        self.macs = np.array([row["flops"] for row in self.rows])
        self.params = np.array([row["params"] for row in self.rows])

    def index(self, entries: tf.Tensor) -> tf.Tensor:
        """Rows of architectures.

        Args:
            entries: int32 of shape `(..., 8)`.
        """
        place_values = 3 ** np.arange(7, -1, -1, dtype=np.int32)
        return tf.reduce_sum(entries * place_values, axis=-1)

    def near(self, budget: float) -> np.ndarray:
        """Which networks of `all_entries` cost 95% to 100% of a budget."""
        return (self.macs >= LEAST_SHARE * budget) & (self.macs <= budget)

    def different(self, allowed: np.ndarray) -> list[int]:
        """Rows of different networks: identities move within a stage.

        Args:
            allowed: Which networks of `all_entries` may be among them.
        """
        found = {}
        for index in np.flatnonzero(allowed):
            found.setdefault((self.accuracy[index], self.macs[index]), int(index))
        return sorted(found.values())

    def draw(self, allowed: np.ndarray, count: int) -> np.ndarray:
        """Random rows of `different`; all, if they are fewer than `count`. The same every time."""
        rows = self.different(allowed)
        return np.random.default_rng(0).choice(rows, min(count, len(rows)), replace=False)

    def best(self, budget: float) -> float:
        """The highest accuracy within a budget."""
        return self.accuracy[self.macs <= budget].max()

    def count_differences(self, networks: int) -> int:
        """How many networks have other MACs or parameters in the project than in the table.

        Args:
            networks: Number of networks to compare.
        """
        differences = 0
        for row, entries in zip(self.rows[:networks], all_entries()):
            network = self.space.architecture(self.space.entries.to_choices(entries))
            differences += (network.macs(), network.params()) != (row["flops"], row["params"])
        return differences


def expected_best(accuracies: np.ndarray, draws: int) -> float:
    """Mean of the best of so many draws, without replacement."""
    left = np.arange(len(accuracies))
    # The chance that the best one is at most the i-th worst: all draws are among those.
    at_most = np.ones(len(accuracies))
    for draw in range(draws):
        at_most *= np.clip(left + 1 - draw, 0, None) / (len(accuracies) - draw)
    return float(np.sort(accuracies) @ np.diff(at_most, prepend=0.0))


class TableSearch:
    """A search on the table. All seeds run in one trace."""

    def __init__(self, table: Table, target: float | None, learning_rate: float, **settings):
        self.table = table
        self.search = fpnas.ArchitectureSearch(
            table.space, cost=fpnas.MacsCost(target), warmup_steps=0, **settings
        )
        self.search.compile("sgd", keras.optimizers.Adam(learning_rate))
        own = set(map(id, self.search.supernet.variables))
        variables = self.search.variables + self.search.architecture_optimizer.variables
        self._initial = [(v, v.numpy()) for v in variables if id(v) not in own]
        self._continue = tf.function(self._until)

    def _until(self, total):
        """Steps until the next one would draw more than `total` samples in all."""
        search, going = self.search, tf.constant(True)
        accuracy = tf.constant(self.table.accuracy / 100, tf.float32)
        while going:
            samples = search.ask()
            drawn = tf.cast(tf.reduce_sum(samples.counts), tf.int64)
            going = search.total_samples + drawn <= total
            if going:
                rows = self.table.index(samples.entries)
                key = tf.stack([search.seed.value, search.step.value]) + 10_000
                noise = tf.random.stateless_normal(tf.shape(rows), key, stddev=NOISE)
                search.tell(samples, SLOPE * (tf.gather(accuracy, rows) - 1) + noise)

    def run(self, seed: int, checkpoints: Sequence[int]) -> np.ndarray:
        """Row of the derived network after each number of samples."""
        for variable, value in self._initial:
            variable.assign(value)
        self.search.seed.assign(seed)
        rows = []
        for total in checkpoints:
            self._continue(tf.constant(total, tf.int64))
            rows.append(self.row("target"))
        return np.array(rows)

    def row(self, budget: float | str | None, least_share: float = 0.0) -> int:
        """Row of the network that the search derives now."""
        found = self.search.derive(budget, least_share=least_share)
        space = self.table.space
        return int(self.table.index(space.entries_of(found)))

    def expected_cost(self) -> float:
        """E[cost] now."""
        probabilities = self.search.distribution.entry_probabilities()
        return float(self.search.space_cost.expected(probabilities))


def without_budget(own: NasBenchMacroSettings, table: Table, **settings: Any) -> harness.Row:
    """Accuracy of the derived network after all samples, over the seeds."""
    search = TableSearch(table, None, **settings)
    rows, evaluated = [], []
    for seed in range(own.seeds):
        rows += list(search.run(seed, [own.samples]))
        evaluated.append(float(search.search.total_evaluated.numpy()))
    accuracy = table.accuracy[rows]
    return {
        "mean": accuracy.mean(),
        "worst": accuracy.min(),
        "evaluated": np.mean(evaluated),
    }


def with_budgets(
    own: NasBenchMacroSettings, table: Table, least_share: float = 0.0, **settings: Any
) -> harness.Row:
    """Distance to the best network within each budget after all samples, over the seeds."""
    distances, over, modes_over, misses, result = [], 0, 0, [], {}
    for budget in BUDGETS:
        search = TableSearch(table, budget, **settings)
        of_budget = []
        for seed in range(own.seeds):
            search.run(seed, [own.samples])
            row = search.row("target", least_share)
            of_budget.append(table.best(budget) - table.accuracy[row])
            over += int(table.macs[row] > budget)
            modes_over += int(table.macs[search.row(None)] > budget)
            misses.append(search.expected_cost() / budget - 1)
        result[f"{budget / 1e6:.0f}M"] = np.mean(of_budget)
        distances += of_budget
    return result | {
        "distance": np.mean(distances),
        "worst_distance": np.max(distances),
        "over": over,
        "modes_over": modes_over,
        "runs": len(distances),
        "expected_cost_off": np.abs(misses).mean(),
    }


def samples_to_reach(own: NasBenchMacroSettings, table: Table, **settings: Any) -> harness.Row:
    """Samples after which the mean accuracy over the seeds stays at or above each level."""
    search, checkpoints = TableSearch(table, None, **settings), CHECKPOINTS[: own.checkpoints]
    rows = np.array([search.run(seed, checkpoints) for seed in range(own.seeds)])
    return _first_to_stay(table.accuracy[rows].mean(axis=0), LEVELS, checkpoints)


def samples_to_reach_with_budgets(
    own: NasBenchMacroSettings, table: Table, **settings: Any
) -> harness.Row:
    """Samples after which the mean distance over seeds and budgets stays within each level."""
    distances, checkpoints = [], BUDGET_CHECKPOINTS[: own.checkpoints]
    for budget in BUDGETS:
        search = TableSearch(table, budget, **settings)
        for seed in range(own.seeds):
            accuracy = table.accuracy[search.run(seed, checkpoints)]
            distances.append(table.best(budget) - accuracy)
    levels = [-level for level in DISTANCES]
    found = _first_to_stay(-np.mean(distances, axis=0), levels, checkpoints)
    return {level.removeprefix("-"): samples for level, samples in found.items()}


def _first_to_stay(values, levels, checkpoints):
    # The mean over the seeds is noisy, so that its first crossing would be too early.
    lowest_later = np.minimum.accumulate(values[::-1])[::-1]
    result = {}
    for level in levels:
        reached = np.flatnonzero(lowest_later >= level)
        result[f"{level:.2f}"] = checkpoints[reached[0]] if len(reached) else None
    return result


def make_jobs() -> dict[str, Callable[..., harness.Row]]:
    """What makes the rows from the settings and the table, by their names."""
    found = {}
    for name, change in SWITCHES.items():
        settings = OURS | change
        if not change.keys() & {"cost_coefficient", "cost_penalty", "least_share"}:
            found[f"no budget | {name}"] = functools.partial(without_budget, **settings)
        found[f"budgets | {name}"] = functools.partial(with_budgets, **settings)
    for rate in (0.05, 0.1):
        for scale in (0.25, 0.5, 1.0):
            settings = OURS | {"samples": fpnas.AdaptiveSamples(scale), "learning_rate": rate}
            name = f"samples | ours, scale {scale:g}, learning rate {rate:g}"
            found[name] = functools.partial(samples_to_reach, **settings)
        for count in (4, 8, 16, 32):
            for scale in (1.0, 10.0, 30.0, 100.0, 300.0):
                settings = {"samples": count, "likelihood_scale": scale, "learning_rate": rate}
                name = f"samples | PARSEC, K {count}, tau {scale:g}, learning rate {rate:g}"
                found[name] = functools.partial(samples_to_reach, **harness.PARSEC, **settings)
    found["budget samples | ours"] = functools.partial(samples_to_reach_with_budgets, **OURS)
    for count in (4, 8, 16):
        for scale in (1.0, 10.0, 30.0, 100.0):
            # The same cost term, target and learning rate.
            settings = OURS | harness.PARSEC | {"samples": count, "likelihood_scale": scale}
            name = f"budget samples | PARSEC, K {count}, tau {scale:g}"
            found[name] = functools.partial(samples_to_reach_with_budgets, **settings)
    return found


def first_of_each_kind(names: Sequence[str], count: int) -> list[str]:
    """The first names of each kind, which is the text before "|" and the method after it."""
    kinds = {}
    for name in names:
        kind, _, rest = name.partition(" | ")
        kinds.setdefault((kind, rest.startswith("PARSEC")), []).append(name)
    kept = {name for members in kinds.values() for name in members[:count]}
    return [name for name in names if name in kept]


def report(by_name: Mapping[str, harness.Row]) -> None:
    """Prints all rows as tables."""
    print("\n| without budget | mean | worst | evaluated |\n|---|---|---|---|")
    for name, row in by_name.items():
        if name.startswith("no budget | "):
            name = name.removeprefix("no budget | ")
            print(f"| {name} | {row['mean']:.2f} | {row['worst']:.2f} | {row['evaluated']:.0f} |")
    columns = [f"{budget / 1e6:.0f}M" for budget in BUDGETS]
    print(f"\n| distance with budgets | {' | '.join(columns)} | mean | worst | over | modes over |")
    print("|---" * (len(columns) + 5) + "|")
    for name, row in by_name.items():
        if name.startswith("budgets | "):
            values = [f"{row[key]:.2f}" for key in (*columns, "distance", "worst_distance")]
            values += [f"{row['over']} of {row['runs']}", f"{row['modes_over']} of {row['runs']}"]
            print(f"| {name.removeprefix('budgets | ')} | {' | '.join(values)} |")
    for title, kind, levels in (
        ("samples to stay at or above", "samples | ", LEVELS),
        ("samples to stay within, with budgets", "budget samples | ", DISTANCES),
    ):
        print(f"\n| {title} | {' | '.join(f'{level:.2f}' for level in levels)} |")
        print("|---" * (len(levels) + 1) + "|")
        for name, row in by_name.items():
            if name.startswith(kind):
                values = [str(row[f"{level:.2f}"] or "never") for level in levels]
                print(f"| {name.removeprefix(kind)} | {' | '.join(values)} |")


def run(settings: NasBenchMacroSettings) -> None:
    """Runs the rows that are not in the output yet, and prints all of them."""
    table = Table(settings.data_dir)
    rows = {
        row["name"]: row
        for row in harness.read_rows(settings.output)
        if row["seeds"] == settings.seeds
    }
    differences = table.count_differences(settings.compared_networks)
    print(f"networks with other MACs or parameters than published: {differences}")
    jobs = make_jobs()
    for name in first_of_each_kind(list(jobs), settings.rows_of_a_kind):
        if name not in rows:
            rows[name] = {"name": name, "seeds": settings.seeds} | jobs[name](settings, table)
            harness.append(settings.output, rows[name])
            print(json.dumps(rows[name]), flush=True)
    report(rows)


COMMAND = harness.make_command(__file__, __doc__, NasBenchMacroSettings, run)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
