"""Classifies image files with a trained model.

python -m export.predict --model=FILE.tflite PHOTO.jpg ...
"""

import dataclasses
import pathlib
import sys
from typing import Any, NamedTuple

import numpy as np

import export
from fpnas_keras import networks, runs
from fpnas_keras.architecture import format_table
from fpnas_keras.commands import Command, run_command, visible_log
from fpnas_keras.data.settings import RESIZES
from fpnas_keras.errors import UserError
from fpnas_keras.files import check_output, write_json
from fpnas_keras.progress import track
from fpnas_keras.settings import Settings, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictSettings(Settings):
    """Settings of a prediction. Each is a flag of `fpnas predict`."""

    images: tuple[str, ...] = setting(
        "Image files, and folders of image files.", basic=True, positional=True
    )
    model: str = setting("The model: a file of fpnas export, or model.keras.", basic=True)
    top: int = setting("Number of classes to show for each image.", 3, least=1, basic=True)
    output: str | None = setting("JSON file to write the predictions to.", None, basic=True)
    labels: str | None = setting(
        "File of the names of the classes, one in each line. Default: those that the .tflite file "
        "or the model's folder holds.",
        None,
    )
    resize: str | None = setting(
        "How images that are not square become square. Default: as the training.",
        None,
        choices=RESIZES,
    )


class Prediction(NamedTuple):
    """What a model says about an image.

    Attributes:
        file: The image file.
        classes: Probabilities of the likeliest classes by name, the largest first.
    """

    file: str
    classes: dict[str, float]


class _Classifier(NamedTuple):
    """A model in one form, whatever file it comes from."""

    function: Any  # Pixels 0..255, (n, height, width, channels), to probabilities or logits.
    gives_logits: bool
    image_shape: tuple[int, int, int]
    labels: list[str]
    resize: str


def classify_images(**settings: Any) -> list[Prediction]:
    """Classifies image files. They are read and resized as those of the training.

    Args:
        **settings: The fields of `PredictSettings`, which are the flags of `fpnas predict`.

    Returns:
        The file and the likeliest classes of each image, in the order of the images.

    Raises:
        UserError: When a setting is wrong, or an image cannot be read.

    Example:

    ```python
    found = export.classify_images(
        model="runs/mine_trained/model_int8.tflite", images=["photo.jpg"]
    )
    found[0].classes  # {"rose": 0.93, "tulip": 0.05, "daisy": 0.02}
    ```
    """
    with visible_log():
        return run_prediction(PredictSettings(**settings))


def run_prediction(settings: PredictSettings) -> list[Prediction]:
    """Like `classify_images`, but takes a `PredictSettings`."""
    # The reader of images imports TensorFlow.
    from fpnas_keras.data.image_files import read_image

    if settings.output:
        check_output(pathlib.Path(settings.output))
    classifier = _load(settings)
    files = _find_files(settings.images)
    found = []
    resize = settings.resize or classifier.resize
    with track(len(files), "classifying", "images") as progress:
        for file in files:
            image = read_image(file, classifier.image_shape, resize)
            scores = np.asarray(classifier.function(image[None].astype(np.float32)))[0]
            if classifier.gives_logits:
                scores = np.exp(scores - scores.max())
                scores /= scores.sum()
            best = np.argsort(-scores, kind="stable")[: settings.top]
            classes = {classifier.labels[index]: round(float(scores[index]), 4) for index in best}
            found.append(Prediction(str(file), classes))
            progress.update(1)
    if settings.output:
        write_json(settings.output, [each._asdict() for each in found])
    return found


def _load(settings):
    path = pathlib.Path(settings.model)
    loaded = _load_tflite(path) if path.suffix == ".tflite" else _load_keras(settings)
    given = loaded.labels
    if settings.labels:
        try:
            given = pathlib.Path(settings.labels).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read `labels` {settings.labels}: {error}") from None
    classes = loaded.function(np.zeros((1, *loaded.image_shape), np.float32)).shape[-1]
    if given is None:
        raise UserError(f"--labels must be given: {path} holds no names of its {classes} classes")
    if len(given) != classes:
        raise UserError(
            f"the model {path} has {classes} classes. Received: {len(given)} names of classes"
        )
    return loaded._replace(labels=given)


def _load_tflite(path):
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read `model` {path}: {error.strerror}") from None
    try:
        runner = export.conversion.Runner(content)
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{path} is not a file of fpnas export: {error}") from None
    found = export.metadata.read(content) or {}
    resize = found.get("resize", "stretch")
    gives_logits = runner.scores == "logits"
    return _Classifier(runner, gives_logits, tuple(runner.image_shape), found.get("labels"), resize)


def _load_keras(settings):
    model = networks.load_model(settings.model)
    run = runs.TrainingRun(pathlib.Path(settings.model).parent)
    labels, resize = None, "stretch"
    if run.is_training:
        labels, resize = run.class_names, run.flags.get("resize", "stretch")
    file = run.path(export.metadata.LABEL_FILE)  # as fpnas export writes it
    if labels is None and file.is_file():
        labels = file.read_text(encoding="utf-8").splitlines()
    gives_logits = not networks.ends_in_softmax(model, f"the model {settings.model}")
    return _Classifier(model.predict_on_batch, gives_logits, model.input_shape[1:], labels, resize)


def _find_files(names):
    """The image files that are named, and those in folders that are named."""
    from fpnas_keras.data.folders import list_images

    files = []
    for name in map(pathlib.Path, names):
        if name.is_dir():
            inside = list_images(name)
            if not inside:
                raise UserError(f"the folder {name} holds no image")
            files += inside
        elif name.is_file():
            files.append(name)
        else:
            raise UserError(f"there is no file or folder {name}")
    return files


def _predict_and_print(settings):
    found = run_prediction(settings)
    rows = [
        [each.file, *(f"{name} {share:.1%}" for name, share in each.classes.items())]
        for each in found
    ]
    print(format_table(rows))
    if settings.output:
        print(f"predictions: {settings.output}")


COMMAND = Command(
    name="fpnas predict",
    summary="Classifies image files with a trained model.",
    examples=(
        (
            "The likeliest classes of two photos",
            "fpnas predict --model=runs/mine_trained/model_int8.tflite one.jpg two.jpg",
        ),
    ),
    settings=PredictSettings,
    run=_predict_and_print,
)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
