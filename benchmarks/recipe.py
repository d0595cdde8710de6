"""What training can do for a network, and where what a search finds stands among others.

python benchmarks/recipe.py --data_dir=DATA

Short protocol: 10,000 training images of Fashion-MNIST, networks of 1.5M MACs, 20 epochs. The
recipe is chosen among `RECIPES` by 10,000 held-out images. One search of `mobile_mini`; its result
trained by the recipe, with a teacher (the largest network of the space; another, "plain", has no
label smoothing) and from the shared weights, 3 seeds each; 10 random networks of the space of 95%
to 100% of the MACs; the shapes of MobileNetV3-Small and EfficientNet-B0 scaled to them; the ranking
of the search's shared weights against what was trained. One job runs on each core. Rows are
appended to --output as jobs finish; a run that was cut goes on from there.
"""

import statistics
from collections.abc import Iterator

import harness
import numpy as np
import scipy.stats
from absl import flags

import fpnas_keras as fpnas
from fpnas_keras import cli, ranking, searched
from fpnas_keras.architecture import Block, Head, Stem, make_divisible
from fpnas_keras.method.distributions import FactorizedLogits

FLAGS = flags.FLAGS

TARGET, LEAST, RANDOM, SEEDS = 1_500_000, 0.95, 10, 3
SHAPE = (28, 28, 1)
SEARCH = (
    *("--space=mobile_mini", "--input_size=28", "--cost=macs", f"--target={TARGET}"),
    *("--epochs=15", "--steps_per_epoch=100", "--architecture_learning_rate=0.03"),
)
# Recipes to choose among, by 10,000 held-out training images and the first random network.
CHOICE = ("--train_images=20000", "--validation_split=0.5")
RECIPES = {
    "plain": (),
    "not moved": ("--random_crop=0",),
    "no label smoothing": ("--label_smoothing=0",),
    "learning rate 0.2": ("--learning_rate=0.2",),
    "flip": ("--random_flip",),
    "flip, batch 64": ("--random_flip", "--batch_size=64"),
    "flip, EMA": ("--random_flip", "--ema_momentum=0.99"),
    "flip, AdamW": ("--random_flip", "--optimizer=adamw"),
    "flip, MixUp": ("--random_flip", "--mix_up=0.2"),
    "flip, CutMix": ("--random_flip", "--cut_mix=0.5"),
    "flip, RandAugment": ("--random_flip", "--rand_augment=0.1"),
}
# (kernel size, expansion, filters, squeeze-excite, hard swish, stride) of the published blocks, at
# 28 pixels: three of five halvings are left, as in `mobile_mini`. Of MobileNetV3 they are the last
# three; of EfficientNet the middle ones, else it is over the target at any width.
MOBILENET_V3_SMALL = (
    (3, 1, 16, 1, 0, 1),
    (3, 4.5, 24, 0, 0, 2),
    (3, 3.67, 24, 0, 0, 1),
    (5, 4, 40, 1, 1, 2),
    *2 * ((5, 6, 40, 1, 1, 1),),
    *2 * ((5, 3, 48, 1, 1, 1),),
    (5, 6, 96, 1, 1, 2),
    *2 * ((5, 6, 96, 1, 1, 1),),
)
EFFICIENTNET_B0 = (
    (3, 1, 16, 1, 1, 1),
    (3, 6, 24, 1, 1, 2),
    (3, 6, 24, 1, 1, 1),
    (5, 6, 40, 1, 1, 2),
    (5, 6, 40, 1, 1, 1),
    (3, 6, 80, 1, 1, 2),
    *2 * ((3, 6, 80, 1, 1, 1),),
    *3 * ((5, 6, 112, 1, 1, 1),),
    *4 * ((5, 6, 192, 1, 1, 1),),
    (3, 6, 320, 1, 1, 1),
)
PUBLISHED = {
    "MobileNetV3-Small": (MOBILENET_V3_SMALL, 16, 576),
    "EfficientNet-B0": (EFFICIENTNET_B0, 32, 1280),
}


def scaled(blocks: tuple, stem: int, head: int) -> fpnas.Architecture:
    """Published blocks at the largest width that is within the target, in steps of 4 channels."""

    def at(width):
        def filters(count):
            return make_divisible(width * count, 4)

        return fpnas.Architecture(
            input_shape=SHAPE,
            num_classes=10,
            stem=Stem(filters(stem), 3, 1, "hard_silu"),
            blocks=[
                Block(
                    filters=filters(out),
                    kernel_size=kernel_size,
                    expansion=expansion,
                    strides=strides,
                    activation="hard_silu" if hard_silu else "relu",
                    splits=splits,
                )
                for kernel_size, expansion, out, splits, hard_silu, strides in blocks
            ],
            head=Head(filters(head), "hard_silu"),
        )

    every = (at(width) for width in np.arange(1.5, 0.05, -0.005))
    return next(each for each in every if each.macs() <= TARGET)


def largest(space: fpnas.spaces.Space) -> fpnas.Architecture:
    """The architecture of most MACs in a space whose last choices are the largest ones."""
    choices = space.cardinalities - 1
    choices[:, fpnas.spaces.VARIABLES.index("skip")] = 0
    return space.architecture(choices)


def random_networks(space: fpnas.spaces.Space) -> list[fpnas.Architecture]:
    """Uniformly drawn networks of 95% to 100% of the target."""
    found, logits = [], FactorizedLogits(space.blocks)
    for step in range(1000):
        for choices in logits.sample(1000, seed=0, step=step).numpy():
            architecture = space.architecture(choices)
            if LEAST * TARGET <= architecture.macs() <= TARGET:
                found.append(architecture)
                if len(found) == RANDOM:
                    return found
    raise RuntimeError("the space has no such networks")


def phases(runs: harness.Runs) -> Iterator[dict[str, list[str]]]:
    """Commands by name; those of a phase need nothing but earlier phases."""
    space = fpnas.spaces.get("mobile_mini", SHAPE, 10)
    files = {"largest": largest(space)}
    files |= {f"random {index}": each for index, each in enumerate(random_networks(space))}
    files |= {name: scaled(*each) for name, each in PUBLISHED.items()}
    for name, architecture in files.items():
        architecture.save(runs.directory(name).with_suffix(".json"))

    def train(architecture, *more):
        file = runs.directory(architecture).with_suffix(".json")
        if architecture == "search":
            file = runs.directory("search") / "architecture.json"
        return [
            *("fpnas_keras.train", *harness.FASHION_MNIST, "--epochs=20"),
            *(f"--architecture={file}", *more),
        ]

    yield {
        "teacher": train("largest", *RECIPES["flip"]),
        "search": ["fpnas_keras.search", *harness.FASHION_MNIST, *SEARCH],
        **{f"recipe {name}": train("random 0", *CHOICE, *RECIPES[name]) for name in RECIPES},
    }
    recipe = RECIPES[best_recipe(harness.finished(FLAGS.output, "name"))]

    def distilled(teacher, seed):
        teacher = runs.directory(teacher) / "model.keras"
        return train("search", *recipe, f"--seed={seed}", f"--teacher={teacher}")

    jobs = {"plain teacher": train("largest", *recipe, "--label_smoothing=0")}
    for seed in range(SEEDS):
        seeded = (*recipe, f"--seed={seed}")
        jobs |= {
            f"distilled {seed}": distilled("teacher", seed),
            f"found {seed}": train("search", *seeded),
            f"supernet {seed}": train("search", *seeded, "--init=supernet"),
        }
    jobs |= {name: train(name, *recipe) for name in files if name.startswith("random")}
    for seed in range(SEEDS):
        jobs |= {f"{name} {seed}": train(name, *recipe, f"--seed={seed}") for name in PUBLISHED}
    yield jobs
    yield {f"distilled plainly {seed}": distilled("plain teacher", seed) for seed in range(SEEDS)}


def best_recipe(rows: dict[str, dict]) -> str:
    """The name of the recipe that is best on the held-out images."""
    return max(RECIPES, key=lambda name: rows[f"recipe {name}"]["val_accuracy"])


def shared_weights(runs: harness.Runs) -> dict[str, ranking.Ranked]:
    """The trained networks of the space as the search's shared weights see them, by name."""
    cli.take_data_flags(runs.directory("search") / "flags.txt")
    images = cli.load_data("train", SHAPE[0])
    names = [f"random {index}" for index in range(RANDOM)]
    files = {name: runs.directory(name).with_suffix(".json") for name in names}
    files |= {
        "found 0": runs.directory("search") / "architecture.json",
        "teacher": runs.directory("largest").with_suffix(".json"),
    }
    architectures = {name: fpnas.Architecture.load(file) for name, file in files.items()}
    search = searched.load(runs.directory("search"))
    return {each.name: each for each in ranking.rank(search, architectures, images)}


def report(rows: dict[str, dict]) -> None:
    """Prints the tables."""

    def line(label, names):
        done = [rows[name] for name in names if name in rows]
        accuracies = [100 * row["test_accuracy"] for row in done]
        if accuracies:
            spread = f"{statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
            listed = " ".join(f"{value:.2f}" for value in accuracies)
            seconds = statistics.median(row["cpu_seconds"] for row in done)
            print(
                f"| {label} | {done[0]['macs'] / 1e6:.2f} | {done[0]['params'] / 1e3:.1f} | "
                f"{listed} | {statistics.mean(accuracies):.2f} | {spread} | {seconds:.0f} |"
            )

    print("\n| recipe | held-out images, % | CPU s |\n|---|---|---|")
    for name in RECIPES:
        row = rows[f"recipe {name}"]
        print(f"| {name} | {100 * row['val_accuracy']:.2f} | {row['cpu_seconds']:.0f} |")
    print(f"chosen: {best_recipe(rows)}")

    columns = "M MACs | k parameters | test accuracy, % | mean | standard deviation | CPU s"
    print(f"\n| | {columns} |\n{'|---' * 7}|")
    for label in ("found", "distilled", "distilled plainly", "supernet", *PUBLISHED):
        line(label, [f"{label} {seed}" for seed in range(SEEDS)])
    for label in ("teacher", "plain teacher"):
        line(f"{label}, largest of the space", [label])
    for index in range(RANDOM):
        line(f"random {index}", [f"random {index}"])
    everywhere = [100 * rows[f"random {index}"]["test_accuracy"] for index in range(RANDOM)]
    mean, deviation = statistics.mean(everywhere), statistics.stdev(everywhere)
    print(f"\nrandom networks: mean {mean:.2f}, standard deviation {deviation:.2f}")
    seen = shared_weights(harness.Runs(FLAGS.work_dir, FLAGS.data_dir))
    print("\n| | trained, % | shared weights, % | loss |\n|---|---|---|---|")
    for name, each in sorted(seen.items(), key=lambda item: -rows[item[0]]["test_accuracy"]):
        print(
            f"| {name} | {100 * rows[name]['test_accuracy']:.2f} | {100 * each.accuracy:.2f} | "
            f"{each.loss:.3f} |"
        )
    for label, names in (("all", list(seen)), ("equal MACs", [n for n in seen if n != "teacher"])):
        trained = [rows[name]["test_accuracy"] for name in names]
        for measure, values in (
            ("accuracy", [seen[name].accuracy for name in names]),
            ("loss", [-seen[name].loss for name in names]),
        ):
            tau = scipy.stats.kendalltau(trained, values)
            print(
                f"Kendall tau, {label} ({len(names)}), shared weights' {measure}: "
                f"{tau.statistic:.2f} (p = {tau.pvalue:.2g})"
            )


if __name__ == "__main__":
    harness.run_phases(__file__, phases, report)
