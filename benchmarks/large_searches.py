"""What large searches cost: a step of `fpnas` at 224 pixels, recomputation, ten times the choices.

python benchmarks/large_searches.py

Every job is a process of its own; what is compared with each other runs in turn in one of them.
Finished jobs are appended to --output; a run that was cut goes on from there.
"""

import functools
import json
import resource
import statistics
import time

import harness
import keras
import numpy as np
import tensorflow as tf

import fpnas_keras as fpnas
from fpnas_keras.architecture import Head, Stem
from fpnas_keras.spaces import Space, stage

BATCH, MEAN_COST, SAMPLES, ARCHITECTURES = 16, 1.0e9, 8, 6


def tilted(space: Space, **settings) -> fpnas.ArchitectureSearch:
    """A search of the space whose logits are moved until E[cost] is `MEAN_COST`."""
    search = fpnas.ArchitectureSearch(space, samples=SAMPLES, warmup_steps=0, **settings)
    search.compile("sgd", "adam")
    distribution = search.distribution
    while True:
        p = distribution.entry_probabilities()
        cost, slope = search.cost_table.expected_and_slope(p)
        if cost >= MEAN_COST:
            return search
        distribution.logits.assign_add(5.0 * distribution.entry_gradient(slope / MEAN_COST))


def search_step(recompute: bool) -> dict[str, float]:
    """Three steps of a search of `fpnas`, weights and logits; the first one traces."""
    keras.utils.set_random_seed(0)
    space = fpnas.spaces.get("fpnas", (224, 224, 3), 1000)
    search = tilted(space, recompute=recompute)
    expected = float(search.cost_table.expected(search.distribution.entry_probabilities()))
    data = tuple(harness.noise(space, BATCH, seed) for seed in (0, 1))
    step, seconds = tf.function(search.train_step), []
    for _ in range(3):
        start = time.perf_counter()
        logs = step(data)
        seconds.append(time.perf_counter() - start)
    return {
        "expected_macs": expected,
        "samples": SAMPLES,
        "first_step_seconds": seconds[0],
        "step_seconds": statistics.mean(seconds[1:]),
        "train_loss": float(logs["train_loss"]),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def sample_against_keras() -> dict[str, list[float]]:
    """The weight half of a sample and Keras' training step of the same networks, in turn."""
    space = fpnas.spaces.get("fpnas", (224, 224, 3), 1000)
    search = tilted(space)
    batch = harness.noise(space, BATCH, 0)
    sample = harness.sample_steps(search, batch, copies=1)
    result = {"macs": [], "sample_seconds": [], "keras_seconds": []}
    for choices in search.distribution.sample(ARCHITECTURES, seed=0, step=0):
        architecture = space.architecture(choices.numpy())
        steps = {
            "sample_seconds": functools.partial(sample, choices),
            "keras_seconds": harness.keras_step(architecture.build(), batch),
        }
        result["macs"].append(architecture.macs())
        for name, seconds in harness.in_turn(steps, repeats=3).items():
            result[name].append(seconds)
        keras.backend.clear_session()
    return result


def recomputed_in_turn() -> dict[str, float]:
    """The weight half of the same samples, activations kept and recomputed, in turn."""
    space = fpnas.spaces.get("fbnetv2_f", (224, 224, 3), 1000)
    batch, samples = harness.noise(space, BATCH, 0), {}
    for recompute in (False, True):
        search = fpnas.ArchitectureSearch(space, recompute=recompute)
        samples[recompute] = harness.sample_steps(search, batch, copies=1)
    ratios = []
    for choices in search.distribution.sample(ARCHITECTURES, seed=0, step=0):
        runs = {name: functools.partial(run, choices) for name, run in samples.items()}
        seconds = harness.in_turn(runs, repeats=3)
        ratios.append(seconds[True] / seconds[False])
    return {"ratios": ratios, "median": statistics.median(ratios)}


def space_of(expansions: tuple[float, ...], activations: tuple[str, ...]) -> Space:
    """8 blocks whose widths are multiples of 16 for expansions in steps of 0.2.

    (oneDNN's kernels are slower for other widths, which is not what is measured here.)
    """
    blocks = [
        block
        for filters in (80, 160)
        for block in stage(
            4,
            least_blocks=4,
            strides=2,
            filters=(filters,),
            kernel_size=(3, 5),
            expansion=expansions,
            activation=activations,
        )
    ]
    return Space("choices", (16, 16, 3), 10, Stem(80, 3, 1), tuple(blocks), Head(256))


def ten_times_the_choices() -> dict[str, float]:
    """Steps of two searches in turn: 4 and 40 choices a block, the same mean MACs."""
    wide = (2, 2.2, 2.4, 2.6, 2.8, 3.2, 3.4, 3.6, 3.8, 4)
    spaces = {
        "narrow": space_of((2, 4), ("relu",)),
        "wide": space_of(wide, ("relu", "relu6")),
    }
    steps, macs = {}, {}
    for name, space in spaces.items():
        search = fpnas.ArchitectureSearch(space, samples=8, warmup_steps=0)
        # No updates of the logits: the mean MACs are to stay as they are.
        search.compile("sgd", keras.optimizers.SGD(0.0))
        p = search.distribution.entry_probabilities()
        macs[name] = float(search.cost_table.expected(p))
        data = tuple(harness.noise(space, 32, seed) for seed in (0, 1))
        steps[name] = functools.partial(tf.function(search.train_step), data)
    # Until most shapes have been met.
    rows = harness.timed_in_turn(steps, repeats=60, untimed=20)
    median = {name: statistics.median(values) for name, values in rows.items()}
    ratios = [b / a for a, b in zip(rows["narrow"], rows["wide"])]
    return {
        "choices": [len(space.blocks[1].entries) for space in spaces.values()],
        "macs": list(macs.values()),
        "seconds": list(median.values()),
        "ratio": median["wide"] / median["narrow"],
        "ratio_quartiles": np.percentile(ratios, [25, 75]).tolist(),
    }


JOBS = {
    "search step": lambda: search_step(recompute=False),
    "search step, recomputed": lambda: search_step(recompute=True),
    "recomputed in turn": recomputed_in_turn,
    "sample against Keras": sample_against_keras,
    "ten times the choices": ten_times_the_choices,
}


def report(rows: dict[str, dict]) -> None:
    """Prints the rows, and the ratios of one of them."""
    print(json.dumps(rows, indent=1))
    own = rows["sample against Keras"]
    ratios = np.divide(own["sample_seconds"], own["keras_seconds"])
    print(f"\nsample / Keras step: {np.round(ratios, 2)}, median {np.median(ratios):.2f}")


if __name__ == "__main__":
    harness.run_jobs(__file__, JOBS, report)
