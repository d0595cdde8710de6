"""A space small enough to enumerate, and ways to walk a space."""

import itertools

import numpy as np

from fpnas_keras.architecture import Head, Stem
from fpnas_keras.spaces import SAME, SearchBlock, Space


def make_tiny_space(input_shape=(8, 8, 1), num_classes=3):
    """Small enough to enumerate: every variable, skip with and without projection, kept filters."""
    return Space(
        name="tiny",
        input_shape=input_shape,
        num_classes=num_classes,
        stem=Stem(filters=8, kernel_size=3, strides=1, activation="hard_silu"),
        blocks=(
            SearchBlock(
                filters=(4, 8),
                kernel_size=(3, 5),
                expansion=(1, 3),
                activation=("relu", "hard_silu"),
                splits=(0, 1),
                strides=2,
            ),
            SearchBlock(
                filters=(4, 8),
                kernel_size=(3, 5),
                expansion=(1, 2, 6),
                splits=(1, 0),
                skip=(False, True),
            ),
            SearchBlock(filters=(SAME,), activation=("relu", "hard_silu"), skip=(False, True)),
            SearchBlock(filters=(8, 12), expansion=(3,), skip=(True, False), strides=2),
        ),
        head=Head(filters=16, activation="hard_silu", dense_units=8),
    )


def random_choices(space, rng):
    """Choices of a uniformly random architecture, irrelevant ones 0."""
    choices = rng.integers(0, space.cardinalities)
    return space.choices(space.architecture(choices))


def all_choices(space):
    """Choices of all architectures of a space, each network once."""
    ranges = [range(n) for n in space.cardinalities.ravel()]
    every = np.array(list(itertools.product(*ranges))).reshape(-1, *space.cardinalities.shape)
    kept = {}
    for choices in every:
        kept.setdefault(space.choices(space.architecture(choices)).tobytes(), choices)
    return np.array([np.frombuffer(key, np.int32) for key in kept]).reshape(
        -1, *space.cardinalities.shape
    )
