"""Measures a latency table of a space on a device, or one network against a table.

python -m export.latency --space=mobile_mini --input_size=28 --channels=1 --output=host.json
python -m export.latency --architecture=architecture.json --latency_table=host.json
"""

import concurrent.futures
import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import pathlib
import random
import shlex
import shutil
import tempfile
import time
from collections.abc import Mapping

import keras
import numpy as np
import scipy.stats
import tensorflow as tf
from absl import flags
from tqdm import tqdm

from export import conversion, devices
from export.latency_model import LatencyModel
from fpnas_keras import cli, spaces
from fpnas_keras.architecture import Architecture, Block, Part, Stem
from fpnas_keras.cost import CostTable, LatencyCost, latency
from fpnas_keras.errors import UserError
from fpnas_keras.files import replacing
from fpnas_keras.method.distributions import FactorizedLogits
from fpnas_keras.networks.plain_network import NetworkBuilder

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "space", None, f"Space to measure: {', '.join(spaces.names())}, or the path of a file."
)
flags.DEFINE_integer("input_size", 32, "Height and width of the images, as searched.", 1)
flags.DEFINE_integer("channels", 3, "Channels of the images: 3, or 1 for grey ones.", 1)
flags.DEFINE_integer("num_classes", 10, "Classes of the images.", 2)
flags.DEFINE_string(
    "architecture",
    None,
    "Instead of a space: network to measure against --latency_table, on the same device.",
)
flags.DEFINE_string("latency_table", None, "Table to compare --architecture with.")
flags.DEFINE_string(
    "output",
    None,
    "File to write: the table, or with --architecture the comparison, by default beside the "
    "architecture. A table that is not finished is gone on with.",
)
flags.DEFINE_enum(
    "device",
    "host",
    ["host", "adb"],
    "This machine, or an Android phone, for which --benchmark_model is needed.",
)
flags.DEFINE_integer(
    "threads", 1, "Threads of the interpreter. Phones are usually timed with one.", 1
)
flags.DEFINE_enum(
    "quantize",
    "none",
    ["none", "int8"],
    "Numbers in the files that are timed: float32, or int8. Measure what you are going to ship.",
)
flags.DEFINE_integer(
    "rounds",
    None,
    "Times that each entry is measured; by default 100 on the host and 3 on a phone, whose "
    "benchmark_model repeats by itself. More are less noisy.",
    lower_bound=1,
)
flags.DEFINE_float(
    "network_seconds",
    None,
    "Least seconds to measure whole networks for, which may take more rounds; by default 40 on "
    "the host, which other work slows down for half a minute at a time, and 0 on a phone.",
    lower_bound=0,
)
flags.DEFINE_integer(
    "max_entries",
    1500,
    "Entries to measure; where a space has more, so many are drawn, and the others follow from a "
    "model fitted to them.",
    lower_bound=50,
)
flags.DEFINE_integer(
    "proof_networks",
    30,
    "Random networks, not used to make the table, that it is proven on in a second process.",
    lower_bound=5,
)
flags.DEFINE_string("benchmark_model", None, "The benchmark_model binary for the phone.")
flags.DEFINE_string("serial", None, "Serial number of the phone (adb devices), if several.")
flags.DEFINE_string("core_mask", "", "Cores of the phone to run on, as taskset takes them: f0.")
flags.DEFINE_boolean("gpu", False, "Whether the phone's GPU runs what it can.")
flags.DEFINE_float(
    "rest_seconds", 0.0, "Seconds to let the phone cool down after each round.", lower_bound=0
)
flags.DEFINE_integer("seed", 0, "Seed of the networks, and of the entries that are drawn.", 0)

flags.register_multi_flags_validator(
    ["space", "architecture"],
    lambda values: (values["space"] is None) != (values["architecture"] is None),
    "give --space, or --architecture and --latency_table",
)
flags.register_multi_flags_validator(
    ["architecture", "latency_table"],
    lambda values: (values["architecture"] is None) == (values["latency_table"] is None),
    "--architecture needs --latency_table, and the other way round",
)
flags.register_multi_flags_validator(
    ["space", "output"],
    lambda values: values["space"] is None or (values["output"] or "").endswith(".json"),
    "--space needs --output, ending in .json",
)
flags.register_multi_flags_validator(
    ["device", "benchmark_model"],
    lambda values: (values["device"] == "adb") == (values["benchmark_model"] is not None),
    "--device=adb needs --benchmark_model, and the other way round",
)

# Networks that the scale between sums of entries and whole networks is taken from.
_SCALE_NETWORKS = 8
_SECONDS_BETWEEN_WRITES = 30
# Of the layers of a part that is timed; see `_write_file`.
_BIAS = 6.0
# What a file of one addition takes is what it takes to call the interpreter.
_NOTHING = "nothing"
# What networks are measured on, twice: so many processes of the interpreter in turn.
_FRESH_DEVICES = {"host": 5, "adb": 1}


def main() -> None:
    """Measures what the flags say."""
    if FLAGS.architecture:
        _measure_architecture()
    else:
        _measure_table()


def _measure_table():
    shape = (FLAGS.input_size, FLAGS.input_size, FLAGS.channels)
    space = spaces.get(FLAGS.space, shape, FLAGS.num_classes)
    output = pathlib.Path(FLAGS.output)
    if not output.parent.is_dir():
        raise UserError(f"`output` must lie in an existing folder. Received: output={output}")
    with contextlib.closing(_device()) as device:
        table = _open_table(output, space, device)
        if not table["complete"]:
            parts = space_parts(space)
            with _files_of(output) as folder:
                _measure_entries(table, parts, device, output, folder)
                _fit(table, parts)
                _scale_and_prove(table, space, folder)
            table["complete"] = True
            _write(output, table)
    _report(output, table)


def space_parts(space: spaces.Space) -> dict[str, Part]:
    """All parts that networks of a space can have, by their names in a table."""
    found = {}

    def record(part):
        found.update((name, part) for name in latency.names(part))
        return 0.0

    CostTable(space, record)
    return found


def _device():
    if FLAGS.device == "host":
        return devices.Host(FLAGS.threads)
    return devices.Adb(
        FLAGS.benchmark_model,
        FLAGS.serial,
        FLAGS.threads,
        FLAGS.core_mask,
        FLAGS.gpu,
        FLAGS.rest_seconds,
    )


def _open_table(output, space, device):
    """The table as it is so far."""
    new = {
        "format": latency.FORMAT,
        "complete": False,
        "space": space.name,
        "input_shape": list(space.input_shape),
        "num_classes": space.num_classes,
        "device": device.describe(),
        "quantize": FLAGS.quantize,
        "versions": {
            name: importlib.metadata.version(name) for name in ("ai-edge-litert", "tensorflow")
        },
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "fit": {},
        "proof": {},
        "measured": {},
        "entries": {},
    }
    if not output.exists():
        return new
    table = latency.read(output)
    for key in ("space", "input_shape", "num_classes", "device", "quantize"):
        if table[key] != new[key] and not (key == "device" and _is_same_device(table, new)):
            raise UserError(
                f"`output` {output} holds a table of another `{key}`: {table[key]}. "
                f"Received: {new[key]}"
            )
    return table


def _is_same_device(one, other):
    """Whether two tables are of one device; its system may have been updated."""
    return one["device"] | {"build": None} == other["device"] | {"build": None}


def _write(output, table):
    with replacing(output) as temporary:
        temporary.write_text(json.dumps(table, indent=0) + "\n")


@contextlib.contextmanager
def _files_of(output):
    """A folder for the files to time, which stays when the block is broken off."""
    folder = output.with_name(f"{output.name}.files")
    folder.mkdir(exist_ok=True)
    yield folder
    shutil.rmtree(folder)


def _measure_entries(table, parts, device, output, folder):
    """Fills `measured`: milliseconds of each entry, round by round."""
    names = [_NOTHING, *_drawn(list(parts))]
    files = _convert({name: parts.get(name) for name in names}, folder)
    rounds, measured = _rounds(), table["measured"]
    for name in names:
        measured.setdefault(name, [])
    total = rounds * len(names)
    written = time.monotonic()
    done = sum(map(len, measured.values()))
    with tqdm(total=total, initial=done, desc="measuring", unit=" entries") as progress:
        try:
            for seed in range(rounds):
                left = {name: file for name, file in files.items() if len(measured[name]) <= seed}
                for name, milliseconds in device.round(left, seed):
                    measured[name].append(round(milliseconds, 6))
                    progress.update()
                    if time.monotonic() > written + _SECONDS_BETWEEN_WRITES:
                        _write(output, table)
                        written = time.monotonic()
        finally:  # A phone may go away; the command goes on from what is written.
            _write(output, table)


def _drawn(names):
    """The entries to measure: all, or all but the blocks and as many of those as may be."""
    if len(names) <= FLAGS.max_entries:
        return names
    blocks = [name for name in names if name.startswith("block")]
    rest = [name for name in names if not name.startswith("block")]
    drawn = random.Random(FLAGS.seed).sample(blocks, max(0, FLAGS.max_entries - len(rest)))
    return rest + drawn


def _rounds():
    return FLAGS.rounds or {"host": 100, "adb": 3}[FLAGS.device]


def _network_seconds():
    default = {"host": 40.0, "adb": 0.0}[FLAGS.device]
    return default if FLAGS.network_seconds is None else FLAGS.network_seconds


def _convert(items, folder):
    """Files of parts or architectures, by name; those that are there already are kept."""
    files = {
        name: folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.tflite" for name in items
    }
    missing = [name for name, file in files.items() if not file.exists()]
    context = multiprocessing.get_context("spawn")
    workers = min(len(os.sched_getaffinity(0)), len(missing))
    if missing:
        # The converter tells of each file; the progress bar is to be seen.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        with (
            concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool,
            tqdm(total=len(missing), desc="converting", unit=" files") as progress,
        ):
            jobs = [
                pool.submit(_write_file, items[name], FLAGS.quantize, files[name])
                for name in missing
            ]
            for job in concurrent.futures.as_completed(jobs):
                job.result()
                progress.update()
    return files


def _write_file(item, quantize, path):
    """Converts an architecture, a part or, for `None`, nothing, in a process of its own."""
    model = item.build() if isinstance(item, Architecture) else part_model(item)
    # More than a random convolution takes away: a bottleneck of attention that is 0 for all inputs
    # has no range, and XNNPACK refuses the int8 file.
    for variable in model.trainable_variables:
        if variable.name == "bias":
            variable.assign(tf.fill(variable.shape, _BIAS))
    generator = np.random.default_rng(0)
    representative = [generator.uniform(0, 6, model.input_shape[1:]) for _ in range(4)]
    with replacing(path) as temporary:
        temporary.write_bytes(conversion.convert(model, quantize, representative))
    keras.backend.clear_session()


def part_model(part: Part | None) -> keras.Model:
    """A part of a network as a model of its own; of `None` a single addition."""
    if part is None:
        x = keras.Input((1, 1, 1))
        return keras.Model(x, keras.layers.Rescaling(1.0, 1.0)(x))
    builder = NetworkBuilder()
    x = keras.Input((*part.size, part.channels))
    if isinstance(part.layers, Stem):
        y = builder.stem(x, part.layers)
    elif isinstance(part.layers, Block):
        y = builder.block(x, part.layers, "block")
    else:
        y = builder.head(x, part.layers, part.num_classes)
    return keras.Model(x, y)


def _fit(table, parts):
    """Fills `entries`, unscaled: what was measured, and what the model makes of the rest.

    Without the call of the interpreter, which a network has once; that is part of the stem.
    """
    measured = {name: devices.typical(times) for name, times in table["measured"].items()}
    call = measured.pop(_NOTHING)
    entries = {name: measured.get(name) for name in parts}
    table["fit"] = {"entries": len(parts), "measured": len(measured), "call": call}
    missing = [name for name in parts if name not in measured]
    if missing:
        known = {name: ms for name, ms in measured.items() if name.startswith("block")}
        model = LatencyModel([parts[name] for name in known], list(known.values()))
        table["fit"]["error"] = model.error
        entries.update(zip(missing, map(float, model([parts[name] for name in missing]))))
    table["entries"] = {
        name: ms if isinstance(parts[name].layers, Stem) else max(0.0, ms - call)
        for name, ms in entries.items()
    }


def _scale_and_prove(table, space, folder):
    """Scales the entries to whole networks, and compares them with others in new processes."""
    networks = random_networks(space, _SCALE_NETWORKS + FLAGS.proof_networks, FLAGS.seed)
    if len(networks) < 4:
        raise UserError(
            f"a latency table needs a space of more networks. Received: {len(networks)} in the "
            f"space `{space.name}`"
        )
    files = _convert({json.dumps(each.to_dict()): each for each in networks}, folder)
    files = {str(index): file for index, file in enumerate(files.values())}
    once, again = _network_times(files)
    scaled = min(_SCALE_NETWORKS, len(networks) // 2)
    sums = np.array([predict(table["entries"], each) for each in networks])
    macs = np.array([each.macs() for each in networks])
    first, rest = slice(scaled), slice(scaled, scaled + FLAGS.proof_networks)
    scale = float(np.median(once[first] / sums[first]))
    by_macs = np.polyval(np.polyfit(macs[first], once[first], 1), macs[rest])
    table["entries"] = {name: scale * ms for name, ms in table["entries"].items()}
    table["fit"]["scale"] = scale
    predicted, measured = scale * sums[rest], once[rest]
    errors = np.abs(predicted / measured - 1)
    table["proof"] = {
        "networks": len(measured),
        "error": float(errors.mean()),
        "largest_error": float(errors.max()),
        "kendall_tau": kendall_tau(predicted, measured),
        "measured_twice_error": float(np.abs(again[rest] / measured - 1).mean()),
        "macs_error": float(np.abs(by_macs / measured - 1).mean()),
        "macs_kendall_tau": kendall_tau(macs[rest], measured),
        "predicted": predicted.tolist(),
        "measured": measured.tolist(),
        "macs": macs[rest].tolist(),
    }


def random_networks(space: spaces.Space, count: int, seed: int) -> list[Architecture]:
    """Networks whose variables are drawn uniformly, no two alike."""
    drawn = FactorizedLogits(space.blocks).sample(2 * count, seed, step=0, stratified=False)
    networks = dict.fromkeys(space.architecture(each) for each in drawn.numpy())
    return list(networks)[:count]


def predict(entries: Mapping[str, float], architecture: Architecture) -> float:
    """Sum of the entries of a network's parts, in milliseconds."""
    return math.fsum(entries[name] for part in architecture.parts() for name in latency.names(part))


def _network_times(files):
    """Milliseconds of networks, measured twice, in turn on devices that are made anew."""
    twice = ({name: [] for name in files}, {name: [] for name in files})
    fresh = 2 * _FRESH_DEVICES[FLAGS.device]
    for index in tqdm(range(fresh), desc="measuring networks"):
        with contextlib.closing(_device()) as device:
            times = devices.times(device, files, _rounds(), _network_seconds() / fresh)
        for name, each in times.items():
            twice[index % 2][name] += each
    return [np.array([devices.typical(each) for each in times.values()]) for times in twice]


def _report(output, table):
    fit, proof = table["fit"], table["proof"]
    print(
        f"\n{output}: {fit['entries']:,} entries, {fit['measured']:,} of them measured, on "
        f"{table['device']['name']}, {table['device']['threads']} thread(s), "
        f"quantize={table['quantize']}"
    )
    if "error" in fit:
        print(f"the others by a model; mean error of entries left out of it: {fit['error']:.1%}")
    print(
        f"on {proof['networks']} other networks: mean error {proof['error']:.1%} (largest "
        f"{proof['largest_error']:.1%}), Kendall tau {proof['kendall_tau']:.3f}; measured twice "
        f"they differ by {proof['measured_twice_error']:.1%}; by MACs: {proof['macs_error']:.1%}, "
        f"{proof['macs_kendall_tau']:.3f}\n"
        "next, search with it:\n"
        "  python -m fpnas_keras.search --cost=latency --target=MILLISECONDS "
        f"--latency_table={shlex.quote(str(output))} --space={shlex.quote(FLAGS.space)} "
        f"--input_size={FLAGS.input_size} --data=DATA --output_dir=DIRECTORY"
    )


def _measure_architecture():
    """Writes what the table says of a network, and what it takes on the device."""
    architecture = Architecture.load(FLAGS.architecture)
    path = pathlib.Path(FLAGS.architecture)
    output = pathlib.Path(FLAGS.output or path.with_name(f"{path.stem}_latency.json"))
    cost = LatencyCost(FLAGS.latency_table)
    try:
        predicted = math.fsum(map(cost, architecture.parts()))
    except KeyError as error:
        raise UserError(f"{FLAGS.latency_table} lacks {error.args[0]} of {path}") from None
    quantize = FLAGS.quantize
    with contextlib.closing(_device()) as device:
        own = device.describe()
    with tempfile.TemporaryDirectory() as folder:
        if FLAGS.latency_table.endswith(".json"):
            table = latency.read(FLAGS.latency_table)
            quantize = table["quantize"]
            if not _is_same_device(table, {"device": own}):
                raise UserError(
                    f"{FLAGS.latency_table} is of the device {table['device']}. Received: {own}"
                )
        file = pathlib.Path(folder) / "network.tflite"
        _write_file(architecture, quantize, file)
        (measured,), (again,) = _network_times({"": file})
    contents = {
        "architecture": str(path),
        "latency_table": FLAGS.latency_table,
        "device": own,
        "quantize": quantize,
        "predicted_milliseconds": predicted,
        "measured_milliseconds": float(measured),
        "measured_twice_error": float(abs(again / measured - 1)),
        "error": float(predicted / measured - 1),
        "macs": architecture.macs(),
    }
    with replacing(output) as temporary:
        temporary.write_text(json.dumps(contents, indent=1) + "\n")
    print(
        f"\npredicted {predicted:.4g} ms, measured {measured:.4g} ms on {own['name']}: "
        f"{contents['error']:+.1%} (measured twice: {contents['measured_twice_error']:.1%})\n"
        f"written: {output}"
    )


def kendall_tau(one: np.ndarray, other: np.ndarray) -> float:
    """Rank correlation: 1 for the same order, 0 for none, as where all are equal."""
    return float(np.nan_to_num(scipy.stats.kendalltau(one, other).statistic))


if __name__ == "__main__":
    cli.run(main)
