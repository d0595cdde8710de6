"""How the time of a search step grows with K, batch, resolution, MACs, choices and blocks.

python benchmarks/scaling.py

Steps of searches of a simple space, weights and logits, where one thing changes at a time; for each
curve all settings run in turn in one process. Writes a picture with one plot for each.
"""

import functools
import pathlib
import statistics

import harness
import keras
import matplotlib
import tensorflow as tf
from absl import flags

import fpnas_keras as fpnas
from fpnas_keras.architecture import Head, Stem
from fpnas_keras.files import replacing
from fpnas_keras.spaces import Space, stage

FLAGS = flags.FLAGS
flags.DEFINE_string("picture", "benchmarks/scaling.png", "File of the picture.")

REPEATS = 15
# From job to the values that its argument takes.
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


def space_of(setting: dict[str, int]) -> Space:
    """Blocks of one width at half the image's size; the mean expansion is always 3."""
    fine = tuple(2 + step / 4 for step in range(9))
    expansions = {2: (3,), 8: (2, 4), 24: (2, 3, 4), 72: fine}
    choices = setting["choices"]
    blocks = stage(
        setting["blocks"],
        least_blocks=setting["blocks"],
        strides=2,
        filters=(setting["filters"],),
        kernel_size=(3, 5),
        expansion=expansions[choices],
        activation=("relu", "hard_silu") if choices > 2 else ("relu",),
        splits=(0, 1) if choices > 8 else (0,),
    )
    size = setting["image size"]
    return Space("scaling", (size, size, 3), 10, Stem(16, 3, 1), tuple(blocks), Head(64))


def curve(name: str) -> dict[str, list[float]]:
    """Median seconds of a step for each value of one argument, in turn."""
    steps, macs, choices = {}, [], []
    for value in CURVES[name]:
        setting = DEFAULTS | {name: value}
        space = space_of(setting)
        search = fpnas.ArchitectureSearch(
            space, samples=setting["samples"], deduplicate=False, warmup_steps=0
        )
        # No updates: the same distribution in all steps.
        search.compile(keras.optimizers.SGD(0.0), keras.optimizers.SGD(0.0))
        data = tuple(harness.noise(space, setting["batch size"], seed) for seed in (0, 1))
        step = tf.function(search.train_step)
        steps[value] = functools.partial(_run, step, data)
        probabilities = search.distribution.entry_probabilities()
        macs.append(float(search.cost_table.expected(probabilities)))
        choices.append(len(space.blocks[-1].entries))
    seconds = harness.timed_in_turn(steps, REPEATS, untimed=6)
    return {
        "values": list(CURVES[name]),
        "macs": macs,
        "choices": choices,
        "seconds": [statistics.median(each) for each in seconds.values()],
    }


def _run(step, data):
    step(data)["train_loss"].numpy()


def plot(rows: dict[str, dict]) -> None:
    """Draws one plot for each curve, from 0."""
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
    with replacing(pathlib.Path(FLAGS.picture)) as temporary:
        figure.savefig(temporary, dpi=90, format="png")


def report(rows: dict[str, dict]) -> None:
    """Prints the curves, and draws them."""
    for name, row in rows.items():
        print(f"\n| {name} | mean MACs, M | ms a step |\n|---|---|---|")
        for value, macs, seconds in zip(row["values"], row["macs"], row["seconds"]):
            print(f"| {value} | {macs / 1e6:.1f} | {1000 * seconds:.0f} |")
    plot(rows)


if __name__ == "__main__":
    jobs = {name: functools.partial(curve, name) for name in CURVES}
    harness.run_jobs(__file__, jobs, report)
