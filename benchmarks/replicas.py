"""Throughput of two workers with one core each against one worker with one core.

python benchmarks/replicas.py

A search of `mobile_mini` at 32 pixels, batch 64, 8 samples a step; and two searches that have
nothing to do with each other, one a core, which is what the machine allows. The settings run in
turn, --repeats times; medians. Rows are appended to --output.
"""

import csv
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile

import harness
from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_integer("repeats", 3, "Runs of each.", lower_bound=1)
flags.DEFINE_string("output", "benchmarks/replicas.jsonl", "File of the finished rows.")

STEPS, EPOCHS, SAMPLES = 15, 5, 8
SEARCH = [
    *("-m", "fpnas_keras.search", "--space=mobile_mini", "--input_size=32", "--batch_size=64"),
    *(f"--epochs={EPOCHS}", f"--steps_per_epoch={STEPS}", f"--samples={SAMPLES}"),
    # Logits that hardly move: all steps draw networks of the same sizes.
    *("--architecture_learning_rate=1e-6", "--warmup_steps=1", "--checkpoint_every=999s"),
    *("--ranked_samples=0",),
]


def samples_a_second(workers: int, together: bool) -> float:
    """Of the epochs after the first two, which trace and meet their shapes for the first time.

    Args:
        workers: Number of workers, one core each.
        together: Whether they share out the samples of one search, or each searches on its own.
    """
    with tempfile.TemporaryDirectory() as directory:
        addresses = []
        for _ in range(workers):
            with socket.socket() as free:
                free.bind(("localhost", 0))
                addresses.append(f"localhost:{free.getsockname()[1]}")
        outputs = [f"{directory}/run_{0 if together else index}" for index in range(workers)]
        processes = []
        for index, core in zip(range(workers), sorted(os.sched_getaffinity(0))):
            task = {"type": "worker", "index": index}
            config = json.dumps({"cluster": {"worker": addresses}, "task": task})
            command = [sys.executable, *SEARCH, f"--output_dir={outputs[index]}"]
            command += ["--strategy=multiworker"] if together else []
            process = subprocess.Popen(
                ["taskset", "-c", str(core), *command],
                env=os.environ | ({"TF_CONFIG": config} if together else {}),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            processes.append(process)
        codes = [process.wait() for process in processes]
        if any(codes):
            raise RuntimeError(f"a worker of {workers} failed")
        return sum(map(_samples_a_second_of, set(outputs)))


def _samples_a_second_of(directory):
    with open(f"{directory}/metrics.csv") as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    return SAMPLES * STEPS * (EPOCHS - 2) / (seconds[-1] - seconds[1])


SETTINGS = {
    "1 worker": (1, False),
    "2 workers": (2, True),
    "2 searches of their own, in sum": (2, False),
}


def main(_: list[str]) -> None:
    """Runs what is not yet in the output."""
    rows = harness.finished(FLAGS.output, "name")
    for repeat in range(FLAGS.repeats):
        for setting, arguments in SETTINGS.items():
            name = f"{setting}, run {repeat}"
            if name not in rows:
                value = {"setting": setting, "samples_a_second": samples_a_second(*arguments)}
                rows[name] = {"name": name, **value}
                harness.append(FLAGS.output, rows[name])
    print("| | samples a second | median | ratio |\n|---|---|---|---|")
    one = None
    for setting in SETTINGS:
        values = [row["samples_a_second"] for row in rows.values() if row["setting"] == setting]
        median = statistics.median(values)
        one = one or median
        listed = " ".join(f"{value:.1f}" for value in values)
        print(f"| {setting} | {listed} | {median:.1f} | {median / one:.2f} |")


if __name__ == "__main__":
    app.run(main)
