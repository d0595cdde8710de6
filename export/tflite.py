"""Writes a trained model as one `.tflite` file and checks it against Keras.

python -m export.tflite --model=runs/quickstart_trained/model.keras
"""

import contextlib
import json
import pathlib
import shlex
import tempfile
from typing import NamedTuple

import keras
import numpy as np
from absl import flags
from tqdm import tqdm

from export import conversion, devices
from fpnas_keras import cli, data
from fpnas_keras.architecture import Architecture
from fpnas_keras.errors import UserError
from fpnas_keras.files import read_json, replacing
from fpnas_keras.networks.plain_network import load_model

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(cli)
flags.DEFINE_string("model", None, "Keras file (.keras) to convert.", required=True)
flags.DEFINE_enum(
    "quantize",
    "none",
    [*conversion.FORMATS, "qat"],
    "Numbers in the file. none: float32; float16: weights of half the size, for GPUs; dynamic: "
    "int8 weights, a quarter of the size; int8: weights and activations, the fastest on most "
    "phones; qat: int8 after a fine-tuning that knows of it, for accuracy that int8 alone loses.",
)
flags.DEFINE_enum(
    "input_type",
    "int8",
    ["int8", "uint8"],
    "Pixels and logits of an int8 file: pixel - 128, or the pixel itself.",
)
flags.DEFINE_integer(
    "representative_images",
    500,
    "Training images whose ranges of activations int8 takes over.",
    lower_bound=1,
)
flags.DEFINE_float(
    "min_agreement",
    0.95,
    "Least share of the test images for which the file and Keras must give the same class; under "
    "it nothing is written.",
    lower_bound=0,
    upper_bound=1,
)
flags.DEFINE_string(
    "architecture",
    None,
    "Architecture of the model, for --quantize=qat; by default what the summary.json beside the "
    "model says.",
)
flags.DEFINE_integer("qat_epochs", 3, "Epochs of the fine-tuning of --quantize=qat.", lower_bound=1)
flags.DEFINE_float(
    "qat_learning_rate",
    0.01,
    "Peak learning rate of that fine-tuning (SGD, cosine to 0); about a tenth of the training's.",
    lower_bound=0,
)
flags.DEFINE_float(
    "prune",
    0.0,
    "Share of the weights of the 1x1 convolutions that --quantize=qat sets to 0 before it "
    "quantizes: smaller files when compressed, no faster here. 0 is off.",
    lower_bound=0,
    upper_bound=0.95,
)
flags.DEFINE_integer("batch_size", 128, "Images a batch of --quantize=qat.", lower_bound=2)
flags.DEFINE_integer(
    "random_crop", 2, "As in fpnas_keras.train, for --quantize=qat.", lower_bound=0
)
flags.DEFINE_boolean("random_flip", False, "As in fpnas_keras.train, for --quantize=qat.")
flags.DEFINE_integer("seed", 0, "Seed of everything that is random.", lower_bound=0)
flags.DEFINE_string(
    "output",
    None,
    "File to write, ending in .tflite; by default beside the model and named after it and after "
    "--quantize. labels.txt and a JSON report go to the same folder.",
)
flags.DEFINE_boolean("overwrite", False, "Whether files that exist already are replaced.")
flags.register_multi_flags_validator(
    ["quantize", "prune"],
    lambda values: values["quantize"] == "qat" or not values["prune"],
    "--prune needs --quantize=qat",
)

# Largest difference of a logit between Keras and a float32 file, on the test set.
MAX_DIFFERENCE = 1e-4
_LATENCY_ROUNDS = 30


class Comparison(NamedTuple):
    """A file and its Keras model on the same images."""

    max_difference: float
    agreement: float
    keras_accuracy: float
    tflite_accuracy: float


def compare(model: keras.Model, content: bytes, images: data.Images) -> Comparison:
    """Runs a model and its file on all images."""
    run = conversion.Runner(content)
    difference, agreed, right = 0.0, 0, np.zeros(2)
    with tqdm(total=len(images.y), desc="comparing", unit=" images", delay=5) as progress:
        for x, y in data.test_batches(images).as_numpy_iterator():
            expected = model.predict_on_batch(x)
            received = np.stack([run(image) for image in x])
            # np.maximum keeps a NaN, max() would drop it.
            difference = float(np.maximum(difference, np.abs(expected - received).max()))
            classes = np.stack([expected.argmax(-1), received.argmax(-1)])
            agreed += int((classes[0] == classes[1]).sum())
            right += (classes == y).sum(axis=-1)
            progress.update(len(y))
    accuracies = right / len(images.y)
    return Comparison(difference, agreed / len(images.y), *accuracies.tolist())


def main() -> None:
    """Converts the model that the flags name, checks the file and reports."""
    keras.utils.set_random_seed(FLAGS.seed)
    model = load_model(FLAGS.model)
    output, labels, report = _output_paths()
    images = _test_images(model, labels)
    content = _convert(model)
    # First, and in a process of its own: what XNNPACK refuses may take its process down.
    milliseconds = _host_milliseconds(content)
    comparison = compare(model, content, images)
    _check(comparison)
    contents = {
        "model": FLAGS.model,
        "quantize": FLAGS.quantize,
        "bytes": len(content),
        "operators": conversion.operators(content),
        "float_operators": conversion.float_operators(content),
        "delegated_partitions": conversion.delegated_partitions(content),
        "host_milliseconds": milliseconds,
        "data": FLAGS.data,
        "seed": FLAGS.seed,
        "test_images": len(images.y),
        **comparison._asdict(),
    }
    with replacing(labels) as temporary:
        temporary.write_text(_label_text(images))
    with replacing(report) as temporary:
        temporary.write_text(json.dumps(contents, indent=1) + "\n")
    with replacing(output) as temporary:
        temporary.write_bytes(content)
    print(
        f"\n{output}: {len(content):,} bytes; test accuracy {comparison.tflite_accuracy:.2%} "
        f"(Keras {comparison.keras_accuracy:.2%}), same class for {comparison.agreement:.2%}, "
        f"largest difference of a logit {comparison.max_difference:.1e}; "
        f"{milliseconds:.3g} ms an image on one thread of this machine\n"
        f"labels: {labels}\nreport: {report}\n"
        "next, time it on this machine:\n"
        f"  litert-benchmark --num_threads=1 --model={shlex.quote(str(output))}"
    )


def _convert(model):
    if FLAGS.quantize not in ("int8", "qat"):
        return conversion.convert(model, FLAGS.quantize)
    owner = f"the model {FLAGS.model}"
    shape, num_classes = model.input_shape[1:], model.output_shape[-1]
    images = cli.load_data_for(owner, shape, num_classes, "train")
    if FLAGS.quantize == "int8":
        representative = conversion.representative_images(images, FLAGS.representative_images)
        return conversion.convert(model, "int8", representative, FLAGS.input_type)
    from export import qat  # which imports a second Keras

    augmentation = data.Augmentation(FLAGS.random_crop, FLAGS.random_flip)
    batches = data.train_batches(images, FLAGS.batch_size, FLAGS.seed, augmentation)
    tuned = qat.fine_tune(
        model,
        _architecture(model),
        batches,
        FLAGS.qat_epochs,
        FLAGS.qat_learning_rate,
        FLAGS.prune,
    )
    return conversion.convert(tuned, "int8", input_type=FLAGS.input_type)


def _architecture(model):
    """The architecture of the model, which --quantize=qat builds anew."""
    path = FLAGS.architecture
    if path:
        architecture = Architecture.load(path)
    else:
        path = pathlib.Path(FLAGS.model).with_name("summary.json")
        if not path.is_file():
            raise UserError(
                f"`architecture` must be given: there is no summary.json beside {FLAGS.model}"
            )
        architecture = read_json(
            path, "a summary", lambda summary: Architecture.from_dict(summary.get("architecture"))
        )
    expected = [weight.shape for weight in architecture.build().weights]
    if [weight.shape for weight in model.weights] != expected:
        raise UserError(f"the model {FLAGS.model} is not of the architecture in {path}")
    return architecture


def _check(comparison):
    """Raises `UserError` unless the file does what Keras does."""
    if FLAGS.quantize == "none" and not comparison.max_difference <= MAX_DIFFERENCE:
        raise UserError(
            f"the converted file differs from Keras by {comparison.max_difference:.2g} in a logit, "
            f"more than {MAX_DIFFERENCE:.0e}; nothing is written"
        )
    if not comparison.agreement >= FLAGS.min_agreement:
        raise UserError(
            f"the converted file gives the class of Keras for {comparison.agreement:.2%} of the "
            f"test images, less than `min_agreement` {FLAGS.min_agreement:.2%}; nothing is written"
        )


def _host_milliseconds(content):
    with (
        contextlib.closing(devices.Host()) as host,
        tempfile.NamedTemporaryFile(suffix=".tflite") as file,
    ):
        file.write(content)
        file.flush()
        times = devices.times(host, {FLAGS.model: pathlib.Path(file.name)}, _LATENCY_ROUNDS)
    return devices.typical(times[FLAGS.model])


def _output_paths():
    model = pathlib.Path(FLAGS.model)
    suffix = "" if FLAGS.quantize == "none" else f"_{FLAGS.quantize}"
    output = pathlib.Path(FLAGS.output or model.with_name(f"{model.stem}{suffix}.tflite"))
    if output.suffix != ".tflite":
        raise UserError(f"`output` must end in .tflite. Received: output={output}")
    if not output.parent.is_dir():
        raise UserError(f"`output` must lie in an existing folder. Received: output={output}")
    report = output.with_name(f"{output.stem}_report.json")
    _refuse_existing(path for path in (output, report) if path.exists())
    return output, output.with_name("labels.txt"), report


def _refuse_existing(paths):
    names = ", ".join(map(str, paths))
    if names and not FLAGS.overwrite:
        raise UserError(f"{names} exists already; --overwrite replaces it")


def _test_images(model, labels):
    images = cli.load_data_for(
        f"the model {FLAGS.model}", model.input_shape[1:], model.output_shape[-1], "test"
    )
    # Several files of one data set may share a folder and its labels.
    if labels.exists() and labels.read_text() != _label_text(images):
        _refuse_existing([labels])
    return images


def _label_text(images):
    return "".join(f"{name}\n" for name in images.class_names)


if __name__ == "__main__":
    cli.run(main)
