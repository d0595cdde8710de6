"""Architectures ranked by what they reach with the shared weights of a search."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from fpnas_keras.architecture import Architecture
from fpnas_keras.data import Images, choose_weights_share, split, test_batches
from fpnas_keras.errors import UserError
from fpnas_keras.method import ArchitectureSearch, Samples
from fpnas_keras.progress import track
from fpnas_keras.spaces import Space

# Maximum number of pixels and of images in a batch: 250 images of 28 pixels, or 39 of 224.
_PIXELS, _IMAGES = 2_000_000, 250
# Networks that are evaluated in one call. The progress bar moves after each.
_NETWORKS = 8
# Images that all finalists are evaluated on. After that the best quarter goes on to four times as
# many images, and so on.
_FIRST_IMAGES, _RATIO = 500, 4


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


class Evaluation:
    """Evaluates architectures with the shared weights of a search, in its graph.

    It uses images of the architecture part, which did not train the shared weights. Each is read
    once. Batch norms use the statistics of the batch, as in the search.

    Args:
        search: The search.
        images: The training images of the search.
        weights_share: Share of the images in the weights part, as in the search.
        count: Maximum number of images.
        batch_size: Images in a batch, about. Default: up to 250, as many as the memory allows.

    Attributes:
        search: The search.
        weights_share: Share of the images in the weights part.
        images: Number of images to evaluate on.
        class_names: Names of the classes.
        batches: Images and labels, and weights if the images have them.
    """

    def __init__(
        self,
        search: ArchitectureSearch,
        images: Images,
        weights_share: float | None = None,
        count: int = 5000,
        batch_size: int | None = None,
    ):
        self.search = search
        seed = int(search.seed.numpy())
        self.weights_share = weights_share or choose_weights_share(len(images.y))
        _, part = split(images.y, 1 - self.weights_share, seed)
        images = images.part(part)
        self.images = min(count, len(part))
        self.class_names = images.class_names
        height, width, _ = images.image_shape
        # Batches of almost one size: a much smaller last one would have poor statistics.
        largest = batch_size or min(max(_PIXELS // (height * width), 1), _IMAGES)
        order = np.random.default_rng(seed).permutation(len(images.y))[: self.images]
        parts = np.array_split(order, -(-self.images // largest))
        # Bytes take a quarter of the memory of floats.
        self.batches = [_read(images.part(np.sort(part))) for part in parts]
        self._evaluate = tf.function(
            self._evaluate_batch,
            input_signature=[
                tf.TensorSpec((None, len(search.space.blocks)), tf.int32),
                tf.TensorSpec((None, *images.image_shape), tf.uint8),
                *(tf.TensorSpec((None,), each.dtype) for each in self.batches[0][1:]),
            ],
        )

    def _evaluate_batch(self, entries, x, *targets):
        batch = (tf.cast(x, tf.float32), *targets)
        return self.search.evaluate_samples(Samples.each(entries), batch)

    def confusion_matrix(self, entries: np.ndarray) -> np.ndarray:
        """How often each class is taken for each other one by an architecture.

        Args:
            entries: The architecture, integers of shape `(blocks,)`.

        Returns:
            int64 of shape `(classes, classes)`: true classes in rows, classes given in columns.
        """
        search = self.search
        choices = search.space.entries.to_choices(entries[None])[0]
        classes = search.space.num_classes
        matrix = np.zeros((classes, classes), np.int64)
        for x, y, *_ in self.batches:
            logits = search.supernet(tf.cast(x, tf.float32), tf.constant(choices, tf.int32))
            given = tf.argmax(logits, axis=-1)
            matrix += tf.math.confusion_matrix(y, given, classes, dtype=tf.int64).numpy()
        return matrix

    def __call__(self, entries: np.ndarray, first: int = 0, last: int | None = None) -> np.ndarray:
        """Loss and accuracy of architectures.

        Args:
            entries: The architectures, integers of shape `(n, blocks)`.
            first: The first batch.
            last: One past the last batch. Default: all batches.

        Returns:
            Sums over the images, float64 of shape `(n, 2)`.
        """
        batches = self.batches[first:last]
        parts = np.array_split(entries, -(-len(entries) // _NETWORKS))
        sums = []
        with track(len(entries) * len(batches), "ranking", "batches") as progress:
            for part in parts:
                part_sums = np.zeros((len(part), 2))
                for batch in batches:
                    means = self._evaluate(tf.constant(part, tf.int32), *batch).numpy()
                    part_sums += len(batch[1]) * means.astype(np.float64)
                    progress.update(len(part))
                sums.append(part_sums)
        return np.concatenate(sums)


def _read(images):
    ((x, *targets),) = test_batches(images, len(images.y))
    return tf.cast(x, tf.uint8), *targets


def rank_finalists(evaluation: Evaluation, finalists: np.ndarray) -> np.ndarray:
    """The finalists in the order of their loss under the shared weights.

    By successive halving: all finalists are evaluated on some images, the best of them on more, and
    so on until all images are used. A finalist comes before those that were out earlier.

    Args:
        evaluation: The evaluation.
        finalists: Different architectures, integers of shape `(n, blocks)`.

    Returns:
        The indices of the finalists, the best one first.

    Reference: Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter
    Optimization", AISTATS 2016, arXiv:1502.07943.
    """
    batches = len(evaluation.batches)
    per_batch = evaluation.images / batches
    left, sums = np.arange(len(finalists)), np.zeros(len(finalists))
    first, last = 0, max(1, round(_FIRST_IMAGES / per_batch))
    ranked = []
    while True:
        last = min(last, batches)
        sums += evaluation(finalists[left], first, last)[:, 0]
        order = np.argsort(sums, kind="stable")
        count = 1 if last == batches else max(1, len(order) // _RATIO)
        left, sums = left[order], sums[order]
        ranked = [*left[count:], *ranked]
        left, sums = left[:count], sums[:count]
        if count == 1:
            return np.array([*left, *ranked])
        first, last = last, last * _RATIO


def draw_architectures(
    search: ArchitectureSearch, count: int, seed: int, budget: float | None = None
) -> dict[str, Architecture]:
    """Architectures drawn from the distribution of a search, each once: at most `count`.

    Args:
        search: The search.
        count: Their number.
        seed: Seed of the draws.
        budget: Largest cost; they cost at least 95% of it. `None`: any cost.
    """
    if budget is None:
        architectures = search.distribution.draw_architectures(count, seed)
    else:
        choices = search.space.entries.to_choices(search.finalists(count, budget, seed=seed))
        architectures = map(search.space.architecture, choices)
    return {f"sample {index}": each for index, each in enumerate(architectures)}


def rank_by_shared_weights(
    evaluation: Evaluation, architectures: Mapping[str, Architecture]
) -> list[Ranked]:
    """Ranks architectures by what they reach with the shared weights of a search.

    Args:
        evaluation: The evaluation.
        architectures: Architectures of the search's space, by name. Equal ones are evaluated once.

    Returns:
        The most accurate first; of equally accurate ones the cheapest first.

    Raises:
        UserError: When an architecture is not in the space.
    """
    search = evaluation.search
    entries = {name: _entries(search.space, name, each) for name, each in architectures.items()}
    # Of equal architectures the first name stays.
    names = list({each.tobytes(): name for name, each in reversed(entries.items())}.values())
    rows = np.stack([entries[name] for name in names])
    costs = search.space_cost(tf.constant(rows)).numpy()
    log_probs = search.distribution.log_prob(tf.constant(rows)).numpy()
    means = evaluation(rows) / evaluation.images
    if len(evaluation.batches[0]) == 2:
        # Sums of float32 means: without weights an accuracy is a whole number of images.
        means[:, 1] = np.round(means[:, 1] * evaluation.images) / evaluation.images
    ranked = [
        Ranked(
            name,
            architectures[name],
            accuracy=float(accuracy),
            loss=float(loss),
            cost=float(cost),
            log_prob=float(log_prob),
            images=evaluation.images,
        )
        for name, (loss, accuracy), cost, log_prob in zip(names, means, costs, log_probs)
    ]
    ranked.sort(key=lambda each: (-each.accuracy, each.cost))
    return [each._replace(pareto=_is_pareto(each, ranked)) for each in ranked]


def _entries(space: Space, name, architecture):
    try:
        return space.entries_of(architecture)
    except ValueError as error:
        raise UserError(f"{name} is not of the search: {error}") from None


def _is_pareto(one, ranked):
    return not any(
        (other.accuracy > one.accuracy and other.cost <= one.cost)
        or (other.accuracy >= one.accuracy and other.cost < one.cost)
        for other in ranked
    )
