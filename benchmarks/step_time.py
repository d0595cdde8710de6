"""How long a sampled architecture takes in the supernet, against the same network alone.

python benchmarks/step_time.py

* For 24 random architectures of each space: the weight half of a search step for one sample
  (forward, backward, accumulation) against a step of Keras' own `fit` on the network that Keras
  builds for that architecture; and forward pass against forward pass.
* Whole search steps, with data, against their samples alone: what is left is Python, input,
  sampling, cost and updates.
* Seconds from the command of the quickstart to its first search step.

What is compared runs in turn in one process. Finished rows are appended to --output; a run that was
cut goes on from there.
"""

import functools
import pathlib
import subprocess
import sys
import tempfile
import time

import harness
import keras
import numpy as np
import tensorflow as tf
from absl import flags

import fpnas_keras as fpnas
from fpnas_keras.cost import CostTable
from fpnas_keras.method.estimator import Samples

FLAGS = flags.FLAGS
flags.DEFINE_integer("architectures", 24, "Random architectures of a space.", lower_bound=1)

REPEATS = 7
# Samples in a timed call, so that what the call itself costs is shared as in a search step.
COPIES = 4
ROOT = pathlib.Path(__file__).parents[1]


def samples(name: str) -> dict[str, list[float]]:
    """Seconds a sample of random architectures of a space, in the supernet and alone."""
    space = harness.get_space(name)
    search = fpnas.ArchitectureSearch(space)
    batch = harness.noise(space, harness.SIZES[name][1], 0)
    train = harness.sample_steps(search, batch, COPIES)
    forward = tf.function(lambda choices: search.supernet(batch[0], choices))

    def repeated(run, *arguments):
        for _ in range(COPIES):
            np.asarray(run(*arguments))  # which waits for the end

    rows = {}
    for choices in search.distribution.sample(FLAGS.architectures, seed=0, step=0):
        architecture = space.architecture(choices.numpy())
        model = architecture.build()
        keras_train = harness.keras_step(model, batch)
        keras_forward = tf.function(functools.partial(model, batch[0], training=True))
        runs = {
            "supernet": functools.partial(train, choices),
            "keras": functools.partial(repeated, keras_train),
            "supernet_forward": functools.partial(repeated, forward, choices),
            "keras_forward": functools.partial(repeated, keras_forward),
        }
        rows.setdefault("macs", []).append(architecture.macs())
        for key, seconds in harness.in_turn(runs, REPEATS).items():
            rows.setdefault(key, []).append(seconds / COPIES)
        print(f"{len(rows['macs'])} of {FLAGS.architectures}", file=sys.stderr, end="\r")
        keras.backend.clear_session()
    return rows


def whole_steps(name: str) -> dict[str, list[float]]:
    """Seconds of steps of `fit` with 8 samples, and of the same samples alone."""
    keras.utils.set_random_seed(0)
    space = harness.get_space(name)
    size = harness.SIZES[name][1]
    x = np.random.default_rng(0).integers(0, 256, (2000, *space.input_shape), np.uint8)
    # Not updated, so that both run the same architectures.
    table = CostTable(space, fpnas.MacsCost())
    cost = fpnas.MacsCost((table.least() + table.largest()) / 2)
    search = fpnas.ArchitectureSearch(space, samples=8, cost=cost, warmup_steps=0)
    search.compile(keras.optimizers.SGD(0.0, momentum=0.9), keras.optimizers.Adam(0.0))
    batches = fpnas.data.search_batches(x, np.arange(len(x)) % 10, size, steps_per_epoch=1000)
    search.make_train_function()
    iterator = iter(batches)
    data = next(iterator)
    drawn = []

    @tf.function
    def samples_alone(choices, counts):
        gradients, results = search.weight_gradients(Samples(choices, counts), data[0])
        return [*gradients, results, search.evaluate_samples(Samples(choices, counts), data[1])]

    def alone():
        return samples_alone(*drawn[-1])[-1].numpy()

    def step():
        return search.train_function(iterator)["train_loss"].numpy()

    rows = {"step": [], "samples": []}
    for repeat in range(60):
        drawn.append(search.ask())  # what the step is going to draw
        seconds = harness.timed_in_turn({"step": step, "samples": alone}, repeats=1, untimed=0)
        if repeat >= 20:  # until most shapes have been met
            for key, (value,) in seconds.items():
                rows[key].append(value)
    return rows


def start() -> dict[str, list[float]]:
    """Seconds from the command of the quickstart to the end of its first step, three times."""
    seconds = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as directory:
            begin = time.perf_counter()
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "fpnas_keras.search"),
                    *("--flagfile=configs/quickstart.flags", f"--output_dir={directory}/run"),
                ],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            seen = b""
            while b"1/40" not in seen:
                chunk = process.stdout.read1()
                if not chunk:
                    raise RuntimeError(f"the search ended before its first step: {seen.decode()}")
                seen += chunk
            seconds.append(time.perf_counter() - begin)
            process.kill()
            process.wait()
    return {"seconds": seconds}


JOBS = {f"samples of {name}": functools.partial(samples, name) for name in harness.SIZES}
JOBS |= {f"steps of {name}": functools.partial(whole_steps, name) for name in harness.SIZES}
JOBS["start"] = start


def report(rows: dict[str, dict]) -> None:
    """Prints the ratios."""
    print("\n| | median | quartiles | range |\n|---|---|---|---|")

    def line(title, values):
        least, low, median, high, most = np.percentile(values, [0, 25, 50, 75, 100])
        spread = f"{low:.3f} to {high:.3f} | {least:.3f} to {most:.3f}"
        print(f"| {title} | {median:.3f} | {spread} |")

    for name in harness.SIZES:
        row = rows[f"samples of {name}"]
        line(f"sample / Keras step, `{name}`", np.divide(row["supernet"], row["keras"]))
        ratios = np.divide(row["supernet_forward"], row["keras_forward"])
        line(f"forward / Keras forward, `{name}`", ratios)
        row = rows[f"steps of {name}"]
        line(f"share outside the samples, `{name}`", 1 - np.divide(row["samples"], row["step"]))
    line("seconds to the first step of the quickstart", rows["start"]["seconds"])


if __name__ == "__main__":
    harness.run_jobs(__file__, JOBS, report)
