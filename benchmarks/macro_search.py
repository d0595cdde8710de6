"""Real searches judged by published accuracies: CIFAR-10 in the space of NAS-Bench-Macro.

python benchmarks/macro_search.py --table_dir=FOLDER --data=folder:FOLDER

The search trains shared weights on images. Nothing that it finds needs a training: the published
table has the accuracy of all networks. A search is judged by

* the accuracy of its result, its percentile among the networks that cost 95% to 100% of the target,
  and its distance to the best network within the target,
* Kendall's tau between the loss under its final shared weights and the published accuracy: of 40
  networks that cost 95% to 100% of the target, and of 40 networks of all costs,
* the best of its finalists: what trainings of all finalists that a search keeps would choose.

`METHODS` has the settings that are compared; each starts from the defaults of `fpnas search`. One
job runs on each core. Finished rows are appended to --output. A run that was interrupted continues
from there.
"""

import dataclasses
import functools
import pathlib
import statistics
import sys
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import harness
import numpy as np
import scipy.stats
from nas_bench_macro import Table, TableSettings, all_entries, expected_best

from fpnas_keras.architecture import Architecture
from fpnas_keras.commands import run_command
from fpnas_keras.errors import UserError
from fpnas_keras.files import write_json
from fpnas_keras.runs import Evaluation, SearchRun
from fpnas_keras.settings import setting
from fpnas_keras.spaces import Space

# What earlier versions did.
BEFORE = {
    "weights_share": 0.5,
    "random_crop": 0,
    "random_flip": False,
    "learning_rate_warmup": 0.0,
    "clip_norm": 0.0,
    "start": "uniform",
    "cost_window": 0.0,
    "finalists": 0,
}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "ours": {},
    "ours before": BEFORE,
    "PARSEC": {**BEFORE, **harness.PARSEC, "samples": 4},
    # The weights are trained on uniform samples, and the best of the finalists is taken: Guo et
    # al., "Single Path One-Shot" (arXiv:1904.00420), with random draws in place of its evolution.
    "single path one-shot": {"architecture_learning_rate": 0.0},
    "most probable": {"finalists": 0},
    "half of the images for the weights": {"weights_share": 0.5},
    "no augmentation": {"random_crop": 0, "random_flip": False},
    "Adam": {"optimizer": "adam"},
    "no rising learning rate and no clipping": {"learning_rate_warmup": 0.0, "clip_norm": 0.0},
    "uniform start": {"start": "uniform"},
    "samples of all costs": {"cost_window": 0.0},
    "slower decision": {"architecture_learning_rate": 0.01},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MacroSearchSettings(TableSettings):
    """Settings of this benchmark."""

    SMOKE: ClassVar[Mapping[str, Any]] = {
        **TableSettings.SMOKE,
        "methods": ("ours",),
        "seeds": 1,
        "search_epochs": 1,
        "steps_per_epoch": 2,
        "warmup_steps": 1,
        "compared_networks": 4,
        "evaluation_images": 4,
    }

    output: str = harness.output_setting("macro_search.jsonl")
    methods: tuple[str, ...] = setting(
        f"What to compare, separated by commas: {'; '.join(METHODS)}.",
        ("ours", "ours before", "PARSEC", "single path one-shot"),
        basic=True,
    )
    warmup_steps: int | None = setting("Steps of the warm-up.", None, least=0)
    compared_networks: int = setting("Networks of each rank correlation.", 40, least=2)
    evaluation_images: int = setting("Images that they are evaluated on.", 1000, least=2)
    judged: str | None = setting("Judge this finished search, and end.", None)

    def check(self) -> None:
        """Raises `UserError` when the table or a method is missing."""
        super().check()
        unknown = set(self.methods) - METHODS.keys()
        if unknown:
            raise UserError(
                f"`methods` must be of {', '.join(METHODS)}. Received: {', '.join(unknown)}"
            )

    def macs(self, target: str) -> float:
        """A target in MACs. Smaller images of a smoke run have a smaller one."""
        return float(target) * 1e6 * (self.input_size / 32) ** 2


def phases(settings: MacroSearchSettings, runs: harness.Runs) -> Iterator[dict[str, harness.Job]]:
    """The searches by name, and then what judges them."""
    names = {
        f"{method} {target}M {seed}": (method, target, seed)
        for seed in range(settings.seeds)
        for target in settings.targets
        for method in settings.methods
    }
    searches, judgements = {}, {}
    for name, (method, target, seed) in names.items():
        changes = {"random_flip": True, "random_crop": settings.input_size // 8} | METHODS[method]
        searches |= runs.search(
            name,
            space="nas_bench_macro",
            target=settings.macs(target),
            seed=seed,
            warmup_steps=settings.warmup_steps,
            **changes,
        )
        judgements |= judge_job(settings, runs, name, target)
    yield searches
    yield judgements


def judge_job(
    settings: MacroSearchSettings, runs: harness.Runs, search: str, target: str
) -> dict[str, harness.Job]:
    """What judges a finished search."""
    name = f"judge {search}"
    changed = dataclasses.replace(
        settings,
        judged=str(runs.directory(search)),
        work_dir=str(runs.directory(name)),
        targets=(target,),
    )
    job = harness.Job([__file__, *changed.to_flags()], functools.partial(judge, changed))
    return {name: job}


def judge(settings: MacroSearchSettings) -> None:
    """Writes what a search is worth, by the table, as the summary of a directory of its own."""
    run, table = SearchRun(settings.judged), Table(settings.table_dir)
    budget = float(settings.targets[0]) * 1e6
    in_band = table.near(budget)
    search = run.load_search()
    images = run.data_settings().load_images("train", settings.input_size)
    evaluation = Evaluation(search, images, run.weights_share, settings.evaluation_images)
    entries = search.space.entries_of(run.architecture)
    accuracy = table.accuracy[int(table.index(entries))]
    summary = {
        "accuracy": accuracy,
        "percentile": 100 * np.mean(table.accuracy[in_band] <= accuracy),
        "distance": table.best(budget) - accuracy,
        "best": table.best(budget),
        "random_mean": table.accuracy[in_band].mean(),
        "random_deviation": table.accuracy[in_band].std(),
        "finalists": finalist_accuracies(run, search.space, table),
        "tau_in_band": rank_correlation(settings, evaluation, table, in_band),
        "tau": rank_correlation(settings, evaluation, table, np.ones(len(table.macs), bool)),
    }
    directory = pathlib.Path(settings.work_dir)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "summary.json", summary)


def finalist_accuracies(run: SearchRun, space: Space, table: Table) -> list[float]:
    """The published accuracies of the finalists that a search keeps, its result first."""
    entries = [space.entries_of(Architecture.load(file)) for file in run.finalist_files]
    return [float(table.accuracy[int(table.index(each))]) for each in entries]


def rank_correlation(
    settings: MacroSearchSettings, evaluation: Evaluation, table: Table, allowed: np.ndarray
) -> float:
    """Kendall's tau between the loss under the shared weights and the published accuracy.

    The images are those of the architecture part, on which the search has chosen.
    """
    rows = table.draw(allowed, settings.compared_networks)
    losses = evaluation(all_entries()[rows])[:, 0]
    return float(scipy.stats.kendalltau(-losses, table.accuracy[rows]).statistic)


def report(settings: MacroSearchSettings, rows: Mapping[str, harness.Row]) -> None:
    """Prints a table of the methods at each target, and of their means over the targets."""
    columns = ("accuracy, %", "percentile, mean", "worst", "distance", "tau in the band", "tau")
    print(f"\n| | target | {' | '.join(columns)} | CPU s |\n{'|---' * 9}|")
    for method in settings.methods:
        for targets in (*((target,) for target in settings.targets), settings.targets):
            names = [
                f"{method} {target}M {seed}" for target in targets for seed in range(settings.seeds)
            ]
            judged = [rows[f"judge {name}"] for name in names]

            def mean(column, judged=judged):
                return statistics.mean(row[column] for row in judged)

            print(
                f"| {method} | {' '.join(targets)} | {mean('accuracy'):.2f} | "
                f"{mean('percentile'):.1f} | {min(row['percentile'] for row in judged):.1f} | "
                f"{mean('distance'):.2f} | {mean('tau_in_band'):.2f} | {mean('tau'):.2f} | "
                f"{statistics.mean(rows[name]['cpu_seconds'] for name in names):.0f} |"
            )
    report_finalists(settings, rows)
    report_sizes(settings)


def report_finalists(settings: MacroSearchSettings, rows: Mapping[str, harness.Row]) -> None:
    """Prints what trainings of a search's finalists would choose, and of as many random networks.

    Rows of an earlier version have no finalists.
    """
    table = Table(settings.table_dir)
    print(
        f"\n| | target | best of the finalists, % | percentile, mean | distance | best of as many "
        f"random ones |\n{'|---' * 6}|"
    )
    for method in settings.methods:
        for target in settings.targets:
            budget = float(target) * 1e6
            near = table.accuracy[table.near(budget)]
            names = [f"judge {method} {target}M {seed}" for seed in range(settings.seeds)]
            finalists = [rows[name]["finalists"] for name in names if rows[name].get("finalists")]
            if not finalists:
                continue
            best = list(map(max, finalists))
            percentile = statistics.mean(100 * np.mean(near <= each) for each in best)
            as_many = statistics.mean(expected_best(near, len(set(each))) for each in finalists)
            listed = " ".join(f"{each:.2f}" for each in best)
            print(
                f"| {method} | {target} | {listed} | {percentile:.1f} | "
                f"{table.best(budget) - statistics.mean(best):.2f} | {as_many:.2f} |"
            )


def report_sizes(settings: MacroSearchSettings) -> None:
    """Prints how well the numbers of parameters and of blocks rank the networks of a cost.

    Beside them: what one gets who takes any of the networks with the most blocks.
    """
    table = Table(settings.table_dir)
    print(
        f"\n| target | networks | tau of the parameters | of the blocks | most blocks: accuracy, % "
        f"| percentile |\n{'|---' * 6}|"
    )
    for target in settings.targets:
        in_band = table.near(float(target) * 1e6)
        rows = np.array(table.different(in_band))
        taus = " | ".join(
            f"{scipy.stats.kendalltau(each[rows], table.accuracy[rows]).statistic:.2f}"
            for each in (table.params, table.blocks)
        )
        deepest = table.accuracy[rows[table.blocks[rows] == table.blocks[rows].max()]]
        percentile = np.mean([np.mean(table.accuracy[in_band] <= each) for each in deepest])
        print(
            f"| {target}M | {len(rows)} | {taus} | {deepest.mean():.2f} | {100 * percentile:.0f} |"
        )


def run(settings: MacroSearchSettings) -> None:
    """Runs the rows that are not in the output yet, and prints all of them."""
    if settings.judged:
        judge(settings)
        return
    runs = harness.Runs(settings)
    report(settings, runs.run_phases(phases(settings, runs)))


COMMAND = harness.make_command(__file__, __doc__, MacroSearchSettings, run)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
