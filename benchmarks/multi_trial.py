"""How many trainings a tuner needs to find what a search finds: NAS-Bench-Macro.

python benchmarks/multi_trial.py --table_dir=FOLDER --data=folder:FOLDER

A multi-trial search trains one network after the other. Here a trial looks up the published
accuracy: the mean of three trainings of 50 epochs. A real trial of --train_epochs epochs would
tell less. For each target, the script counts the trials until the best network is as good as the
searches of `macro_search.py`, whose rows are in --searches:

* random networks that cost 95% to 100% of the target, by counting,
* tuners of Keras Tuner, which run in an environment that the script makes. Networks over the target
  are not trained and do not count.

What a trial takes is measured on one core, with a network of about the target's cost. Finished rows
are appended to --output.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import harness
import numpy as np
from nas_bench_macro import Table, TableSettings, all_entries, expected_best

from fpnas_keras.building import planning
from fpnas_keras.commands import run_command
from fpnas_keras.errors import UserError
from fpnas_keras.settings import setting
from fpnas_keras.train import TrainSettings

# The Bayesian tuner needs scikit-learn.
REQUIREMENTS = (*harness.KERAS_TUNER, "scikit-learn")
# After so many trainings the best accuracy is shown.
SHOWN = (1, 3, 10)
_SCRIPT = pathlib.Path(__file__).with_name("tuner_trials.py")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiTrialSettings(TableSettings):
    """Settings of this benchmark."""

    SMOKE: ClassVar[Mapping[str, Any]] = {
        **TableSettings.SMOKE,
        "tuners": (),  # Their environment needs the network.
        "searches": "none.jsonl",
    }

    output: str = harness.output_setting("multi_trial.jsonl")
    searches: str = setting("Rows of macro_search.py.", "benchmarks/macro_search.jsonl", basic=True)
    tuners: tuple[str, ...] = setting(
        "Tuners of Keras Tuner: RandomSearch; BayesianOptimization, which takes minutes to hours "
        "where most networks cost more than the target.",
        ("RandomSearch",),
    )
    trials: int = setting("Networks that a tuner trains.", 30, least=1)

    def check(self) -> None:
        """Raises `UserError` when the table or the rows of the searches are missing."""
        super().check()
        if not self.smoke and not pathlib.Path(self.searches).is_file():
            raise UserError(
                f"`searches` must be a file of rows. Received: searches={self.searches}"
            )

    def training_name(self, target: str) -> str:
        """Name of the row of a training."""
        return f"training {target}M {self.train_epochs} epochs"

    def tuner_name(self, tuner: str, target: str, seed: int) -> str:
        """Name of the row of a tuner."""
        return f"{tuner} {target}M {self.trials} trials {seed}"


def run_tuner(
    settings: MultiTrialSettings, table_file: pathlib.Path, tuner: str, target: str, seed: int
) -> harness.Row:
    """The accuracies of the networks that a tuner trains, in their order."""
    python = harness.make_environment(
        harness.Runs(settings).work_dir / "environment_keras_tuner", REQUIREMENTS
    )
    arguments = [tuner, table_file, 1e6 * float(target), settings.trials, seed]
    done = subprocess.run(
        list(map(str, [python, "-W", "ignore", _SCRIPT, *arguments])),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | harness.OTHERS_VARIABLES,
    )
    return {"accuracies": json.loads(done.stdout.splitlines()[-1])}


def time_training(settings: MultiTrialSettings, table: Table, target: str) -> harness.Row:
    """Seconds of a training of a network that costs about the target."""
    runs = harness.Runs(settings)
    nearest = np.abs(table.macs - 1e6 * float(target)).argmin()
    choices = table.space.entries.to_choices(all_entries()[nearest])
    file = runs.work_dir / f"{target}M.json"
    table.space.architecture(choices).save(file)
    train = TrainSettings(
        **runs.data(),
        architecture=str(file),
        input_size=settings.input_size,
        random_flip=True,
        batch_size=settings.batch_size,
        output_dir=str(runs.directory(f"training {target}M")),
    )
    probe = planning.probe_training(train, train.load_images("train", settings.input_size))
    return {"seconds": probe.seconds(settings.train_epochs), "epochs": settings.train_epochs}


def trials_to_reach(accuracies: Sequence[float], level: float) -> float:
    """The number of the first trial that reaches an accuracy; infinite if none does."""
    reached = np.flatnonzero(np.array(accuracies) >= level)
    return float(reached[0]) + 1 if len(reached) else np.inf


def random_trials(accuracies: np.ndarray, level: float) -> float:
    """Median number of draws, without replacement, until one reaches an accuracy."""
    worse, missed = np.count_nonzero(accuracies < level), 1.0
    for draw in range(len(accuracies)):
        missed *= max(worse - draw, 0) / (len(accuracies) - draw)
        if missed <= 0.5:
            return draw + 1.0
    return np.inf


class Found(NamedTuple):
    """What is found for a target, by the mean of the searches.

    Attributes:
        name: How.
        accuracy: Published accuracy in percent.
        seconds: CPU seconds.
    """

    name: str
    accuracy: float
    seconds: float


def searches(settings: MultiTrialSettings, target: str, training_seconds: float) -> list[Found]:
    """What the searches for a target find, alone and with trainings of all their finalists."""
    rows = harness.finished(settings.searches, "name")
    names = [name for name in rows if name.startswith(f"ours {target}M ")]
    if not names:
        return []
    accuracy = statistics.mean(rows[f"judge {name}"]["accuracy"] for name in names)
    seconds = statistics.mean(rows[name]["cpu_seconds"] for name in names)
    found = [Found("the search", accuracy, seconds)]
    # Earlier versions kept no finalists, or one network several times.
    finalists = {name: set(rows[f"judge {name}"].get("finalists", ())) for name in names}
    names = [name for name in names if finalists[name]]
    if names:
        best = statistics.mean(max(finalists[name]) for name in names)
        seconds = statistics.mean(
            rows[name]["cpu_seconds"] + len(finalists[name]) * training_seconds for name in names
        )
        found.append(Found("with trainings of its finalists", best, seconds))
    return found


def report(settings: MultiTrialSettings, rows: Mapping[str, harness.Row], table: Table) -> None:
    """Prints the table."""
    shown = " | ".join(f"best of {count}" for count in SHOWN)
    print(
        f"\n| target | found by | accuracy, % | trials | {shown} | trials to be as good | "
        f"a training over its time | their time over its |\n{'|---' * (7 + len(SHOWN))}|"
    )
    for target in settings.targets:
        seconds = rows[settings.training_name(target)]["seconds"]
        all_found = searches(settings, target, seconds)
        if not all_found:
            print(f"| {target}M | not in {settings.searches} {'|' * (6 + len(SHOWN))}")
        for found in all_found:
            ratio = seconds / found.seconds
            for name, (best, needed) in _trials(settings, rows, table, target, found).items():
                cells = " | ".join(f"{each:.2f}" for each in best)
                print(
                    f"| {target}M | {found.name} | {found.accuracy:.2f} | {name} | {cells} | "
                    f"{needed:.1f} | {ratio:.2f} | {needed * ratio:.1f} |"
                )


def _trials(settings, rows, table, target, found):
    """Best accuracies after `SHOWN` trials, and trials to be as good, by the kind of trials."""
    near = table.accuracy[table.near(1e6 * float(target))]
    best = [expected_best(near, count) for count in SHOWN]
    trials = {"random, 95% to 100% of the target": (best, random_trials(near, found.accuracy))}
    for tuner in settings.tuners:
        names = [settings.tuner_name(tuner, target, seed) for seed in range(settings.seeds)]
        own = [rows[name]["accuracies"] for name in names]
        best = [np.mean([max(each[:count]) for each in own]) for count in SHOWN]
        needed = statistics.median(trials_to_reach(each, found.accuracy) for each in own)
        trials[tuner] = (best, needed)
    return trials


def run(settings: MultiTrialSettings) -> None:
    """Makes the rows that are not in the output yet, and prints all of them."""
    if not settings.smoke:  # All on one core, as the searches.
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    table = Table(settings.table_dir)
    blocks = (3,) * len(table.space.blocks)
    table_file = harness.Runs(settings).work_dir / "table.npz"
    np.savez(table_file, accuracy=table.accuracy.reshape(blocks), macs=table.macs.reshape(blocks))
    jobs = {}
    for target in settings.targets:
        jobs[settings.training_name(target)] = (time_training, table, target)
        for tuner in settings.tuners:
            for seed in range(settings.seeds):
                name = settings.tuner_name(tuner, target, seed)
                jobs[name] = (run_tuner, table_file, tuner, target, seed)
    rows = harness.finished(settings.output, "name")
    for name, (work, *arguments) in jobs.items():
        if name not in rows:
            print(f"{name} ...", flush=True)
            rows[name] = {"name": name} | work(settings, *arguments)
            harness.append(settings.output, rows[name])
    report(settings, rows, table)


COMMAND = harness.make_command(__file__, __doc__, MultiTrialSettings, run)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
