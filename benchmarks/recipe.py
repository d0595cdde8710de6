"""What training adds to a network, and how the network of a search compares with others.

python benchmarks/recipe.py --data_dir=DATA

Short protocol: 10,000 training images of Fashion-MNIST, networks of 1.5M MACs, 20 epochs. The
recipe is the best of `RECIPES` on 10,000 held-out images. There is one search of `mobile_mini`. Its
result is trained by the recipe, with a teacher (the largest network of the space; the "plain" one
is trained without label smoothing) and from the shared weights, with 3 seeds each. It is compared
with 10 random networks of the space that cost 95% to 100% of the target, and with the shapes of
MobileNetV3-Small and EfficientNet-B0 scaled to the target. The ranking by the shared weights is
compared with the trained accuracies. One job runs on each core. Finished rows are appended to
--output. A run that was interrupted continues from there.
"""

import dataclasses
import statistics
import sys
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import harness
import scipy.stats
from networks import draw_random_networks, largest_network

import fpnas_keras as fpnas
from fpnas_keras.commands import run_command
from fpnas_keras.published import scale_published
from fpnas_keras.runs import Evaluation, Ranked, SearchRun
from fpnas_keras.settings import setting

# Recipes to choose from, on held-out training images and with the first random network.
RECIPES = {
    "plain": {},
    "not moved": {"random_crop": 0},
    "no label smoothing": {"label_smoothing": 0.0},
    "learning rate 0.2": {"learning_rate": 0.2},
    "flip": {"random_flip": True},
    "flip, batch 64": {"random_flip": True, "batch_size": 64},
    "flip, EMA": {"random_flip": True, "ema_momentum": 0.99},
    "flip, AdamW": {"random_flip": True, "optimizer": "adamw"},
    "flip, MixUp": {"random_flip": True, "mix_up": 0.2},
    "flip, CutMix": {"random_flip": True, "cut_mix": 0.5},
    "flip, RandAugment": {"random_flip": True, "rand_augment": 0.1},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeSettings(harness.ProjectSettings):
    """Settings of this benchmark."""

    SMOKE: ClassVar[Mapping[str, Any]] = {
        **harness.ProjectSettings.SMOKE,
        "recipes": ("plain", "flip, CutMix"),
        "published": ("MobileNetV3-Small",),
        "published_blocks": 2,
        "random_networks": 2,
    }

    output: str = harness.output_setting("recipe.jsonl")
    recipes: tuple[str, ...] = setting("Recipes to choose from.", tuple(RECIPES))
    published: tuple[str, ...] = setting(
        "Published networks, separated by commas.", ("MobileNetV3-Small", "EfficientNet-B0")
    )
    published_blocks: int = setting("Most blocks of a published network.", 16, least=1)
    random_networks: int = setting("Random networks.", 10, least=2)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of the images, which are grey."""
        return self.input_size, self.input_size, 1


def phases(settings: RecipeSettings, runs: harness.Runs) -> Iterator[dict[str, harness.Job]]:
    """The jobs by name. Those of a phase need the results of earlier phases only."""
    space = fpnas.spaces.get(settings.space, settings.input_shape, 10)
    random_networks = draw_random_networks(space, settings.target, settings.random_networks)
    networks = {"largest": largest_network(space)}
    networks |= {f"random {index}": each for index, each in enumerate(random_networks)}
    networks |= {
        name: scale_published(
            name, settings.input_shape, 10, settings.target, most_blocks=settings.published_blocks
        )
        for name in settings.published
    }
    for name, architecture in networks.items():
        architecture.save(network_file(runs, name))

    def train(name, network, **changes):
        return runs.train(name, network_file(runs, network), **changes)

    jobs = train("teacher", "largest", **RECIPES["flip"]) | runs.search("search")
    held_out = {"train_images": 2 * settings.train_images, "validation_split": 0.5}
    for name in settings.recipes:
        jobs |= train(f"recipe {name}", "random 0", **held_out | RECIPES[name])
    yield jobs
    rows = harness.finished(settings.output, "name")
    recipe = RECIPES[best_recipe(settings, rows)]

    def distill(name, teacher, seed):
        teacher = str(runs.directory(teacher) / "model.keras")
        return train(name, "search", **recipe, seed=seed, teacher=teacher)

    jobs = train("plain teacher", "largest", **recipe | {"label_smoothing": 0.0})
    for seed in range(settings.seeds):
        jobs |= distill(f"distilled {seed}", "teacher", seed)
        jobs |= train(f"found {seed}", "search", **recipe, seed=seed)
        jobs |= train(f"supernet {seed}", "search", **recipe, seed=seed, init="supernet")
    for index in range(settings.random_networks):
        jobs |= train(f"random {index}", f"random {index}", **recipe)
    for seed in range(settings.seeds):
        for name in settings.published:
            jobs |= train(f"{name} {seed}", name, **recipe, seed=seed)
    yield jobs
    jobs = {}
    for seed in range(settings.seeds):
        jobs |= distill(f"distilled plainly {seed}", "plain teacher", seed)
    yield jobs


def network_file(runs: harness.Runs, name: str) -> str:
    """The architecture file of a network. "search" is what the search finds."""
    if name == "search":
        return str(runs.architecture_file(name))
    return f"{runs.directory(name)}.json"


def best_recipe(settings: RecipeSettings, rows: Mapping[str, harness.Row]) -> str:
    """The name of the recipe that is best on the held-out images."""
    return max(settings.recipes, key=lambda name: rows[f"recipe {name}"]["val_accuracy"])


def rank_trained_networks(settings: RecipeSettings, runs: harness.Runs) -> dict[str, Ranked]:
    """The trained networks of the space, ranked by the shared weights of the search, by name."""
    run = SearchRun(runs.directory("search"))
    images = run.data_settings().load_images("train", settings.input_size)
    names = {f"random {index}": f"random {index}" for index in range(settings.random_networks)}
    names |= {"found 0": "search", "teacher": "largest"}
    networks = {
        name: fpnas.Architecture.load(network_file(runs, network))
        for name, network in names.items()
    }
    evaluation = Evaluation(run.load_search(), images, run.weights_share)
    ranked = fpnas.runs.rank_by_shared_weights(evaluation, networks)
    return {each.name: each for each in ranked}


def report_recipes(settings: RecipeSettings, rows: Mapping[str, harness.Row]) -> None:
    """Prints the accuracy of each recipe on the held-out images."""
    print("\n| recipe | held-out images, % | CPU s |\n|---|---|---|")
    for name in settings.recipes:
        row = rows[f"recipe {name}"]
        print(f"| {name} | {100 * row['val_accuracy']:.2f} | {row['cpu_seconds']:.0f} |")
    print(f"chosen: {best_recipe(settings, rows)}")


def report_trainings(settings: RecipeSettings, rows: Mapping[str, harness.Row]) -> None:
    """Prints the test accuracy of each training."""

    def line(label, names):
        done = [rows[name] for name in names]
        accuracies = [100 * row["test_accuracy"] for row in done]
        spread = f"{statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        listed = " ".join(f"{value:.2f}" for value in accuracies)
        seconds = statistics.median(row["cpu_seconds"] for row in done)
        print(
            f"| {label} | {done[0]['macs'] / 1e6:.2f} | {done[0]['params'] / 1e3:.1f} | "
            f"{listed} | {statistics.mean(accuracies):.2f} | {spread} | {seconds:.0f} |"
        )

    columns = "M MACs | k parameters | test accuracy, % | mean | standard deviation | CPU s"
    print(f"\n| | {columns} |\n{'|---' * 7}|")
    for label in ("found", "distilled", "distilled plainly", "supernet", *settings.published):
        line(label, [f"{label} {seed}" for seed in range(settings.seeds)])
    for label in ("teacher", "plain teacher"):
        line(f"{label}, largest of the space", [label])
    random_names = [f"random {index}" for index in range(settings.random_networks)]
    for name in random_names:
        line(name, [name])
    accuracies = [100 * rows[name]["test_accuracy"] for name in random_names]
    mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies)
    print(f"\nrandom networks: mean {mean:.2f}, standard deviation {deviation:.2f}")


def report_ranking(ranked: Mapping[str, Ranked], rows: Mapping[str, harness.Row]) -> None:
    """Compares the ranking by shared weights with the trained accuracies."""
    print("\n| | trained, % | shared weights, % | loss |\n|---|---|---|---|")
    for name, each in sorted(ranked.items(), key=lambda item: -rows[item[0]]["test_accuracy"]):
        print(
            f"| {name} | {100 * rows[name]['test_accuracy']:.2f} | {100 * each.accuracy:.2f} | "
            f"{each.loss:.3f} |"
        )
    equal = [name for name in ranked if name != "teacher"]
    for label, names in (("all", list(ranked)), ("equal MACs", equal)):
        trained = [rows[name]["test_accuracy"] for name in names]
        for measure, values in (
            ("accuracy", [ranked[name].accuracy for name in names]),
            ("loss", [-ranked[name].loss for name in names]),
        ):
            tau = scipy.stats.kendalltau(trained, values)
            print(
                f"Kendall tau, {label} ({len(names)}), shared weights' {measure}: "
                f"{tau.statistic:.2f} (p = {tau.pvalue:.2g})"
            )


def run(settings: RecipeSettings) -> None:
    """Runs the jobs that have no row yet, and reports."""
    runs = harness.Runs(settings)
    rows = runs.run_phases(phases(settings, runs))
    report_recipes(settings, rows)
    report_trainings(settings, rows)
    report_ranking(rank_trained_networks(settings, runs), rows)


COMMAND = harness.make_command(__file__, __doc__, RecipeSettings, run)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
