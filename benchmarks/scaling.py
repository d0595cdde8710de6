"""How the time of a search step grows with K, batch, resolution, MACs, choices and blocks.

python benchmarks/scaling.py

It times steps of searches of a simple space, which update weights and logits. One thing changes at
a time. For each curve all settings run in turn in one process. It writes a picture with one plot
for each curve.
"""

import dataclasses
import functools
import pathlib
import statistics
import sys
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import harness
import keras
import matplotlib
import tensorflow as tf

import fpnas_keras as fpnas
from fpnas_keras.architecture import Head, Stem
from fpnas_keras.commands import run_command
from fpnas_keras.files import replacing
from fpnas_keras.settings import setting
from fpnas_keras.spaces import Space, stage

# The values of the argument that changes, by job.
CURVES = {
    "samples": (2, 4, 8, 16, 32, 64),
    "batch size": (8, 16, 32, 64, 128),
    "image size": (16, 24, 32, 48, 64),
    "filters": (16, 32, 48, 64, 96),
    "choices": (2, 8, 24, 72),
    "blocks": (2, 4, 8, 16),
}
DEFAULTS = {
    "samples": 4,
    "batch size": 32,
    "image size": 32,
    "filters": 32,
    "choices": 8,
    "blocks": 4,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingSettings(harness.JobSettings):
    """Settings of this benchmark."""

    SMOKE: ClassVar[Mapping[str, Any]] = {"values": 1, "most_blocks": 1, "repeats": 1, "untimed": 0}

    output: str = harness.output_setting("scaling.jsonl")
    picture: str = setting("File of the picture.", "benchmarks/scaling.png")
    values: int = setting("Values of each argument: the first ones of its list.", 6, least=1)
    most_blocks: int = setting("Most blocks of a space.", 16, least=1)
    repeats: int = setting("Timed steps of each value. The median counts.", 15, least=1)
    untimed: int = setting("Steps before those.", 6, least=0)

    def shrink(self, folder: pathlib.Path) -> Self:
        """The settings of the smoke run that these settings ask for."""
        smallest = super().shrink(folder)
        return dataclasses.replace(smallest, picture=str(folder / "scaling.png"))


def space_of(values: Mapping[str, int], most_blocks: int) -> Space:
    """Blocks of one width at half the size of the image. The mean expansion is always 3.

    Args:
        values: The values of all arguments, as `DEFAULTS`.
        most_blocks: Most blocks of the space.
    """
    fine = tuple(2 + step / 4 for step in range(9))
    expansions = {2: (3,), 8: (2, 4), 24: (2, 3, 4), 72: fine}
    choices, count = values["choices"], min(values["blocks"], most_blocks)
    blocks = stage(
        count,
        least_blocks=count,
        strides=2,
        filters=(values["filters"],),
        kernel_size=(3, 5),
        expansion=expansions[choices],
        activation=("relu", "hard_silu") if choices > 2 else ("relu",),
        splits=(0, 1) if choices > 8 else (0,),
    )
    size = values["image size"]
    return Space("scaling", (size, size, 3), 10, Stem(16, 3, 1), tuple(blocks), Head(64))


def curve(settings: ScalingSettings, name: str) -> dict[str, list[float]]:
    """Median seconds of a step for each value of one argument, in turn."""
    steps, macs, choices = {}, [], []
    for value in CURVES[name][: settings.values]:
        values = DEFAULTS | {name: value}
        space = space_of(values, settings.most_blocks)
        search = fpnas.ArchitectureSearch(
            space, samples=values["samples"], deduplicate=False, warmup_steps=0
        )
        # Without updates all steps have the same distribution.
        search.compile(keras.optimizers.SGD(0.0), keras.optimizers.SGD(0.0))
        data = tuple(harness.noise(space, values["batch size"], seed) for seed in (0, 1))
        step = tf.function(search.train_step)
        steps[value] = functools.partial(_run, step, data)
        probabilities = search.distribution.entry_probabilities()
        macs.append(float(search.space_cost.expected(probabilities)))
        choices.append(len(space.blocks[-1].entries))
    seconds = harness.timed_in_turn(steps, settings.repeats, settings.untimed)
    return {
        "values": list(steps),
        "macs": macs,
        "choices": choices,
        "seconds": [statistics.median(each) for each in seconds.values()],
    }


def _run(step, data):
    step(data)["train_loss"].numpy()


def plot(rows: dict[str, harness.Row], picture: str) -> None:
    """Draws one plot for each curve. The axes begin at 0."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(11, 6), layout="constrained")
    for axis, (name, row) in zip(axes.flat, rows.items()):
        x, label = row["values"], name
        if name == "filters":
            x, label = [each / 1e6 for each in row["macs"]], "mean MACs, millions"
        if name == "choices":
            x, label = row["choices"], "choices of a block"
        if name == "image size":
            x, label = [each**2 for each in x], "pixels"
        axis.plot(x, [1000 * each for each in row["seconds"]], "o-")
        axis.set(xlabel=label, ylabel="ms a step", xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
    with replacing(pathlib.Path(picture)) as temporary:
        figure.savefig(temporary, dpi=90, format="png")


def report(settings: ScalingSettings, rows: dict[str, harness.Row]) -> None:
    """Prints the curves, and draws them."""
    for name, row in rows.items():
        print(f"\n| {name} | mean MACs, M | ms a step |\n|---|---|---|")
        for value, macs, seconds in zip(row["values"], row["macs"], row["seconds"]):
            print(f"| {value} | {macs / 1e6:.1f} | {1000 * seconds:.0f} |")
    plot(rows, settings.picture)


def run(settings: ScalingSettings) -> None:
    """Runs the jobs that have no row yet, and reports."""
    jobs = {name: functools.partial(curve, settings, name) for name in CURVES}
    harness.run_jobs(__file__, settings, jobs, functools.partial(report, settings))


COMMAND = harness.make_command(__file__, __doc__, ScalingSettings, run)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
