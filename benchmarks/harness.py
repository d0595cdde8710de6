"""What the benchmarks of speed and memory share: noise, timing in turn, rows in a file."""

import json
import os
import pathlib
import queue
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import keras
import tensorflow as tf
from absl import app, flags

import fpnas_keras as fpnas
from fpnas_keras.method.estimator import Samples

Batch = tuple[tf.Tensor, tf.Tensor]

ROOT = pathlib.Path(__file__).parents[1]
# The short protocol's images, as the command lines take them.
FASHION_MNIST = ("--data=tfds:fashion_mnist", "--nodownload", "--train_images=10000")
# Image size and batch size that each space is measured with.
SIZES = {"mobile_mini": (32, 64), "fbnetv2_f": (128, 32)}


def get_space(name: str) -> fpnas.spaces.Space:
    """A space at its size of `SIZES`, with 10 classes."""
    size = SIZES[name][0]
    return fpnas.spaces.get(name, (size, size, 3), 10)


def noise(space: fpnas.spaces.Space, size: int, seed: int) -> Batch:
    """Noise with labels: the time and the memory are those of any images."""
    x = tf.random.stateless_uniform((size, *space.input_shape), (seed, 0), 0, 255)
    return x, tf.range(size) % space.num_classes


def timed_in_turn(
    runs: dict[str, Callable[[], object]], repeats: int, untimed: int = 1
) -> dict[str, list[float]]:
    """Seconds of each of several functions that are called in turn.

    Args:
        runs: The functions by name; each returns when its work is done.
        repeats: Timed calls of each.
        untimed: Calls before those: the first one traces, or meets its shapes for the first time.
    """
    seconds = {name: [] for name in runs}
    for repeat in range(untimed + repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat >= untimed:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def in_turn(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each of several functions that are called in turn."""
    return {name: statistics.median(s) for name, s in timed_in_turn(runs, repeats).items()}


def keras_step(model: keras.Model, batch: Batch) -> Callable[[], object]:
    """A step of Keras' own `fit` of a model."""
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=False)
    model.make_train_function()
    batches = iter(tf.data.Dataset.from_tensors(batch).repeat())
    return lambda: model.train_function(batches)["loss"].numpy()


def sample_steps(
    search: fpnas.ArchitectureSearch, batch: Batch, copies: int
) -> Callable[[tf.Tensor], object]:
    """From choices to the weight half of a search step that samples them `copies` times."""

    @tf.function
    def run(choices):
        drawn = Samples.each(tf.repeat(choices[None], copies, axis=0))
        gradients, results = search.weight_gradients(drawn, batch)
        return [*gradients, results]

    return lambda choices: run(choices)[-1].numpy()


def finished(output: str, key: str = "job") -> dict[str, dict]:
    """The rows of a file by what each has under `key`."""
    path = pathlib.Path(output)
    lines = path.read_text().splitlines() if path.exists() else []
    return {row[key]: row for row in map(json.loads, lines)}


def append(output: str, row: dict) -> None:
    """Adds a row to a file of finished rows."""
    with pathlib.Path(output).open("a") as file:
        file.write(json.dumps(row) + "\n")


def run_jobs(
    script: str,
    jobs: dict[str, Callable[[], dict]],
    report: Callable[[dict[str, dict]], None],
) -> None:
    """The command line of a benchmark whose jobs run one after the other, each in a process.

    Args:
        script: `__file__` of the benchmark; its rows go into a `.jsonl` file of that name.
        jobs: By name, what makes a row.
        report: Prints all rows, by job.
    """
    flags.DEFINE_enum("job", None, list(jobs), "Run this job alone and print its row.")
    output = f"benchmarks/{pathlib.Path(script).stem}.jsonl"
    flags.DEFINE_string("output", output, "File of the finished rows.")

    def main(_):
        if flags.FLAGS.job:
            print(json.dumps(jobs[flags.FLAGS.job]()))
        else:
            report(_in_processes(script, jobs, flags.FLAGS.output))

    app.run(main)


def _in_processes(script, jobs, output):
    rows = finished(output)
    for job in jobs:
        if job not in rows:
            print(f"{job} ...", flush=True)
            done = subprocess.run(
                [sys.executable, script, f"--job={job}"],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            rows[job] = {"job": job, **json.loads(done.stdout.splitlines()[-1])}
            append(output, rows[job])
    return rows


def on_cores(
    phases: Iterable[dict[str, list[str]]],
    run: Callable[[str, list[str], int], dict],
    output: str,
) -> dict[str, dict]:
    """Runs the commands that are not in the output yet, one on each core at a time.

    Args:
        phases: Commands by name; those of a phase need nothing but earlier phases.
        run: From name, command and core to the row of a job.
        output: File that finished rows are appended to.

    Returns:
        The rows by name.
    """
    rows = finished(output, "name")
    cores = queue.SimpleQueue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)

    def work(item):
        name, command = item
        core = cores.get()
        try:
            rows[name] = {"name": name, **run(name, command, core)}
        finally:
            cores.put(core)
        append(output, rows[name])
        print(f"finished: {name}", flush=True)

    with ThreadPoolExecutor(cores.qsize()) as pool:
        for phase in phases:
            list(pool.map(work, [item for item in phase.items() if item[0] not in rows]))
    return rows


class Runs:
    """Runs the project's command lines for `on_cores`, each in a run directory of its own.

    Args:
        work_dir: Folder of the run directories, made here.
        data_dir: Where tensorflow_datasets keeps its data.
    """

    def __init__(self, work_dir: str, data_dir: str):
        self.work_dir = pathlib.Path(work_dir).absolute()
        self.data_dir = pathlib.Path(data_dir).absolute()
        self.work_dir.mkdir(parents=True, exist_ok=True)

    def directory(self, name: str) -> pathlib.Path:
        """Run directory of a job."""
        return self.work_dir / name.replace(" ", "_")

    def __call__(self, name: str, command: list[str], core: int) -> dict:
        """Runs a module with flags on one core; its summary, or a `RuntimeError`."""
        output_dir = self.directory(name)
        command = [sys.executable, "-m", *command, f"--output_dir={output_dir}"]
        command.append(f"--data_dir={self.data_dir}")
        log = output_dir.with_name(f"{output_dir.name}.log")
        shutil.rmtree(output_dir, ignore_errors=True)  # what a run that was cut has left
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
            os.sched_setaffinity(process.pid, {core})
            if process.wait():
                raise RuntimeError(f"{' '.join(command)} failed; see {log}")
        return json.loads((output_dir / "summary.json").read_text())


def run_phases(
    script: str,
    phases: Callable[[Runs], Iterable[dict[str, list[str]]]],
    report: Callable[[dict[str, dict]], None],
) -> None:
    """The command line of a benchmark whose jobs are the project's own, one on each core.

    Args:
        script: `__file__` of the benchmark; its rows go into a `.jsonl` file of that name.
        phases: From the runs to what `on_cores` takes.
        report: Prints all rows, by name.
    """
    from fpnas_keras import cli  # and its flags, --data_dir among them

    name = pathlib.Path(script).stem
    flags.adopt_module_key_flags(cli)
    flags.mark_flag_as_required("data_dir")
    flags.DEFINE_string("work_dir", f"runs/benchmark_{name}", "Folder of the run directories.")
    flags.DEFINE_string("output", f"benchmarks/{name}.jsonl", "File of the finished rows.")

    def main(_):
        runs = Runs(flags.FLAGS.work_dir, flags.FLAGS.data_dir)
        report(on_cores(phases(runs), runs, flags.FLAGS.output))

    app.run(main)
