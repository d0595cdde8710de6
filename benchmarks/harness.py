"""What the benchmarks share: settings, command lines, files of rows, jobs, and timing in turn."""

import dataclasses
import functools
import json
import os
import pathlib
import queue
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, NamedTuple, Self

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

import keras
import tensorflow as tf

import fpnas_keras as fpnas
from fpnas_keras.commands import Command
from fpnas_keras.errors import UserError
from fpnas_keras.method import Samples
from fpnas_keras.runs import RunDirectory
from fpnas_keras.search import SearchSettings, run_search
from fpnas_keras.settings import Settings, setting
from fpnas_keras.spaces import Space
from fpnas_keras.train import TrainSettings, run_training

Batch = tuple[tf.Tensor, tf.Tensor]
Row = dict[str, Any]

ROOT = pathlib.Path(__file__).parents[1]
# PARSEC (arXiv:1902.05116) as settings of a search. The number of samples is to be added.
PARSEC: Mapping[str, Any] = {
    "distribution": "joint",
    "start": "uniform",
    "cost_window": 0.0,
    "control_variate": False,
    "stratified": False,
    "deduplicate": False,
}
# What an environment for Keras Tuner holds.
KERAS_TUNER = ("keras-tuner==1.4.8", "tensorflow-cpu==2.21.0", "tensorboard")
# What the code of others runs with, besides the variables that are set.
OTHERS_VARIABLES = {"TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": "tensorflow"}
# Image size and batch size that each space is measured with.
SIZES = {"mobile_mini": (32, 64), "fbnetv2_f": (128, 32)}
# A space of two blocks, which replaces every other space in a smoke run.
SMALL_SPACE = ROOT / "benchmarks" / "small_space.json"


def output_setting(name: str) -> str:
    """The setting `output` of a benchmark, with a file of the folder `benchmarks` as default."""
    return setting("File of the finished rows.", f"benchmarks/{name}", basic=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkSettings(Settings):
    """Settings that all benchmarks have. Each is a flag.

    Subclasses give `output` a default, by `output_setting`.

    Attributes:
        SMOKE: The values of settings in a smoke run, unless they are given.
    """

    SMOKE: ClassVar[Mapping[str, Any]] = {}

    output: str = setting("File of the finished rows.", basic=True)
    smoke: bool = setting(
        "Whether to run everything once in the smallest size, on stand-in data, in this process. "
        "It shows within seconds that the benchmark works. The results mean nothing. They go to a "
        "temporary folder, unless --output is given.",
        False,
        basic=True,
    )

    def shrink(self, folder: pathlib.Path) -> Self:
        """The settings of the smoke run that these settings ask for.

        Args:
            folder: The temporary folder.
        """
        smallest = {"output": str(folder / pathlib.Path(self.output).name), **self.SMOKE}
        defaults = self.defaults()
        changes = {name: value for name, value in smallest.items() if name in defaults}
        return dataclasses.replace(self, **changes)


def make_command(
    script: str,
    documentation: str,
    settings: type[BenchmarkSettings],
    run: Callable[[Any], None],
) -> Command:
    """The command of a benchmark.

    Args:
        script: `__file__` of the benchmark.
        documentation: Its `__doc__`.
        settings: Class of its settings.
        run: Runs the benchmark and prints its tables.
    """
    name = f"python benchmarks/{pathlib.Path(script).name}"

    def start(given):
        if not given.smoke:
            run(given)
            return
        with tempfile.TemporaryDirectory() as folder:
            run(given.shrink(pathlib.Path(folder)))

    examples = [("Everything once, in seconds", f"{name} --smoke")]
    return Command(name, documentation.splitlines()[0], examples, settings, start)


# Files of rows


def read_rows(output: str | os.PathLike) -> list[Row]:
    """Reads a file of rows, one JSON object in each line. The file need not exist."""
    path = pathlib.Path(output)
    return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []


def finished(output: str | os.PathLike, key: str = "job") -> dict[str, Row]:
    """The rows of a file by what they have under `key`."""
    return {row[key]: row for row in read_rows(output)}


def append(output: str, row: Row) -> None:
    """Adds a row to a file of rows."""
    with pathlib.Path(output).open("a") as file:
        file.write(json.dumps(row) + "\n")


# Benchmarks whose jobs run one after the other, each in a process of its own


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobSettings(BenchmarkSettings):
    """Settings of a benchmark whose jobs run one after the other, each in a process."""

    job: str | None = setting("Run this job alone and print its row.", None)

    def get_space(self, name: str, image_size: int, num_classes: int = 10) -> Space:
        """A space for colored images. In a smoke run: the small space at 8 pixels."""
        if self.smoke:
            name, image_size = SMALL_SPACE, 8
        return fpnas.spaces.get(name, (image_size, image_size, 3), num_classes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedSettings(JobSettings):
    """Settings of a benchmark of time or memory. Noise is as good as images for it."""

    SMOKE: ClassVar[Mapping[str, Any]] = {"spaces": ("mobile_mini",), "repeats": 1}

    spaces: tuple[str, ...] = setting(
        f"Spaces to measure, separated by commas: {', '.join(SIZES)}.", tuple(SIZES)
    )
    repeats: int = setting("Timed calls of each function. The median counts.", 7, least=1)

    def check(self) -> None:
        """Raises `UserError` when a space has no size to be measured with."""
        unknown = [name for name in self.spaces if name not in SIZES]
        if unknown:
            raise UserError(
                f"`spaces` must be of {', '.join(SIZES)}. Received: spaces={','.join(unknown)}"
            )

    def measured_space(self, name: str) -> tuple[Space, int]:
        """A space and its batch size, as in `SIZES`."""
        image_size, batch_size = SIZES[name]
        return self.get_space(name, image_size), 2 if self.smoke else batch_size


def run_jobs(
    script: str,
    settings: JobSettings,
    jobs: Mapping[str, Callable[[], Row]],
    report: Callable[[dict[str, Row]], None],
) -> None:
    """Runs the jobs that have no row yet, and reports.

    Args:
        script: `__file__` of the benchmark.
        settings: Its settings.
        jobs: The functions that make the rows, by the names of the jobs.
        report: Prints the tables of the rows, which it gets by job.
    """
    if settings.job is not None:
        print(json.dumps(run_job(settings, jobs)))
        return
    rows = finished(settings.output)
    for job in jobs:
        if job not in rows:
            print(f"{job} ...", flush=True)
            row = measure_job(script, dataclasses.replace(settings, job=job), jobs)
            rows[job] = {"job": job, **row}
            append(settings.output, rows[job])
    report(rows)


def run_job(settings: JobSettings, jobs: Mapping[str, Callable[[], Row]]) -> Row:
    """The row of `settings.job`.

    Raises:
        UserError: When there is no such job.
    """
    if settings.job not in jobs:
        raise UserError(f"`job` must be one of {', '.join(jobs)}. Received: job={settings.job}")
    return jobs[settings.job]()


def measure_job(script: str, settings: JobSettings, jobs: Mapping[str, Callable[[], Row]]) -> Row:
    """The row of `settings.job`, measured in a new process; in a smoke run in this one."""
    if settings.smoke:
        return run_job(settings, jobs)
    command = [sys.executable, script, *settings.to_flags()]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


# Benchmarks whose jobs are searches and trainings, one on each core at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectSettings(BenchmarkSettings):
    """Settings of a benchmark of searches and trainings.

    The defaults are the short protocol of the documentation. The digits of scikit-learn replace
    Fashion-MNIST in a smoke run.
    """

    SMOKE: ClassVar[Mapping[str, Any]] = {
        "data": "digits",
        "train_images": 40,
        "space": str(SMALL_SPACE),
        "search_epochs": 2,
        "steps_per_epoch": 1,
        "batch_size": 8,
        "train_epochs": 1,
        "seeds": 1,
    }

    data_dir: str | None = setting(
        "Folder where tensorflow_datasets keeps its data. Default: ~/tensorflow_datasets.",
        None,
        basic=True,
    )
    work_dir: str | None = setting(
        "Folder of the run directories. Default: a folder in runs/, named after --output.",
        None,
        basic=True,
    )
    data: str = setting("Images to use.", "tfds:fashion_mnist")
    input_size: int = setting("Height and width of the images.", 28, least=1)
    train_images: int = setting("Number of training images.", 10_000, least=2)
    space: str = setting("Space to search.", "mobile_mini", path=True)
    target: float = setting("What the networks may cost.", 1.5e6, least=0)
    search_epochs: int = setting("Epochs of a search.", 15, least=1)
    steps_per_epoch: int = setting("Steps in an epoch of a search.", 100, least=1)
    batch_size: int | None = setting(
        "Images in a batch. Default: that of the command.", None, least=2
    )
    train_epochs: int = setting("Epochs of a training.", 20, least=1)
    seeds: int = setting("Repetitions with other seeds.", 3, least=1)

    def shrink(self, folder: pathlib.Path) -> Self:
        """The settings of the smoke run that these settings ask for."""
        smallest = super().shrink(folder)
        return dataclasses.replace(smallest, work_dir=self.work_dir or str(folder / "runs"))


class Job(NamedTuple):
    """Something that runs in a directory and leaves a summary there, which is its row.

    Attributes:
        arguments: What follows `python` to run it in a process.
        run: Runs it in this process.
        has_architecture: Whether its row also holds the architecture of the run.
    """

    arguments: list[str]
    run: Callable[[], object]
    has_architecture: bool = False


class Runs:
    """Makes searches and trainings that follow the settings of a benchmark, and runs them.

    Args:
        settings: The settings.
    """

    def __init__(self, settings: ProjectSettings):
        self.settings = settings
        name = pathlib.Path(settings.output).stem
        work_dir = settings.work_dir or ROOT / "runs" / f"benchmark_{name}"
        self.work_dir = pathlib.Path(work_dir).absolute()
        self.work_dir.mkdir(parents=True, exist_ok=True)

    def directory(self, name: str) -> pathlib.Path:
        """Run directory of a job."""
        return self.work_dir / name.replace(" ", "_")

    def architecture_file(self, name: str) -> pathlib.Path:
        """The architecture that a search finds."""
        return RunDirectory(self.directory(name)).architecture_file

    def data(self) -> dict[str, Any]:
        """The settings of a search or training that name the images."""
        own = self.settings
        return {
            "data": own.data,
            "data_dir": own.data_dir and str(pathlib.Path(own.data_dir).absolute()),
            "download": False,
            "train_images": own.train_images,
        }

    def search(self, name: str, **changes: Any) -> dict[str, Job]:
        """A search by its name.

        Args:
            name: Its name.
            **changes: Settings of `fpnas search` that differ from those of the benchmark.
        """
        own = self.settings
        values = {
            **self._common(name),
            "space": own.space,
            "input_size": own.input_size,
            "cost": "macs",
            "target": own.target,
            "epochs": own.search_epochs,
            "steps_per_epoch": own.steps_per_epoch,
            "architecture_learning_rate": 0.03,
            "ranked_samples": 0,  # Nobody reads the ranking in the report of the search.
        }
        return {name: search_job(SearchSettings(**values | changes))}

    def train(self, name: str, architecture: str | os.PathLike, **changes: Any) -> dict[str, Job]:
        """A training by its name.

        Args:
            name: Its name.
            architecture: The architecture file. An earlier phase may write it.
            **changes: Settings of `fpnas train` that differ from those of the benchmark.
        """
        values = {
            # What earlier rows were measured with, whatever the defaults of the command are now.
            **({} if "optimizer" in changes else {"learning_rate": 0.1}),
            "batch_size": 128,
            **self._common(name),
            "architecture": architecture,
            "epochs": self.settings.train_epochs,
        }
        settings = TrainSettings(**values | changes)
        job = Job(
            ["-m", "fpnas_keras.train", *settings.to_flags()],
            functools.partial(run_training, settings),
            has_architecture=True,
        )
        return {name: job}

    def _common(self, name):
        values = {"output_dir": str(self.directory(name)), **self.data()}
        if self.settings.batch_size is not None:
            values["batch_size"] = self.settings.batch_size
        return values

    def run_phases(self, phases: Iterable[dict[str, Job]]) -> dict[str, Row]:
        """Runs the jobs that have no row yet, one on each core at a time.

        In a smoke run they run one after the other in this process.

        Args:
            phases: Jobs by name. The jobs of a phase need the results of earlier phases only.

        Returns:
            The rows of the output file by name.
        """
        output = self.settings.output
        rows = finished(output, "name")
        cores = queue.SimpleQueue()
        for core in sorted(os.sched_getaffinity(0))[: 1 if self.settings.smoke else None]:
            cores.put(core)

        def work(item):
            name, job = item
            core = cores.get()
            try:
                rows[name] = {"name": name, **self._run(name, job, core)}
            finally:
                cores.put(core)
            append(output, rows[name])
            print(f"finished: {name}", flush=True)

        with ThreadPoolExecutor(cores.qsize()) as pool:
            for phase in phases:
                for name in phase.keys() & rows.keys():
                    self._restore(name, rows[name])
                todo = [item for item in phase.items() if item[0] not in rows]
                list((map if self.settings.smoke else pool.map)(work, todo))
        return rows

    def _restore(self, name, row):
        """Writes the architecture of a row whose directory is gone: a training may need it."""
        run = RunDirectory(self.directory(name))
        if "architecture" in row and not run.architecture_file.exists():
            run.directory.mkdir(exist_ok=True)
            fpnas.Architecture.from_dict(row["architecture"]).save(run.architecture_file)

    def _run(self, name, job, core):
        """The row of a job, from the files that it leaves."""
        run = RunDirectory(self.directory(name))
        shutil.rmtree(run.directory, ignore_errors=True)  # An interrupted run may have left it.
        if self.settings.smoke:
            job.run()
        else:
            run_on_core(job.arguments, core, self.work_dir / f"{run.directory.name}.log")
        if not job.has_architecture:
            return run.summary
        return {"architecture": run.architecture.to_dict(), **run.summary}


def search_job(settings: SearchSettings) -> Job:
    """A search as a job."""
    return Job(
        ["-m", "fpnas_keras.search", *settings.to_flags()],
        functools.partial(run_search, settings),
        has_architecture=True,
    )


def run_on_core(arguments: list[str], core: int, log: pathlib.Path) -> None:
    """Runs Python in a process on one core.

    Raises:
        RuntimeError: When the process fails. The message names the log.
    """
    command = [sys.executable, *arguments]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
        os.sched_setaffinity(process.pid, {core})
        if process.wait():
            raise RuntimeError(f"{' '.join(command)} failed; see {log}")


def make_environment(
    folder: pathlib.Path, requirements: Iterable[str], without_dependencies: Iterable[str] = ()
) -> pathlib.Path:
    """A virtual environment for code of others, made if it is not there yet.

    Args:
        folder: Its folder.
        requirements: What it holds.
        without_dependencies: What is installed after that, whatever it or others ask for.

    Returns:
        Its Python.

    Raises:
        CalledProcessError: When something cannot be installed.
    """
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        print(f"making the environment {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *requirements], check=True)
        for pinned in without_dependencies:
            subprocess.run([*pip, "--no-deps", pinned], check=True)
        (folder / "complete").touch()
    return python


# Timing


def noise(space: Space, size: int, seed: int) -> Batch:
    """Noise with labels: the time and the memory are those of any images.

    Args:
        space: The space, which gives the shape of the images.
        size: Number of images.
        seed: Seed of the noise.
    """
    x = tf.random.stateless_uniform((size, *space.input_shape), (seed, 0), 0, 255)
    return x, tf.range(size) % space.num_classes


def timed_in_turn(
    runs: Mapping[str, Callable[[], object]], repeats: int, untimed: int = 1
) -> dict[str, list[float]]:
    """Times several functions that are called in turn.

    Args:
        runs: The functions by name. Each returns when its work is done.
        repeats: Timed calls of each.
        untimed: Calls before those. The first call traces, or meets its shapes for the first time.

    Returns:
        Seconds of each timed call.
    """
    seconds = {name: [] for name in runs}
    for repeat in range(untimed + repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat >= untimed:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def in_turn(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each of several functions that are called in turn."""
    return {name: statistics.median(s) for name, s in timed_in_turn(runs, repeats).items()}


def draw_networks(
    search: fpnas.ArchitectureSearch, count: int
) -> list[tuple[tf.Tensor, fpnas.Architecture]]:
    """Draws networks from the distribution of a search.

    Returns:
        The entries of each network, int32 of shape `(blocks,)`, and its architecture.
    """
    drawn = search.distribution.sample(count, seed=0, step=0)
    architectures = map(search.space.architecture, search.space.entries.to_choices(drawn.numpy()))
    return list(zip(tf.unstack(drawn), architectures))


def keras_step(
    model: keras.Model, batch: Batch, loss: keras.losses.Loss | None = None
) -> Callable[[], object]:
    """A step of Keras' own `fit` of a model; the default loss is for indices of classes."""
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True)
    loss = loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=False)
    model.make_train_function()
    batches = iter(tf.data.Dataset.from_tensors(batch).repeat())
    return lambda: model.train_function(batches)["loss"].numpy()


def sample_steps(
    search: fpnas.ArchitectureSearch, batch: Batch, copies: int
) -> Callable[[tf.Tensor], object]:
    """The weight half of a search step that draws one architecture several times.

    Args:
        search: The search.
        batch: Images and labels.
        copies: How many times the architecture is drawn.

    Returns:
        A function of the entries of the architecture.
    """

    @tf.function
    def run(entries):
        drawn = Samples.each(tf.repeat(entries[None], copies, axis=0))
        gradients, results = search.weight_gradients(drawn, batch)
        return [*gradients, results]

    return lambda entries: run(entries)[-1].numpy()
