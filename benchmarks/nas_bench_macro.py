"""The search against the truth: NAS-Bench-Macro, 6,561 networks of known accuracy.

python benchmarks/nas_bench_macro.py --data_dir=FOLDER

The log-likelihood of a sample is -3.5 * (1 - accuracy), with the accuracy of the table, plus
Gaussian noise of 0.02; all else is the product's own: distribution, draws, estimator, schedules,
controller, derivation. Rows are appended to --output as they are finished; a run that was cut goes
on from there.
"""

import functools
import json
import pathlib
from collections.abc import Sequence

import harness
import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import fpnas_keras as fpnas

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "Folder of nas-bench-macro_cifar10.json.", required=True)
flags.DEFINE_string("output", "benchmarks/nas_bench_macro.jsonl", "File of the finished rows.")
flags.DEFINE_integer("seeds", 24, "Runs of each row.", lower_bound=1)

SLOPE, NOISE = 3.5, 0.02
SAMPLES = 1_000
BUDGETS = (30e6, 40e6, 60e6, 80e6)
LEVELS = (92.85, 92.90, 92.95, 93.00)
CHECKPOINTS = (*range(50, 500, 25), *range(500, 1_000, 50), *range(1_000, 5_001, 100))
# With budgets: points of accuracy below the best within the budget, mean over the budgets.
DISTANCES = (0.60, 0.50, 0.40, 0.30, 0.25)
BUDGET_CHECKPOINTS = (*range(100, 500, 50), *range(500, 1_000, 100), *range(1_000, 5_001, 500))

CONTROLLER = fpnas.CostController(anneal_steps=100)
OURS = {
    "samples": fpnas.AdaptiveSamples(scale=0.25),
    "cost_coefficient": CONTROLLER,
    "learning_rate": 0.1,
}
PARSEC = {
    "distribution": "joint",
    "control_variate": False,
    "stratified": False,
    "deduplicate": False,
}
# What each switch buys: one thing changed at a time.
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
}


class Table:
    """The published table, by architecture and inside the graph."""

    def __init__(self, data_dir: str):
        self.space = fpnas.spaces.get("nas_bench_macro")
        path = pathlib.Path(data_dir) / "nas-bench-macro_cifar10.json"
        rows = json.loads(path.read_text())
        # In the order of the space: row-major over the entries of the blocks.
        self._digits = self.space.blocks[0].variables["operation"][1]
        codes = np.stack(np.unravel_index(np.arange(3**8), (3,) * 8), axis=1)
        codes = ["".join(str(self._digits[entry]) for entry in code) for code in codes]
        self.rows = [rows[code] for code in codes]
        self.accuracy = np.array([row["mean_acc"] for row in self.rows])
        self.macs = np.array([row["flops"] for row in self.rows])

    def index(self, choices: tf.Tensor, distribution: fpnas.distributions.BlockLogits) -> tf.Tensor:
        """Rows of architectures, from their choices."""
        place_values = 3 ** np.arange(7, -1, -1, dtype=np.int32)
        return tf.reduce_sum(distribution.entries.index(choices) * place_values, axis=-1)

    def best(self, budget: float) -> float:
        """The highest accuracy within a budget."""
        return self.accuracy[self.macs <= budget].max()

    def count_differences(self) -> int:
        """How many networks have other MACs or parameters in the project than in the table."""
        entries = self.space.blocks[0].entries
        differences = 0
        for row, code in zip(self.rows, np.ndindex(*(3,) * 8)):
            network = self.space.architecture(entries[list(code)])
            differences += (network.macs(), network.params()) != (row["flops"], row["params"])
        return differences


class TableSearch:
    """A search on the table, run again for each seed without being traced again."""

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
                rows = self.table.index(samples.choices, search.distribution)
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
        choices = self.table.space.choices(found)
        return int(self.table.index(tf.constant(choices), self.search.distribution))

    def expected_cost(self) -> float:
        """E[cost] now."""
        probabilities = self.search.distribution.entry_probabilities()
        return float(self.search.cost_table.expected(probabilities))


def without_budget(table: Table, **settings) -> dict[str, float]:
    """Accuracy of the derived network after 1,000 samples, over the seeds."""
    search = TableSearch(table, None, **settings)
    rows, evaluated = [], []
    for seed in range(FLAGS.seeds):
        rows += list(search.run(seed, [SAMPLES]))
        evaluated.append(float(search.search.total_evaluated.numpy()))
    accuracy = table.accuracy[rows]
    return {
        "mean": accuracy.mean(),
        "worst": accuracy.min(),
        "evaluated": np.mean(evaluated),
    }


def with_budgets(table: Table, least_share: float = 0.0, **settings) -> dict[str, float]:
    """Distance to the best network within each budget after 1,000 samples, over the seeds."""
    distances, over, modes_over, misses, result = [], 0, 0, [], {}
    for budget in BUDGETS:
        search = TableSearch(table, budget, **settings)
        own = []
        for seed in range(FLAGS.seeds):
            search.run(seed, [SAMPLES])
            row = search.row("target", least_share)
            own.append(table.best(budget) - table.accuracy[row])
            over += int(table.macs[row] > budget)
            modes_over += int(table.macs[search.row(None)] > budget)
            misses.append(search.expected_cost() / budget - 1)
        result[f"{budget / 1e6:.0f}M"] = np.mean(own)
        distances += own
    return result | {
        "distance": np.mean(distances),
        "worst_distance": np.max(distances),
        "over": over,
        "modes_over": modes_over,
        "runs": len(distances),
        "expected_cost_off": np.abs(misses).mean(),
    }


def samples_to_reach(table: Table, **settings) -> dict[str, float | None]:
    """Samples after which the mean accuracy over the seeds stays at or above each level."""
    search = TableSearch(table, None, **settings)
    rows = np.array([search.run(seed, CHECKPOINTS) for seed in range(FLAGS.seeds)])
    return _first_to_stay(table.accuracy[rows].mean(axis=0), LEVELS, CHECKPOINTS)


def samples_to_reach_with_budgets(table: Table, **settings) -> dict[str, float | None]:
    """Samples after which the mean distance over seeds and budgets stays within each level."""
    distances = []
    for budget in BUDGETS:
        search = TableSearch(table, budget, **settings)
        for seed in range(FLAGS.seeds):
            accuracy = table.accuracy[search.run(seed, BUDGET_CHECKPOINTS)]
            distances.append(table.best(budget) - accuracy)
    levels = [-level for level in DISTANCES]
    found = _first_to_stay(-np.mean(distances, axis=0), levels, BUDGET_CHECKPOINTS)
    return {level.removeprefix("-"): samples for level, samples in found.items()}


def _first_to_stay(values, levels, checkpoints):
    # Stays: the mean of seeds is noisy, and its first crossing would flatter.
    lowest_later = np.minimum.accumulate(values[::-1])[::-1]
    result = {}
    for level in levels:
        reached = np.flatnonzero(lowest_later >= level)
        result[f"{level:.2f}"] = checkpoints[reached[0]] if len(reached) else None
    return result


def jobs() -> dict[str, functools.partial]:
    """All rows by name."""
    found = {}
    for name, change in SWITCHES.items():
        settings = OURS | change
        if not {"cost_coefficient", "cost_penalty", "least_share"} & change.keys():
            found[f"no budget | {name}"] = functools.partial(without_budget, **settings)
        found[f"budgets | {name}"] = functools.partial(with_budgets, **settings)
    for rate in (0.05, 0.1):
        for scale in (0.25, 0.5, 1.0):
            settings = {"samples": fpnas.AdaptiveSamples(scale), "learning_rate": rate}
            name = f"samples | ours, scale {scale:g}, learning rate {rate:g}"
            found[name] = functools.partial(samples_to_reach, **settings)
        for count in (4, 8, 16, 32):
            for scale in (1.0, 10.0, 30.0, 100.0, 300.0):
                settings = {"samples": count, "likelihood_scale": scale, "learning_rate": rate}
                name = f"samples | PARSEC, K {count}, tau {scale:g}, learning rate {rate:g}"
                found[name] = functools.partial(samples_to_reach, **PARSEC, **settings)
    found["budget samples | ours"] = functools.partial(samples_to_reach_with_budgets, **OURS)
    for count in (4, 8, 16):
        for scale in (1.0, 10.0, 30.0, 100.0):
            # The same cost term, target and learning rate.
            settings = OURS | PARSEC | {"samples": count, "likelihood_scale": scale}
            name = f"budget samples | PARSEC, K {count}, tau {scale:g}"
            found[name] = functools.partial(samples_to_reach_with_budgets, **settings)
    return found


def report(rows: list[dict]) -> None:
    """Prints all rows as tables."""
    by_name = {row["name"]: row for row in rows}
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


def main(_: list[str]) -> None:
    """Runs what is not yet in the output and prints all of it."""
    table = Table(FLAGS.data_dir)
    output = pathlib.Path(FLAGS.output)
    lines = output.read_text().splitlines() if output.exists() else []
    rows = [row for row in map(json.loads, lines) if row["seeds"] == FLAGS.seeds]
    print(f"networks with other MACs or parameters than published: {table.count_differences()}")
    for name, job in jobs().items():
        if name not in {row["name"] for row in rows}:
            rows.append({"name": name, "seeds": FLAGS.seeds} | job(table))
            harness.append(FLAGS.output, rows[-1])
            print(json.dumps(rows[-1]), flush=True)
    report(rows)


if __name__ == "__main__":
    app.run(main)
