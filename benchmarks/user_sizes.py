"""Searches of a user's size: are they better than random networks, and how long must they be?

python benchmarks/user_sizes.py --folder=FOLDER

For each number of photos a class: searches of several lengths with 3 seeds, whose results are
trained, and random networks that cost 95% to 100% of the target, trained in the same way. All other
settings are the defaults of the commands. The folders are those of `few_photos.py`.

One job runs on each core. Finished rows are appended to --output. A run that was interrupted
continues from there.
"""

import dataclasses
import statistics
import sys
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import few_photos
import harness
import numpy as np
import scipy.stats
from networks import draw_random_networks

import fpnas_keras as fpnas
from fpnas_keras.commands import run_command
from fpnas_keras.errors import UserError
from fpnas_keras.settings import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserSizesSettings(few_photos.FewPhotosSettings):
    """Settings of this benchmark."""

    SMOKE: ClassVar[Mapping[str, Any]] = {
        **few_photos.FewPhotosSettings.SMOKE,
        "photos": ("60",),  # A number that was measured; the stand-ins are 16.
        "lengths": ("3",),
        "random_networks": 2,
    }

    output: str = harness.output_setting("user_sizes.jsonl")
    photos: tuple[str, ...] = setting("Training photos of each class.", ("60", "400"))
    classes: int = setting("Number of classes, the first in their order.", 5, least=2)
    target: float = setting("What the networks may cost, in MACs.", 2e6, least=0)
    space: str = setting("Space to search.", "mobile_128", path=True)
    lengths: tuple[str, ...] = setting("Epochs of the searches, of 100 steps.", ("3", "15"))
    seeds: int = setting("Searches of each length.", 3, least=1)
    random_networks: int = setting("Random networks.", 8, least=2)

    def check(self) -> None:
        """Raises `UserError` when the photos are not given."""
        if not self.smoke and self.folder is None:
            raise UserError("--folder must be given")


def phases(settings: UserSizesSettings, runs: harness.Runs) -> Iterator[dict[str, harness.Job]]:
    """The searches, and then the trainings, by name."""
    searches, trainings = {}, {}
    shape = (settings.input_size, settings.input_size, 3)
    space = fpnas.spaces.get(settings.space, shape, few_photos.count_classes(settings))
    drawn = draw_random_networks(space, settings.target, settings.random_networks)
    for folder in few_photos.make_folders(settings, runs).values():
        common = {"data": f"folder:{folder}", "train_images": None, "random_flip": True}
        files = {}
        for index, architecture in enumerate(drawn):
            file = runs.work_dir / f"random_{index}.json"
            architecture.save(file)
            files[f"{folder.name} random {index}"] = file, 0
        for length in settings.lengths:
            for seed in range(settings.seeds):
                name = f"{folder.name} search {length} {seed}"
                searches |= runs.search(name, **common, epochs=int(length), seed=seed)
                files[name] = runs.architecture_file(name), seed
        # In a smoke run those of the harness.
        defaults = {} if settings.smoke else dict.fromkeys(("batch_size", "epochs"))
        defaults["learning_rate"] = None
        for name, (file, seed) in files.items():
            trainings |= runs.train(f"{name} trained", file, **common, **defaults, seed=seed)
    yield searches
    yield trainings


def report(settings: UserSizesSettings, rows: Mapping[str, harness.Row]) -> None:
    """Prints a table."""
    print(
        "\n| photos a class | networks | test accuracy, % | mean | in deviations of random | p | "
        f"entropy of the search | its CPU s |\n{'|---' * 8}|"
    )
    for count in settings.photos:
        folder = f"{settings.images}_{count}"
        kinds = {"random": [f"random {index}" for index in range(settings.random_networks)]}
        for length in settings.lengths:
            names = [f"search {length} {seed}" for seed in range(settings.seeds)]
            kinds[f"search of {length} epochs"] = names
        drawn = _accuracies(rows, folder, kinds["random"])
        for kind, names in kinds.items():
            values = _accuracies(rows, folder, names)
            listed = " ".join(f"{value:.1f}" for value in values)
            cells = [count, kind, listed, f"{values.mean():.2f}"]
            if kind == "random":
                cells += [f"deviation {drawn.std(ddof=1):.2f}", "", "", ""]
            else:
                test = scipy.stats.ttest_ind(values, drawn, equal_var=False, alternative="greater")
                found = [rows[f"{folder} {name}"] for name in names]
                cells += [
                    f"{(values.mean() - drawn.mean()) / drawn.std(ddof=1):+.2f}",
                    f"{test.pvalue:.2g}",
                    f"{statistics.mean(row['entropy'] for row in found):.1f} of "
                    f"{found[0]['initial_entropy']:.1f}",
                    f"{statistics.mean(row['cpu_seconds'] for row in found):.0f}",
                ]
            print(f"| {' | '.join(cells)} |")


def _accuracies(rows, folder, names):
    return np.array([100 * rows[f"{folder} {name} trained"]["test_accuracy"] for name in names])


def run(settings: UserSizesSettings) -> None:
    """Runs the jobs that have no row yet, and reports."""
    runs = harness.Runs(settings)
    report(settings, runs.run_phases(phases(settings, runs)))


COMMAND = harness.make_command(__file__, __doc__, UserSizesSettings, run)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
