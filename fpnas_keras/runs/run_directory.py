"""The files of a run directory: their names and formats.

`SearchRun`, `TrainingRun` and `BuildRun` read what they alone have. `Session` names the copies of
the user's files, and `Checkpoints` the checkpoints.

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

import functools
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fpnas_keras.architecture import Architecture
from fpnas_keras.data.settings import DATA_FLAGS, DataSettings
from fpnas_keras.errors import UserError
from fpnas_keras.files import (
    check_fields,
    read_json,
    replacing,
    write_json,
)
from fpnas_keras.settings import flag_values

_CHECKPOINT = re.compile(r"step_(\d+)\.ckpt")


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


def checked_fingerprint(data: Any) -> dict[str, Any]:
    """The content of `images.json`, for `read_json`."""
    check_fields(data, "it", fingerprint=str, count=int)
    names = data.get("class_names", [])
    if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
        raise UserError("`class_names` must be a list of texts")
    return data
