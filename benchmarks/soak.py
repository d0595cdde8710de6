"""2,000 steps of a search in one process: memory, time and traces must not grow.

python benchmarks/soak.py

The numbers are written to --output.
"""

import json
import os
import pathlib
import statistics
import time

import keras
import tensorflow as tf
from absl import app, flags

import fpnas_keras as fpnas

FLAGS = flags.FLAGS
flags.DEFINE_string("output", "benchmarks/soak.json", "File of the numbers.")
flags.DEFINE_integer("steps", 2000, "Steps of the search.", lower_bound=1000)


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


def main(_: list[str]) -> None:
    """Searches and prints one table."""
    images = fpnas.data.load("digits", "train", 8)
    batches = fpnas.data.search_batches(images.x, images.y, 32, steps_per_epoch=200)
    space = fpnas.spaces.get("mobile_mini", (8, 8, 1), 10)
    # A fixed number of samples from the first step on, so that the steps can be compared.
    search = fpnas.ArchitectureSearch(
        space, samples=4, cost=fpnas.MacsCost(target=1e5), warmup_steps=0
    )
    # Logits that stand still: later steps draw networks of the same sizes.
    search.compile(keras.optimizers.SGD(0.05), keras.optimizers.Adam(0.0))
    traces, train_step = [], search.train_step
    search.train_step = lambda data: traces.append(0) or train_step(data)
    watch = Watch()
    search.fit(batches, epochs=FLAGS.steps // 200, verbose=2, shuffle=False, callbacks=[watch])
    early, late = watch.seconds[200:400], watch.seconds[-200:]
    row = {
        "steps": FLAGS.steps,
        "megabytes_after_200": round(statistics.median(watch.megabytes[190:210])),
        "megabytes_at_the_end": round(statistics.median(watch.megabytes[-20:])),
        "milliseconds_200_to_400": round(1e3 * statistics.median(early), 2),
        "milliseconds_last_200": round(1e3 * statistics.median(late), 2),
        "traces": len(traces),
        "tensorflow": tf.__version__,
    }
    memory = row["megabytes_at_the_end"] / row["megabytes_after_200"]
    seconds = row["milliseconds_last_200"] / row["milliseconds_200_to_400"]
    row |= {"memory_ratio": round(memory, 4), "time_ratio": round(seconds, 3)}
    print("\n| | |\n|---|---|\n" + "\n".join(f"| {key} | {row[key]} |" for key in row))
    pathlib.Path(FLAGS.output).write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
