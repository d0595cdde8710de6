"""Parts of networks, and whole networks, as `.tflite` files to be timed."""

import concurrent.futures
import contextlib
import hashlib
import math
import multiprocessing
import os
import pathlib
from collections.abc import Iterator, Mapping

import keras
import numpy as np
import tensorflow as tf

import export
from fpnas_keras.architecture import Architecture, Block, Part, Stem
from fpnas_keras.cost import latency_table
from fpnas_keras.files import replacing
from fpnas_keras.method import FactorizedLogits
from fpnas_keras.networks import NetworkBuilder
from fpnas_keras.progress import track
from fpnas_keras.spaces import Space

_INT8 = ("int8", "qat")
# Bias of all layers of a part that is timed; see `write_file`.
_BIAS = 6.0


def named_parts(space: Space) -> dict[str, Part]:
    """All parts that networks of a space can have, by their names in a latency table."""
    return {name: part for part in space.parts() for name in latency_table.names(part)}


def random_networks(space: Space, count: int, seed: int) -> list[Architecture]:
    """Different networks, with uniformly drawn variables: `count`, or fewer in a small space."""
    return FactorizedLogits(space).draw_architectures(2 * count, seed)[:count]


def sum_of_entries(entries: Mapping[str, float], architecture: Architecture) -> float:
    """Sum of the table's entries of a network's parts, in milliseconds."""
    parts = architecture.parts()
    return math.fsum(entries[name] for part in parts for name in latency_table.names(part))


def write_files(
    items: Mapping[str, Architecture | Part | None], quantize: str, folder: pathlib.Path
) -> dict[str, pathlib.Path]:
    """Converts parts and architectures to files, in parallel processes.

    Args:
        items: What to convert, by name; see `write_file`.
        quantize: A format of `fpnas export`.
        folder: Where the files go. Files that are there already are kept.

    Returns:
        The files by name.
    """
    files = {
        name: folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.tflite" for name in items
    }
    missing = [name for name, file in files.items() if not file.exists()]
    if not missing:
        return files
    with open_pool(len(missing)) as pool, track(len(missing), "converting", "files") as progress:
        jobs = [pool.submit(write_file, items[name], quantize, files[name]) for name in missing]
        for job in concurrent.futures.as_completed(jobs):
            job.result()
            progress.update()
    return files


@contextlib.contextmanager
def open_pool(files: int) -> Iterator[concurrent.futures.Executor]:
    """Processes in which files are converted, one on each core, but no more than there are files.

    What has not begun when the `with` statement ends, as by an error, is dropped.
    """
    # The converter logs each file, which would break a progress bar.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    workers = min(len(os.sched_getaffinity(0)), files)
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def write_file(item: Architecture | Part | None, quantize: str, path: pathlib.Path) -> None:
    """Converts an architecture, a part, or for `None` a single addition, to a file."""
    model = part_model(item, quantize)
    # More than a random convolution takes away. An attention bottleneck that is 0 for all inputs
    # has no range, and XNNPACK refuses the int8 file.
    for variable in model.trainable_variables:
        if variable.name.removesuffix(":0").endswith("bias"):
            variable.assign(tf.fill(variable.shape, _BIAS))
    # tfmot rounds as `fpnas export` does and takes four times as long. The converter gives the same
    # operators, but for an addition of one pixel in each attention.
    generator = np.random.default_rng(0)
    representative = [generator.uniform(0, 6, model.input_shape[1:]) for _ in range(4)]
    quantize = "int8" if quantize in _INT8 else quantize
    # int8 at both ends: uint8 takes another operator there, in each part.
    content = export.conversion.convert(model, quantize, representative, input_type="int8")
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    keras.backend.clear_session()


def part_model(part: Architecture | Part | None, quantize: str = "none") -> keras.Model:
    """An architecture or a part of one as a model of its own; for `None` a single addition.

    Args:
        part: The architecture or the part.
        quantize: For "int8" and "qat" the model is built from layers of tf_keras, as `fpnas export`
            builds it: it has other operators, and so another latency.
    """
    builder = export.qat.TwinBuilder() if quantize in _INT8 else NetworkBuilder()
    if isinstance(part, Architecture):
        return builder.network(part)
    library = builder.library
    if part is None:
        x = library.Input((1, 1, 1))
        return library.Model(x, library.layers.Rescaling(1.0, 1.0)(x))
    x = library.Input((*part.size, part.channels))
    if isinstance(part.layers, Stem):
        y = builder.stem(x, part.layers)
    elif isinstance(part.layers, Block):
        y = builder.block(x, part.layers, "block")
    else:
        y = builder.head(x, part.layers, part.num_classes)
    return library.Model(x, y)
