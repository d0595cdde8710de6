"""What a search finds, against random networks of the same space and cost, and networks by hand.

python benchmarks/versus.py --data_dir=DATA --cifar10=FOLDER --flowers=FOLDER

Jobs: Fashion-MNIST at 28 pixels, CIFAR-10 at 32 and flowers at 64. Short protocol: at most 10,000
training images, networks of at most 2M MACs, 20 epochs. Every network is trained by the same
recipe, which is the best of `RECIPES` for four random networks on held-out training images.
Compared are

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
from networks import draw_random_networks

import fpnas_keras as fpnas
from fpnas_keras.commands import run_command
from fpnas_keras.data.settings import DATA_FLAGS, DataSettings
from fpnas_keras.errors import UserError
from fpnas_keras.published import PUBLISHED, scale_published
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
        "short_networks": 2,
        "search_seeds": 1,
    }

    output: str = harness.output_setting("versus.jsonl")
    jobs: tuple[str, ...] = setting(f"Jobs: {', '.join(JOBS)}.", tuple(JOBS), basic=True)
    cifar10: str | None = setting("Image folder of CIFAR-10.", None, basic=True)
    flowers: str | None = setting("Image folder of the flowers.", None, basic=True)
    search_seeds: int = setting("Searches of a job.", 3, least=1)
    seeds: int = setting("Trainings of each network found or made by hand.", 2, least=1)
    random_networks: int = setting("Random networks of a job.", 10, least=2)
    short_epochs: tuple[str, ...] = setting(
        "Random networks are also trained for so many epochs: does a short training rank them?",
        ("2",),
    )
    short_networks: int = setting("How many of them.", 40, least=0)
    published: tuple[str, ...] = setting("Networks by hand.", tuple(PUBLISHED))
    published_blocks: int = setting("Most blocks of a network by hand.", 20, least=1)
    recipe_networks: int = setting("Random networks that judge a recipe.", 4, least=1)
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
            for label, network in _recipe_trainings(settings, name, recipe).items():
                file = architecture_file(runs, network)
                first |= train(runs, job, label, file, **held_out)
    yield first
    rows = harness.finished(settings.output, "name")
    trainings = {}
    for name, job in jobs.items():
        for label, network, recipe, seed, epochs in _trainings(settings, rows, name):
            file = architecture_file(runs, network)
            given = {**RECIPES[recipe], "seed": seed, "epochs": epochs}
            trainings |= train(runs, job, label, file, **given)
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
        todo = [each for each in _tasks(settings, rows, name) if each[0] not in rows]
        tasks += [_task(runs, job, *each) for each in todo]
        _write_images(settings, job, folder / f"{name}.npz")
    (folder / "tasks.json").write_text(json.dumps(tasks))
    print(f"{len(tasks)} trainings: {folder / 'tasks.json'}")


def _trainings(settings, rows, job):
    """Name, network, recipe, seed and epochs of the trainings of a job, recipes aside."""
    recipe, epochs = best_recipe(settings, rows, job), settings.train_epochs
    for each, repeats in networks(settings).items():
        for seed in range(repeats):
            yield f"{job} {each}: {seed}", f"{job} {each}", recipe, seed, epochs
    for short in map(int, settings.short_epochs):
        for index in range(min(settings.random_networks, settings.short_networks)):
            each = f"{job} random {index}"
            yield f"{each}: {short} epochs", each, recipe, 0, short


def _tasks(settings, rows, job):
    """The trainings that can run now, as those of `_trainings` and a share that is held out."""
    choosing = [
        (name, network, recipe, 0, settings.train_epochs, HELD_OUT)
        for recipe in settings.recipes
        for name, network in _recipe_trainings(settings, job, recipe).items()
    ]
    if {name for name, *_ in choosing} <= rows.keys():
        return [(*each, 0) for each in _trainings(settings, rows, job)]
    return choosing


def _recipe_trainings(settings, job, recipe):
    """The trainings that judge a recipe, and the network of each."""
    count = min(settings.recipe_networks, settings.random_networks)
    return {f"{job} recipe {recipe}: {index}": f"{job} random {index}" for index in range(count)}


def _task(runs, job, name, network, recipe, seed, epochs, held_out):
    architecture = fpnas.Architecture.load(architecture_file(runs, network))
    return {
        "name": name,
        "images": name.split()[0],
        "architecture": architecture.to_dict(),
        "macs": architecture.macs(),
        "epochs": epochs,
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

    def accuracy(recipe):
        names = _recipe_trainings(settings, job, recipe)
        return statistics.mean(rows[name]["val_accuracy"] for name in names)

    return max(settings.recipes, key=accuracy)


def accuracies(
    settings: VersusSettings, rows: Mapping[str, harness.Row], job: str, network: str
) -> np.ndarray:
    """Test accuracies in percent of a network's trainings."""
    seeds = range(networks(settings)[network])
    return np.array([100 * rows[f"{job} {network}: {seed}"]["test_accuracy"] for seed in seeds])


def report(settings: VersusSettings, runs: harness.Runs, rows: Mapping[str, harness.Row]) -> None:
    """Prints a table of each job."""
    for job in settings.jobs:
        print(f"\n{job}, recipe: {best_recipe(settings, rows, job)}")
        print(f"\n| | M MACs | test accuracy, % | mean |\n{'|---' * 4}|")
        for network in networks(settings):
            values = accuracies(settings, rows, job, network)
            macs = rows[f"{job} {network}: 0"]["macs"] / 1e6
            listed = " ".join(f"{value:.2f}" for value in values)
            print(f"| {network} | {macs:.2f} | {listed} | {values.mean():.2f} |")

        found, drawn = _means(settings, rows, job, "search"), _means(settings, rows, job, "random")
        difference, deviation = found.mean() - drawn.mean(), drawn.std(ddof=1)
        test = scipy.stats.ttest_ind(found, drawn, equal_var=False, alternative="greater")
        print(
            f"\nrandom: mean {drawn.mean():.2f}, standard deviation {deviation:.2f}, best "
            f"{drawn.max():.2f}; found: mean {found.mean():.2f}, {difference:+.2f}, which are "
            f"{difference / deviation:+.2f} standard deviations of random (Welch, one-sided"
            f": p = {test.pvalue:.2g})"
        )
        _report_noise(settings, rows, job, difference, deviation)
        for epochs in settings.short_epochs:
            _report_short(settings, rows, job, drawn, epochs)
        _report_params(runs, job, drawn)
        seconds = [rows[f"{job} search {seed}"]["cpu_seconds"] for seed in range(len(found))]
        print(f"CPU time of a search: {statistics.mean(seconds):.0f} s")


def _means(settings, rows, job, kind):
    """Mean accuracies of the networks whose name begins with a word."""
    names = [each for each in networks(settings) if each.startswith(kind)]
    return np.array([accuracies(settings, rows, job, each).mean() for each in names])


def _report_noise(settings, rows, job, difference, deviation):
    """Says what share of the spread of random networks is noise, and what random search reaches.

    Of the best of n trained networks, random search keeps only what is no noise.
    """
    if settings.seeds == 1:
        return
    # Networks by hand are not of the space, and some of them train badly.
    searches = [name for name in networks(settings) if name.startswith("search")]
    variances = [accuracies(settings, rows, job, name).var(ddof=1) for name in searches]
    noise = float(np.mean(variances)) ** 0.5
    share = max(0.0, 1 - (noise / deviation) ** 2)
    print(
        f"standard deviation of the trainings of one found network: {noise:.2f}; so the networks "
        f"themselves explain {share:.0%} of the variance of the random ones"
    )
    gains = {n: share * deviation * _expected_largest(n) for n in range(1, 1001)}
    count = next((n for n, gain in gains.items() if gain >= difference), None)
    print(
        f"trainings with which random search reaches the mean of the searches: "
        f"{count or 'over 1000'}"
    )


def _expected_largest(count):
    """Expected largest of some standard normal numbers."""
    x = np.linspace(-8, 8, 4001)
    density = count * scipy.stats.norm.pdf(x) * scipy.stats.norm.cdf(x) ** (count - 1)
    return float(np.trapezoid(x * density, x))


def _report_short(settings, rows, job, drawn, epochs):
    """Says how well a short training ranks the random networks."""
    names = {index: f"{job} random {index}: {epochs} epochs" for index in range(len(drawn))}
    known = [index for index, name in names.items() if name in rows]
    if len(known) > 1:
        short = [rows[names[index]]["test_accuracy"] for index in known]
        tau = scipy.stats.kendalltau(short, drawn[known]).statistic
        print(f"Kendall's tau of {epochs} epochs with all: {tau:.2f} ({len(known)} networks)")


def _report_params(runs, job, drawn):
    """Says how well the number of parameters alone ranks the random networks."""
    files = [architecture_file(runs, f"{job} random {index}") for index in range(len(drawn))]
    params = [fpnas.Architecture.load(file).params() for file in files]
    tau = scipy.stats.kendalltau(params, drawn).statistic
    print(f"Kendall's tau of the parameters with the accuracy: {tau:.2f} ({len(drawn)} networks)")


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
    report(settings, runs, rows)
    if settings.picture:
        draw(settings, rows)


COMMAND = harness.make_command(__file__, __doc__, VersusSettings, run)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
