"""What a training leaves in its run directory."""

import csv
import functools
import pathlib
from typing import TYPE_CHECKING, Any

from fpnas_keras.errors import UserError
from fpnas_keras.files import check_fields, read_json
from fpnas_keras.runs.run_directory import RunDirectory

if TYPE_CHECKING:
    import keras


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
        if not self.metrics_file.is_file():
            raise UserError(
                f"{self.metrics_file} is missing: no epoch has ended yet, or this is no training"
            )
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
        for path in sorted(self.directory.glob("[!.]*_report.json")):
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
