"""What a search finds, against random networks of the same space and cost, and networks by hand.

python benchmarks/versus.py --data_dir=DATA --cifar10=FOLDER --flowers=FOLDER

Jobs: Fashion-MNIST at 28 pixels, CIFAR-10 at 32 and flowers at 64. Short protocol: at most 10,000
training images, networks of at most 2M MACs, 20 epochs. Every network is trained by the same
recipe, which is the best of `RECIPES` for a random network on held-out training images. Compared
are

* the results of 3 searches with different seeds, each trained with 2 seeds, or --seeds,
* random networks that cost 95% to 100% of the target: 10, or --random_networks,
* MobileNetV3-Small, MobileNetV2 and EfficientNet-B0 at the largest width within the target, each
  trained as often.

With --tasks_dir=FOLDER nothing runs here: the trainings that have no row yet, and their images, go
to a folder, for `torch_trainings.py` on a machine with a GPU. First those that choose the recipe;
once their rows are in --output, those of the networks.

One job runs on each core. Finished rows are appended to --output. A run that was interrupted
continues from there.
"""

import dataclasses
import json
import pathlib
import statistics
import sys
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import harness
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
from networks import PUBLISHED, draw_random_networks, scale_published

import fpnas_keras as fpnas
from fpnas_keras.commands import run_command
from fpnas_keras.data.settings import DATA_FLAGS, DataSettings
from fpnas_keras.errors import UserError
from fpnas_keras.settings import setting

RECIPES = {
    "batch 128 at 0.1": {"batch_size": 128, "learning_rate": 0.1},
    "batch 128 at 0.2": {"batch_size": 128, "learning_rate": 0.2},
    "batch 32 at 0.1": {"batch_size": 32, "learning_rate": 0.1},
}
# Images that are held out to choose a recipe.
HELD_OUT = 0.3


class Data(NamedTuple):
    """The images of a job and what is searched for them."""

    data: str
    image_shape: tuple[int, int, int]
    num_classes: int
    space: str
    target: float
    train_images: int | None
    stem_strides: int
    batch_size: int


JOBS = {
    "fashion_mnist": Data("tfds:fashion_mnist", (28, 28, 1), 10, "mobile_40", 1.5e6, 10_000, 1, 64),
    "cifar10": Data("cifar10", (32, 32, 3), 10, "mobile_40", 2e6, 10_000, 1, 64),
    "flowers": Data("flowers", (64, 64, 3), 5, "mobile_128", 2e6, None, 2, 32),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VersusSettings(harness.ProjectSettings):
    """Settings of this benchmark."""

    SMOKE: ClassVar[Mapping[str, Any]] = {
        **harness.ProjectSettings.SMOKE,
        "jobs": ("fashion_mnist",),
        "published": ("MobileNetV3-Small",),
        "published_blocks": 2,
        "recipes": ("batch 128 at 0.1",),
        "random_networks": 2,
        "search_seeds": 1,
    }

    output: str = harness.output_setting("versus.jsonl")
    jobs: tuple[str, ...] = setting(f"Jobs: {', '.join(JOBS)}.", tuple(JOBS), basic=True)
    cifar10: str | None = setting("Image folder of CIFAR-10.", None, basic=True)
    flowers: str | None = setting("Image folder of the flowers.", None, basic=True)
    search_seeds: int = setting("Searches of a job.", 3, least=1)
    seeds: int = setting("Trainings of each network found or made by hand.", 2, least=1)
    random_networks: int = setting("Random networks of a job.", 10, least=2)
    published: tuple[str, ...] = setting("Networks by hand.", tuple(PUBLISHED))
    published_blocks: int = setting("Most blocks of a network by hand.", 20, least=1)
    recipes: tuple[str, ...] = setting("Recipes to choose from.", tuple(RECIPES))
    tasks_dir: str | None = setting("Folder to write trainings to, instead of running.", None)
    picture: str | None = setting("File of the picture, a PNG.", None)

    def check(self) -> None:
        """Raises `UserError` when a job is unknown or its images are not given."""
        for name in self.jobs:
            if name not in JOBS:
                raise UserError(f"`jobs` must be of {', '.join(JOBS)}. Received: {name}")
            if getattr(self, name, "") is None and not self.smoke:
                raise UserError(f"--{name} must be given for the job {name}: its image folder")

    def get(self, name: str) -> Data:
        """The data of a job; in a smoke run the digits in the small space."""
        job = JOBS[name]
        if self.smoke:
            return job._replace(
                data=self.data,
                space=self.space,
                train_images=self.train_images,
                batch_size=self.batch_size,
            )
        folder = getattr(self, name, None)
        return job._replace(data=f"folder:{folder}") if folder else job


def phases(settings: VersusSettings, runs: harness.Runs) -> Iterator[dict[str, harness.Job]]:
    """The jobs by name. Those of a phase need the results of earlier phases only."""
    jobs = {name: settings.get(name) for name in settings.jobs}
    first = {}
    for name, job in jobs.items():
        save_networks(settings, runs, name, job)
        for seed in range(settings.search_seeds):
            first |= search(runs, job, f"{name} search {seed}", seed)
        for recipe in settings.recipes:
            held_out = {"validation_split": HELD_OUT} | RECIPES[recipe]
            file = architecture_file(runs, f"{name} random 0")
            first |= train(runs, job, f"{name} recipe {recipe}", file, **held_out)
    yield first
    rows = harness.finished(settings.output, "name")
    for name, job in jobs.items():
        recipe = RECIPES[best_recipe(settings, rows, name)]
        trainings = {}
        for each, repeats in networks(settings).items():
            file = architecture_file(runs, f"{name} {each}")
            for seed in range(repeats):
                label = f"{name} {each}: {seed}"
                trainings |= train(runs, job, label, file, seed=seed, **recipe)
        yield trainings


def networks(settings: VersusSettings) -> dict[str, int]:
    """How often each network of a job is trained. "search N" is the result of a search."""
    found = {f"search {seed}": settings.seeds for seed in range(settings.search_seeds)}
    drawn = {f"random {index}": 1 for index in range(settings.random_networks)}
    return found | dict.fromkeys(settings.published, settings.seeds) | drawn


def save_networks(settings: VersusSettings, runs: harness.Runs, name: str, job: Data) -> None:
    """Writes the architecture files of the random networks and of those made by hand."""
    space = fpnas.spaces.get(job.space, job.image_shape, job.num_classes)
    drawn = draw_random_networks(space, job.target, settings.random_networks)
    made = {f"random {index}": each for index, each in enumerate(drawn)}
    for each in settings.published:
        made[each] = scale_published(
            each,
            job.image_shape,
            job.num_classes,
            job.target,
            job.stem_strides,
            settings.published_blocks,
        )
    for each, architecture in made.items():
        architecture.save(architecture_file(runs, f"{name} {each}"))


def write_tasks(settings: VersusSettings, runs: harness.Runs) -> None:
    """Writes the trainings that can run now, and their images, for `torch_trainings.py`."""
    folder = pathlib.Path(settings.tasks_dir)
    folder.mkdir(parents=True, exist_ok=True)
    rows = harness.finished(settings.output, "name")
    tasks = []
    for name in settings.jobs:
        job = settings.get(name)
        save_networks(settings, runs, name, job)
        trainings = list(_trainings(settings, rows, name))
        tasks += [_task(runs, job, *each) for each in trainings if each[0] not in rows]
        _write_images(settings, job, folder / f"{name}.npz")
    (folder / "tasks.json").write_text(json.dumps(tasks))
    print(f"{len(tasks)} trainings: {folder / 'tasks.json'}")


def _trainings(settings, rows, job):
    """Name, network, recipe, held-out share and seed of the trainings of a job."""
    recipes = {f"{job} recipe {recipe}": recipe for recipe in settings.recipes}
    if not recipes.keys() <= rows.keys():
        for name, recipe in recipes.items():
            yield name, f"{job} random 0", recipe, HELD_OUT, 0
        return
    recipe = best_recipe(settings, rows, job)
    for each, repeats in networks(settings).items():
        for seed in range(repeats):
            yield f"{job} {each}: {seed}", f"{job} {each}", recipe, 0, seed


def _task(runs, job, name, network, recipe, held_out, seed):
    architecture = fpnas.Architecture.load(architecture_file(runs, network))
    return {
        "name": name,
        "images": name.split()[0],
        "architecture": architecture.to_dict(),
        "macs": architecture.macs(),
        "epochs": runs.settings.train_epochs,
        **RECIPES[recipe],
        "random_crop": _common(job)["random_crop"],
        "held_out": held_out,
        "seed": seed,
    }


def _write_images(settings, job, file):
    given = {name: value for name, value in _common(job).items() if name in DATA_FLAGS}
    images = DataSettings(data_dir=settings.data_dir, download=False, **given)
    arrays = {}
    for part in ("train", "test"):
        loaded = images.load_images(part, job.image_shape[0])
        arrays |= {f"x_{part}": loaded.x, f"y_{part}": loaded.y}
    np.savez_compressed(file, **arrays)


def architecture_file(runs: harness.Runs, name: str) -> str:
    """The architecture file of a network of a job."""
    if " search " in name:
        return str(runs.architecture_file(name))
    return f"{runs.directory(name)}.json"


def _common(job: Data) -> dict[str, Any]:
    return {
        "data": job.data,
        "train_images": job.train_images,
        "random_flip": True,
        "random_crop": max(2, job.image_shape[0] // 16),
    }


def search(runs: harness.Runs, job: Data, name: str, seed: int) -> dict[str, harness.Job]:
    """A search of a job."""
    return runs.search(
        name,
        **_common(job),
        space=job.space,
        input_size=job.image_shape[0],
        target=job.target,
        batch_size=job.batch_size,
        seed=seed,
    )


def train(
    runs: harness.Runs, job: Data, name: str, architecture: str, **changes: Any
) -> dict[str, harness.Job]:
    """A training of a network of a job."""
    return runs.train(name, architecture, **_common(job), **changes)


def best_recipe(settings: VersusSettings, rows: Mapping[str, harness.Row], job: str) -> str:
    """The recipe that is best on the held-out images of a job."""
    return max(settings.recipes, key=lambda name: rows[f"{job} recipe {name}"]["val_accuracy"])


def accuracies(
    settings: VersusSettings, rows: Mapping[str, harness.Row], job: str, network: str
) -> np.ndarray:
    """Test accuracies in percent of a network's trainings."""
    seeds = range(networks(settings)[network])
    return np.array([100 * rows[f"{job} {network}: {seed}"]["test_accuracy"] for seed in seeds])


def report(settings: VersusSettings, rows: Mapping[str, harness.Row]) -> None:
    """Prints a table of each job."""
    for job in settings.jobs:
        print(f"\n{job}, recipe: {best_recipe(settings, rows, job)}")
        print(f"\n| | M MACs | test accuracy, % | mean |\n{'|---' * 4}|")
        for network in networks(settings):
            values = accuracies(settings, rows, job, network)
            macs = rows[f"{job} {network}: 0"]["macs"] / 1e6
            listed = " ".join(f"{value:.2f}" for value in values)
            print(f"| {network} | {macs:.2f} | {listed} | {values.mean():.2f} |")

        def means(names, job=job):
            return np.array([accuracies(settings, rows, job, each).mean() for each in names])

        found = means(f"search {seed}" for seed in range(settings.search_seeds))
        drawn = means(f"random {index}" for index in range(settings.random_networks))
        difference = found.mean() - drawn.mean()
        test = scipy.stats.ttest_ind(found, drawn, equal_var=False, alternative="greater")
        print(
            f"\nrandom: mean {drawn.mean():.2f}, standard deviation {drawn.std(ddof=1):.2f}, best "
            f"{drawn.max():.2f}; found: mean {found.mean():.2f}, {difference:+.2f}, which are "
            f"{difference / drawn.std(ddof=1):+.2f} standard deviations of random (Welch, one-sided"
            f": p = {test.pvalue:.2g})"
        )
        seconds = [rows[f"{job} search {seed}"]["cpu_seconds"] for seed in range(len(found))]
        print(f"CPU time of a search: {statistics.mean(seconds):.0f} s")


def draw(settings: VersusSettings, rows: Mapping[str, harness.Row]) -> None:
    """Draws accuracy against MACs for each job: random networks, by hand, ours."""
    figure, axes = plt.subplots(
        1, len(settings.jobs), figsize=(5 * len(settings.jobs), 4), squeeze=False, dpi=120
    )
    kinds = {
        "random": [f"random {index}" for index in range(settings.random_networks)],
        "ours": [f"search {seed}" for seed in range(settings.search_seeds)],
        **{name: [name] for name in settings.published},
    }
    for axis, job in zip(axes[0], settings.jobs):
        for kind, names in kinds.items():
            macs = [rows[f"{job} {name}: 0"]["macs"] / 1e6 for name in names]
            means = [accuracies(settings, rows, job, name).mean() for name in names]
            axis.scatter(macs, means, label=kind, s=40 if kind == "random" else 80)
        axis.set(title=job, xlabel="million MACs", ylabel="test accuracy, %")
    axes[0, -1].legend()
    figure.tight_layout()
    figure.savefig(settings.picture)
    plt.close(figure)


def run(settings: VersusSettings) -> None:
    """Runs the jobs that have no row yet, and reports."""
    runs = harness.Runs(settings)
    if settings.tasks_dir:
        write_tasks(settings, runs)
        return
    rows = runs.run_phases(phases(settings, runs))
    report(settings, rows)
    if settings.picture:
        draw(settings, rows)


COMMAND = harness.make_command(__file__, __doc__, VersusSettings, run)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
