"""Small spaces, ways to walk a space, an independent count of MACs, commands as processes."""

import functools
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import keras
import numpy as np

from fpnas_keras.architecture import Head, Stem
from fpnas_keras.cost import CostTable, latency
from fpnas_keras.spaces import SAME, SearchBlock, Space

ROOT = pathlib.Path(__file__).parents[1]
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
    """Small enough to enumerate: every variable, kept filters, shared choices.

    The first two blocks have every variable too; one, all but skip, is traced in a fourth of the
    time.
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
    """A finished table of a space, of a function from parts to milliseconds."""
    entries = {}

    def record(part):
        entries.update((name, milliseconds(part)) for name in latency.names(part))
        return 0.0

    CostTable(space, record)
    table = {key: {} for key in latency.KEYS} | {
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
    """Choices of a random architecture, each variable uniform, irrelevant ones 0."""
    choices = rng.integers(0, space.cardinalities)
    for row, block in enumerate(space.blocks):
        if block.operation:
            choices[row] = block.entries[rng.integers(len(block.entries))]
    return space.choices(space.architecture(choices))


@functools.cache
def all_choices(space):
    """Choices of all architectures of a space, each network once; read only."""
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
    """Independent of the project: a walk over the built layers and their output shapes."""
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


# It has imported what takes longest to import, and forks a process for each command.
FORKS = """
import gc, json, os, runpy, sys
import sklearn.datasets, sklearn.model_selection
import fpnas_keras.commands
gc.freeze()  # else each process copies all that was imported, to look for garbage
for line in sys.stdin:
    module, arguments, environment, outputs = json.loads(line)
    child = os.fork()
    if not child:
        os.environ.update(environment)
        for number, path in outputs:
            os.dup2(os.open(path, os.O_WRONLY), number)
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _forks():
    return subprocess.Popen(
        [sys.executable, "-c", FORKS],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run(module, *arguments, **changes):
    """As `run_process`, with changes of the environment, but without the time of importing."""
    forks = _forks()
    with tempfile.NamedTemporaryFile("r") as stdout, tempfile.NamedTemporaryFile("r") as stderr:
        outputs = [(1, stdout.name), (2, stderr.name)]
        job = [module, [*map(str, arguments)], changes, outputs]
        print(json.dumps(job), file=forks.stdin, flush=True)
        code = int(forks.stdout.readline())
        return subprocess.CompletedProcess(job, code, stdout.read(), stderr.read())
