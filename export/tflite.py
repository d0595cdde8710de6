"""Writes a trained model as one `.tflite` file and checks it against Keras.

python -m export.tflite --model=runs/quickstart_trained/model.keras
"""

import contextlib
import dataclasses
import pathlib
import shlex
import sys
import tempfile
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from absl import logging

import export
from fpnas_keras import data, networks, runs
from fpnas_keras.architecture import Architecture
from fpnas_keras.commands import Command, run_command
from fpnas_keras.data.settings import DataSettings
from fpnas_keras.errors import UserError
from fpnas_keras.files import check_output, replacing, write_json
from fpnas_keras.progress import track
from fpnas_keras.report import write_report
from fpnas_keras.settings import MAX_SEED, setting

if TYPE_CHECKING:
    import keras

_INT8, _QAT, _FILES = "int8 files", "Fine-tuning of --quantize=qat", "Check and files"
# Largest difference of a logit between Keras and a float32 file, on the test set.
MAX_DIFFERENCE = 1e-4
_LATENCY_ROUNDS = 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfliteSettings(DataSettings):
    """Settings of an export. Each is a flag of `fpnas export`."""

    model: str = setting("Keras file (.keras) to convert.", basic=True)
    quantize: str = setting(
        "Numbers in the file. none: float32; float16: weights of half the size, for GPUs; "
        "dynamic: int8 weights, a quarter of the size; int8: weights and activations, the fastest "
        "on most phones; qat: int8 after a fine-tuning that rounds as int8 does, for the accuracy "
        "that int8 alone loses.",
        "none",
        choices=("none", "float16", "dynamic", "int8", "qat"),
        basic=True,
    )
    input_type: str = setting(
        "Type of the pixels and logits of an int8 file. int8: pixel - 128. uint8: the pixel.",
        "int8",
        choices=("int8", "uint8"),
        group=_INT8,
    )
    representative_images: int = setting(
        "Number of training images from which the ranges of the activations are computed.",
        500,
        least=1,
        group=_INT8,
    )
    min_agreement: float = setting(
        "Least share of the test images for which the file and Keras must give the same class. "
        "Below it nothing is written.",
        0.95,
        least=0,
        most=1,
        group=_FILES,
    )
    architecture: str | None = setting(
        "Architecture of the model, for --quantize=qat. Default: architecture.json beside the "
        "model.",
        None,
        group=_QAT,
        path=True,
    )
    qat_epochs: int = setting("Epochs of the fine-tuning.", 3, least=1, group=_QAT)
    qat_learning_rate: float = setting(
        "Peak learning rate of the fine-tuning (SGD, cosine to 0). About a tenth of the "
        "training's.",
        0.01,
        least=0,
        group=_QAT,
    )
    prune: float = setting(
        "Share of the weights of the 1x1 convolutions that are set to 0 before the fine-tuning "
        "rounds them. The file becomes smaller when compressed, and no faster here. 0 turns it "
        "off.",
        0.0,
        least=0,
        most=0.95,
        group=_QAT,
    )
    batch_size: int = setting("Images in a batch.", 128, least=2, group=_QAT)
    random_crop: int = setting("As for fpnas train.", 2, least=0, group=_QAT)
    random_flip: bool = setting("As for fpnas train.", False, group=_QAT)
    seed: int = setting("Seed of everything that is random.", 0, least=0, most=MAX_SEED, group=_QAT)
    output: str | None = setting(
        "File to write, ending in .tflite. Default: beside the model, named after it and after "
        "--quantize. labels.txt and a JSON report go to the same folder.",
        None,
        group=_FILES,
    )
    overwrite: bool = setting("Whether files that exist are replaced.", False, group=_FILES)

    def check(self) -> None:
        """Raises `UserError` when settings do not fit together."""
        if self.prune and self.quantize != "qat":
            raise UserError("--prune needs --quantize=qat")


class TfliteExport(NamedTuple):
    """The files of an export.

    Attributes:
        path: The `.tflite` file.
        labels: Names of the classes, one in each line.
        report_file: The report as JSON.
        report: Size, operators, accuracies and what else was found.
    """

    path: pathlib.Path
    labels: pathlib.Path
    report_file: pathlib.Path
    report: dict[str, Any]


class Comparison(NamedTuple):
    """A file and its Keras model on the same images.

    Attributes:
        max_difference: Largest difference of a logit.
        agreement: Share of the images that both give the same class.
        keras_accuracy: Accuracy of the Keras model.
        tflite_accuracy: Accuracy of the file.
        keras_balanced_accuracy: Mean of the accuracies of the classes that have images.
        tflite_balanced_accuracy: The same of the file.
        class_changes: Accuracy of the file minus that of the Keras model, for each class that has
            images.
    """

    max_difference: float
    agreement: float
    keras_accuracy: float
    tflite_accuracy: float
    keras_balanced_accuracy: float
    tflite_balanced_accuracy: float
    class_changes: dict[str, float]


def export_tflite(**settings: Any) -> TfliteExport:
    """Converts a trained model to a `.tflite` file, checks it, and writes it with its labels.

    Args:
        **settings: The fields of `TfliteSettings`, which are the flags of `fpnas export`.

    Raises:
        UserError: When a setting is wrong, or the file does not do what Keras does. Nothing is
            written then.

    Example:

    ```python
    exported = export.export_tflite(
        model="runs/mine_trained/model.keras", data="folder:photos", quantize="int8"
    )
    exported.path, exported.report["tflite_accuracy"]
    ```
    """
    return run_export(TfliteSettings(**settings))


def run_export(settings: TfliteSettings) -> TfliteExport:
    """Like `export_tflite`, but takes a `TfliteSettings`."""
    import keras

    keras.utils.set_random_seed(settings.seed)
    model = networks.load_model(settings.model)
    output, labels, report_file = _output_paths(settings)
    images = _load_test_images(settings, model, labels)
    content = _convert(settings, model)
    # First, and in a process of its own: what XNNPACK refuses may take its process down.
    milliseconds = _time_on_host(settings.model, content)
    with data.naming_unreadable(images):
        comparison = compare(model, content, images)
    _check(settings, comparison)
    report = {
        "model": settings.model,
        "quantize": settings.quantize,
        "bytes": len(content),
        "operators": export.conversion.operators(content),
        "float_operators": export.conversion.float_operators(content),
        "delegated_partitions": export.conversion.delegated_partitions(content),
        "host_milliseconds": milliseconds,
        "data": settings.data,
        "seed": settings.seed,
        "test_images": len(images.y),
        **comparison._asdict(),
    }
    with replacing(labels) as temporary:
        temporary.write_text(_label_text(images), encoding="utf-8")
    write_json(report_file, report)
    with replacing(output) as temporary:
        temporary.write_bytes(content)
    _report_with_training(pathlib.Path(settings.model).parent)
    return TfliteExport(output, labels, report_file, report)


def _report_with_training(model_folder):
    """Makes the report of the training again, if there is one: it has a section of the files."""
    if runs.TrainingRun(model_folder).report.is_file():
        try:
            write_report(model_folder)
        except (UserError, OSError) as error:  # The file is there all the same.
            logging.warning("no report: %s", error)


def compare(model: "keras.Model", content: bytes, images: "data.Images") -> Comparison:
    """Runs a model and its file on all images."""
    runner = export.conversion.Runner(content)
    classes = len(images.class_names)
    difference, agreed, right = 0.0, 0, np.zeros((2, classes))
    with track(len(images.y), "comparing", "images") as progress:
        for x, y in data.test_batches(images).as_numpy_iterator():
            expected = model.predict_on_batch(x)
            received = np.stack([runner(image) for image in x])
            # np.maximum keeps a NaN, max() would drop it.
            difference = float(np.maximum(difference, np.abs(expected - received).max()))
            given = np.stack([expected.argmax(-1), received.argmax(-1)])
            agreed += int((given[0] == given[1]).sum())
            right += [np.bincount(y[each == y], minlength=classes) for each in given]
            progress.update(len(y))
    counts = np.bincount(images.y, minlength=classes)
    shares = right[:, counts > 0] / counts[counts > 0]
    names = [name for name, count in zip(images.class_names, counts) if count]
    return Comparison(
        difference,
        agreed / len(images.y),
        *(right.sum(axis=1) / len(images.y)).tolist(),
        *shares.mean(axis=1).tolist(),
        dict(zip(names, (shares[1] - shares[0]).tolist())),
    )


def _convert(settings, model):
    """The model as a flat buffer."""
    convert = export.conversion.convert
    if settings.quantize not in ("int8", "qat"):
        return convert(model, settings.quantize)
    images = settings.load_images_for(
        f"the model {settings.model}",
        model.input_shape[1:],
        model.output_shape[-1],
        "train",
        again=True,
    )
    with data.naming_unreadable(images):
        if settings.quantize == "int8":
            count = settings.representative_images
            representative = export.conversion.representative_images(images, count)
            return convert(model, "int8", representative, settings.input_type)
        tuned = _fine_tune(settings, model, images)
        return convert(tuned, "int8", input_type=settings.input_type)


def _fine_tune(settings, model, images):
    augmentation = data.Augmentation(settings.random_crop, settings.random_flip)
    return export.qat.fine_tune(
        model,
        _find_architecture(settings, model),
        data.train_batches(images, settings.batch_size, settings.seed, augmentation),
        settings.qat_epochs,
        settings.qat_learning_rate,
        settings.prune,
    )


def _find_architecture(settings, model):
    """The architecture of the model, which --quantize=qat builds again."""
    path = settings.architecture
    if not path:
        path = runs.TrainingRun(pathlib.Path(settings.model).parent).architecture_file
        if not path.is_file():
            raise UserError(
                f"`architecture` must be given: there is no {path.name} beside {settings.model}"
            )
    architecture = Architecture.load(path)
    expected = [weight.shape for weight in architecture.build().weights]
    if [weight.shape for weight in model.weights] != expected:
        raise UserError(f"the model {settings.model} is not of the architecture in {path}")
    return architecture


def _check(settings, comparison):
    """Raises `UserError` unless the file does what Keras does."""
    if settings.quantize == "none" and not comparison.max_difference <= MAX_DIFFERENCE:
        raise UserError(
            f"the converted file differs from Keras by {comparison.max_difference:.2g} in a logit, "
            f"more than {MAX_DIFFERENCE:.0e}; nothing is written"
        )
    if not comparison.agreement >= settings.min_agreement:
        raise UserError(
            f"the converted file gives the class of Keras for {comparison.agreement:.2%} of the "
            f"test images, less than `min_agreement` {settings.min_agreement:.2%}; nothing is "
            "written"
        )


def _time_on_host(name, content):
    """Milliseconds of one image on one thread of this machine."""
    devices = export.devices
    with (
        contextlib.closing(devices.Host()) as host,
        tempfile.NamedTemporaryFile(suffix=".tflite") as file,
    ):
        file.write(content)
        file.flush()
        times = devices.times(host, {name: pathlib.Path(file.name)}, _LATENCY_ROUNDS)
    return devices.tenth_percentile(times[name])


def _output_paths(settings):
    """The paths of the file, of the labels and of the report."""
    model = pathlib.Path(settings.model)
    suffix = "" if settings.quantize == "none" else f"_{settings.quantize}"
    output = pathlib.Path(settings.output or model.with_name(f"{model.stem}{suffix}.tflite"))
    if output.suffix != ".tflite":
        raise UserError(f"`output` must end in .tflite. Received: output={output}")
    check_output(output)
    report = output.with_name(f"{output.stem}_report.json")
    _refuse_existing(settings, [path for path in (output, report) if path.exists()])
    return output, output.with_name("labels.txt"), report


def _refuse_existing(settings, paths):
    if paths and not settings.overwrite:
        raise UserError(f"{', '.join(map(str, paths))} exists already; --overwrite replaces it")


def _load_test_images(settings, model, labels):
    images = settings.load_images_for(
        f"the model {settings.model}", model.input_shape[1:], model.output_shape[-1], "test"
    )
    # Several files of one data set may share a folder and its labels.
    if labels.exists() and labels.read_text(encoding="utf-8") != _label_text(images):
        _refuse_existing(settings, [labels])
    return images


def _label_text(images):
    return "".join(f"{name}\n" for name in images.class_names)


def _export_and_print(settings):
    exported = run_export(settings)
    report = exported.report
    print(
        f"\n{exported.path}: {report['bytes']:,} bytes; test accuracy "
        f"{report['tflite_accuracy']:.2%} (Keras {report['keras_accuracy']:.2%}), balanced "
        f"{report['tflite_balanced_accuracy']:.2%} ({report['keras_balanced_accuracy']:.2%}), "
        f"same class for {report['agreement']:.2%}, largest difference of a logit "
        f"{report['max_difference']:.1e}; {report['host_milliseconds']:.3g} ms an image on one "
        "thread of this machine\n"
        f"labels: {exported.labels}\nreport: {exported.report_file}\n"
        "next, time it on this machine:\n"
        f"  litert-benchmark --num_threads=1 --model={shlex.quote(str(exported.path))}"
    )


COMMAND = Command(
    name="fpnas export",
    summary="Writes a trained model as a .tflite file and checks it against Keras.",
    examples=(
        (
            "An int8 file of a network for photos",
            "fpnas export --model=runs/mine_trained/model.keras --data=folder:photos "
            "--quantize=int8",
        ),
    ),
    settings=TfliteSettings,
    run=_export_and_print,
)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
