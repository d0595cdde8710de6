import dataclasses
import functools
import json
import os
import pathlib
import stat
import time

import numpy as np
import pytest
from helpers import run, run_process

import export
from export import conversion, devices, latency_parts
from export.latency import LatencySettings, _check_table, _comparison_file, _draw_entries
from export.latency_model import LatencyModel
from export.latency_parts import named_parts
from fpnas_keras import Architecture, LatencyCost, search, spaces
from fpnas_keras.architecture import Block, Part, count_part
from fpnas_keras.cost import SpaceCost, latency_table
from fpnas_keras.errors import UserError
from fpnas_keras.runs import BuildRun

measure = functools.partial(run, "export.latency")
SPACE = {
    "format": 1,
    "stem": {"filters": 8, "kernel_size": 3, "strides": 2},
    "blocks": [
        {"filters": [8, 12], "expansion": [1, 3], "strides": 2},
        {"filters": ["same"], "kernel_size": [3, 5], "skip": [False, True]},
    ],
    "head": {"filters": 16},
}
FLAGS = ["--input_size=16", "--channels=1", "--proof_networks=5", "--network_seconds=0"]
# Stands in for adb: answers as it does, and fails as it does where FAIL says so.
ADB = """#!/usr/bin/env python3
import os, sys
words, fail = sys.argv[1:], os.environ.get("FAIL", "")
open(os.environ["ADB_LOG"], "a").write(" ".join(words) + chr(10))
if words[0] == "-s":
    words = words[2:]
def die(text):
    print(text, file=sys.stderr)
    sys.exit(1)
if fail == "none":
    die("error: no devices/emulators found")
if fail == "unauthorized":
    die("error: device unauthorized." + chr(10) + "This adb server's $ADB_VENDOR_KEYS is not set"
        + chr(10) + "Otherwise check for a confirmation dialog on your device.")
command = " ".join(words)
if words[0] == "get-state":
    print("device")
elif words[0] == "push":
    if fail == "push" and words[1].endswith(".tflite"):
        die("adb: error: failed to copy: remote No space left on device")
    print(words[1] + ": 1 file pushed, 0 skipped. 9.1 MB/s (4096 bytes in 0.000s)")
elif "getprop ro.product.model" in command:
    print("Pixel 8")
elif "getprop" in command:
    print("google/shiba/shiba:15/AP4A/1:user/release-keys")
elif "benchmark_model --graph" in command:
    if fail == "crash":
        die("Segmentation fault")
    if fail == "garbage":
        print("INFO: Failed to load model")
        sys.exit(0)
    if fail == "late" and sum("--graph" in each for each in open(os.environ["ADB_LOG"])) > 7:
        die("error: device offline")
    text = open(os.environ["ADB_OUTPUT"]).read()
    if "BY_SIZE" in os.environ:  # Microseconds by the size of the file that was pushed there.
        graph = command.split("--graph=")[1].split()[0]
        pushed = [line.strip() for line in open(os.environ["ADB_LOG"]) if "push " in line]
        local = [line for line in pushed if line.endswith(graph)][-1].partition("push ")[2]
        local = local.removesuffix(graph).strip()
        text = text.replace("1498", str(os.path.getsize(local) // 10))
    print(text)
"""
OUTPUT = """Cpus_allowed:	f0
INFO: STARTING!
INFO: Log parameter values verbosely: [0]
INFO: Num threads: [1]
INFO: Graph: [/data/local/tmp/fpnas_keras/0.tflite]
INFO: Loaded model /data/local/tmp/fpnas_keras/0.tflite
INFO: Created TensorFlow Lite XNNPACK delegate for CPU.
INFO: Initialized session in 2.345ms.
INFO: Running benchmark for at least 5 iterations and at least 0.5 seconds
INFO: count=250 first=3001 curr=1999 min=1950 max=3001 avg=2003.5 std=80 median=1998

INFO: Running benchmark for at least 100 iterations and at least 0.2 seconds
INFO: count=100 first=1501 curr=1499 min=1450 max=1801 avg=1503.5 std=30 p5=1460 median=1498

INFO: Inference timings in us: Init: 2345, Warmup (avg): 2003.5, Inference (avg): 1503.5
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("with space")
    (folder / "small.json").write_text(json.dumps(SPACE))
    return folder


@pytest.fixture(scope="module")
def table(folder):
    flags = [f"--space={folder / 'small.json'}", "--rounds=5", *FLAGS]
    result = run_process("export.latency", *flags, f"--output={folder / 'table.json'}")
    assert result.returncode == 0, result.stderr
    assert "python -m fpnas_keras.search --cost=latency" in result.stdout
    return folder / "table.json"


def test_a_table_of_this_machine_knows_all_networks_of_the_space(folder, table):
    space = spaces.get(folder / "small.json", (16, 16, 1), 10)
    content = latency_table.read(table)
    assert content["complete"]
    assert set(content["measured"]) == {"nothing", *content["entries"]}
    assert {len(times) for times in content["measured"].values()} == {5}
    assert content["proof"]["networks"] == 5
    # stem; 2 x 2 first blocks; 2 x 2 second ones; 2 heads.
    assert len(content["entries"]) == 1 + 4 + 4 + 2
    least = SpaceCost(space, LatencyCost(table)).least()
    assert 0 < least < 1000
    # What it takes to call the interpreter counts once, with the stem.
    times = {name: devices.tenth_percentile(each) for name, each in content["measured"].items()}
    for name, ms in content["entries"].items():
        own = times[name] if name.startswith("stem") else max(0, times[name] - times["nothing"])
        assert ms == pytest.approx(content["fit"]["scale"] * own)
    assert not list(folder.glob("*.files"))


def test_a_finished_table_is_reported_again_and_another_space_is_refused(folder, table):
    before = table.read_bytes()
    flags = [f"--space={folder / 'small.json'}", f"--output={table}"]
    assert measure(*flags, *FLAGS, "--rounds=5").returncode == 0
    result = measure(*flags, "--input_size=32", "--channels=1")
    assert result.returncode == 1
    assert "holds a table of another `input_shape`: [16, 16, 1]" in result.stderr.splitlines()[-1]
    assert table.read_bytes() == before


def test_a_network_is_measured_against_the_table(folder, table):
    space = spaces.get(folder / "small.json", (16, 16, 1), 10)
    architecture = space.architecture(np.zeros_like(space.cardinalities))
    architecture.save(folder / "architecture.json")
    flags = [f"--architecture={folder / 'architecture.json'}", f"--latency_table={table}"]
    result = measure(*flags, "--network_seconds=0")
    assert result.returncode == 0, result.stderr
    content = json.loads((folder / "architecture_latency.json").read_text())
    predicted = sum(map(LatencyCost(table), architecture.parts()))
    assert content["predicted_milliseconds"] == pytest.approx(predicted)
    assert 0 < content["measured_milliseconds"] < 1000
    assert "predicted" in result.stdout


def test_tables_for_several_numbers_of_threads_are_measured_in_turn(folder, tmp_path, monkeypatch):
    rounds = []

    class Device(devices.Host):
        def __init__(self, threads):
            super().__init__(threads)
            assert self._process.args[-1] == str(threads)

        def round(self, files, seed):
            rounds.append(self.threads)
            return super().round(files, seed)

    monkeypatch.setattr(devices, "Host", Device)
    flags = [f"--space={folder / 'small.json'}", "--rounds=2", *FLAGS]
    result = measure(*flags, "--threads=1,2", f"--output={tmp_path / 'host.json'}")
    assert result.returncode == 0, result.stderr
    files = [tmp_path / f"host_{threads}_threads.json" for threads in (1, 2)]
    assert sorted(tmp_path.iterdir()) == files
    tables = list(map(latency_table.read, files))
    assert [table["device"]["threads"] for table in tables] == [1, 2]
    assert all(
        table["complete"] and str(file) in result.stdout for table, file in zip(tables, files)
    )
    assert rounds[:4] == [1, 2, 1, 2]
    # A table for one number is the same table.
    result = measure(*flags, "--threads=2", f"--output={files[1]}")
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_what_xnnpack_did_not_run_is_in_the_table(folder, tmp_path):
    # XNNPACK has no softmax over splits in int8.
    split = SPACE["blocks"][1] | {"splits": [0, 4]}
    (tmp_path / "split.json").write_text(
        json.dumps(SPACE | {"blocks": [SPACE["blocks"][0], split]})
    )
    flags = [f"--space={tmp_path / 'split.json'}", "--rounds=1", *FLAGS, "--quantize=int8"]
    result = measure(*flags, f"--output={tmp_path / 'table.json'}")
    assert result.returncode == 0, result.stderr
    table = latency_table.read(tmp_path / "table.json")
    blocks = {name for name in table["entries"] if name.endswith("splits4")}
    assert blocks and set(table["shares"]) == blocks
    assert all(0.5 < share < 1 for share in table["shares"].values())
    proof = table["proof"]
    assert len(proof["shares"]) == proof["networks"]
    assert f"XNNPACK ran only a part of {len(blocks)} measured entries, at worst" in result.stdout


def test_a_table_of_an_earlier_version_is_read(tmp_path, table):
    content = json.loads(table.read_text())
    del content["shares"]
    phone = {"kind": "adb", "name": "Pixel 8", "threads": 1, "gpu": True}
    (tmp_path / "old.json").write_text(json.dumps(content | {"device": phone}))
    read = latency_table.read(tmp_path / "old.json")
    del phone["gpu"]
    assert read["device"] == phone | {"core_mask": "", "delegate": "gpu"}
    assert read["shares"] == {}


@pytest.fixture
def phone(tmp_path):
    """A stand-in for adb on the PATH, and the flags of the phone behind it."""
    adb = tmp_path / "bin" / "adb"
    adb.parent.mkdir()
    adb.write_text(ADB)
    adb.chmod(adb.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "benchmark_model").write_text("binary")
    (tmp_path / "output.txt").write_text(OUTPUT)
    environment = {
        "PATH": f"{adb.parent}:{os.environ['PATH']}",
        "ADB_LOG": str(tmp_path / "adb.log"),
        "ADB_OUTPUT": str(tmp_path / "output.txt"),
    }
    flags = ["--device=adb", f"--benchmark_model={tmp_path}/benchmark_model", "--core_mask=f0"]
    return flags, environment


@pytest.mark.slow
def test_a_table_of_a_phone_goes_on_where_the_phone_went_away(folder, tmp_path, phone):
    flags, environment = phone
    output = tmp_path / "phone.json"
    flags = [f"--space={folder / 'small.json'}", f"--output={output}", *FLAGS, *flags, "--rounds=1"]
    result = measure(*flags, **environment, FAIL="late")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last == "error: the phone does not answer: error: device offline"
    assert sum(map(len, latency_table.read(output)["measured"].values())) == 7
    with pytest.raises(ValueError, match="is not finished"):
        LatencyCost(output)
    result = measure(*flags, **environment)
    assert result.returncode == 0, result.stderr
    content = latency_table.read(output)
    assert content["device"]["name"] == "Pixel 8"
    assert set(map(tuple, content["measured"].values())) == {(1.498,)}
    runs = [line for line in (tmp_path / "adb.log").read_text().splitlines() if "--graph" in line]
    assert sum("networks" not in line for line in runs[:8]) == 8
    assert "taskset f0" in runs[0] and "--use_xnnpack=true --use_gpu=false" in runs[0]
    # 7 entries and the failure, then the other 5 and all networks twice.
    assert (len(runs) - 8 - 5) % 2 == 0 and len(runs) > 13 + 2 * content["proof"]["networks"]


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        ("none", "the phone does not answer: error: no devices/emulators found"),
        ("unauthorized", "Otherwise check for a confirmation dialog on your device."),
        ("push", "failed to copy: remote No space left on device"),
        ("crash", "Segmentation fault"),
        ("garbage", "benchmark_model gave no time for"),
    ],
)
def test_what_goes_wrong_with_a_phone_is_said_in_a_line(
    fail, message, tmp_path, phone, monkeypatch
):
    _, environment = phone
    for name, value in (environment | {"FAIL": fail}).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "0.tflite").write_bytes(b"0")
    with pytest.raises(ValueError) as error:
        phone = devices.Adb(str(tmp_path / "benchmark_model"), serial="X1")
        list(phone.round({"0": tmp_path / "0.tflite"}, seed=0))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_adb_that_is_not_there(tmp_path, monkeypatch):
    (tmp_path / "benchmark_model").write_text("binary")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="adb is not installed"):
        devices.Adb(str(tmp_path / "benchmark_model"))
    with pytest.raises(ValueError, match="`benchmark_model` must be"):
        devices.Adb(str(tmp_path / "nothing"))


def test_times_in_the_output_of_benchmark_model():
    assert devices.parse_benchmark(OUTPUT, "x") == 1.498
    older = "count=50 first=32891 curr=33978 min=32641 max=34005 avg=33209.4 std=450\n"
    older += "Inference timings in us: Init: 855, Warmup (avg): 34825.1, Inference (avg): 33209.4"
    assert devices.parse_benchmark(older, "x") == 33.2094
    of_2019 = "count=7 first=127425 curr=66709 min=66709 max=127425 avg=76605.9 std=20944\n"
    of_2019 += "count=15 first=66753 curr=66800 min=66699 max=66838 avg=66767.6 std=39\n"
    of_2019 += "Average inference timings in us: Warmup: 76605.9, Init: 9933, no stats: 66767.6"
    assert devices.parse_benchmark(of_2019, "x") == 66.7676
    thousands = "Inference timings in us: Init: 1, Warmup (avg): 2, Inference (avg): 1.2e+06"
    assert devices.parse_benchmark(thousands, "x") == 1200
    with pytest.raises(ValueError, match="gave no time for x: nothing"):
        devices.parse_benchmark("", "x")
    with pytest.raises(ValueError, match="gave no time for x: count=7"):  # only the warm-up's
        devices.parse_benchmark(of_2019.splitlines()[0], "x")


@pytest.mark.parametrize("value", ["0", "nan", "inf", "-nan"])
def test_a_time_that_is_none_is_refused(value):
    with pytest.raises(UserError, match=r"the time of x must be a number above 0|gave no time"):
        devices.parse_benchmark(f"Inference timings in us: Inference (avg): {value}", "x")


REPLACING = (
    "INFO: Replacing {} out of {} node(s) with delegate ({}) node, yielding {} partitions for the "
    "whole graph.\n"
)
APPLIED = "Explicitly applied {} delegate, and the model graph will be {} executed by the delegate"


@pytest.mark.parametrize(
    ("text", "delegate", "share"),
    [
        (APPLIED.format("GPU", "completely"), "gpu", 1.0),
        (APPLIED.format("GPU", "partially") + " w/ 2 delegate kernels.", "gpu", None),
        (
            REPLACING.format(30, 40, "TfLiteGpuDelegateV2", 2)
            + REPLACING.format(10, 42, "TfLiteXNNPackDelegate", 1)
            + APPLIED.format("GPU", "partially"),
            "gpu",
            0.75,
        ),
        ("Applied GPU delegate.", "gpu", 1.0),
        (
            "INFO: Created TensorFlow Lite delegate for NNAPI.\nApplied NNAPI delegate.",
            "nnapi",
            1.0,
        ),
        (
            REPLACING.format(9, 10, "TfLiteNnapiDelegate", 1)
            + APPLIED.format("NNAPI", "partially"),
            "nnapi",
            0.9,
        ),
        (
            "Num threads: [4]\nINFO: Created TensorFlow Lite XNNPACK delegate for CPU.",
            "xnnpack",
            1.0,
        ),
        ("#threads used for CPU inference: [4]\nApplied XNNPACK delegate.", "xnnpack", 1.0),
    ],
)
def test_a_run_under_the_conditions_that_were_asked_for(text, delegate, share):
    assert devices.check_conditions(text, "x", 4, delegate) == share


@pytest.mark.parametrize(
    ("text", "said"),
    [("Cpus_allowed:\t0f", "0f"), ("Cpus_allowed:\t00000000,000000ff", "ff"), ("", "nothing")],
)
def test_other_cores_than_those_that_were_asked_for_are_refused(text, said):
    applied = "\nApplied XNNPACK delegate."
    assert devices.check_conditions("Cpus_allowed:\t0F0" + applied, "x", 1, "xnnpack", "f0") == 1
    with pytest.raises(UserError, match=rf"to run on the cores f0. The phone says: .*{said}"):
        devices.check_conditions(text + applied, "x", 1, "xnnpack", "f0")


@pytest.mark.parametrize(
    ("text", "delegate", "message"),
    [
        ("Num threads: [1]\nApplied GPU delegate.", "gpu", "on 4 threads. .* says: 1 threads"),
        ("INFO: Created TensorFlow Lite XNNPACK delegate for CPU.", "gpu", "GPU was to run x"),
        ("", "nnapi", "NNAPI was to run x"),
        ("", "xnnpack", "XNNPACK was to run x, and benchmark_model does not say"),
        ("XNNPACK delegate created.\nFailed to apply XNNPACK delegate.", "xnnpack", "Failed to"),
        (
            "GPU delegate created.\nThough GPU delegate is explicitly applied, the model graph "
            "will not be executed by the delegate.",
            "gpu",
            "GPU does not run x. benchmark_model says: Though GPU",
        ),
        ("GPU delegate is not supported on this platform.", "gpu", "not supported on this"),
        (
            "INFO: Created TensorFlow Lite XNNPACK delegate for CPU.\n"
            "ERROR: ModifyGraphWithDelegate is disallowed when graph is immutable.",
            "xnnpack",
            "is disallowed",
        ),
    ],
)
def test_a_run_that_was_elsewhere_is_refused(text, delegate, message):
    with pytest.raises(UserError, match=message):
        devices.check_conditions(text, "x", 4, delegate)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --space, or"),
        (["--space=mobile_mini"], "--space needs --output"),
        (["--architecture=a.json"], "--architecture needs --latency_table"),
        (["--space=mobile_mini", "--output=t.json", "--device=adb"], "needs --benchmark_model"),
        (["--space=no", "--output=t.json"], "`space` must be one of"),
        (["--space=no", "--output=t.json", "--threads=1,1"], "`threads` must be different numbers"),
        (["--space=no", "--output=t.json", "--threads=1,x"], "`threads` must be an integer from 1"),
        (["--architecture=a", "--latency_table=t", "--threads=1,2"], "needs one number of"),
        (["--space=no", "--output=t.json", "--delegate=gpu"], "--delegate: only for phones"),
        (
            [
                "--space=no",
                "--output=t.json",
                "--device=adb",
                "--benchmark_model=b",
                "--core_mask=x",
            ],
            "`core_mask` must be a hexadecimal number",
        ),
        (["--space=mobile_mini", "--output=no/t.json"], "existing folder"),
    ],
)
def test_bad_flags_are_refused(flags, message):
    result = measure(*flags)
    assert result.returncode != 0
    assert message in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("quantize", ["none", "float16", "dynamic", "int8", "qat"])
def test_parts_are_timed_in_each_format_that_export_writes(tmp_path, quantize):
    part = Part(Block(12, 3, 3, 1, "hard_silu", 1), (8, 8), 12)
    latency_parts.write_file(part, quantize, tmp_path / "part.tflite")
    content = (tmp_path / "part.tflite").read_bytes()
    operators = conversion.operators(content)
    # int8 files have other operators for hard swish, so that XNNPACK runs all of it.
    is_whole = quantize in ("int8", "qat")
    assert ("HARD_SWISH" in operators) != is_whole
    assert (conversion.float_operators(content) == {}) == is_whole
    if is_whole:
        assert conversion.interpreter_operators(content) == {}
    # The ends of a part are those of the parts beside it.
    assert "QUANTIZE" not in operators


def test_blocks_that_were_not_measured_follow_from_those_that_were():
    rng = np.random.default_rng(0)

    def draw():
        block = Block(
            int(rng.choice([16, 24, 32, 48])),
            int(rng.choice([3, 5])),
            float(rng.choice([1, 3, 4.5])),
            int(rng.choice([1, 2])),
            str(rng.choice(["relu", "hard_silu"])),
            int(rng.choice([0, 1])),
        )
        return Part(block, (16, 16), int(rng.choice([16, 24, 32])))

    def milliseconds(part):
        own = count_part(part)
        factor = 1.5 if part.layers.activation == "hard_silu" else 1.0
        return 0.01 + 1e-7 * own.macs * factor + 1e-6 * own.params

    parts = list(
        {latency_table.names(part)[0]: part for part in (draw() for _ in range(600))}.values()
    )
    times = np.array([milliseconds(part) for part in parts])
    model = LatencyModel(parts[100:], times[100:])
    errors = np.abs(model(parts[:100]) / times[:100] - 1)
    assert errors.mean() < 0.02
    assert model.error < 0.02


def test_a_table_that_was_begun_with_another_draw_is_refused(folder, tmp_path, phone):
    """Else some entries would have been measured less often than others, or never."""
    flags, environment = phone
    output = tmp_path / "phone.json"
    flags = [f"--space={folder / 'small.json'}", f"--output={output}", *FLAGS, *flags, "--rounds=1"]
    assert measure(*flags, **environment, FAIL="late").returncode == 1
    table = json.loads(output.read_text())
    table["measured"].popitem()
    output.write_text(json.dumps(table))
    result = measure(*flags, "--seed=1", **environment)
    assert result.returncode == 1
    assert "was begun with another `seed` or `max_entries`" in result.stderr.splitlines()[-1]


def test_some_blocks_are_measured_however_many_other_parts_there_are():
    settings = LatencySettings(space="fbnetv2_f", output="t.json", max_entries=50)
    parts = named_parts(spaces.get("fbnetv2_f", (64, 64, 3), 10))
    names = _draw_entries(settings, list(parts))
    blocks = [name for name in names if name.startswith("block")]
    assert len(blocks) == 50 < sum(name.startswith("block") for name in parts)
    assert {name for name in parts if not name.startswith("block")} < set(names)


def test_each_job_refuses_the_settings_of_the_other():
    with pytest.raises(UserError, match="`space` must be given to measure a table"):
        export.measure_latency(architecture="a.json", latency_table="t.json")
    with pytest.raises(UserError, match="`architecture` must be given to compare"):
        export.compare_latency(space="mobile_mini", output="t.json")


def test_a_network_of_the_package_is_compared_in_the_current_folder(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = LatencySettings(
        architecture="configs/architectures/mobilenet_v2.json", latency_table=table
    )
    assert _comparison_file(settings) == pathlib.Path("mobilenet_v2_latency.json")
    with pytest.raises(UserError, match=r"`quantize` must be that of .*, none"):
        _check_table(
            dataclasses.replace(settings, quantize="int8"), latency_table.read(table)["device"]
        )


def test_a_published_table_says_nothing_of_the_device(tmp_path):
    file = tmp_path / "table.json"
    file.write_text(json.dumps({"Conv-input:1x1x1-output:1x1x1": {"mean": 1.0}}))
    settings = LatencySettings(architecture="mobilenet_v2.json", latency_table=str(file))
    assert _check_table(settings, {"kind": "host"}) == "none"
    flags = [f"--latency_table={file}"]
    assert search._device_arguments(str(file), file).split() == flags


def test_conversions_that_have_not_begun_are_dropped_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), latency_parts.open_pool(1) as pool:
        jobs = [pool.submit(time.sleep, 0.1) for _ in range(100)]
        raise ZeroDivisionError
    assert sum(job.cancelled() for job in jobs) > 90


def test_architectures_of_a_table_that_lacks_their_parts(folder, table):
    space = spaces.get("mobile_mini", (16, 16, 1), 10)
    architecture: Architecture = space.architecture(np.zeros_like(space.cardinalities))
    architecture.save(folder / "other.json")
    result = measure(f"--architecture={folder / 'other.json'}", f"--latency_table={table}")
    assert result.returncode == 1
    assert f"{table} lacks stem 16x16x1 k3 f16" in result.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_build_for_a_phone(folder, tmp_path, phone):
    """`fpnas build` measures its table and its files on the phone."""
    flags, environment = phone
    directory = tmp_path / "build"
    result = run(
        "fpnas_keras.building.build",
        *("--data=digits", "--train_images=400", f"--space={folder / 'small.json'}"),
        *("--input_size=16", "--target=0.9ms", "--nobaseline", f"--output_dir={directory}"),
        *("--search.epochs=1", "--search.steps_per_epoch=2", "--search.ranked_samples=0"),
        *("--train.epochs=3", "--export.min_agreement=0", "--export.max_accuracy_drop=1"),
        *("--latency.rounds=1", "--latency.network_seconds=0", "--latency.proof_networks=5"),
        *("--latency.core_mask=f0", *flags[:2]),
        **environment,
        BY_SIZE="1",
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )
    assert result.returncode == 0, result.stderr
    summary = BuildRun(directory).summary
    assert (summary["device"], summary["milliseconds"]) == ("adb", summary["bytes"] // 10 / 1000)
    (table,) = (tmp_path / "cache" / "fpnas_keras").glob("small_*.json")
    assert latency_table.read(table)["device"]["name"] == "Pixel 8"
    assert (directory / "latency_table.json").read_bytes() == table.read_bytes()
