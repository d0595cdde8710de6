"""The files of a run directory: their names and formats.

`Session` names the copies of the user's files, and `Checkpoints` the checkpoints.

| file | search | training |
|---|---|---|
| `flags.txt` | flags that repeat the run | the same |
| `chosen.txt` | flags that the run has chosen for its images | the same |
| `images.json` | fingerprint and class names of the training images | the same |
| `metrics.csv` | one row after each epoch | the same |
| `summary.json` | totals, cost of the result; written last | accuracies; written last |
| `architecture.json` | the result | the network |
| `probabilities.jsonl` | one line after each epoch | |
| `search.weights.h5` | shared weights and logits | |
| `ranking.json`, `pareto/` | architectures ranked by shared weights | |
| `report.html`, `report/` | a page about the search, and its plots | the same of the training |
| `space.*`, `latency_table.*` | copies of the user's files | |
| `model.keras` | | the trained network |
| `mistakes.json` | | the test images that are most wrong |
| `teacher_logits.npy` | | logits of a teacher for the training images |
| `teacher.*`, `teacher_weights.h5` | | copies of the user's files |
| `tensorboard/` | event files | event files |
| `checkpoints/` | the last two; one when the run is finished | the same |
"""

import csv
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fpnas_keras.architecture import Architecture
from fpnas_keras.cost import COSTS, Cost, MacsCost, make_cost
from fpnas_keras.data.settings import DATA_FLAGS, DataSettings
from fpnas_keras.errors import UserError
from fpnas_keras.files import (
    KINDS,
    abbreviate,
    check_fields,
    check_format,
    read_json,
    replacing,
    summarize_error,
    write_json,
)
from fpnas_keras.runs.settings import TRAINING_FLAGS
from fpnas_keras.settings import flag_values
from fpnas_keras.spaces import SUFFIXES
from fpnas_keras.spaces import get as get_space

if TYPE_CHECKING:
    import keras

    from fpnas_keras.method import ArchitectureSearch
    from fpnas_keras.runs.ranking import Ranked

RANKING_FORMAT = 1
_CHECKPOINT = re.compile(r"step_(\d+)\.ckpt")
UNITS = {name: cost.unit for name, cost in COSTS.items()}
# Values of the column `phase`, and what reports call them.
PHASES = {"warm_up": "warm-up", "factorized": "factorized", "joint": "joint"}
# Columns of a search's metrics.csv, in their order.
SEARCH_METRICS = {
    "step": int,
    "epoch": int,
    "phase": str,
    "samples": float,
    "total_samples": int,
    "cost_coefficient": float,
    "entropy": float,
    "evaluated": float,
    "expected_cost": float,
    "train_accuracy": float,
    "train_loss": float,
    "validation_accuracy": float,
    "validation_loss": float,
    "seconds": float,
}
_SUMMARY_OF_SEARCH = dict.fromkeys(
    ("macs", "params", "steps", "total_samples", "total_evaluated"), int
) | dict.fromkeys(("found_cost", "wall_seconds", "cpu_seconds", "peak_memory_mb"), float)


class RunDirectory:
    """What searches and trainings have in common.

    Args:
        directory: The directory. It need not exist yet.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = pathlib.Path(directory).expanduser()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.directory)!r})"

    def path(self, name: str) -> pathlib.Path:
        """Path of a file of the run."""
        return self.directory / name

    @property
    def flag_file(self) -> pathlib.Path:
        """A flag file that repeats the run."""
        return self.path("flags.txt")

    @property
    def chosen_file(self) -> pathlib.Path:
        """The flags that were not given and that the run has chosen for its images."""
        return self.path("chosen.txt")

    @property
    def images_file(self) -> pathlib.Path:
        """The fingerprint and the class names of the training images."""
        return self.path("images.json")

    @property
    def metrics_file(self) -> pathlib.Path:
        """A CSV file with one row after each epoch."""
        return self.path("metrics.csv")

    @property
    def summary_file(self) -> pathlib.Path:
        """What the run did and found. It is written last: a run that has it is finished."""
        return self.path("summary.json")

    @property
    def architecture_file(self) -> pathlib.Path:
        """The architecture that was found or trained."""
        return self.path("architecture.json")

    @property
    def tensorboard_folder(self) -> pathlib.Path:
        """Event files for TensorBoard."""
        return self.path("tensorboard")

    @property
    def checkpoint_folder(self) -> pathlib.Path:
        """The checkpoints. The last one stays when the run is finished."""
        return self.path("checkpoints")

    @property
    def checkpoints(self) -> dict[int, pathlib.Path]:
        """The checkpoint files by their step, the last one first."""
        found = {}
        if self.checkpoint_folder.is_dir():
            for path in self.checkpoint_folder.iterdir():
                if match := _CHECKPOINT.fullmatch(path.name):
                    found[int(match[1])] = path
        return dict(sorted(found.items(), reverse=True))

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return self.summary_file.is_file()

    @property
    def architecture(self) -> Architecture | None:
        """The architecture that was found or trained, `None` before that.

        Raises:
            UserError: When the file is damaged.
        """
        file = self.architecture_file
        return Architecture.load(file) if file.is_file() else None

    @property
    def report(self) -> pathlib.Path:
        """The page about the run."""
        return self.path("report.html")

    @property
    def plot_folder(self) -> pathlib.Path:
        """The plots of the report as PNG files."""
        return self.path("report")

    @property
    def planned_epochs(self) -> int:
        """The flag `--epochs`."""
        return self._number("epochs", int)

    def column(self, name: str) -> np.ndarray:
        """A column of the metrics, float64. Values that no plot can show become NaN."""
        values = np.array([row[name] for row in self.epochs], float)
        return np.where(np.abs(values) < 1e300, values, np.nan)

    def check(self) -> None:
        """Raises `UserError` unless the directory holds a run, finished or not."""
        for file in (self.flag_file, self.metrics_file):
            if not file.is_file():
                raise UserError(
                    f"{self.directory} must be a run directory, with flags.txt and metrics.csv. "
                    f"It lacks {file.name}"
                )
        self._check_flags()

    @property
    def next_command(self) -> str:
        """The command that follows a finished run, or an empty text."""
        return str((self.summary or {}).get("next", ""))

    def write_flags(self, given: Sequence[str], chosen: Sequence[str] = ()) -> None:
        """Writes the flag file, and the file of the flags that were chosen."""
        for path, lines in ((self.chosen_file, chosen), (self.flag_file, given)):
            with replacing(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        for name in ("flags", "chosen"):  # which may have been read before
            self.__dict__.pop(name, None)

    def flag_lines(self) -> list[str]:
        """The lines of the flag file, read leniently: to be compared with those of another run."""
        return self.flag_file.read_text(encoding="utf-8", errors="replace").splitlines()

    @functools.cached_property
    def flags(self) -> dict[str, str]:
        """The flags of the run by name, as text.

        Raises:
            UserError: When the flag file is missing or not text.
        """
        try:
            return flag_values(self.flag_file.read_text(encoding="utf-8").splitlines())
        except UnicodeDecodeError as error:
            raise UserError(f"{self.flag_file} must be text in UTF-8. Received: {error}") from None
        except OSError as error:
            raise UserError(f"cannot read {self.flag_file}: {error.strerror}") from None

    @functools.cached_property
    def chosen(self) -> dict[str, str]:
        """The flags that the run has chosen for its images, by name, as text."""
        if not self.chosen_file.is_file():  # of an earlier version
            return {}
        return flag_values(self.chosen_file.read_text("utf-8", errors="replace").splitlines())

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes the summary, which finishes the run."""
        write_json(self.summary_file, summary)

    @property
    def summary(self) -> dict[str, Any] | None:
        """What the run did and found, `None` before it is finished.

        Raises:
            UserError: When the file is damaged.
        """
        if not self.finished:
            return None
        return read_json(self.summary_file, "a summary", self._checked_summary)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes of the training images; `None` in runs before version 0.3."""
        if not self.images_file.is_file():
            return None
        names = read_json(self.images_file, "a fingerprint", checked_fingerprint).get("class_names")
        return None if names is None else tuple(names)

    def data_settings(self) -> DataSettings:
        """Which images the run used.

        Raises:
            UserError: When the flag file is damaged.
        """
        given = {name: value for name, value in self.flags.items() if name in DATA_FLAGS}
        try:
            return DataSettings.from_flags([f"--{name}={value}" for name, value in given.items()])
        except UserError as error:
            raise UserError(f"{self.flag_file} is not the flag file of a run: {error}") from None

    def _flag(self, name: str) -> str:
        value = (self.chosen | self.flags).get(name)
        if value is None:
            raise UserError(f"{self.flag_file} must hold the flags of a run. It lacks --{name}")
        return value

    def _number(self, name: str, kind: Callable[[str], float]) -> float:
        value = self._flag(name)
        try:
            number = kind(value)
            if 0 < number < math.inf:
                return number
        except ValueError:
            pass
        raise UserError(
            f"--{name} in {self.flag_file} must be a number above 0. Received: --{name}={value}"
        )

    def _checked_summary(self, summary: Any) -> dict[str, Any]:
        check_fields(summary, "the summary")
        return summary


class TrainingRun(RunDirectory):
    """What a training left in its run directory. Unfinished trainings can be read as well.

    Example:

    ```python
    run = fpnas.train_architecture(architecture="architecture.json", output_dir="runs/mine_trained")
    run.summary["test_accuracy"]
    model = run.model()
    ```
    """

    @property
    def model_file(self) -> pathlib.Path:
        """The trained network."""
        return self.path("model.keras")

    @property
    def teacher_file(self) -> pathlib.Path:
        """Logits of a teacher for the training images."""
        return self.path("teacher_logits.npy")

    @property
    def mistakes_file(self) -> pathlib.Path:
        """The test images that are most wrong, for the report."""
        return self.path("mistakes.json")

    @property
    def is_training(self) -> bool:
        """Whether the directory holds a training, and not a search."""
        return self.flag_file.is_file() and "architecture" in self.flags

    @functools.cached_property
    def epochs(self) -> list[dict[str, float]]:
        """The rows of the metrics: step, epoch, loss, accuracy and others, as numbers.

        Raises:
            UserError: When no epoch has ended yet, or the file is damaged.
        """
        with self.metrics_file.open(newline="", encoding="utf-8") as file:
            try:
                rows = [
                    {name: float(cell) for name, cell in row.items()}
                    for row in csv.DictReader(file)
                ]
                if not all({"step", "epoch", "loss", "accuracy"} <= row.keys() for row in rows):
                    raise UserError("it lacks a column")
            except (TypeError, ValueError, csv.Error) as error:
                raise UserError(
                    f"{self.metrics_file} is not the metrics of a training: {error}"
                ) from None
        if not rows:
            raise UserError(f"{self.metrics_file}: no epoch has ended yet")
        return rows

    @property
    def mistakes(self) -> list[dict[str, Any]]:
        """The test images that are most wrong, the worst first; empty before the end."""
        if not self.mistakes_file.is_file():
            return []
        return read_json(self.mistakes_file, "a list of mistakes", _checked_mistakes)

    @property
    def exports(self) -> dict[str, dict[str, Any]]:
        """The reports of the `.tflite` files beside the model, by the name of the file."""
        found = {}
        for path in sorted(self.directory.glob("*_report.json")):
            name = path.name.removesuffix("_report.json") + ".tflite"
            model = self.model_file
            if model.exists() and path.stat().st_mtime < model.stat().st_mtime:
                continue  # of the model before the run went on
            found[name] = read_json(path, "a report of an export", checked_export)
        return found

    def _check_flags(self):
        for name in ("architecture", "data", "epochs"):
            self._flag(name)

    def model(self) -> "keras.Model":
        """The trained network, from pixels 0..255 to logits.

        Raises:
            UserError: When there is none, or the file is damaged.
        """
        from fpnas_keras.networks import load_model

        return load_model(str(self.model_file))


class SearchRun(RunDirectory):
    """What a search left in its run directory. Unfinished searches can be read as well.

    Example:

    ```python
    run = fpnas.search_architecture(data="digits", output_dir="runs/digits", ...)
    run.architecture.build()
    search = run.load_search()
    search.derive(budget=3e5)
    ```
    """

    @property
    def probabilities_file(self) -> pathlib.Path:
        """One JSON object after each epoch, with the probability of each choice."""
        return self.path("probabilities.jsonl")

    @property
    def weights_file(self) -> pathlib.Path:
        """Shared weights and logits."""
        return self.path("search.weights.h5")

    @property
    def ranking_file(self) -> pathlib.Path:
        """Architectures ranked by the shared weights."""
        return self.path("ranking.json")

    @property
    def latency_table(self) -> pathlib.Path | None:
        """The run's copy of the latency table, `None` where the search has none."""
        tables = sorted(self.directory.glob("latency_table.*"))
        return tables[0] if tables else None

    @property
    def is_decided(self) -> bool | None:
        """Whether half of the entropy is gone; `None` before the end."""
        summary = self.summary
        if not summary or "initial_entropy" not in summary:  # which earlier versions did not have
            return None
        return summary["entropy"] <= summary["initial_entropy"] / 2

    @property
    def decision(self) -> str:
        """Whether a finished search has decided, in words; empty before the end."""
        if self.is_decided is None:
            return ""
        summary = self.summary
        return (
            f"The search is {'decided' if self.is_decided else 'undecided'}: "
            f"{summary['entropy']:.1f} of {summary['initial_entropy']:.1f} nats of entropy are "
            "left."
        )

    @property
    def verdict(self) -> str:
        """The decision, and what to do if there is none."""
        if self.is_decided is False:
            return f"{self.decision} Raise --epochs: the command then goes on from here."
        return self.decision

    @property
    def cost_kind(self) -> str:
        """The flag `--cost`: one of `COSTS`."""
        return self._flag("cost")

    @property
    def unit(self) -> str:
        """Unit of the costs."""
        return UNITS[self.cost_kind]

    @property
    def target(self) -> float | None:
        """The target of the cost."""
        return self._number("target", float) if "target" in self.flags else None

    @property
    def weights_share(self) -> float:
        """Share of the images in the weights part of a finished search. It was 0.5 before 0.3."""
        return self.summary.get("weights_share", 0.5)

    def training_arguments(self) -> str:
        """The flags of the search that its training should have too, each with a space after it."""
        values = {name: self.flags[name] for name in TRAINING_FLAGS if name in self.flags}
        lines = [
            f"--{name}" if value == "true" else f"--{name}={value}"
            for name, value in values.items()
            if value not in ("false", "none")
        ]
        return "".join(f"{shlex.quote(line)} " for line in lines)

    @functools.cached_property
    def cost(self) -> Cost:
        """The cost of the search. MACs where the copy of the latency table is gone."""
        table = self.latency_table
        if self.cost_kind == "latency" and table is None:
            return MacsCost()
        return make_cost(self.cost_kind, table=table)

    @functools.cached_property
    def epochs(self) -> list[dict[str, Any]]:
        """The rows of the metrics, with the columns `SEARCH_METRICS`.

        Raises:
            UserError: When no epoch has ended yet, or the file is damaged.
        """
        return _read_metrics(self.metrics_file)

    @property
    def phases(self) -> list[tuple[str, int, int]]:
        """Name, first and last step of each phase. The steps are rounded to whole epochs."""
        phases, start = [], 0
        for name, rows in itertools.groupby(self.epochs, key=lambda row: row["phase"]):
            end = list(rows)[-1]["step"]
            phases.append((name, start, end))
            start = end
        return phases

    @functools.cached_property
    def probabilities(self) -> list[dict[str, Any]]:
        """`{"step": ..., "epoch": ..., "blocks": [{variable: {choice: probability}}]}` by epoch.

        Raises:
            UserError: When the file is damaged.
        """
        file = self.probabilities_file
        return _read_probabilities(file) if file.is_file() else []

    @property
    def ranking(self) -> dict[str, Any] | None:
        """What `write_ranking` wrote, `None` before that.

        Raises:
            UserError: When the file is damaged.
        """
        if not self.ranking_file.is_file():
            return None
        return read_json(self.ranking_file, "a ranking", _checked_ranking)

    def write_ranking(self, ranked: "Sequence[Ranked]", unit: str) -> None:
        """Writes a ranking.

        Args:
            ranked: Architectures, best first.
            unit: Unit of their costs.
        """
        rows = []
        for number, each in enumerate(ranked, 1):
            count = each.architecture.count()
            row = each._asdict() | {"rank": number, "macs": count.macs, "params": count.params}
            rows.append(row | {"architecture": each.architecture.to_dict()})
        contents = {"format": RANKING_FORMAT, "images": ranked[0].images, "cost_unit": unit}
        write_json(self.ranking_file, contents | {"architectures": rows})

    def write_pareto_front(self, ranked: "Sequence[Ranked]") -> None:
        """Writes the architectures on the Pareto front of a ranking to files of their own."""
        for each in ranked:
            if each.pareto:
                file = self.pareto_file(each)
                file.parent.mkdir(exist_ok=True)
                each.architecture.save(file)

    def pareto_file(self, ranked: "Ranked") -> pathlib.Path:
        """The file of an architecture on the Pareto front.

        Its name depends on its content. A later ranking does not overwrite it, since trainings
        refer to it.
        """
        content = json.dumps(ranked.architecture.to_dict(), sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:8]
        name = pathlib.Path(ranked.name).stem.replace(" ", "_")
        return self.path("pareto") / f"{name}_{digest}.json"

    @classmethod
    def of_architecture(cls, file: str | os.PathLike) -> "SearchRun":
        """The run directory of an architecture file: its folder, or the parent of `pareto/`."""
        folder = pathlib.Path(file).parent
        return cls(folder.parent if folder.name == "pareto" else folder)

    def load_search(self) -> "ArchitectureSearch":
        """The search with its shared weights and logits, not compiled.

        Raises:
            UserError: When the directory holds no finished search, or one of its files is damaged.
        """
        from fpnas_keras.method import ArchitectureSearch

        summary = read_json(self.summary_file, "a finished search's summary", _checked_for_loading)
        table = self.latency_table
        if summary["cost"] == "latency" and table is None:
            raise UserError(
                f"{self.directory} lacks the search's latency table (latency_table.json)"
            )
        copies = [self.path(f"space{suffix}") for suffix in SUFFIXES]
        space = get_space(
            next((file for file in copies if file.is_file()), summary["space"]),
            tuple(summary["input_shape"]),
            summary["num_classes"],
        )
        search = ArchitectureSearch(
            dataclasses.replace(space, name=summary["space"]),  # not that of the copied file
            cost=make_cost(summary["cost"], summary["target"], table),
            distribution=summary["distribution"],
            start="uniform",  # The weights replace it.
            warmup_steps=0,
        )
        try:
            search.load_weights(self.weights_file)
        except Exception as error:  # The readers inside Keras raise errors of many classes.
            raise UserError(
                f"{self.weights_file} must hold the weights of the search: {summarize_error(error)}"
            ) from None
        return search

    def _check_flags(self):
        for name in ("space", "data", "cost", "epochs"):
            self._flag(name)
        if self.cost_kind not in UNITS:
            raise UserError(
                f"--cost in {self.flag_file} must be one of {', '.join(UNITS)}. "
                f"Received: {self.cost_kind}"
            )

    def _checked_summary(self, summary: Any) -> dict[str, Any]:
        check_fields(summary, "the summary", **_SUMMARY_OF_SEARCH)
        return summary


def checked_fingerprint(data: Any) -> dict[str, Any]:
    """The content of `images.json`, for `read_json`."""
    check_fields(data, "it", fingerprint=str, count=int)
    names = data.get("class_names", [])
    if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
        raise UserError("`class_names` must be a list of texts")
    return data


def _checked_for_loading(summary):
    kinds = {"space": str, "input_shape": list, "num_classes": int, "distribution": str}
    check_fields(summary, "the summary", **kinds, cost=str)
    if summary.get("target", 0) is not None:  # where it is missing too
        check_fields(summary, "the summary", target=float)
    if summary["cost"] not in COSTS:
        raise UserError(f"`cost` must be one of {', '.join(COSTS)}. Received: {summary['cost']}")
    return summary


def _checked_mistakes(data):
    if not isinstance(data, list):
        raise UserError("it must be a list")
    for each in data:
        check_fields(each, "a mistake", true=str, given=str, probability=float, image=str)
        if not each["image"].startswith("data:image/png;base64,"):
            raise UserError("`image` must be a PNG as a data URL")
    return data


def checked_export(data: Any) -> dict[str, Any]:
    """The content of the report of an export, for `read_json`."""
    numbers = {"bytes": int, "tflite_accuracy": float, "agreement": float}
    check_fields(data, "the report", quantize=str, host_milliseconds=float, **numbers)
    return data


def _read_metrics(path):
    if not path.is_file():
        raise UserError(f"{path} is missing: no epoch has ended yet, or this is no search")
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            missing = [name for name in SEARCH_METRICS if name not in (reader.fieldnames or ())]
            if reader.fieldnames and missing:
                raise UserError(
                    f"it lacks the columns {', '.join(missing)}. "
                    f"Received: {abbreviate(','.join(reader.fieldnames))}"
                )
            for cells in reader:
                row = {name: _read_cell(cells, name) for name in SEARCH_METRICS}
                _check_step(rows, row)
                rows.append(row)
            if not rows:
                raise UserError("no epoch has ended yet")
        except (ValueError, csv.Error) as error:
            raise UserError(
                f"{path} is not the metrics of a search: line {reader.line_num}: {error}"
            ) from None
    return rows


def _read_cell(cells, name):
    kind, received = SEARCH_METRICS[name], abbreviate(cells[name])
    if name == "phase" and cells[name] not in PHASES:
        raise UserError(f"`phase` must be one of {', '.join(PHASES)}. Received: {received}")
    try:
        # A search that diverged has NaN among its metrics.
        return kind(cells[name])
    except (TypeError, ValueError):
        raise UserError(f"`{name}` must be {KINDS[kind]}. Received: {received}") from None


def _check_step(rows, row):
    before = rows[-1]["step"] if rows else 0
    if not before < row["step"] < 1e15:
        raise UserError(
            f"`step` must rise from line to line. Received: {row['step']} after {before}"
        )


def _read_probabilities(path):
    rows = []
    with path.open(encoding="utf-8") as file:
        try:
            for line in file:
                row = json.loads(line)
                check_fields(row, "it", step=int, epoch=int, blocks=list)
                _check_step(rows, row)
                if _choice_names(row) != _choice_names(rows[0] if rows else row):
                    raise UserError("it must have the blocks and choices of line 1")
                rows.append(row)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path} is not the probabilities of a search: line {len(rows) + 1}: {error}"
            ) from None
    return rows


def _choice_names(row):
    """Names of the choices of each variable of each block, after a check of their values."""
    for block in row["blocks"]:
        variables = block.values() if isinstance(block, dict) else [block]
        for choices in variables:
            if not isinstance(choices, dict) or not choices:
                raise UserError(
                    "a block must hold {variable: {choice: probability}}. "
                    f"Received: {abbreviate(block)}"
                )
            for value in choices.values():
                # A search that diverged has NaN.
                if type(value) not in (int, float) or value < 0 or value > 1:
                    raise UserError(
                        f"a probability must be from 0 to 1. Received: {abbreviate(value)}"
                    )
    return [{name: list(each) for name, each in block.items()} for block in row["blocks"]]


def _checked_ranking(data):
    check_fields(data, "the ranking", format=int, images=int, cost_unit=str, architectures=list)
    check_format(data, RANKING_FORMAT)
    if data["cost_unit"] not in UNITS.values():
        raise UserError(
            f"`cost_unit` must be one of {', '.join(dict.fromkeys(UNITS.values()))}. "
            f"Received: {abbreviate(data['cost_unit'])}"
        )
    for index, each in enumerate(data["architectures"]):
        numbers = {"accuracy": float, "loss": float, "cost": float, "macs": int, "params": int}
        if isinstance(each, dict) and each.get("log_prob") is not None:
            numbers["log_prob"] = float
        where = f"`architectures[{index}]`"
        check_fields(each, where, name=str, rank=int, pareto=bool, **numbers)
    return data
