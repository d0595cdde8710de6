"""Scores without a training: do they rank networks of one cost?

python benchmarks/training_free.py --table_dir=FOLDER --cifar10=FOLDER --flowers=FOLDER

Kendall's tau of each score with the accuracy of the networks:

* in NAS-Bench-Macro, the published ones of 30 networks that cost 95% to 100% of 30M, 40M and 60M
  MACs,
* the random networks of `versus.py`, trained for 20 epochs.

The scores are those of networks with random weights and a gamma of 1 in all batch norms: the norm
of the gradient (Abdelfattah et al., arXiv:2101.08134), ZiCo (Li et al., arXiv:2301.11300), NASWOT
(Mellor et al., arXiv:2006.04647) and SynFlow (Tanaka et al., arXiv:2006.05467). Beside them are the
numbers of blocks and of parameters. Finished rows are appended to --output. A run that was
interrupted continues from there.
"""

import dataclasses
import functools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import harness
import keras
import numpy as np
import scipy.stats
import tensorflow as tf
from nas_bench_macro import TABLE_FILE, Table, all_entries
from networks import draw_random_networks
from versus import JOBS

import fpnas_keras as fpnas
from fpnas_keras import progress
from fpnas_keras.commands import run_command
from fpnas_keras.data import Images
from fpnas_keras.data.settings import DataSettings
from fpnas_keras.errors import UserError
from fpnas_keras.networks import build_network
from fpnas_keras.settings import setting

SCORES = ("gradient norm", "ZiCo", "NASWOT", "SynFlow", "blocks", "parameters")
# ZiCo compares the gradients of so many batches.
_BATCHES, _BATCH_SIZE, _NASWOT_IMAGES = 4, 32, 64

Networks = Sequence[tuple[fpnas.Architecture, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingFreeSettings(harness.BenchmarkSettings):
    """Settings of this benchmark."""

    SMOKE: ClassVar[Mapping[str, Any]] = {"targets": (), "jobs": ("fashion_mnist",), "networks": 3}

    output: str = harness.output_setting("training_free.jsonl")
    table_dir: str | None = setting(f"Folder of {TABLE_FILE}.", None, basic=True)
    data_dir: str | None = setting(
        "Folder where tensorflow_datasets keeps its data. Default: ~/tensorflow_datasets.",
        None,
        basic=True,
    )
    cifar10: str | None = setting("Image folder of CIFAR-10.", None, basic=True)
    flowers: str | None = setting("Image folder of the flowers.", None, basic=True)
    targets: tuple[str, ...] = setting("Targets in millions of MACs.", ("30", "40", "60"))
    jobs: tuple[str, ...] = setting(f"Jobs of `versus.py`: {', '.join(JOBS)}.", tuple(JOBS))
    trainings: str = setting(
        "Rows of `versus.py`, with the networks and their accuracies.",
        str(harness.ROOT / "benchmarks" / "versus.jsonl"),
        path=True,
    )
    networks: int = setting("Networks of a target.", 30, least=3)

    def check(self) -> None:
        """Raises `UserError` when the table or the images are not given."""
        unknown = set(self.jobs) - JOBS.keys()
        if unknown:
            raise UserError(f"`jobs` must be of {', '.join(JOBS)}. Received: {', '.join(unknown)}")
        needed = {"table_dir": self.targets, "cifar10": self.targets or "cifar10" in self.jobs}
        needed["flowers"] = "flowers" in self.jobs
        for name, is_needed in needed.items():
            if is_needed and getattr(self, name) is None and not self.smoke:
                raise UserError(f"--{name} must be given")

    def load_images(self, job: str) -> Images:
        """The training images of a job; in a smoke run the digits."""
        name = "digits" if self.smoke else JOBS[job].data
        if (folder := getattr(self, job, None)) is not None:
            name = f"folder:{folder}"
        given = DataSettings(data=name, data_dir=self.data_dir, download=False)
        return given.load_images("train", 8 if self.smoke else JOBS[job].image_shape[0])


def groups(settings: TrainingFreeSettings) -> Iterator[tuple[str, str, Networks]]:
    """Each row's name, the job that has its images, and its networks with their accuracies."""
    for target in settings.targets:
        yield f"NAS-Bench-Macro, {target}M", "cifar10", table_networks(settings, float(target))
    for job in settings.jobs:
        yield job, job, trained_networks(settings, job)


def table_networks(settings: TrainingFreeSettings, target: float) -> Networks:
    """Networks that cost about a target in millions of MACs, with their published accuracies."""
    table = Table(settings.table_dir)
    rows = table.draw(table.near(target * 1e6), settings.networks)
    choices = table.space.entries.to_choices(all_entries()[rows])
    return list(zip(map(table.space.architecture, choices), table.accuracy[rows]))


def trained_networks(settings: TrainingFreeSettings, job: str) -> Networks:
    """The random networks of `versus.py`; in a smoke run some of the small space."""
    if settings.smoke:
        space = fpnas.spaces.get(harness.SMALL_SPACE, (8, 8, 1), 10)
        return list(zip(draw_random_networks(space, 30e3, settings.networks), range(100)))
    rows = harness.finished(settings.trainings, "name")
    return [
        (fpnas.Architecture.from_dict(row["architecture"]), row["test_accuracy"])
        for name, row in rows.items()
        if re.fullmatch(rf"{job} random \d+: 0", name)
    ]


def score(architecture: fpnas.Architecture, images: Images) -> dict[str, float]:
    """The scores of one network, by `SCORES`."""
    keras.utils.set_random_seed(0)
    model = build_network(architecture)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.gamma.assign(np.ones(layer.gamma.shape))
    kernels = [layer.kernel for layer in model.layers if hasattr(layer, "kernel")]
    gradients = [
        kernel_gradients(model, kernels, *draw(images, _BATCH_SIZE, seed))
        for seed in range(_BATCHES)
    ]
    values = (
        sum(np.linalg.norm(each) for each in gradients[0]),
        zico(gradients),
        naswot(model, draw(images, _NASWOT_IMAGES, _BATCHES)[0]),
        synflow(model, kernels),  # It changes the weights.
        sum(not block.skip for block in architecture.blocks),
        architecture.params(),
    )
    keras.backend.clear_session()
    return dict(zip(SCORES, map(float, values), strict=True))


def draw(images: Images, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random images, float32, and their labels."""
    indices = np.sort(np.random.default_rng(seed).permutation(len(images.y))[:count])
    pixels = np.stack([np.asarray(images.x[index], np.float32) for index in indices])
    return pixels, np.asarray(images.y)[indices]


def kernel_gradients(
    model: keras.Model, kernels: Sequence[keras.Variable], x: np.ndarray, y: np.ndarray
) -> list[np.ndarray]:
    """The gradient of the cross-entropy with respect to each kernel."""
    with tf.GradientTape() as tape:
        logits = model(x, training=True)
        losses = keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)
        loss = tf.reduce_mean(losses)
    gradients = tape.gradient(loss, [kernel.value for kernel in kernels])
    return [gradient.numpy() for gradient in gradients]


def zico(gradients: Sequence[Sequence[np.ndarray]]) -> float:
    """sum over the kernels of log(sum of mean |g| / deviation of g), g one gradient a batch."""
    total = 0.0
    for of_kernel in map(np.stack, zip(*gradients)):
        mean, deviation = np.abs(of_kernel).mean(axis=0), of_kernel.std(axis=0)
        total += np.log((mean[deviation > 0] / deviation[deviation > 0]).sum())
    return total


def naswot(model: keras.Model, x: np.ndarray) -> float:
    """log det of how many activations, on or off, each two images have in common."""
    kinds = (keras.layers.Activation, keras.layers.ReLU)
    outputs = [layer.output for layer in model.layers if isinstance(layer, kinds)]
    common = np.zeros((len(x), len(x)))
    for each in keras.Model(model.input, outputs)(x, training=True):
        is_on = (each.numpy().reshape(len(x), -1) > 0).astype(np.float32)
        common += is_on @ is_on.T + (1 - is_on) @ (1 - is_on).T
    return np.linalg.slogdet(common)[1]


def synflow(model: keras.Model, kernels: Sequence[keras.Variable]) -> float:
    """log sum |w * gradient| of the sum of the outputs, with |w| for w and an image of ones.

    Batch norms get a mean of 0 and a variance of 1.
    """
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.moving_mean.assign(np.zeros(layer.moving_mean.shape))
            layer.moving_variance.assign(np.ones(layer.moving_variance.shape))
    for kernel in kernels:
        kernel.assign(np.abs(kernel.numpy()))
    ones = np.full((1, *model.input_shape[1:]), 255, np.float32)
    with tf.GradientTape() as tape:
        output = tf.reduce_sum(model(ones, training=False))
    gradients = tape.gradient(output, [kernel.value for kernel in kernels])
    return np.log(
        sum(np.abs(each.numpy() * kernel.numpy()).sum() for each, kernel in zip(gradients, kernels))
    )


def measure(networks: Networks, images: Images) -> harness.Row:
    """Kendall's tau of each score with the accuracies."""
    scores = []
    with progress.track(len(networks), "scores", "networks") as bar:
        for architecture, _ in networks:
            scores.append(score(architecture, images))
            bar.update()
    accuracies = [accuracy for _, accuracy in networks]
    taus = {
        name: scipy.stats.kendalltau([each[name] for each in scores], accuracies).statistic
        for name in SCORES
    }
    return {"networks": len(networks), **taus}


def run(settings: TrainingFreeSettings) -> None:
    """Runs the rows that are not in the output yet, and prints all of them."""
    rows = harness.finished(settings.output, "name")
    load_images = functools.cache(settings.load_images)  # Several rows need those of CIFAR-10.
    for name, job, networks in groups(settings):
        if name not in rows:
            print(name, flush=True)
            rows[name] = {"name": name, **measure(networks, load_images(job))}
            harness.append(settings.output, rows[name])
    print(f"\n| networks of | number | {' | '.join(SCORES)} |\n{'|---' * (2 + len(SCORES))}|")
    for name, row in rows.items():
        taus = " | ".join(f"{row[each]:.2f}" for each in SCORES)
        print(f"| {name} | {row['networks']} | {taus} |")


COMMAND = harness.make_command(__file__, __doc__, TrainingFreeSettings, run)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
