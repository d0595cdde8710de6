"""Architectures ranked by what they reach with the shared weights of a search."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from fpnas_keras.architecture import Architecture
from fpnas_keras.data import Images, split, test_batches
from fpnas_keras.errors import UserError
from fpnas_keras.method import ArchitectureSearch
from fpnas_keras.networks import recalibrate

# Maximum number of pixels and of images in a batch: 250 images of 28 pixels, or 39 of 224.
_PIXELS, _IMAGES = 2_000_000, 250


class Ranked(NamedTuple):
    """An architecture and what it reaches with the shared weights.

    Attributes:
        name: What it is called.
        architecture: The architecture.
        accuracy: Share of the images whose class it gives.
        loss: Mean cross-entropy.
        cost: Cost, in the unit of the search's cost.
        log_prob: log p under the search's distribution, in nats.
        images: Number of images that it was evaluated on.
        pareto: Whether no other is as accurate and cheaper, or more accurate and as cheap.
    """

    name: str
    architecture: Architecture
    accuracy: float
    loss: float
    cost: float
    log_prob: float
    images: int
    pareto: bool = False


def draw_architectures(
    search: ArchitectureSearch, count: int, seed: int
) -> dict[str, Architecture]:
    """Architectures drawn from the distribution of a search, each once: at most `count`."""
    architectures = search.distribution.draw_architectures(count, seed)
    return {f"sample {index}": each for index, each in enumerate(architectures)}


def rank_by_shared_weights(
    search: ArchitectureSearch,
    architectures: Mapping[str, Architecture],
    images: Images,
    seed: int = 0,
    evaluation_images: int = 5000,
    recalibration_images: int = 2000,
) -> list[Ranked]:
    """Evaluates architectures with the shared weights of a search.

    Each architecture is built and takes its slice of the shared weights. The statistics of its
    batch norms are estimated on images of the weights part. It is evaluated on images of the
    architecture part; the test set is not read.

    Args:
        search: The search.
        architectures: Architectures of its space, by name. Equal ones are evaluated once.
        images: The training images of the search.
        seed: Seed of the search, which split them.
        evaluation_images: Maximum number of images to evaluate on.
        recalibration_images: Maximum number of images for the statistics.

    Returns:
        The most accurate first; of equally accurate ones the cheapest first.

    Raises:
        UserError: When an architecture is not in the space.
    """
    entries = {name: _entries(search.space, name, each) for name, each in architectures.items()}
    # Of equal architectures the first name stays.
    names = {each.tobytes(): name for name, each in reversed(entries.items())}.values()
    weights_part, architecture_part = split(images.y, 0.5, seed)
    rng = np.random.default_rng(seed)
    recalibration = _batches(images, rng.permutation(weights_part)[:recalibration_images])
    evaluation = _batches(images, rng.permutation(architecture_part)[:evaluation_images])
    ranked = []
    for name in tqdm(names, desc="ranking", unit=" networks"):
        model = architectures[name].build()
        search.supernet.give_weights(model)
        recalibrate(model, (tf.cast(x, tf.float32) for x, _ in recalibration))
        loss, accuracy = _evaluate(model, evaluation)
        chosen = tf.constant(entries[name][None])
        ranked.append(
            Ranked(
                name,
                architectures[name],
                accuracy,
                loss,
                cost=float(search.space_cost(chosen)[0]),
                log_prob=float(search.distribution.log_prob(chosen)[0]),
                images=sum(len(y) for _, y in evaluation),
            )
        )
    ranked.sort(key=lambda each: (-each.accuracy, each.cost))
    return [each._replace(pareto=_is_pareto(each, ranked)) for each in ranked]


def _entries(space, name, architecture):
    try:
        return space.entries.from_choices(space.choices(architecture))
    except ValueError as error:
        raise UserError(f"{name} is not of the search: {error}") from None


def _batches(images, indices):
    part = images.part(np.sort(indices))
    # Decoded once for all networks. Bytes take a quarter of the memory of floats.
    height, width, _ = images.image_shape
    batch_size = min(max(_PIXELS // (height * width), 1), _IMAGES)
    return [(tf.cast(x, tf.uint8), y) for x, y in test_batches(part, batch_size)]


def _evaluate(model, batches):
    """Mean loss and accuracy. Eager: tracing a graph for each network would take longer."""
    losses, right = [], []
    for x, y in batches:
        logits = model(tf.cast(x, tf.float32), training=False)
        losses.append(tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits))
        right.append(tf.argmax(logits, axis=-1, output_type=y.dtype) == y)
    mean_loss = tf.reduce_mean(tf.concat(losses, axis=0))
    accuracy = tf.reduce_mean(tf.cast(tf.concat(right, axis=0), tf.float64))
    return float(mean_loss), float(accuracy)


def _is_pareto(one, ranked):
    return not any(
        (other.accuracy > one.accuracy and other.cost <= one.cost)
        or (other.accuracy >= one.accuracy and other.cost < one.cost)
        for other in ranked
    )
