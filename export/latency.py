"""Measures a latency table of a space on a device, or one network against a table.

python -m export.latency --space=mobile_mini --input_size=28 --channels=1 --output=host.json
python -m export.latency --architecture=architecture.json --latency_table=host.json
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import math
import pathlib
import random
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

import export
import fpnas_keras
from fpnas_keras import spaces
from fpnas_keras.architecture import Architecture, Part, Stem
from fpnas_keras.commands import Command, run_command, visible_log
from fpnas_keras.cost import LatencyCost, latency_table, published_tables
from fpnas_keras.errors import UserError
from fpnas_keras.files import check_output, is_of_package, write_json
from fpnas_keras.progress import track
from fpnas_keras.settings import MAX_SEED, Settings, setting

if TYPE_CHECKING:
    from export.devices import Adb, Host

_DEVICE, _MEASURING = "Device", "Measuring"
# Networks that the scale between sums of entries and whole networks is taken from.
_SCALE_NETWORKS = 8
_SECONDS_BETWEEN_WRITES = 30
_FEWEST_BLOCKS = 50
# A file with one addition takes the time of calling the interpreter.
_NOTHING = "nothing"
# Networks are measured twice, each time in this many processes of the interpreter.
_FRESH_DEVICES = {"host": 5, "adb": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceSettings(Settings):
    """Settings of the device that files are timed on."""

    device: str = setting(
        "This machine, or an Android phone, which needs --benchmark_model.",
        "host",
        choices=("host", "adb"),
        group=_DEVICE,
    )
    threads: tuple[int, ...] = setting(
        "Threads of the interpreter. Phones are usually timed with one. Several numbers, such as "
        "1,2,4, are measured in turn.",
        (1,),
        least=1,
        group=_DEVICE,
    )
    benchmark_model: str | None = setting(
        "The benchmark_model binary for the phone.", None, group=_DEVICE
    )
    serial: str | None = setting(
        "Serial number of the phone (adb devices), if there are several.", None, group=_DEVICE
    )
    core_mask: str = setting(
        "Cores of the phone to run on, as taskset takes them: f0.", "", group=_DEVICE
    )
    delegate: str = setting(
        "What runs the files on the phone: its CPU by XNNPACK, its GPU, or by NNAPI what Android "
        "has for it.",
        "xnnpack",
        choices=tuple(export.devices.DELEGATES),
        group=_DEVICE,
    )
    rest_seconds: float = setting(
        "Seconds to let the phone cool down after each round.", 0.0, least=0, group=_DEVICE
    )
    rounds: int | None = setting(
        "Times that each entry is measured. Default: 100 on the host, and 3 on a phone, whose "
        "benchmark_model repeats by itself. More rounds are less noisy.",
        None,
        least=1,
        group=_MEASURING,
    )

    def check(self) -> None:
        """Raises `UserError` when settings do not fit together."""
        if (self.device == "adb") != (self.benchmark_model is not None):
            raise UserError("--device=adb needs --benchmark_model, and the other way round")
        of_phones = self.name_changed(("serial", "core_mask", "delegate", "rest_seconds"))
        if self.device == "host" and of_phones:
            raise UserError(f"{of_phones}: only for phones, which --device=adb stands for")
        if self.core_mask and not re.fullmatch("[0-9a-fA-F]{1,16}", self.core_mask):
            raise UserError(
                "`core_mask` must be a hexadecimal number, such as f0. "
                f"Received: core_mask={self.core_mask}"
            )
        if len(set(self.threads)) < len(self.threads):
            raise UserError(
                "`threads` must be different numbers. "
                f"Received: threads={','.join(map(str, self.threads))}"
            )

    def count_rounds(self) -> int:
        """Rounds of measuring."""
        return self.rounds or {"host": 100, "adb": 3}[self.device]

    @contextlib.contextmanager
    def open_device(self, threads: int) -> "Iterator[Host | Adb]":
        """The device, inside the block."""
        if self.device == "host":
            device = export.devices.Host(threads)
        else:
            device = export.devices.Adb(
                self.benchmark_model,
                self.serial,
                threads,
                self.core_mask,
                self.delegate,
                self.rest_seconds,
            )
        with contextlib.closing(device):
            yield device


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatencySettings(DeviceSettings):
    """Settings of a latency table, or of the comparison of a network with one."""

    space: str | None = setting(
        f"Space to measure: {', '.join(spaces.names())}; or the path of a file.",
        None,
        basic=True,
        path=True,
    )
    input_size: int = setting(
        "Height and width of the images, as they will be searched.", 32, least=1, basic=True
    )
    channels: int = setting(
        "Channels of the images: 3, or 1 for grey images.", 3, least=1, basic=True
    )
    num_classes: int = setting("Number of classes.", 10, least=2, basic=True)
    output: str | None = setting(
        "File to write: the table, which must end in .json; or with --architecture the comparison, "
        "by default beside the architecture. An unfinished table is continued. With several "
        "--threads there is a table for each: host_2_threads.json for host.json.",
        None,
        basic=True,
    )
    architecture: str | None = setting(
        "Instead of --space: a network to measure and to compare with --latency_table, on the "
        "same device.",
        None,
        group="Comparison",
        path=True,
    )
    latency_table: str | None = setting(
        "Table to compare --architecture with.", None, group="Comparison", path=True
    )
    quantize: str | None = setting(
        "Numbers in the files that are timed, as of fpnas export. Measure the format that you are "
        "going to ship. int8 and qat files have the same operators. Default: none, and for "
        "--architecture that of the table.",
        None,
        choices=("none", "float16", "dynamic", "int8", "qat"),
        group=_DEVICE,
    )
    network_seconds: float | None = setting(
        "Minimum number of seconds to measure whole networks for, in as many rounds as that takes. "
        "Default: 40 on the host, where other work can slow it down for half a minute, and 0 on a "
        "phone.",
        None,
        least=0,
        group=_MEASURING,
    )
    max_entries: int = setting(
        "Maximum number of entries to measure. If a space has more, this many are drawn, and a "
        "model that is fitted to them predicts the others.",
        1500,
        least=50,
        group=_MEASURING,
    )
    proof_networks: int = setting(
        "Random networks that the finished table is checked on in a second process. They are not "
        "used to make it.",
        30,
        least=5,
        group=_MEASURING,
    )
    seed: int = setting(
        "Seed of the networks, and of the entries that are drawn.",
        0,
        least=0,
        most=MAX_SEED,
        group=_MEASURING,
    )

    def check(self) -> None:
        """Raises `UserError` when settings do not fit together."""
        super().check()
        if (self.space is None) == (self.architecture is None):
            raise UserError("give --space, or --architecture and --latency_table")
        if (self.architecture is None) != (self.latency_table is None):
            raise UserError("--architecture needs --latency_table, and the other way round")
        if self.space is not None and not (self.output or "").endswith(".json"):
            raise UserError(
                f"--space needs --output, ending in .json. Received: output={self.output}"
            )
        if self.architecture and len(self.threads) > 1:
            raise UserError("--architecture needs one number of --threads, that of the table")

    @property
    def number_format(self) -> str:
        """Numbers in the files of a table."""
        return self.quantize or "none"

    def seconds_for_networks(self) -> float:
        """Least seconds to measure whole networks for."""
        default = {"host": 40.0, "adb": 0.0}[self.device]
        return default if self.network_seconds is None else self.network_seconds

    def output_file(self, threads: int) -> pathlib.Path:
        """The file of the table for a number of threads."""
        path = pathlib.Path(self.output)
        if len(self.threads) == 1:
            return path
        return path.with_name(f"{path.stem}_{threads}_threads{path.suffix}")


def measure_latency(**settings: Any) -> list[dict[str, Any]]:
    """Measures latency tables of a space on a device: one for each number of threads.

    An unfinished table in the same file is continued. A finished one is returned as it is. The
    files to time are made in processes of their own: a script that calls this needs
    `if __name__ == "__main__":`.

    Args:
        **settings: The fields of `LatencySettings`, which are the flags of `fpnas latency`.

    Returns:
        The tables in the order of `threads`, as they stand in their files.

    Raises:
        UserError: When a setting is wrong, the device fails, or the file holds another table.

    Example:

    ```python
    export.measure_latency(space="mobile_mini", input_size=28, channels=1, output="host.json")
    ```
    """
    with visible_log():
        return run_measuring(LatencySettings(**settings))


def run_measuring(settings: LatencySettings) -> list[dict[str, Any]]:
    """Like `measure_latency`, but takes a `LatencySettings`."""
    if settings.space is None:
        raise UserError("`space` must be given to measure a table. Received: space=None")
    shape = (settings.input_size, settings.input_size, settings.channels)
    space = spaces.get(settings.space, shape, settings.num_classes)
    for threads in settings.threads:
        check_output(settings.output_file(threads))
    with contextlib.ExitStack() as stack:
        devices = [stack.enter_context(settings.open_device(each)) for each in settings.threads]
        tables = [_open_table(settings, space, device) for device in devices]
        begun = [(t, d) for t, d in zip(tables, devices) if not t["complete"]]
        if begun:
            parts = export.latency_parts.named_parts(space)
            with _folder_of_files(pathlib.Path(settings.output)) as folder:
                _measure_entries(settings, begun, parts, folder)
                for table, _ in begun:
                    _fit(table, parts)
                    _scale_and_prove(settings, table, space, folder)
                    table["complete"] = True
                    write_json(_table_file(settings, table), table)
    return tables


def _table_file(settings, table):
    return settings.output_file(table["device"]["threads"])


def compare_latency(**settings: Any) -> dict[str, Any]:
    """Measures a network on a device and compares the time with a latency table.

    Args:
        **settings: The fields of `LatencySettings`, `architecture` and `latency_table` among them.

    Returns:
        The comparison, as it stands in the file `output`.

    Raises:
        UserError: When a setting is wrong, the device fails, or the table is of another device.
    """
    with visible_log():
        return run_comparison(LatencySettings(**settings))


def run_comparison(settings: LatencySettings) -> dict[str, Any]:
    """Like `compare_latency`, but takes a `LatencySettings`."""
    if settings.architecture is None:
        raise UserError(
            "`architecture` must be given to compare it with a table. Received: architecture=None"
        )
    architecture = Architecture.load(settings.architecture)
    predicted = _predict(settings, architecture)
    output = _comparison_file(settings)
    check_output(output)
    (threads,) = settings.threads
    with settings.open_device(threads) as device:
        own = device.describe()
    quantize = _check_table(settings, own)
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "network.tflite"
        export.latency_parts.write_file(architecture, quantize, file)
        ((measured,), (again,)), shares = _time_networks(settings, {"": file}, threads)
    comparison = {
        "architecture": settings.architecture,
        "latency_table": settings.latency_table,
        "device": own,
        "quantize": quantize,
        "predicted_milliseconds": predicted,
        "measured_milliseconds": float(measured),
        "measured_twice_error": float(abs(again / measured - 1)),
        "error": float(predicted / measured - 1),
        "share": shares[""],
        "macs": architecture.macs(),
    }
    write_json(output, comparison)
    return comparison


def _check_table(settings, device):
    """The numbers of the table to compare with, which must be of this device."""
    table = published_tables.read_own(settings.latency_table)
    if table is None:
        return settings.number_format
    if not _is_same_device(table, {"device": device}):
        raise UserError(
            f"{settings.latency_table} is of the device {table['device']}. Received: {device}"
        )
    if settings.quantize not in (None, table["quantize"]):
        raise UserError(
            f"`quantize` must be that of {settings.latency_table}, {table['quantize']}. "
            f"Received: quantize={settings.quantize}"
        )
    return table["quantize"]


def _predict(settings, architecture):
    cost = LatencyCost(settings.latency_table)
    try:
        return math.fsum(map(cost, architecture.parts()))
    except KeyError as error:
        raise UserError(
            f"{settings.latency_table} lacks {error.args[0]} of {settings.architecture}"
        ) from None


def _comparison_file(settings):
    """Beside the architecture, or in the current folder for one that comes with the package."""
    path = pathlib.Path(settings.architecture)
    folder = pathlib.Path() if is_of_package(path) else path.parent
    return pathlib.Path(settings.output or folder / f"{path.stem}_latency.json")


def versions() -> dict[str, str]:
    """The versions of what converts and runs files, by package."""
    packages = {name: importlib.metadata.version(name) for name in ("ai-edge-litert", "tensorflow")}
    return packages | {"fpnas_keras": fpnas_keras.__version__}  # It may not be installed.


def _open_table(settings, space, device):
    """The table as it is so far."""
    new = {
        "format": latency_table.FORMAT,
        "complete": False,
        "space": space.name,
        "input_shape": list(space.input_shape),
        "num_classes": space.num_classes,
        "device": device.describe(),
        "quantize": settings.number_format,
        "versions": versions(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "fit": {},
        "proof": {},
        "measured": {},
        "shares": {},
        "entries": {},
    }
    output = settings.output_file(device.threads)
    if not output.exists():
        return new
    table = latency_table.read(output)
    for key in ("space", "input_shape", "num_classes", "device", "quantize"):
        if table[key] != new[key] and not (key == "device" and _is_same_device(table, new)):
            raise UserError(
                f"`output` {output} holds a table of another `{key}`: {table[key]}. "
                f"Received: {new[key]}"
            )
    return table


def _is_same_device(one, other):
    """Whether two tables are of one device. Its system may have been updated."""
    return one["device"] | {"build": None} == other["device"] | {"build": None}


@contextlib.contextmanager
def _folder_of_files(output):
    """A folder for the files to time. It stays when the block is interrupted."""
    folder = output.with_name(f"{output.name}.files")
    folder.mkdir(exist_ok=True)
    yield folder
    shutil.rmtree(folder)


def _measure_entries(
    settings: LatencySettings,
    begun: Sequence[tuple[dict[str, Any], "Host | Adb"]],
    parts: Mapping[str, Part],
    folder: pathlib.Path,
) -> None:
    """Fills `measured` and `shares` of tables, each with its device, round by round."""
    names = [_NOTHING, *_draw_entries(settings, list(parts))]
    for table, _ in begun:
        if table["measured"] and table["measured"].keys() != set(names):
            raise UserError(
                f"`output` {_table_file(settings, table)} was begun with another `seed` or "
                f"`max_entries`. Received: seed={settings.seed}, "
                f"max_entries={settings.max_entries}"
            )
        for name in names:
            table["measured"].setdefault(name, [])
    items = {name: parts.get(name) for name in names}
    files = export.latency_parts.write_files(items, settings.number_format, folder)
    rounds = settings.count_rounds()
    left = sum(rounds - len(times) for table, _ in begun for times in table["measured"].values())

    def write():
        for table, _ in begun:
            write_json(_table_file(settings, table), table)

    written = time.monotonic()
    with track(left, "measuring", "entries") as progress:
        try:
            for seed, (table, device) in itertools.product(range(rounds), begun):
                for _ in _measure_round(table, device, files, seed):
                    progress.update()
                    if time.monotonic() > written + _SECONDS_BETWEEN_WRITES:
                        write()
                        written = time.monotonic()
        finally:  # A phone may go away. The command continues from what is written.
            write()


def _measure_round(table, device, files, seed):
    """Measures what the round of a seed lacks; yields after each file."""
    measured, shares = table["measured"], table["shares"]
    left = {name: file for name, file in files.items() if len(measured[name]) <= seed}
    for name, milliseconds in device.round(left, seed):
        measured[name].append(round(milliseconds, 6))
        if device.shares[name] != 1:
            shares[name] = device.shares[name]
        yield


def _draw_entries(settings, names):
    """The entries to measure: all of them, or all but the blocks and as many blocks as allowed."""
    if len(names) <= settings.max_entries:
        return names
    blocks = [name for name in names if name.startswith("block")]
    rest = [name for name in names if not name.startswith("block")]
    # Some blocks in any case, which the model of the others is fitted to.
    count = min(len(blocks), max(_FEWEST_BLOCKS, settings.max_entries - len(rest)))
    return rest + random.Random(settings.seed).sample(blocks, count)


def _fit(table, parts):
    """Fills `entries`, unscaled: what was measured, and the model's predictions of the rest.

    The time of calling the interpreter is subtracted, since a network has it once. The stem keeps
    it.
    """
    measured = {
        name: export.devices.tenth_percentile(times) for name, times in table["measured"].items()
    }
    call = measured.pop(_NOTHING)
    entries = {name: measured.get(name) for name in parts}
    table["fit"] = {"entries": len(parts), "measured": len(measured), "call": call}
    missing = [name for name in parts if name not in measured]
    if missing:
        known = {name: ms for name, ms in measured.items() if name.startswith("block")}
        model = export.latency_model.LatencyModel(
            [parts[name] for name in known], list(known.values())
        )
        table["fit"]["error"] = model.error
        entries.update(zip(missing, map(float, model([parts[name] for name in missing]))))
    table["entries"] = {
        name: ms if isinstance(parts[name].layers, Stem) else max(0.0, ms - call)
        for name, ms in entries.items()
    }


def _scale_and_prove(settings, table, space, folder):
    """Scales the entries to whole networks, and compares them with other networks."""
    latency_parts = export.latency_parts
    count = _SCALE_NETWORKS + settings.proof_networks
    networks = latency_parts.random_networks(space, count, settings.seed)
    if len(networks) < 4:
        raise UserError(
            f"a latency table needs a space of more networks. Received: {len(networks)} in the "
            f"space `{space.name}`"
        )
    items = {json.dumps(each.to_dict()): each for each in networks}
    files = latency_parts.write_files(items, settings.number_format, folder)
    (once, again), shares = _time_networks(
        settings,
        {str(index): file for index, file in enumerate(files.values())},
        table["device"]["threads"],
    )
    scaled = min(_SCALE_NETWORKS, len(networks) // 2)
    sums = np.array([latency_parts.sum_of_entries(table["entries"], each) for each in networks])
    scale = float(np.median(once[:scaled] / sums[:scaled]))
    table["entries"] = {name: scale * ms for name, ms in table["entries"].items()}
    table["fit"]["scale"] = scale
    macs = np.array([each.macs() for each in networks])
    table["proof"] = _prove(scale * sums, once, again, macs, scaled)
    table["proof"]["shares"] = list(shares.values())[scaled:]


def _prove(predicted, measured, again, macs, scaled):
    """How well the table and a line through MACs predict the networks after the first `scaled`."""
    line = np.polyfit(macs[:scaled], measured[:scaled], 1)
    predicted, measured, again, macs = (
        each[scaled:] for each in (predicted, measured, again, macs)
    )
    errors = np.abs(predicted / measured - 1)
    return {
        "networks": len(measured),
        "error": float(errors.mean()),
        "largest_error": float(errors.max()),
        "kendall_tau": kendall_tau(predicted, measured),
        "measured_twice_error": float(np.abs(again / measured - 1).mean()),
        "macs_error": float(np.abs(np.polyval(line, macs) / measured - 1).mean()),
        "macs_kendall_tau": kendall_tau(macs, measured),
        "predicted": predicted.tolist(),
        "measured": measured.tolist(),
        "macs": macs.tolist(),
    }


def kendall_tau(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation: 1 for the same order, 0 for none, as where all are equal."""
    from scipy.stats import kendalltau

    return float(np.nan_to_num(kendalltau(one, other).statistic))


def _time_networks(settings, files, threads):
    """Networks, measured twice, alternating, on a newly opened device each time.

    Returns:
        Milliseconds of each, once and again, and the share of each that the delegate ran.
    """
    twice = ({name: [] for name in files}, {name: [] for name in files})
    fresh = 2 * _FRESH_DEVICES[settings.device]
    seconds = settings.seconds_for_networks() / fresh
    with track(fresh, "measuring networks", "passes") as progress:
        for index in range(fresh):
            with settings.open_device(threads) as device:
                times = export.devices.times(device, files, settings.count_rounds(), seconds)
            for name, each in times.items():
                twice[index % 2][name] += each
            progress.update()
    once, again = (
        np.array([export.devices.tenth_percentile(times[name]) for name in files])
        for times in twice
    )
    return (once, again), {name: device.shares[name] for name in files}


def _run_and_print(settings):
    if settings.architecture:
        comparison = run_comparison(settings)
        print(
            f"\npredicted {comparison['predicted_milliseconds']:.4g} ms, measured "
            f"{comparison['measured_milliseconds']:.4g} ms on {comparison['device']['name']}: "
            f"{comparison['error']:+.1%} (measured twice: "
            f"{comparison['measured_twice_error']:.1%})\n"
            f"{_describe_shares([comparison['share']], 'network', settings.delegate)}"
            f"written: {_comparison_file(settings)}"
        )
    else:
        for table in run_measuring(settings):
            print(_describe(settings, table))


def _describe(settings, table):
    """What is known of a finished table, and what to type next."""
    fit, proof, device = table["fit"], table["proof"], table["device"]
    file, delegate = str(_table_file(settings, table)), device.get("delegate", "xnnpack")
    text = (
        f"\n{file}: {fit['entries']:,} entries, {fit['measured']:,} of them measured, "
        f"on {device['name']}, {device['threads']} thread(s), "
        f"quantize={table['quantize']}\n"
    )
    if "error" in fit:
        text += (
            "the others by a model; mean error of entries left out of its fit: "
            f"{fit['error']:.1%}\n"
        )
    text += _describe_shares(list(table["shares"].values()), "measured entries", delegate)
    # Tables of earlier versions do not have them.
    text += _describe_shares(proof.get("shares", []), "networks below", delegate)
    return text + (
        f"on {proof['networks']} other networks: mean error {proof['error']:.1%} (largest "
        f"{proof['largest_error']:.1%}), Kendall tau {proof['kendall_tau']:.3f}; measured twice "
        f"they differ by {proof['measured_twice_error']:.1%}; by MACs: {proof['macs_error']:.1%}, "
        f"{proof['macs_kendall_tau']:.3f}\n"
        "next, search with it:\n"
        "  python -m fpnas_keras.search --cost=latency --target=MILLISECONDS "
        f"--latency_table={shlex.quote(file)} --space={shlex.quote(settings.space)} "
        f"--input_size={settings.input_size} --data=DATA --output_dir=DIRECTORY"
    )


def _describe_shares(shares, what, delegate):
    """A line on files that the delegate ran only a part of, or no line."""
    parts = [share for share in shares if share != 1]
    if not parts:
        return ""
    known = [share for share in parts if share is not None]
    least = f", at worst {min(known):.0%} of the operators" if known else ""
    name = export.devices.DELEGATES[delegate]
    return f"{name} ran only a part of {len(parts)} {what}{least}; the interpreter ran the rest\n"


COMMAND = Command(
    name="fpnas latency",
    summary="Measures a latency table of a space on a device, or a network against a table.",
    examples=(
        (
            "This machine",
            "fpnas latency --space=mobile_mini --input_size=28 --channels=1 --output=host.json",
        ),
        (
            "A network that was found, against the table",
            "fpnas latency --architecture=runs/mine/architecture.json --latency_table=host.json",
        ),
    ),
    settings=LatencySettings,
    run=_run_and_print,
)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
