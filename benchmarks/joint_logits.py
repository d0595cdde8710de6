"""What joint logits cost: time and memory of a step without the networks.

python benchmarks/joint_logits.py

20 blocks of 720 and of 5,000 choices each, factorized and joint, a fresh process each: draw 16
architectures, expected cost, gradient, Adam.
"""

import json
import pathlib
import resource
import subprocess
import sys
import time

import numpy as np
from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_string("measure", None, "CHOICES,DISTRIBUTION: one row, in this process.")
flags.DEFINE_string("output", "benchmarks/joint_logits.json", "File of the rows.")

BLOCKS, SAMPLES, STEPS = 20, 16, 200
CHOICES = {
    720: {"expansion": range(1, 7), "kernel_size": (3, 5), "activation": 3},
    5000: {"expansion": range(1, 26), "kernel_size": (3, 5, 7, 9, 11), "activation": 2},
}


def space(choices: int):  # noqa: ANN201 (imported in the measuring process only)
    """20 blocks with that many choices each, in 5 stages."""
    from fpnas_keras.architecture import ACTIVATIONS, Head, Stem
    from fpnas_keras.spaces import SearchBlock, Space

    own = CHOICES[choices]
    blocks = [
        SearchBlock(
            filters=range(8, 88, 8),
            expansion=own["expansion"],
            kernel_size=own["kernel_size"],
            activation=ACTIVATIONS[: own["activation"]],
            splits=(0, 1),
            strides=2 if index % 4 == 0 else 1,
        )
        for index in range(BLOCKS)
    ]
    assert all(len(block.entries) == choices for block in blocks)
    stem, head = Stem(16, 3, 2, "relu"), Head(256, "relu")
    return Space("wide", (224, 224, 3), 1000, stem, tuple(blocks), head)


def measure(choices: int, distribution: str) -> dict[str, float]:
    """Median milliseconds of a step, and peak memory of the process."""
    import keras
    import tensorflow as tf

    import fpnas_keras as fpnas

    wide = space(choices)
    search = fpnas.ArchitectureSearch(
        wide,
        samples=SAMPLES,
        cost=fpnas.MacsCost(target=300e6),
        distribution=distribution,
        warmup_steps=0,
    )
    search.compile("sgd", keras.optimizers.Adam(0.01))

    @tf.function
    def step():
        samples = search.ask()
        search.tell(samples, tf.random.stateless_normal(tf.shape(samples.counts), (0, 1)))

    step()
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "choices": choices,
        "distribution": distribution,
        "logits": search.distribution.count_params(),
        "milliseconds": round(1e3 * float(np.median(seconds)), 2),
        "spread": [round(1e3 * float(np.quantile(seconds, q)), 2) for q in (0.1, 0.9)],
        "megabytes": round(peak / 1024, 1),
    }


def main(_: list[str]) -> None:
    """Measures each row in a fresh process."""
    if FLAGS.measure:
        choices, distribution = FLAGS.measure.split(",")
        print(json.dumps(measure(int(choices), distribution)))
        return
    rows = []
    for choices in CHOICES:
        for distribution in ("factorized", "joint"):
            command = [sys.executable, __file__, f"--measure={choices},{distribution}"]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(result.stdout.splitlines()[-1]))
            print(json.dumps(rows[-1]), flush=True)
    pathlib.Path(FLAGS.output).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
