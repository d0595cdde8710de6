"""2,000 steps of a search in one process: memory, time and traces must not grow.

python benchmarks/soak.py

The numbers are written to --output.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import harness
import keras
import tensorflow as tf

import fpnas_keras as fpnas
from fpnas_keras.commands import run_command
from fpnas_keras.errors import UserError
from fpnas_keras.settings import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoakSettings(harness.BenchmarkSettings):
    """Settings of this benchmark."""

    SMOKE: ClassVar[Mapping[str, Any]] = {
        "steps": 5,
        "window": 1,
        "space": str(harness.SMALL_SPACE),
    }

    output: str = harness.output_setting("soak.json")
    space: str = setting("Space to search.", "mobile_mini", path=True)
    steps: int = setting("Steps of the search.", 2000, least=1)
    window: int = setting(
        "Steps that are compared at the start, after as many others, and at the end. They "
        "are also the steps of an epoch.",
        200,
        least=1,
    )

    def check(self) -> None:
        """Raises `UserError` when there are too few steps to compare."""
        if self.steps < 5 * self.window:
            raise UserError(
                f"`steps` must be at least 5 times `window`. Received: steps={self.steps}, "
                f"window={self.window}"
            )


class Watch(keras.callbacks.Callback):
    """Notes memory and time of every step."""

    def __init__(self):
        super().__init__()
        self.megabytes, self.seconds = [], []

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        resident = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        self.megabytes.append(resident * os.sysconf("SC_PAGE_SIZE") / 2**20)


def run(settings: SoakSettings) -> None:
    """Searches, prints the numbers and writes them."""
    window = settings.window
    images = fpnas.data.load("digits", "train", 8)
    batches = fpnas.data.search_batches(images.x, images.y, 32, steps_per_epoch=window)
    space = fpnas.spaces.get(settings.space, (8, 8, 1), 10)
    # A fixed number of samples from the first step on, so that the steps can be compared.
    search = fpnas.ArchitectureSearch(
        space, samples=4, cost=fpnas.MacsCost(target=1e5), warmup_steps=0
    )
    # The logits do not change, so that later steps draw networks of the same sizes.
    search.compile(keras.optimizers.SGD(0.05), keras.optimizers.Adam(0.0))
    traces, train_step = [], search.train_step
    search.train_step = lambda data: traces.append(0) or train_step(data)
    watch = Watch()
    epochs = settings.steps // window
    search.fit(batches, epochs=epochs, verbose=2, shuffle=False, callbacks=[watch])
    early, late = watch.seconds[window : 2 * window], watch.seconds[-window:]
    around = max(1, window // 20)
    row = {
        "steps": settings.steps,
        "megabytes_after_200": round(
            statistics.median(watch.megabytes[window - around : window + around])
        ),
        "megabytes_at_the_end": round(statistics.median(watch.megabytes[-2 * around :])),
        "milliseconds_200_to_400": round(1e3 * statistics.median(early), 2),
        "milliseconds_last_200": round(1e3 * statistics.median(late), 2),
        "traces": len(traces),
        "tensorflow": tf.__version__,
    }
    memory = row["megabytes_at_the_end"] / row["megabytes_after_200"]
    seconds = row["milliseconds_last_200"] / row["milliseconds_200_to_400"]
    row |= {"memory_ratio": round(memory, 4), "time_ratio": round(seconds, 3)}
    print("\n| | |\n|---|---|\n" + "\n".join(f"| {key} | {row[key]} |" for key in row))
    pathlib.Path(settings.output).write_text(json.dumps(row, indent=1) + "\n")


COMMAND = harness.make_command(__file__, __doc__, SoakSettings, run)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
