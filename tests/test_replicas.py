"""Several replicas that evaluate the samples of a step: the result is that of one process."""

import json
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
import tensorflow as tf
from helpers import ROOT, SMALL_SPACE, environment, run
from hypothesis import given
from hypothesis import strategies as st

from fpnas_keras.errors import UserError
from fpnas_keras.method.replicas import make_strategy, own_share, worker_failures
from fpnas_keras.method.strategies import WorkerLostError, is_chief

SEARCH = ["fpnas_keras.search", "--input_size=16", "--epochs=3", "--steps_per_epoch=4"]
SEARCH += ["--batch_size=16", "--cost=macs", "--target=60e3", "--samples=5", "--warmup_steps=3"]
SEARCH += ["--distribution=coarse_to_fine", "--coarse_epochs=2", "--learning_rate=0.001"]


def test_a_strategy_of_several_workers_needs_a_new_process(monkeypatch):
    def refuse():
        raise RuntimeError("Collective ops must be configured at program startup")

    monkeypatch.setattr(tf.distribute, "MultiWorkerMirroredStrategy", refuse)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(UserError, match=r"start a new process\. \(Collective ops must be"):
        make_strategy("multiworker")
    assert signal.getsignal(signal.SIGTERM) is handler


@given(st.lists(st.integers(1, 10**9), max_size=40), st.integers(1, 8))
def test_each_sample_is_one_replicas_and_the_work_is_even(work, replicas):
    shares = [
        own_share(tf.constant(work, tf.float64), r, replicas).numpy() for r in range(replicas)
    ]
    assert sorted(np.concatenate(shares)) == list(range(len(work)))
    assert all(map(len, shares)) or len(work) < replicas
    sums = [sum(work[index] for index in share) for share in shares]
    assert max(sums) - min(sums) <= max(work, default=0)


def test_the_work_is_even():
    """Back and forth by size would give 15 and 9."""
    work = tf.constant([4.0, 8.0, 3.0, 5.0, 4.0], tf.float64)
    shares = [own_share(work, replica, 2).numpy().tolist() for replica in range(2)]
    assert shares == [[1, 4], [3, 0, 2]]


# Needs two logical devices, which must be configured before TensorFlow starts: a new process.
MIRRORED = """
import sys
import keras, numpy as np, tensorflow as tf
sys.path[:0] = ["tests"]
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from helpers import make_tiny_space
import fpnas_keras as fpnas

x, y = np.random.default_rng(0).uniform(0, 255, (60, 8, 8, 1)), np.arange(60) % 3
two = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
weights, rows = [], []
for strategy in (None, two):
    # With 1 sample in the warm-up one of the replicas has none.
    for optimizer in (keras.optimizers.SGD(0.01, momentum=0.9), keras.optimizers.AdamW(1e-4)):
        keras.utils.set_random_seed(0)
        search = fpnas.ArchitectureSearch(
            make_tiny_space(blocks=1), samples=5, cost=fpnas.MacsCost(target=20_000),
            warmup_steps=2, warmup_samples=1, distribution="coarse_to_fine", strategy=strategy,
        )
        search.compile(optimizer, keras.optimizers.Adam(0.03))
        batches = fpnas.data.search_batches(x.astype("float32"), y, 10, steps_per_epoch=3)
        history = search.fit(
            batches, epochs=3, callbacks=[fpnas.CoarseToFine(2)], verbose=0, shuffle=False
        )
        weights.append([v.numpy() for v in search.variables])
        rows.append(np.array(list(history.history.values())))
for one, several, one_row, several_row in zip(weights[:2], weights[2:], rows[:2], rows[2:]):
    print(max(np.abs(a.astype(float) - b).max() for a, b in zip(one, several)))
    print((np.abs(one_row - several_row) / np.maximum(1, np.abs(one_row))).max())
"""


@pytest.mark.slow
def test_two_replicas_on_one_machine_are_one_process_to_rounding():
    result = subprocess.run(
        [sys.executable, "-c", MIRRORED], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    differences = [float(line) for line in result.stdout.splitlines()[-4:]]
    assert max(differences) < 1e-3, differences


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    """The arguments of a search of a small space."""
    file = tmp_path_factory.mktemp("space") / "small.json"
    file.write_text(json.dumps(SMALL_SPACE))
    return [*SEARCH, f"--space={file}"]


def start(search, directory, *arguments):
    """Starts two workers on this machine."""
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            ports.append(free.getsockname()[1])
    workers = [f"localhost:{port}" for port in ports]
    processes = []
    for index in range(2):
        task = {"type": "worker", "index": index}
        config = json.dumps({"cluster": {"worker": workers}, "task": task})
        command = [*search, "--strategy=multiworker", f"--output_dir={directory}", *arguments]
        with open(f"{directory}.{index}.log", "a") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", *command],
                    env=environment(TF_CONFIG=config),
                    stdout=log,
                    stderr=log,
                )
            )
    return processes


def logs(directory):
    return [pathlib.Path(f"{directory}.{index}.log").read_text() for index in range(2)]


def weights_of(directory):
    found = {}
    with h5py.File(directory / "search.weights.h5") as file:
        file.visititems(
            lambda name, each: (
                found.update({name: each[()]}) if isinstance(each, h5py.Dataset) else None
            )
        )
    return found


@pytest.fixture(scope="module")
def two(search, tmp_path_factory):
    """The directory of a finished search by two workers."""
    directory = tmp_path_factory.mktemp("two") / "run"
    codes = [process.wait(timeout=500) for process in start(search, directory)]
    assert codes == [0, 0], logs(directory)
    return directory


def test_two_workers_find_what_one_process_finds(search, two, tmp_path):
    result = run(*search, f"--output_dir={tmp_path}/one")
    assert result.returncode == 0, result.stderr
    one = tmp_path / "one"
    assert (one / "architecture.json").read_text() == (two / "architecture.json").read_text()
    ours, theirs = weights_of(one), weights_of(two)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], atol=2e-3, err_msg=name)
    # The chief alone writes and reports.
    assert re.search(r"next, train it", logs(two)[0])
    assert "next, train it" not in logs(two)[1]


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_job_and_all_go_on_together(search, two, tmp_path):
    directory = tmp_path / "run"
    processes = start(search, directory, "--checkpoint_every=1")
    while not (directory / "checkpoints" / "step_6.ckpt").exists():
        assert [process.poll() for process in processes] == [None, None], logs(directory)
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGKILL)
    died = time.monotonic()
    assert processes[0].wait(timeout=60) == 128 + signal.SIGUSR1, logs(directory)
    print(f"the other worker ended after {time.monotonic() - died:.0f} s")
    message = "another worker cannot be reached any more. Start all workers again"
    assert message in logs(directory)[0]
    assert "Traceback" not in logs(directory)[0]
    assert not (directory / "summary.json").exists()

    codes = [process.wait(timeout=500) for process in start(search, directory)]
    assert codes == [0, 0], logs(directory)
    assert "continuing after step" in logs(directory)[1]
    for name in ("architecture.json", "search.weights.h5"):
        assert (directory / name).read_bytes() == (two / name).read_bytes()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("", "Received: none"),
        ("{", "Received: {"),
        ("[]", "Received: []"),
        ('{"cluster": {"worker": ["a"]}, "task": {"type": "worker", "index": 0}}', "not host:port"),
        ('{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}', "index is 1"),
        ('{"cluster": {"ps": ["a:1"]}, "task": {"type": "ps", "index": 0}}', "type is 'ps'"),
    ],
)
def test_a_bad_cluster_is_refused(monkeypatch, config, message):
    monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(ValueError, match="needs the environment variable TF_CONFIG") as caught:
        is_chief("multiworker")
    assert message in str(caught.value)


def test_one_replica_is_no_strategy():
    assert make_strategy("none") is None
    assert make_strategy("mirrored") is None  # one CPU
    assert is_chief("none")


@pytest.mark.parametrize(
    ("kind", "index", "cluster", "chief"),
    [
        ("worker", 0, ["worker"], True),
        ("worker", 1, ["worker"], False),
        ("chief", 0, ["chief", "worker"], True),
        ("worker", 0, ["chief", "worker"], False),
    ],
)
def test_one_of_all_workers_writes(monkeypatch, kind, index, cluster, chief):
    config = {"cluster": {each: ["a:1", "b:1"] for each in cluster}}
    config["task"] = {"type": kind, "index": index}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    assert is_chief("multiworker") == chief


def test_errors_of_a_lost_worker_are_named_under_several_workers_only(monkeypatch):
    error = tf.errors.UnavailableError(None, None, "Socket closed\nand more")
    with pytest.raises(tf.errors.UnavailableError), worker_failures(None):
        raise error
    with pytest.raises(tf.errors.UnavailableError), worker_failures(tf.distribute.get_strategy()):
        raise error

    class Several:
        """A real one waits for its workers."""

    monkeypatch.setattr(tf.distribute, "MultiWorkerMirroredStrategy", Several)
    with (
        pytest.raises(
            WorkerLostError, match=r"worker cannot be reached.*\(Socket closed\)$"
        ) as raised,
        worker_failures(Several()),
    ):
        raise error
    assert raised.value.exit_code == 128 + signal.SIGUSR1
    assert "\n" not in str(raised.value)
    with pytest.raises(tf.errors.InvalidArgumentError), worker_failures(Several()):
        raise tf.errors.InvalidArgumentError(None, None, "no worker's fault")


def test_strategies_load_without_tensorflow():
    code = "import sys, fpnas_keras.method.strategies; print('tensorflow' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr
