"""What large searches cost: a step of `fpnas` at 224 pixels, recomputation, ten times the choices.

python benchmarks/large_searches.py

Each job has a process of its own. Times that are compared are measured in turn in one of them.
Finished rows are appended to --output. A run that was interrupted continues from there.
"""

import dataclasses
import functools
import json
import resource
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import harness
import keras
import numpy as np
import tensorflow as tf

import fpnas_keras as fpnas
from fpnas_keras.architecture import Head, Stem
from fpnas_keras.commands import run_command
from fpnas_keras.settings import setting
from fpnas_keras.spaces import Space, stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class LargeSearchesSettings(harness.JobSettings):
    """Settings of this benchmark."""

    SMOKE: ClassVar[Mapping[str, Any]] = {
        "repeats": 1,
        "batch_size": 2,
        "mean_cost": 6e4,
        "samples": 2,
        "steps": 1,
        "architectures": 1,
        "blocks": 1,
        "compared_steps": 1,
        "untimed_steps": 0,
    }

    output: str = harness.output_setting("large_searches.jsonl")
    repeats: int = setting("Timed calls of each function. The median counts.", 3, least=1)
    batch_size: int = setting("Images in a batch of the large searches.", 16, least=1)
    mean_cost: float = setting("Expected MACs of the search of `fpnas`.", 1.0e9, least=1)
    samples: int = setting("Samples in a step.", 8, least=2)
    steps: int = setting("Timed steps of the search of `fpnas`.", 2, least=1)
    architectures: int = setting("Random architectures of a space.", 6, least=1)
    blocks: int = setting("Blocks of a stage with few and many choices.", 4, least=1)
    compared_steps: int = setting("Timed steps with few and with many choices.", 60, least=1)
    untimed_steps: int = setting("Steps before those, in which most shapes are met.", 20, least=0)


def expensive_search(settings: LargeSearchesSettings, **arguments: Any) -> fpnas.ArchitectureSearch:
    """A search of `fpnas`. Its logits are moved until E[cost] is `mean_cost`."""
    space = settings.get_space("fpnas", 224, 1000)
    search = fpnas.ArchitectureSearch(space, samples=settings.samples, warmup_steps=0, **arguments)
    search.compile("sgd", "adam")
    distribution = search.distribution
    while True:
        p = distribution.entry_probabilities()
        cost, slope = search.space_cost.expected_and_slope(p)
        if cost >= settings.mean_cost:
            return search
        gradient = distribution.entry_gradient(slope / settings.mean_cost)
        distribution.logits.assign_add(5.0 * gradient)


def search_step(settings: LargeSearchesSettings, recompute: bool) -> dict[str, float]:
    """Steps of a search of `fpnas`, which update weights and logits. The first step traces."""
    keras.utils.set_random_seed(0)
    search = expensive_search(settings, recompute=recompute)
    expected = float(search.space_cost.expected(search.distribution.entry_probabilities()))
    data = tuple(harness.noise(search.space, settings.batch_size, seed) for seed in (0, 1))
    step, seconds = tf.function(search.train_step), []
    for _ in range(1 + settings.steps):
        start = time.perf_counter()
        logs = step(data)
        seconds.append(time.perf_counter() - start)
    return {
        "expected_macs": expected,
        "samples": settings.samples,
        "first_step_seconds": seconds[0],
        "step_seconds": statistics.mean(seconds[1:]),
        "train_loss": float(logs["train_loss"]),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def sample_against_keras(settings: LargeSearchesSettings) -> dict[str, list[float]]:
    """The weight half of a sample, and Keras' training step of the same network, in turn."""
    search = expensive_search(settings)
    batch = harness.noise(search.space, settings.batch_size, 0)
    sample = harness.sample_steps(search, batch, copies=1)
    result = {"macs": [], "sample_seconds": [], "keras_seconds": []}
    for entries, architecture in harness.draw_networks(search, settings.architectures):
        steps = {
            "sample_seconds": functools.partial(sample, entries),
            "keras_seconds": harness.keras_step(architecture.build(), batch),
        }
        result["macs"].append(architecture.macs())
        for name, seconds in harness.in_turn(steps, settings.repeats).items():
            result[name].append(seconds)
        keras.backend.clear_session()
    return result


def recomputed_in_turn(settings: LargeSearchesSettings) -> harness.Row:
    """The weight half of the same samples, with activations kept and recomputed, in turn."""
    space = settings.get_space("fbnetv2_f", 224, 1000)
    batch, samples = harness.noise(space, settings.batch_size, 0), {}
    for recompute in (False, True):
        search = fpnas.ArchitectureSearch(space, recompute=recompute)
        samples[recompute] = harness.sample_steps(search, batch, copies=1)
    ratios = []
    for entries, _ in harness.draw_networks(search, settings.architectures):
        runs = {name: functools.partial(run, entries) for name, run in samples.items()}
        seconds = harness.in_turn(runs, settings.repeats)
        ratios.append(seconds[True] / seconds[False])
    return {"ratios": ratios, "median": statistics.median(ratios)}


def space_of(
    expansions: tuple[float, ...], activations: tuple[str, ...], blocks_of_stage: int
) -> Space:
    """Two stages of blocks whose widths are multiples of 16 for expansions in steps of 0.2.

    The kernels of oneDNN are slower for other widths, which would disturb the comparison.

    Args:
        expansions: Choices of the expansion.
        activations: Choices of the activation.
        blocks_of_stage: Blocks of a stage.
    """
    blocks = [
        block
        for filters in (80, 160)
        for block in stage(
            blocks_of_stage,
            least_blocks=blocks_of_stage,
            strides=2,
            filters=(filters,),
            kernel_size=(3, 5),
            expansion=expansions,
            activation=activations,
        )
    ]
    return Space("choices", (16, 16, 3), 10, Stem(80, 3, 1), tuple(blocks), Head(256))


def ten_times_the_choices(settings: LargeSearchesSettings) -> harness.Row:
    """Steps of two searches in turn, with 4 and 40 choices per block and the same mean MACs."""
    wide = (2, 2.2, 2.4, 2.6, 2.8, 3.2, 3.4, 3.6, 3.8, 4)
    spaces = {
        "narrow": space_of((2, 4), ("relu",), settings.blocks),
        "wide": space_of(wide, ("relu", "relu6"), settings.blocks),
    }
    steps, macs = {}, {}
    for name, space in spaces.items():
        search = fpnas.ArchitectureSearch(space, samples=settings.samples, warmup_steps=0)
        # Without updates of the logits the mean MACs do not change.
        search.compile("sgd", keras.optimizers.SGD(0.0))
        p = search.distribution.entry_probabilities()
        macs[name] = float(search.space_cost.expected(p))
        data = tuple(harness.noise(space, 2 * settings.batch_size, seed) for seed in (0, 1))
        steps[name] = functools.partial(tf.function(search.train_step), data)
    rows = harness.timed_in_turn(steps, settings.compared_steps, settings.untimed_steps)
    median = {name: statistics.median(values) for name, values in rows.items()}
    ratios = [b / a for a, b in zip(rows["narrow"], rows["wide"])]
    return {
        "choices": [len(space.blocks[-1].entries) for space in spaces.values()],
        "macs": list(macs.values()),
        "seconds": list(median.values()),
        "ratio": median["wide"] / median["narrow"],
        "ratio_quartiles": np.percentile(ratios, [25, 75]).tolist(),
    }


def report(rows: dict[str, harness.Row]) -> None:
    """Prints the rows, and the ratios of one of them."""
    print(json.dumps(rows, indent=1))
    own = rows["sample against Keras"]
    ratios = np.divide(own["sample_seconds"], own["keras_seconds"])
    print(f"\nsample / Keras step: {np.round(ratios, 2)}, median {np.median(ratios):.2f}")


def run(settings: LargeSearchesSettings) -> None:
    """Runs the jobs that have no row yet, and reports."""
    jobs = {
        "search step": functools.partial(search_step, settings, recompute=False),
        "search step, recomputed": functools.partial(search_step, settings, recompute=True),
        "recomputed in turn": functools.partial(recomputed_in_turn, settings),
        "sample against Keras": functools.partial(sample_against_keras, settings),
        "ten times the choices": functools.partial(ten_times_the_choices, settings),
    }
    harness.run_jobs(__file__, settings, jobs, report)


COMMAND = harness.make_command(__file__, __doc__, LargeSearchesSettings, run)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
