"""What networks cost, and what that means for a build: image size, target, latency table."""

import contextlib
import functools
import hashlib
import json
import math
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Sequence
from typing import Any, Self

import export
from export.latency import run_measuring, versions
from fpnas_keras import cost, spaces
from fpnas_keras.architecture import Architecture
from fpnas_keras.building.settings import BuildSettings, default_space
from fpnas_keras.cost import latency_table, published_tables
from fpnas_keras.files import replacing
from fpnas_keras.progress import track
from fpnas_keras.spaces import VARIABLES, Space

_SIZES = (224, 192, 160, 128, 96, 64, 48, 32)
# A smaller image than this is enlarged to it.
_LEAST_SIZE = 16
# The size of a file does not limit the size of the images. This one does.
_MOST_PIXELS_BY_BYTES = 96
# The target is at least so many times the cost of the smallest network.
_ROOM = 2.0
# Seconds of one core for an entry of a latency table and for a whole network, about.
_ENTRY_SECONDS, _NETWORK_SECONDS = 0.9, 4.0
_MOST_ENTRIES, _LEAST_ENTRIES = 1500, 150
# Of a table that has little time: networks that test it, and seconds to measure those.
_PROOF_NETWORKS, _PROOF_SECONDS = 8, 20.0


def choose_size(settings: BuildSettings, shape: tuple[int, int, int], num_classes: int) -> int:
    """The height and width that images are resized to.

    Args:
        settings: The settings of the build.
        shape: Shape of the images as they are.
        num_classes: Number of classes.

    Returns:
        The largest one, up to that of the images, at which the target is at least twice the cost
        of the smallest network of the space. If there is none, the smallest size.

    Raises:
        UserError: When the target is below the cost of the smallest network at every size.
    """
    target = settings.parsed_target()
    native = max(shape[0], _LEAST_SIZE)
    if target.kind == "bytes":
        native = min(native, _MOST_PIXELS_BY_BYTES)
    sizes = [size for size in _SIZES if size <= native] or [native]
    made = [
        spaces.get(settings.space or default_space(size), (size, size, shape[-1]), num_classes)
        for size in sizes
    ]
    with NetworkCosts(settings, target.kind) as costs_of:
        costs = costs_of([smallest_network(space) for space in made])
    for size, least in zip(sizes, costs):
        if target.value >= _ROOM * least:
            return size
    bound = f"the cost of the smallest network of {made[-1].name} for images of {sizes[-1]} pixels"
    target.check_reachable(costs[-1], math.inf, bound, settings.target)
    return sizes[-1]


def check_target(settings: BuildSettings, space: Space) -> None:
    """Raises `UserError` when no network of the space costs the target.

    Milliseconds are checked by the search, when they are measured.
    """
    target = settings.parsed_target()
    if target.kind == "latency":
        return
    space_cost = cost.SpaceCost(space, cost.make_cost(target.kind))
    least, largest = float(space_cost.least()), float(space_cost.largest())
    target.check_reachable(
        least,
        largest,
        f"the least and the largest cost in the space `{space.name}` for images of "
        f"{space.input_shape[0]} pixels",
        settings.target,
    )


def smallest_network(space: Space) -> Architecture:
    """The fewest filters everywhere, all blocks skipped that can be, and else the least block."""

    def size(block, row):
        chosen = {name: getattr(block, name)[index] for name, index in zip(VARIABLES, row)}
        filters = 0 if block.keeps_filters else chosen["filters"]
        return (
            *(filters, not chosen["skip"], chosen["expansion"]),
            *(chosen["kernel_size"], chosen["splits"]),
        )

    return space.architecture(
        [min(block.entries, key=functools.partial(size, block)) for block in space.blocks]
    )


class NetworkCosts:
    """What networks cost: MACs, bytes of their int8 files, or milliseconds of those on the device.

    Milliseconds need files, which are made in processes of their own. They stay as long as the
    block that this object is used in. A script that asks for milliseconds needs
    `if __name__ == "__main__":`.

    Args:
        settings: The settings of the build.
        kind: Kind of the target.
    """

    def __init__(self, settings: BuildSettings, kind: str):
        self._settings = settings
        self._kind = kind
        self._stack = contextlib.ExitStack()
        self._pool = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def __call__(self, architectures: Sequence[Architecture]) -> list[float]:
        """The cost of each network."""
        if self._kind == "latency":
            return time_files(self._settings, self._write(architectures))
        cost_of = cost.make_cost(self._kind)
        return [float(sum(map(cost_of, each.parts()))) for each in architectures]

    def _write(self, architectures):
        if self._pool is None:
            self._folder = pathlib.Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
            pool = export.latency_parts.open_pool(len(architectures))
            self._pool = self._stack.enter_context(pool)
        files = [self._folder / f"{uuid.uuid4().hex}.tflite" for _ in architectures]
        count = len(files)
        done = self._pool.map(
            export.latency_parts.write_file, architectures, ["int8"] * count, files
        )
        with track(count, "converting", "networks") as progress:
            for _ in done:
                progress.update()
        return files


def time_files(settings: BuildSettings, files: Sequence[pathlib.Path]) -> list[float]:
    """Milliseconds of each file on the device, measured in turn."""
    given = settings.device_settings()
    names = {str(index): file for index, file in enumerate(files)}
    with given.open_device(given.threads[0]) as device:
        times = export.devices.times(device, names, given.count_rounds())
    return [export.devices.tenth_percentile(times[name]) for name in names]


def describe_device(settings: BuildSettings) -> dict[str, Any]:
    """What is known of the device, as it stands in a latency table.

    Raises:
        UserError: When the device cannot be used.
    """
    given = settings.device_settings()
    with given.open_device(given.threads[0]) as device:
        return device.describe()


def check_table(settings: BuildSettings, table: str, space: Space) -> list[str]:
    """Checks a latency table of the user.

    Args:
        settings: The settings of the build.
        table: The file.
        space: The space.

    Returns:
        What is to be said about it, in sentences.

    Raises:
        UserError: When it is no table, not finished, or lacks parts of the space.
    """
    cost.SpaceCost(space, cost.LatencyCost(table))
    known, notes = published_tables.read_own(table), []
    if known is None:
        return []
    described = describe_device(settings)
    if any(known["device"][key] != described[key] for key in latency_table.DEVICE_KEYS):
        notes.append(
            f"the target is for {known['device']['name']}, {known['device']['threads']} thread(s); "
            f"the files are timed on {described['name']}, {described['threads']} thread(s)"
        )
    if known["quantize"] not in ("int8", "qat"):
        notes.append(f"the latency table is of {known['quantize']} files, not of int8")
    return notes


def measure_table(
    settings: BuildSettings, space: Space, file: pathlib.Path, seconds: float | None
) -> list[str]:
    """Writes a latency table of the space for the device: one that is known, or a new one.

    Finished tables are kept in `$XDG_CACHE_HOME/fpnas_keras`, by default in `~/.cache`, where later
    builds find them. One that was made in less time than there is now is not used.

    Args:
        settings: The settings of the build.
        space: The space.
        file: The table to write. If it is there, but not finished, it is continued.
        seconds: Time for measuring; `None` if there is no limit. It decides how many entries are
            measured. A model that is fitted to them predicts the others.

    Returns:
        What was done, in sentences.
    """
    latency = settings.latency_settings(
        settings.space,
        input_size=space.input_shape[0],
        channels=space.input_shape[-1],
        num_classes=space.num_classes,
        **{"output": str(file)} | _limits_of_table(seconds),
    )
    described = describe_device(settings)
    parts = sorted(export.latency_parts.named_parts(space))
    given = {name: each for name, each in (settings.latency or {}).items() if name != "serial"}
    key = [parts, described, latency.number_format, given, versions()]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    folder = folder / "fpnas_keras"
    cached = folder / f"{pathlib.Path(space.name).stem}_{digest}.json"
    wanted = min(len(parts), latency.max_entries)
    if cached.is_file():
        measured = latency_table.read(cached)["fit"].get("measured", 0)
        if measured >= wanted:
            with replacing(file) as temporary:
                shutil.copyfile(cached, temporary)
            return [f"latency table: {cached}, with {measured:,} measured entries"]
    run_measuring(latency)
    notes = []
    if wanted < len(parts):
        notes = [f"latency table: {wanted:,} of {len(parts):,} entries measured, others predicted"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(cached) as temporary:
            shutil.copyfile(file, temporary)
    except OSError as error:
        notes.append(f"{folder}: {error.strerror}; later builds measure the latency table again")
    return notes


def _limits_of_table(seconds):
    """The settings of a latency table that has some time."""
    if seconds is None:
        return {}
    cores = len(os.sched_getaffinity(0))
    left = cores * (seconds - _PROOF_SECONDS) - 2 * _PROOF_NETWORKS * _NETWORK_SECONDS
    return {
        "max_entries": int(min(max(left / _ENTRY_SECONDS, _LEAST_ENTRIES), _MOST_ENTRIES)),
        "proof_networks": _PROOF_NETWORKS,
        "network_seconds": _PROOF_SECONDS,
    }
