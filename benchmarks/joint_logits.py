"""What joint logits cost: time and memory of a step without the networks.

python benchmarks/joint_logits.py

20 blocks of 720 and of 5,000 choices each, factorized and joint, each in a new process. A step
draws 16 architectures and computes the expected cost, the gradient and the update of Adam. The rows
are written to --output at the end.
"""

import dataclasses
import functools
import json
import pathlib
import resource
import sys
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import harness
import keras
import numpy as np
import tensorflow as tf

import fpnas_keras as fpnas
from fpnas_keras.architecture import ACTIVATIONS, Head, Stem
from fpnas_keras.commands import run_command
from fpnas_keras.settings import setting
from fpnas_keras.spaces import SearchBlock, Space

CHOICES = {
    720: {"expansion": range(1, 7), "kernel_size": (3, 5), "activation": ACTIVATIONS[:3]},
    5000: {
        "expansion": range(1, 26),
        "kernel_size": (3, 5, 7, 9, 11),
        "activation": ACTIVATIONS[:2],
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class JointLogitsSettings(harness.JobSettings):
    """Settings of this benchmark."""

    SMOKE: ClassVar[Mapping[str, Any]] = {"blocks": 2, "steps": 1, "target": 50e6}

    output: str = harness.output_setting("joint_logits.json")
    blocks: int = setting("Blocks of the space.", 20, least=1)
    steps: int = setting("Timed steps.", 200, least=1)
    target: float = setting("Target of the search, in MACs.", 300e6, least=0)


def make_space(choices: int, blocks: int) -> Space:
    """A space of blocks with that many choices each, in stages of 4 blocks."""
    search_blocks = [
        SearchBlock(
            filters=range(8, 88, 8),
            splits=(0, 1),
            strides=2 if index % 4 == 0 else 1,
            **CHOICES[choices],
        )
        for index in range(blocks)
    ]
    assert all(len(each.entries) == choices for each in search_blocks)
    stem, head = Stem(16, 3, 2, "relu"), Head(256, "relu")
    return Space("wide", (224, 224, 3), 1000, stem, tuple(search_blocks), head)


def measure(settings: JointLogitsSettings, choices: int, distribution: str) -> harness.Row:
    """Median milliseconds of a step, and peak memory of the process."""
    search = fpnas.ArchitectureSearch(
        make_space(choices, settings.blocks),
        samples=16,
        cost=fpnas.MacsCost(settings.target),
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
    for _ in range(settings.steps):
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


def run(settings: JointLogitsSettings) -> None:
    """Measures each row in a new process, and writes all."""
    jobs = {
        f"{choices},{distribution}": functools.partial(measure, settings, choices, distribution)
        for choices in CHOICES
        for distribution in ("factorized", "joint")
    }
    if settings.job is not None:
        print(json.dumps(harness.run_job(settings, jobs)))
        return
    rows = []
    for job in jobs:
        rows.append(harness.measure_job(__file__, dataclasses.replace(settings, job=job), jobs))
        print(json.dumps(rows[-1]), flush=True)
    pathlib.Path(settings.output).write_text(json.dumps(rows, indent=1) + "\n")


COMMAND = harness.make_command(__file__, __doc__, JointLogitsSettings, run)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
