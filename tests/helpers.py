"""Small spaces, ways to walk a space, an independent count of MACs, commands as processes."""

import contextlib
import functools
import importlib
import io
import itertools
import json
import os
import pathlib
import subprocess
import sys
from unittest import mock

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from fpnas_keras import data
from fpnas_keras.architecture import Architecture, Block, Head, Stem
from fpnas_keras.commands import run_command
from fpnas_keras.cost import latency_table
from fpnas_keras.spaces import SAME, SearchBlock, Space

ROOT = pathlib.Path(__file__).parents[1]
# Every activation, every attention, a projection, a residual, no expansion, a dense layer.
EVERYTHING = Architecture(
    (16, 16, 3),
    5,
    Stem(8, 3, 2, "hard_silu"),
    (
        Block(8, 3, 1, 1, "relu", 1),
        Block(12, 5, 3, 2, "hard_silu", 2),
        Block(12, 3, 3, 1, "relu6", 4),
        Block(16, skip=True),
        Block(16, 7, 2, 1, "hard_silu", 0),
    ),
    Head(24, "hard_silu", 16),
)
# A space file for commands: 612 networks of two blocks, of which a search is traced soon.
SMALL_SPACE = {
    "format": 1,
    "stem": {"filters": 8, "kernel_size": 3, "strides": 2},
    "blocks": [
        {
            "filters": [8, 12, 16],
            "kernel_size": [3, 5],
            "expansion": [1, 3, 6],
            "splits": [0, 1],
            "strides": 2,
        },
        {
            "filters": ["same"],
            "kernel_size": [3, 5],
            "expansion": [2, 3, 4, 6],
            "activation": ["relu", "hard_silu"],
            "skip": [False, True],
        },
    ],
    "head": {"filters": 64, "activation": "hard_silu"},
}


def make_tiny_space(input_shape=(8, 8, 1), num_classes=3, blocks=4):
    """A space that is small enough to enumerate, with every feature of a search block.

    Fewer blocks are traced faster: with 1 block in a fourth of the time. The first two have every
    variable. The first alone cannot be skipped.
    """
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
                splits=(2, 1),
                strides=2,
            ),
            SearchBlock(
                filters=(4, 8),
                kernel_size=(3, 5),
                expansion=(1, 2, 6),
                splits=(4, 0),
                skip=(False, True),
            ),
            SearchBlock(
                filters=(SAME,), activation=("relu", "hard_silu"), skip=(False, True), repeats=2
            ),
            SearchBlock(filters=(8, 12), expansion=(3,), skip=(True, False), strides=2, repeats=2),
        )[:blocks],
        head=Head(filters=16, activation="hard_silu", dense_units=8),
    )


def write_latency_table(path, space, milliseconds, **changes):
    """Writes a finished latency table of a space.

    Args:
        path: The file.
        space: The space.
        milliseconds: Gives the milliseconds of a part.
        **changes: Keys of the table to change.
    """
    entries = {
        name: milliseconds(part) for part in space.parts() for name in latency_table.names(part)
    }
    table = {key: {} for key in latency_table.KEYS} | {
        "format": 1,
        "complete": True,
        "space": space.name,
        "input_shape": space.input_shape,
        "num_classes": space.num_classes,
        "device": {"kind": "host", "name": "stand-in", "threads": 1},
        "quantize": "none",
        "entries": entries,
    }
    path.write_text(json.dumps(table | changes))
    return path


def random_choices(space, rng):
    """Choices of a random architecture, each variable uniform; 0 for irrelevant variables."""
    choices = rng.integers(0, space.cardinalities)
    for row, block in enumerate(space.blocks):
        if block.operation:
            choices[row] = block.entries[rng.integers(len(block.entries))]
    return space.choices(space.architecture(choices))


def all_entries(space):
    """Entries of `all_choices`, in the same order."""
    return space.entries.from_choices(all_choices(space))


@functools.cache
def all_choices(space):
    """Choices of all architectures of a space, each architecture once. The array is read-only.

    It does not use the entries of the space, so that tests can compare with it.
    """
    ranges = [range(n) for n in space.cardinalities.ravel()]
    every = np.array(list(itertools.product(*ranges))).reshape(-1, *space.cardinalities.shape)
    kept = {}
    for choices in every:
        kept.setdefault(space.choices(space.architecture(choices)).tobytes(), choices)
    found = np.array([np.frombuffer(key, np.int32) for key in kept])
    found = found.reshape(-1, *space.cardinalities.shape)
    found.setflags(write=False)
    return found


def counted_macs(model):
    """MACs of a Keras model, from its layers and their output shapes.

    It is independent of how the project counts.
    """
    total = 0
    for layer in model.layers:
        if isinstance(layer, keras.layers.DepthwiseConv2D):
            _, height, width, channels = layer.output.shape
            total += height * width * channels * layer.kernel_size[0] ** 2
        elif isinstance(layer, keras.layers.Conv2D):
            _, height, width, _ = layer.output.shape
            kernel_size, _, filters_in, filters = layer.kernel.shape
            total += height * width * kernel_size**2 * filters_in * filters
        elif isinstance(layer, keras.layers.Dense):
            total += layer.kernel.shape[0] * layer.kernel.shape[1]
    return total


def environment(**changes):
    return os.environ | {"PYTHONPATH": str(ROOT)} | changes


def run_process(module, *arguments):
    """Runs `python -m` to its end."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment())


def run(module, *arguments, **changes):
    """As `run_process`, inside this process, with changes of the environment."""
    command = importlib.import_module(module).COMMAND
    stdout, stderr = io.StringIO(), io.StringIO()
    handler = logging.get_absl_handler().python_handler
    stream = handler.setStream(stderr)
    try:
        with (
            mock.patch.dict(os.environ, changes),
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
        ):
            code = run_command(command, [*map(str, arguments)])
    finally:
        handler.setStream(stream)
    return subprocess.CompletedProcess(arguments, code, stdout.getvalue(), stderr.getvalue())


def calibrated(model):
    """The model with moving statistics that fit its weights."""
    x = 255 * tf.random.stateless_uniform((32, 16, 16, 3), (1, 2))
    for _ in range(30):
        model(x, training=True)
    return model


def random_images(count=20):
    """Images of 16 pixels of five classes."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return data.Images(x, np.arange(count) % 5, tuple("abcde"), (16, 16, 3))
