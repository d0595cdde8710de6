"""Writes a trained model as one `.tflite` file and checks it against Keras.

python -m export.tflite --model=runs/quickstart_trained/model.keras
"""

import contextlib
import dataclasses
import pathlib
import shlex
import sys
import tempfile
from typing import Any, NamedTuple

from absl import logging

import export
from fpnas_keras import data, networks, runs
from fpnas_keras.architecture import Architecture
from fpnas_keras.commands import Command, run_command, visible_log
from fpnas_keras.data.settings import DATA_FLAGS, RESIZES, DataSettings
from fpnas_keras.errors import UserError
from fpnas_keras.files import check_output, replacing, write_json
from fpnas_keras.report import failure_as_warning, write_report
from fpnas_keras.settings import MAX_SEED, Settings, setting

_INTERFACE, _INT8, _CHECK, _QAT, _FILES, _DATA = (
    *("What the file takes and gives", "int8 files", "Check", "Fine-tuning of --quantize=qat"),
    *("Files", "Data"),
)
_AS_TRAINED = " Default: as the training that made the model."
_LATENCY_ROUNDS = 30
# Images at once, from which the ranges of int8 are taken.
_CALIBRATION_BATCH = 125
# What files take, and networks of this project are trained on.
_PIXELS = (0.0, 255.0)
# Shift of the images of a fine-tuning, for models whose training is not known.
_RANDOM_CROP = 2
# The settings that only some files depend on, by the numbers in these.
_NEEDS = {
    ("qat",): {
        *("prune", "qat_epochs", "qat_learning_rate", "qat_batch_size"),
        *("random_crop", "random_flip"),
    },
    ("int8",): {"representative_images"},
    ("int8", "qat"): {"architecture", "input_type"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfliteSettings(Settings):
    """Settings of an export. Each is a flag of `fpnas export`."""

    model: str = setting("Keras file (.keras) to convert.", basic=True)
    data: str | None = setting(
        "Images to check and calibrate with." + _AS_TRAINED, None, basic=True, group=_DATA
    )
    data_dir: str | None = setting(
        "Folder where tensorflow_datasets keeps its data." + _AS_TRAINED, None, group=_DATA
    )
    download: bool | None = setting(
        "Whether tensorflow_datasets may download data." + _AS_TRAINED, None, group=_DATA
    )
    train_images: int | None = setting(
        "Number of training images." + _AS_TRAINED, None, least=2, group=_DATA
    )
    resize: str | None = setting(
        "How images that are not square become square." + _AS_TRAINED,
        None,
        choices=RESIZES,
        group=_DATA,
    )
    quantize: str = setting(
        "Numbers in the file. none: float32; float16: weights of half the size, for GPUs; "
        "dynamic: int8 weights of a quarter; int8: weights and activations, the fastest "
        "on most phones; qat: int8 after a fine-tuning that rounds as int8 does, for the accuracy "
        "that int8 alone loses.",
        "none",
        choices=("none", "float16", "dynamic", "int8", "qat"),
        basic=True,
    )
    scores: str = setting(
        "What the file gives. probabilities: of each class, their sum is 1; what MediaPipe and ML "
        "Kit expect.",
        "probabilities",
        choices=("probabilities", "logits"),
        group=_INTERFACE,
    )
    batch_size: int = setting(
        "Images that the file takes at once.", 1, least=1, most=1024, group=_INTERFACE
    )
    input_range: tuple[float, ...] = setting(
        "Least and largest pixel that the model was trained with, such as -1,1. The file takes "
        "pixels of 0 to 255 all the same.",
        _PIXELS,
        least=-1e6,
        most=1e6,
        group=_INTERFACE,
    )
    input_type: str = setting(
        "Type of the pixels and scores of an int8 file. uint8: the pixel, which MediaPipe needs. "
        "int8: pixel - 128.",
        "uint8",
        choices=("int8", "uint8"),
        group=_INT8,
    )
    representative_images: int = setting(
        "Number of training images from which the ranges of the activations are computed.",
        500,
        least=1,
        group=_INT8,
    )
    max_accuracy_drop: float = setting(
        "Largest loss of accuracy on the test images: of the file against Keras, and of the Keras "
        "model against what its training recorded. Above it no file is written, unless the images "
        "are so few that the file may lose it by chance.",
        0.05,
        least=0,
        most=1,
        group=_CHECK,
    )
    min_agreement: float = setting(
        "Least share of the test images for which the file gives the class of Keras, or of those "
        "that Keras gets right for which the file is right too. Below it no file is written, "
        "unless there are so few that it may be chance.",
        0.95,
        least=0,
        most=1,
        group=_CHECK,
    )
    architecture: str | None = setting(
        "Architecture of the model, for --quantize=int8 and qat. Default: architecture.json beside "
        "the model.",
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
    qat_batch_size: int = setting("Images in a batch of the fine-tuning.", 128, least=2, group=_QAT)
    prune: float = setting(
        "Share of the weights of the 1x1 convolutions that are set to 0 before the fine-tuning "
        "rounds them. The file becomes smaller when compressed, and no faster here. 0 turns it "
        "off.",
        0.0,
        least=0,
        most=0.95,
        group=_QAT,
    )
    random_crop: int | None = setting(
        "Largest shift of an image of the fine-tuning, in pixels." + _AS_TRAINED,
        None,
        least=0,
        group=_QAT,
    )
    random_flip: bool | None = setting(
        "Mirror half of the images of the fine-tuning left to right." + _AS_TRAINED,
        None,
        group=_QAT,
    )
    seed: int = setting("Seed of everything that is random.", 0, least=0, most=MAX_SEED, group=_QAT)
    output: str | None = setting(
        "File to write, ending in .tflite. Default: beside the model, named after it and after "
        "--quantize. labels.txt and a JSON report go to the same folder.",
        None,
        group=_FILES,
    )
    overwrite: bool = setting("Whether files that exist are replaced.", False, group=_FILES)
    model_name: str | None = setting(
        "Name of the model in the file's metadata. Default: that of its folder.", None, group=_FILES
    )
    model_version: str = setting("Version of the model in the metadata.", "1", group=_FILES)
    author: str = setting("Author in the metadata.", "", group=_FILES)
    license: str = setting("Licence of the model in the metadata.", "", group=_FILES)

    def check(self) -> None:
        """Raises `UserError` when settings do not fit together."""
        for formats, names in _NEEDS.items():
            flags = self.name_changed(names)
            if flags and self.quantize not in formats:
                raise UserError(
                    f"{flags} needs --quantize={' or '.join(formats)}. "
                    f"Received: quantize={self.quantize}"
                )
        received = ",".join(f"{each:g}" for each in self.input_range)
        if len(self.input_range) != 2 or not self.input_range[0] < self.input_range[1]:
            raise UserError(
                "`input_range` must be two numbers, the least pixel and the largest. "
                f"Received: input_range={received}"
            )
        if self.quantize == "qat" and self.input_range != _PIXELS:
            raise UserError(
                "--quantize=qat needs pixels of 0 to 255: it is for the networks of this project. "
                f"Received: input_range={received}"
            )

    def find_images(self, run: "runs.TrainingRun | None") -> DataSettings:
        """Which images to use: those of the training, unless others are given.

        Args:
            run: The training that made the model; `None` if it is not known.
        """
        given = {name: value for name, value in self.given().items() if name in DATA_FLAGS}
        if run is None and "data" not in given:
            raise UserError(
                f"`data` must be given: {self.model} does not lie in the directory of a training"
            )
        if run is None:
            return DataSettings(**given)
        return run.data_settings().replaced(given)

    def find_augmentation(self, run: "runs.TrainingRun | None") -> "data.Augmentation":
        """How the images of the fine-tuning are changed: as those of the training, if it is known.

        Args:
            run: The training that made the model; `None` if it is not known.
        """
        known = {} if run is None else run.chosen | run.flags
        crop, flip = self.random_crop, self.random_flip
        if crop is None:
            crop = int(known.get("random_crop", _RANDOM_CROP))
        if flip is None:
            flip = known.get("random_flip") == "true"
        return data.Augmentation(crop, flip)


def settings_without_effect(quantize: str) -> set[str]:
    """The names of the settings that a file with such numbers does not depend on."""
    return set().union(*(names for formats, names in _NEEDS.items() if quantize not in formats))


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


def export_tflite(**settings: Any) -> TfliteExport:
    """Converts a trained model to a `.tflite` file, checks it, and writes it with its labels.

    Args:
        **settings: The fields of `TfliteSettings`, which are the flags of `fpnas export`.

    Returns:
        The files and the report.

    Raises:
        UserError: When a setting is wrong, or the file does not do what Keras does. No `.tflite`
            file is written then. Fine-tuned weights of `quantize="qat"` are kept.

    Example:

    ```python
    exported = export.export_tflite(
        model="runs/mine_trained/model.keras", data="folder:photos", quantize="int8"
    )
    exported.path, exported.report["tflite_accuracy"]
    ```
    """
    with visible_log():
        return run_export(TfliteSettings(**settings))


def run_export(settings: TfliteSettings) -> TfliteExport:
    """Like `export_tflite`, but takes a `TfliteSettings`."""
    import keras

    keras.utils.set_random_seed(settings.seed)
    return _Export(settings).run()


class _Export:
    """One export: its model, images and files."""

    def __init__(self, settings):
        self.settings = settings
        self.model = networks.load_model(settings.model)
        run = runs.TrainingRun(pathlib.Path(settings.model).parent)
        is_own = run.is_training and pathlib.Path(settings.model).name == run.model_file.name
        self.run_of_model = run if is_own else None
        self.images_settings = settings.find_images(self.run_of_model)
        self.output, self.labels, self.report_file = _output_paths(settings)

    def run(self):
        """Converts, checks and writes."""
        settings = self.settings
        images = self._load_images("test")
        self._check_class_names(images)
        # Several files of one data set may share a folder and its labels.
        if self.labels.exists() and self.labels.read_text("utf-8") != _label_text(images):
            _refuse_existing(settings, [self.labels])
        scores = self._with_scores()
        if self.run_of_model is None and settings.input_range == _PIXELS:
            export.comparison.warn_of_range(self.model, images)
        content = export.metadata.add(self._convert(scores), self._metadata(images))
        # First, and in a process of its own: what XNNPACK refuses may take its process down.
        milliseconds = _time_on_host(settings.model, content)
        with data.naming_unreadable(images):
            comparison = export.comparison.compare(scores, content, images)
        export.comparison.check(
            comparison,
            export.comparison.MAX_DIFFERENCE if settings.quantize == "none" else None,
            settings.min_agreement,
            settings.max_accuracy_drop,
            self._recorded_accuracy(),
            len(images.y),
        )
        report = self._report(content, images, milliseconds) | comparison._asdict()
        with replacing(self.labels) as temporary:
            temporary.write_text(_label_text(images), encoding="utf-8")
        write_json(self.report_file, report)
        with replacing(self.output) as temporary:
            temporary.write_bytes(content)
        _report_with_training(pathlib.Path(settings.model).parent)
        return TfliteExport(self.output, self.labels, self.report_file, report)

    def _load_images(self, split):
        return self.images_settings.load_images_for(
            f"the model {self.settings.model}",
            self.model.input_shape[1:],
            self.model.output_shape[-1],
            split,
            again=split == "train",
        )

    def _check_class_names(self, images):
        """Refuses images whose classes are not those that the model was trained on."""
        run = self.run_of_model
        names = run and run.class_names
        if names and names != images.class_names:
            raise UserError(
                f"the model {self.settings.model} was trained on the classes {', '.join(names)}. "
                f"Received: data={self.images_settings.data} with {', '.join(images.class_names)}"
            )

    def _recorded_accuracy(self):
        """Accuracy of the model on the test images as its training has it, or `None`."""
        run = self.run_of_model
        if run is None or not run.finished or self.images_settings.data != run.flags["data"]:
            return None
        return run.summary.get("test_accuracy")

    def _with_scores(self):
        """The model from pixels 0..255 to the scores of the file."""
        import keras

        settings, name = self.settings, f"the model {self.settings.model}"
        low, high = settings.input_range
        is_rescaled = settings.input_range != _PIXELS
        model, needs_softmax = self.model, False
        if settings.scores == "logits":
            model = networks.to_logits(model, name)
        else:
            needs_softmax = not networks.ends_in_softmax(model, name)
        if not is_rescaled and not needs_softmax:
            return model
        images = x = keras.Input(model.input_shape[1:], name="image")
        if is_rescaled:
            x = keras.layers.Rescaling((high - low) / 255, low, name="input_range")(x)
        x = model(x)
        if needs_softmax:
            x = keras.layers.Softmax(name="probabilities")(x)
        return keras.Model(images, x, name="scores")  # A counted name would be in the file.

    def _convert(self, scores):
        """The model as a flat buffer."""
        settings = self.settings
        common = {"scores": settings.scores, "batch_size": settings.batch_size}
        if settings.quantize not in ("int8", "qat"):
            return export.conversion.convert(scores, settings.quantize, **common)
        common["input_type"] = settings.input_type
        images = self._load_images("train")
        with data.naming_unreadable(images):
            twin = self._twin()
            if twin is None:
                conversion = export.conversion
                few = conversion.representative_images(images, settings.representative_images)
                pixels = conversion.representative_pixels(few)
                return conversion.convert(scores, "int8", pixels, **common)
            quantized = self._quantize(twin, images)
            if settings.scores == "probabilities":
                quantized = export.qat.with_softmax(quantized)
            return export.conversion.convert(quantized, "int8", **common)

    def _twin(self):
        """The network in tf_keras, to be quantized; `None` for a model of other projects."""
        settings = self.settings
        if settings.input_range != _PIXELS:
            return None
        try:
            self.architecture = _find_architecture(settings, self.model)
            logits = networks.to_logits(self.model, f"the model {settings.model}")
            return export.qat.twin(logits, self.architecture)
        except UserError as error:
            if settings.quantize == "qat" or settings.architecture:
                raise
            logging.info("TensorFlow's converter rounds the model: %s", error)
            return None

    def _quantize(self, twin, images):
        """A model of tf_keras that rounds as int8 does, fine-tuned for it if that is asked for."""
        settings = self.settings
        if settings.quantize == "int8":
            few = export.conversion.representative_images(images, settings.representative_images)
            return export.qat.quantize(twin, data.test_batches(few, _CALIBRATION_BATCH))
        augmentation = settings.find_augmentation(self.run_of_model)
        tuned = export.qat.fine_tune(
            twin,
            data.train_batches(images, settings.qat_batch_size, settings.seed, augmentation),
            settings.qat_epochs,
            settings.qat_learning_rate,
            settings.prune,
        )
        file = self.output.with_suffix(".keras")
        with replacing(file) as temporary:
            export.qat.tuned_network(tuned, self.architecture).save(temporary)
        logging.info("the fine-tuned weights: %s (--overwrite replaces them)", file)
        return tuned

    def _metadata(self, images):
        settings = self.settings
        return export.metadata.Metadata(
            name=settings.model_name or pathlib.Path(settings.model).absolute().parent.name,
            description=f"Image classifier of {len(images.class_names)} classes, {settings.scores}",
            version=settings.model_version,
            author=settings.author,
            license=settings.license,
            labels=images.class_names,
            scores=settings.scores,
            resize=self.images_settings.resize,
        )

    def _report(self, content, images, milliseconds):
        settings, conversion = self.settings, export.conversion
        few = images.part([0, len(images.y) - 1])
        ((x, *_),) = data.test_batches(few).as_numpy_iterator()
        return {
            "model": settings.model,
            "quantize": settings.quantize,
            "scores": settings.scores,
            "bytes": len(content),
            "batch_size": settings.batch_size,
            "resizable": conversion.resizable(content, x),
            "operators": conversion.operators(content),
            "interpreter_operators": conversion.interpreter_operators(content),
            "float_operators": conversion.float_operators(content),
            "delegated_partitions": conversion.delegated_partitions(content),
            "host_milliseconds": milliseconds,
            "data": self.images_settings.data,
            "seed": settings.seed,
            "test_images": len(images.y),
        }


def _report_with_training(model_folder):
    """Makes the report of the training again, if there is one: it has a section of the files."""
    if runs.TrainingRun(model_folder).report.is_file():
        with failure_as_warning():
            write_report(model_folder)


def _find_architecture(settings, model):
    """The architecture of the model, which is built again to be quantized."""
    path = settings.architecture
    if not path:
        path = runs.TrainingRun(pathlib.Path(settings.model).parent).architecture_file
        if not path.is_file():
            raise UserError(
                f"there is no {path.name} beside {settings.model}. --quantize=qat is for networks "
                "of this project: give --architecture, or take --quantize=int8, which works for "
                "any model"
            )
    architecture = Architecture.load(path)
    expected = [weight.shape for weight in architecture.build().weights]
    if [weight.shape for weight in model.weights] != expected:
        raise UserError(
            f"the model {settings.model} is not of the architecture in {path}, which "
            "--quantize=qat needs. --quantize=int8 works for any model"
        )
    return architecture


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
    paths = [output, report]
    if settings.quantize == "qat":
        weights = output.with_suffix(".keras")
        if weights.absolute() == model.absolute():
            raise UserError(
                f"the fine-tuned weights would replace the model {model}. Received: output={output}"
            )
        paths.append(weights)
    _refuse_existing(settings, [path for path in paths if path.exists()])
    return output, output.with_name("labels.txt"), report


def _refuse_existing(settings, paths):
    if paths and not settings.overwrite:
        raise UserError(f"{', '.join(map(str, paths))} exists already; --overwrite replaces it")


def _label_text(images):
    return "".join(f"{name}\n" for name in images.class_names)


def _export_and_print(settings):
    exported = run_export(settings)
    report = exported.report
    file = shlex.quote(str(exported.path))
    one = "score" if report["scores"] == "logits" else "probability"
    print(
        f"\n{exported.path}: {report['bytes']:,} bytes; test accuracy "
        f"{report['tflite_accuracy']:.2%} (Keras {report['keras_accuracy']:.2%}), balanced "
        f"{report['tflite_balanced_accuracy']:.2%} ({report['keras_balanced_accuracy']:.2%}), "
        f"same class for {report['agreement']:.2%}, largest difference of a {one} "
        f"{report['max_difference']:.1e}; {report['host_milliseconds']:.3g} ms an image on one "
        "thread of this machine"
    )
    if report["delegated_partitions"] > 1:
        left = ", ".join(
            f"{count} {name}" for name, count in report["interpreter_operators"].items()
        )
        print(f"XNNPACK does not run {left}. These split the network, which makes it slower")
    if not report["resizable"]:
        print(f"it takes {report['batch_size']} at a time and cannot be resized: --batch_size")
    print(
        f"labels: {exported.labels}\nreport: {exported.report_file}\n"
        "time it on this machine:\n"
        f"  litert-benchmark --num_threads=1 --model={file}\n"
        "next, classify images with it:\n"
        f"  python -m export.predict --model={file} IMAGE_OR_FOLDER"
    )


COMMAND = Command(
    name="fpnas export",
    summary="Writes a trained model as a .tflite file and checks it against Keras.",
    examples=(
        (
            "An int8 file of a network for photos",
            "fpnas export --model=runs/mine_trained/model.keras --quantize=int8",
        ),
    ),
    settings=TfliteSettings,
    run=_export_and_print,
)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
