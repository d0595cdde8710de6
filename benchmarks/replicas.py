"""Throughput of two workers with one core each, compared with one worker with one core.

python benchmarks/replicas.py

It measures a search of `mobile_mini` at 32 pixels with batches of 64 images and 8 samples in a
step, by one worker and by two. Two independent searches, one on each core, show what the machine
allows. The settings run in turn, --repeats times, and the medians are compared. Finished rows are
appended to --output. A run that was interrupted continues from there.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any, ClassVar

import harness

from fpnas_keras.commands import run_command
from fpnas_keras.errors import UserError
from fpnas_keras.runs import SearchRun
from fpnas_keras.search import SearchSettings
from fpnas_keras.settings import setting

# Number of workers, and whether they work on one search.
KINDS = {
    "1 worker": (1, False),
    "2 workers": (2, True),
    "2 searches of their own, in sum": (2, False),
}
# In the first epochs, searches trace and meet their shapes for the first time.
UNTIMED_EPOCHS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplicasSettings(harness.BenchmarkSettings):
    """Settings of this benchmark."""

    SMOKE: ClassVar[Mapping[str, Any]] = {
        "repeats": 1,
        "space": str(harness.SMALL_SPACE),
        "input_size": 8,
        "batch_size": 2,
        "steps": 10,
        "epochs": UNTIMED_EPOCHS + 1,
        "samples": 2,
    }

    output: str = harness.output_setting("replicas.jsonl")
    repeats: int = setting("Runs of each.", 2, least=1)
    space: str = setting("Space to search.", "mobile_mini", path=True)
    input_size: int = setting("Height and width of the images.", 32, least=1)
    batch_size: int = setting("Images in a batch.", 64, least=2)
    steps: int = setting("Steps in an epoch.", 15, least=1)
    epochs: int = setting("Epochs of a search.", 5, least=UNTIMED_EPOCHS + 1)
    samples: int = setting("Samples in a step.", 8, least=2)

    def search(self, output_dir: str, together: bool) -> SearchSettings:
        """The search of a worker.

        Args:
            output_dir: Its run directory.
            together: Whether all workers work on one search.
        """
        return SearchSettings(
            output_dir=output_dir,
            space=self.space,
            input_size=self.input_size,
            batch_size=self.batch_size,
            epochs=self.epochs,
            steps_per_epoch=self.steps,
            samples=self.samples,
            # The logits hardly change: all steps draw networks of the same sizes.
            architecture_learning_rate=1e-6,
            warmup_steps=1,
            checkpoint_every="999s",
            ranked_samples=0,
            strategy="multiworker" if together else "none",
        )


def measure(settings: ReplicasSettings, workers: int, together: bool) -> float:
    """Samples per second, without the first epochs.

    Args:
        settings: The settings.
        workers: Number of workers, with one core each.
        together: Whether they work on one search, or each on its own.
    """
    cores = len(os.sched_getaffinity(0))
    if cores < workers:  # They would wait for each other.
        raise UserError(f"{workers} workers need as many cores. Received: {cores} core(s)")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as logs:
        addresses = [f"localhost:{_find_free_port()}" for _ in range(workers)]
        outputs = [f"{folder}/run_{0 if together else index}" for index in range(workers)]
        processes = []
        for index, core in zip(range(workers), sorted(os.sched_getaffinity(0))):
            task = {"type": "worker", "index": index}
            config = json.dumps({"cluster": {"worker": addresses}, "task": task})
            search = settings.search(outputs[index], together)
            log = logs.enter_context(pathlib.Path(folder, f"log_{index}").open("w"))
            process = subprocess.Popen(
                ["taskset", "-c", str(core), sys.executable, *harness.search_job(search).arguments],
                env=os.environ | ({"TF_CONFIG": config} if together else {}),
                cwd=harness.ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            processes.append(process)
        codes = [process.wait() for process in processes]
        if any(codes):
            texts = [pathlib.Path(folder, f"log_{i}").read_text()[-2000:] for i in range(workers)]
            raise RuntimeError(f"a worker of {workers} failed:\n" + "\n".join(texts))
        return sum(_samples_per_second(settings, output) for output in set(outputs))


def _find_free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _samples_per_second(settings, output):
    seconds = SearchRun(output).column("seconds")
    samples = settings.samples * settings.steps * (settings.epochs - UNTIMED_EPOCHS)
    return float(samples / (seconds[-1] - seconds[UNTIMED_EPOCHS - 1]))


def report(rows: Mapping[str, harness.Row]) -> None:
    """Prints the table."""
    print("| | samples per second | median | ratio |\n|---|---|---|---|")
    one = None
    for kind in KINDS:
        values = [row["samples_a_second"] for row in rows.values() if row["setting"] == kind]
        median = statistics.median(values)
        one = one or median
        listed = " ".join(f"{value:.1f}" for value in values)
        print(f"| {kind} | {listed} | {median:.1f} | {median / one:.2f} |")


def run(settings: ReplicasSettings) -> None:
    """Runs the settings that have no row yet, and reports."""
    rows = harness.finished(settings.output, "name")
    for repeat in range(settings.repeats):
        for kind, (workers, together) in KINDS.items():
            name = f"{kind}, run {repeat}"
            if name not in rows:
                value = measure(settings, workers, together)
                rows[name] = {"name": name, "setting": kind, "samples_a_second": value}
                harness.append(settings.output, rows[name])
    report(rows)


COMMAND = harness.make_command(__file__, __doc__, ReplicasSettings, run)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
