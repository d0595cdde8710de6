"""The files of a build: the run directories of its steps, and what it leaves itself.

| file | what it is |
|---|---|
| `flags.txt`, `chosen.txt`, `images.json` | as in every run directory |
| `planned.json` | what was decided at the start of each step, in sentences |
| `steps.json` | the steps that are finished, with the seconds that each took |
| `latency_table.json` | the latency table, for a target in milliseconds |
| `search/`, `training/` | the run directories of the search and the training |
| `trained_finalists.json` | how many of the search's finalists are trained |
| `trained_finalists/` | the run directories of their trainings |
| `architecture.json` | the best of these finalists |
| `mobilenet_v3_small.json`, `baseline/` | the network to compare with, and its training |
| `model.tflite`, `model_int8.tflite` or `model_qat.tflite`, `labels.txt` | the files for the app |
| `baseline_int8.tflite`, or `baseline_qat.tflite` | the file of the network to compare with |
| `*_report.json` | what was found when a file was checked |
| `summary.json` | what was found; written last |
| `report.html`, `report/` | a page about all of it, and its plots |
"""

import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

from fpnas_keras.errors import UserError
from fpnas_keras.files import check_fields, read_json, write_json
from fpnas_keras.runs.run_directory import RunDirectory
from fpnas_keras.runs.search_run import SearchRun
from fpnas_keras.runs.training_run import TrainingRun, checked_export

# What is known of a network and its file.
_NETWORK = dict.fromkeys(("accuracy", "milliseconds", "training_seconds"), float)
_NETWORK |= dict.fromkeys(("bytes", "macs", "params", "epochs"), int)


class BuildRun(RunDirectory):
    """What a build left in its directory. Unfinished builds can be read as well.

    Example:

    ```python
    run = fpnas.build(data="folder:photos", target="8M", time="1h", output_dir="runs/photos")
    run.summary["file"], run.summary["accuracy"]
    ```
    """

    @property
    def is_build(self) -> bool:
        """Whether the directory holds a build, and not a search or a training."""
        return self.flag_file.is_file() and "target" in self.flags and "cost" not in self.flags

    @property
    def search(self) -> SearchRun:
        """The run of the search."""
        return SearchRun(self.path("search"))

    @property
    def training(self) -> TrainingRun:
        """The training of the network for the app."""
        return TrainingRun(self.path("training"))

    @property
    def network_file(self) -> pathlib.Path:
        """The network for the app: the best of the finalists that were trained, or the first."""
        chosen = self.architecture_file
        return chosen if chosen.is_file() else self.search.architecture_file

    @property
    def trained_finalists_file(self) -> pathlib.Path:
        """How many finalists of the search are trained."""
        return self.path("trained_finalists.json")

    @property
    def trained_finalists(self) -> list[TrainingRun]:
        """The trainings of finalists of the search, begun or not, in the order of the search.

        Raises:
            UserError: When the file of their number is damaged.
        """
        if not self.trained_finalists_file.is_file():
            return []
        contents = read_json(self.trained_finalists_file, "a number of finalists", _checked_count)
        numbers = range(1, contents["count"] + 1)
        return [TrainingRun(self.path(f"trained_finalists/{number}")) for number in numbers]

    def plan_trained_finalists(self, count: int) -> None:
        """Writes down how many finalists are trained."""
        write_json(self.trained_finalists_file, {"count": count})

    @property
    def baseline(self) -> TrainingRun:
        """The training of the network to compare with."""
        return TrainingRun(self.path("baseline"))

    @property
    def baseline_architecture_file(self) -> pathlib.Path:
        """The network to compare with."""
        return self.path("mobilenet_v3_small.json")

    @property
    def latency_table(self) -> pathlib.Path | None:
        """The latency table, if there is one: that of the user or the one that was measured."""
        tables = [file for file in self.directory.glob("latency_table.*") if file.is_file()]
        return tables[0] if tables else None

    @property
    def measured_table(self) -> pathlib.Path:
        """The latency table that the build measures."""
        return self.path("latency_table.json")

    @property
    def steps_file(self) -> pathlib.Path:
        """The steps that are finished."""
        return self.path("steps.json")

    def tflite_file(self, quantize: str, name: str = "model") -> pathlib.Path:
        """The `.tflite` file of a format of `fpnas export`."""
        return self.path(f"{name}.tflite" if quantize == "none" else f"{name}_{quantize}.tflite")

    def export_report(self, quantize: str, name: str = "model") -> dict[str, Any] | None:
        """What was found when a file was checked; `None` before that."""
        file = self.tflite_file(quantize, name)
        report = file.with_name(f"{file.stem}_report.json")
        if not file.is_file() or not report.is_file():
            return None
        return read_json(report, "a report of an export", checked_export)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The finished steps: `name`, `seconds`, `cpu_seconds` and `notes`, texts.

        Raises:
            UserError: When the file is damaged.
        """
        if not self.steps_file.is_file():
            return []
        return read_json(self.steps_file, "a list of steps", _checked_steps)

    def forget_beginning(self) -> None:
        """Removes what a build has left before its search, which then begins with other flags."""
        for path in self.directory.glob("latency_table.*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        # The flags last: without them, other files would belong to nobody.
        for name in ("chosen.txt", "images.json", "planned.json", "steps.json", "flags.txt"):
            self.path(name).unlink(missing_ok=True)

    def add_step(self, name: str, seconds: float, cpu_seconds: float, notes: Sequence[str]) -> None:
        """Writes down that a step is finished.

        Args:
            name: Its name.
            seconds: What it took.
            cpu_seconds: What it took of the processors.
            notes: What was decided in it, in sentences.
        """
        step = {"name": name, "seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1)}
        step["notes"] = list(notes)
        write_json(self.steps_file, [*self.steps, step])

    @property
    def planned(self) -> dict[str, list[str]]:
        """What was decided at the start of each step, by its name. A resumed step needs it.

        Raises:
            UserError: When the file is damaged.
        """
        file = self.path("planned.json")
        return read_json(file, "a plan", _checked_planned) if file.is_file() else {}

    def write_planned(self, name: str, notes: Sequence[str]) -> None:
        """Writes down what was decided at the start of a step."""
        write_json(self.path("planned.json"), self.planned | {name: list(notes)})

    def _checked_summary(self, summary: Any) -> dict[str, Any]:
        texts = dict.fromkeys(("description", "file", "target", "device"), str)
        check_fields(summary, "the summary", **texts, **_NETWORK, notes=list, wall_seconds=float)
        if summary.get("baseline") is not None:
            check_fields(summary["baseline"], "`baseline`", file=str, **_NETWORK)
        counts = summary.get("class_counts")
        if not isinstance(counts, dict) or not all(type(n) is int for n in counts.values()):
            raise UserError("`class_counts` of the summary must be an object of integers")
        return summary

    def check(self) -> None:
        """Raises `UserError` unless the directory holds a build, finished or not."""
        if not self.is_build:
            raise UserError(f"{self.directory} must be the directory of a build")


def _checked_count(data):
    check_fields(data, "it", count=int)
    if not 0 < data["count"] < 1000:
        raise UserError(f"`count` must be above 0 and below 1,000. Received: {data['count']}")
    return data


def _checked_planned(data):
    if not isinstance(data, dict) or not all(isinstance(each, list) for each in data.values()):
        raise UserError("it must be an object of lists")
    return data


def _checked_steps(data):
    if not isinstance(data, list):
        raise UserError("it must be a list")
    for each in data:
        check_fields(each, "a step", name=str, seconds=float, cpu_seconds=float, notes=list)
    return data
