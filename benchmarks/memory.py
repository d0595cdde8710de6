"""Peak memory of a search step, against training the largest architecture alone and all at once.

python benchmarks/memory.py

One fresh process each: a step with K = 1, 4, 16 and 64 samples; a step of Keras' `fit` on the
largest architecture of the space; DMaskingNAS (all choices as masks over the widest); and all
combinations of a block's choices side by side, as in DARTS, where it fits. `before` is what the
process holds when networks and data are made and nothing has run; 2 images of 8x8 show what the
graph of a search takes by itself.
"""

import functools
import resource

import harness
import keras
import numpy as np
import tensorflow as tf
from dmasking import DMaskingNAS

import fpnas_keras as fpnas
from fpnas_keras.architecture import Part
from fpnas_keras.networks.supernet import Supernet

STEPS = 3
SAMPLES = (1, 4, 16, 64)


def peak_mb() -> int:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def search_steps(
    name: str, make=fpnas.ArchitectureSearch, size: tuple[int, int] | None = None, **settings
) -> dict[str, int]:
    """Steps of a search, weights and logits, with images and batches of `size`."""
    image_size, batch_size = size or harness.SIZES[name]
    space = fpnas.spaces.get(name, (image_size, image_size, 3), 10)
    data = tuple(harness.noise(space, batch_size, seed) for seed in (0, 1))
    search = make(space, warmup_steps=0, **settings)
    search.compile(keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True), "adam")
    before = peak_mb()
    step = tf.function(search.train_step)
    for _ in range(STEPS):
        step(data)["train_loss"].numpy()
    return {"before": before, "peak": peak_mb()}


def sampled(name: str, samples: int) -> dict[str, int]:
    """A search step with K samples, none counted twice."""
    # One sample needs the gradient of the papers: with the control variate it is 0.
    settings = {"deduplicate": False, "control_variate": samples > 1}
    return search_steps(name, samples=samples, **settings)


def largest_alone(name: str) -> dict[str, int]:
    """A step of Keras' `fit` on the architecture of the most MACs."""
    space = harness.get_space(name)
    choices = [
        max(block.entries, key=lambda own, b=block: _most_macs(space, b, own))
        for block in space.blocks
    ]
    architecture = space.architecture(np.array(choices))
    batch = harness.noise(space, harness.SIZES[name][1], 0)
    step = harness.keras_step(architecture.build(), batch)
    before = peak_mb()
    for _ in range(STEPS):
        step()
    return {"before": before, "peak": peak_mb(), "macs": architecture.macs()}


def _most_macs(space, block, own):
    cost = fpnas.MacsCost()
    return sum(cost(Part(each, (16, 16), 64)) for each in block.blocks(own, 64))


def side_by_side(name: str) -> dict[str, int]:
    """A step of the weights through all combinations of each block's choices, widest filters."""
    space = harness.get_space(name)
    images, labels = harness.noise(space, harness.SIZES[name][1], 0)
    supernet = Supernet(space)
    weights = [variable.value for variable in supernet.trainable_variables]
    before = peak_mb()

    def network(x):
        x, widest = supernet.features(x), tf.constant(0)
        for block in supernet.blocks:
            own, filters = block.block.entries, len(block.block.filters) - 1
            own = own[own[:, 1] == filters]
            outputs = [block(x, choices=tf.constant(each), filters_in=widest) for each in own]
            x = tf.add_n(outputs) / len(outputs)
            if not block.block.keeps_filters:
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


JOBS = {}
for _name in harness.SIZES:
    JOBS[f"{_name}, largest alone"] = functools.partial(largest_alone, _name)
    for _samples in SAMPLES:
        JOBS[f"{_name}, K = {_samples}"] = functools.partial(sampled, _name, _samples)
    JOBS[f"{_name}, K = 4, 2 images of 8x8"] = functools.partial(
        search_steps, _name, samples=4, size=(8, 2)
    )
    JOBS[f"{_name}, DMaskingNAS"] = functools.partial(
        search_steps, _name, make=DMaskingNAS, total_steps=100
    )
# In `fbnetv2_f` a block has hundreds of combinations.
JOBS["mobile_mini, side by side"] = functools.partial(side_by_side, "mobile_mini")


def report(rows: dict[str, dict]) -> None:
    """Prints the table."""
    print("\n| | before, MB | peak, MB | peak / largest alone |\n|---|---|---|---|")
    for job, row in rows.items():
        alone = rows[f"{job.split(',')[0]}, largest alone"]["peak"]
        print(f"| {job} | {row['before']:,} | {row['peak']:,} | {row['peak'] / alone:.2f} |")


if __name__ == "__main__":
    harness.run_jobs(__file__, JOBS, report)
