"""Peak memory of a search step, compared with training the largest network and all choices at once.

python benchmarks/memory.py

Each row is measured in a new process: a search step with K = 1, 4, 16 and 64 samples; a step of
Keras' `fit` on the largest architecture of the space; DMaskingNAS, which masks the widest tensors;
and all combinations of a block's choices side by side, as in DARTS, where that fits. `before` is
the memory of the process when networks and data exist and nothing has run. The row with 2 images
of 8x8 pixels shows the memory of the graph of a search.
"""

import dataclasses
import functools
import resource
import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import harness
import keras
import numpy as np
import tensorflow as tf
from dmasking import DMaskingNAS

import fpnas_keras as fpnas
from fpnas_keras.architecture import Part, count_part
from fpnas_keras.commands import run_command
from fpnas_keras.networks import Supernet
from fpnas_keras.settings import setting
from fpnas_keras.spaces import VARIABLES, Space

SAMPLES = (1, 4, 16, 64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemorySettings(harness.SpeedSettings):
    """Settings of this benchmark."""

    SMOKE: ClassVar[Mapping[str, Any]] = {
        **harness.SpeedSettings.SMOKE,
        "most_samples": 1,
        "steps": 1,
    }

    output: str = harness.output_setting("memory.jsonl")
    most_samples: int = setting("Largest K.", max(SAMPLES), least=1)
    steps: int = setting("Steps in a process.", 3, least=1)


def peak_mb() -> int:
    """Peak resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def search_steps(
    settings: MemorySettings,
    space: Space,
    batch_size: int,
    make: Callable[..., fpnas.ArchitectureSearch] = fpnas.ArchitectureSearch,
    **arguments: Any,
) -> dict[str, int]:
    """Runs steps of a search, which update weights and logits.

    Args:
        settings: Settings of the benchmark.
        space: The space.
        batch_size: Images in a batch.
        make: Makes the search from the space and `arguments`.
        **arguments: Arguments of the search.
    """
    data = tuple(harness.noise(space, batch_size, seed) for seed in (0, 1))
    search = make(space, warmup_steps=0, **arguments)
    search.compile(keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True), "adam")
    before = peak_mb()
    step = tf.function(search.train_step)
    for _ in range(settings.steps):
        step(data)["train_loss"].numpy()
    return {"before": before, "peak": peak_mb()}


def sampled(settings: MemorySettings, name: str, samples: int) -> dict[str, int]:
    """Search steps with K samples. Equal samples are evaluated each."""
    # With the control variate, the gradient of a single sample is zero.
    arguments = {"deduplicate": False, "control_variate": samples > 1}
    space, batch_size = settings.measured_space(name)
    return search_steps(settings, space, batch_size, samples=samples, **arguments)


def graph_alone(settings: MemorySettings, name: str) -> dict[str, int]:
    """Search steps with K = 4 on images that need no memory."""
    return search_steps(settings, settings.get_space(name, 8), 2, samples=4)


def masked(settings: MemorySettings, name: str) -> dict[str, int]:
    """Steps of DMaskingNAS."""
    space, batch_size = settings.measured_space(name)
    return search_steps(settings, space, batch_size, make=DMaskingNAS, total_steps=100)


def largest_alone(settings: MemorySettings, name: str) -> dict[str, int]:
    """Steps of Keras' `fit` on the architecture of the most MACs."""
    space, batch_size = settings.measured_space(name)
    choices = [
        max(block.entries, key=lambda own, b=block: _count_macs(b, own)) for block in space.blocks
    ]
    architecture = space.architecture(np.array(choices))
    step = harness.keras_step(architecture.build(), harness.noise(space, batch_size, 0))
    before = peak_mb()
    for _ in range(settings.steps):
        step()
    return {"before": before, "peak": peak_mb(), "macs": architecture.macs()}


def _count_macs(block, own):
    """MACs of a block at a fixed size, to compare choices."""
    return sum(count_part(Part(each, (16, 16), 64)).macs for each in block.make_blocks(own, 64))


def side_by_side(settings: MemorySettings, name: str) -> dict[str, int]:
    """A step of the weights through all combinations of each block's choices, widest filters."""
    space, batch_size = settings.measured_space(name)
    images, labels = harness.noise(space, batch_size, 0)
    supernet = Supernet(space)
    weights = [variable.value for variable in supernet.trainable_variables]
    before = peak_mb()

    def network(x):
        x, widest = supernet.features(x), tf.constant(0)
        for block in supernet.blocks:
            own, filters = block.search_block.entries, len(block.search_block.filters) - 1
            own = own[own[:, VARIABLES.index("filters")] == filters]
            # One after the other: the combinations share kernels that must not run twice at once.
            outputs = tf.map_fn(
                lambda e, x=x, block=block, widest=widest: block(
                    x, choices=e, filters_in_index=widest
                ),
                tf.constant(own),
                fn_output_signature=tf.float32,
                parallel_iterations=1,
            )
            x = tf.reduce_mean(outputs, axis=0)
            if not block.search_block.keeps_filters:
                widest = tf.constant(filters)
        x = supernet.head_activation(supernet.head_bn(supernet.head(x)))
        return supernet.classes(tf.reduce_mean(x, axis=[1, 2]))

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            logits = network(images)
            loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        return tape.gradient(loss, weights, unconnected_gradients="zero")

    step()[0].numpy()
    return {"before": before, "peak": peak_mb()}


def make_jobs(settings: MemorySettings) -> dict[str, Callable[[], harness.Row]]:
    """The jobs by name."""
    jobs = {}
    for name in settings.spaces:

        def job(function, *arguments, name=name):
            return functools.partial(function, settings, name, *arguments)

        jobs[f"{name}, largest alone"] = job(largest_alone)
        for samples in SAMPLES:
            if samples <= settings.most_samples:
                jobs[f"{name}, K = {samples}"] = job(sampled, samples)
        jobs[f"{name}, K = 4, 2 images of 8x8"] = job(graph_alone)
        jobs[f"{name}, DMaskingNAS"] = job(masked)
        if name == "mobile_mini":  # In `fbnetv2_f` a block has hundreds of combinations.
            jobs[f"{name}, side by side"] = job(side_by_side)
    return jobs


def report(rows: dict[str, harness.Row]) -> None:
    """Prints the table."""
    print("\n| | before, MB | peak, MB | peak / largest alone |\n|---|---|---|---|")
    for job, row in rows.items():
        alone = rows[f"{job.split(',')[0]}, largest alone"]["peak"]
        print(f"| {job} | {row['before']:,} | {row['peak']:,} | {row['peak'] / alone:.2f} |")


def run(settings: MemorySettings) -> None:
    """Runs the jobs that have no row yet, and reports."""
    harness.run_jobs(__file__, settings, make_jobs(settings), report)


COMMAND = harness.make_command(__file__, __doc__, MemorySettings, run)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
