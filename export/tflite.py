"""Writes a trained model as one `.tflite` file and checks it against Keras.

python -m export.tflite --model=runs/quickstart_trained/model.keras
"""

import collections
import json
import pathlib
import shlex
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from absl import flags
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from tqdm import tqdm

from fpnas_keras import cli, data
from fpnas_keras.files import reason, replacing

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(cli)
flags.DEFINE_string("model", None, "Keras file (.keras) to convert.", required=True)
flags.DEFINE_string(
    "output",
    None,
    "File to write, ending in .tflite; by default beside the model and named after it. "
    "labels.txt and a JSON report go to the same folder.",
)
flags.DEFINE_boolean("overwrite", False, "Whether files that exist already are replaced.")

# Largest difference of a logit between Keras and the file, float32, on the test set.
MAX_DIFFERENCE = 1e-4


class Comparison(NamedTuple):
    """A file and its Keras model on the same images."""

    max_difference: float
    agreement: float
    keras_accuracy: float
    tflite_accuracy: float


def convert(model: keras.Model) -> bytes:
    """Converts a model of one image input to a float32 TFLite flat buffer.

    The file takes one image, float32 pixels 0..255 (batch 1: a dynamic batch
    splits the part that XNNPACK runs), has builtin operators only, and the
    signature `serving_default` from `image` to `logits`.

    Args:
        model: A built functional model from images to logits.

    Raises:
        ValueError: When the model needs operators that are not builtin.
    """
    module = tf.Module()
    # The module owns the variables, else the converter leaves them out of the file.
    module.variables_of_model = [variable.value for variable in model.variables]
    shape = (1, *model.input_shape[1:])

    @tf.function(input_signature=[tf.TensorSpec(shape, tf.float32, name="image")])
    def serve(image):
        return {"logits": model(image, training=False)}

    module.serve = serve
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [serve.get_concrete_function()], module
    )
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    try:
        return converter.convert()
    except Exception as error:  # ConverterError is not public.
        message = f"the model {model.name} cannot be converted: {reason(error, line=-1)}"
        raise ValueError(message) from None


def compare(model: keras.Model, tflite: bytes, images: data.Images) -> Comparison:
    """Runs a model and its file on all images."""
    interpreter = Interpreter(model_content=tflite)
    serve = interpreter.get_signature_runner("serving_default")
    difference, agreed, right = 0.0, 0, np.zeros(2)
    with tqdm(total=len(images.y), desc="comparing", unit=" images", delay=5) as progress:
        for x, y in data.test_batches(images).as_numpy_iterator():
            expected = model.predict_on_batch(x)
            received = np.concatenate([serve(image=image[None])["logits"] for image in x])
            # np.maximum keeps a NaN, max() would drop it.
            difference = float(np.maximum(difference, np.abs(expected - received).max()))
            classes = np.stack([expected.argmax(-1), received.argmax(-1)])
            agreed += int((classes[0] == classes[1]).sum())
            right += (classes == y).sum(axis=-1)
            progress.update(len(y))
    accuracies = right / len(images.y)
    return Comparison(difference, agreed / len(images.y), *accuracies.tolist())


def operators(tflite: bytes) -> dict[str, int]:
    """How often each operator occurs in a file."""
    # Without the delegate, which would show as one operator for all that it took.
    interpreter = Interpreter(
        model_content=tflite,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    names = (op["op_name"] for op in interpreter._get_ops_details())
    return dict(sorted(collections.Counter(names).items()))


def main() -> None:
    """Converts the model that the flags name, checks the file and reports."""
    model = load_model(FLAGS.model)
    output, labels, report = _output_paths()
    images = _test_images(model, labels)
    tflite = convert(model)
    comparison = compare(model, tflite, images)
    if not comparison.max_difference <= MAX_DIFFERENCE:
        raise ValueError(
            f"the converted file differs from Keras by {comparison.max_difference:.2g} in a logit, "
            f"more than {MAX_DIFFERENCE:.0e}; nothing is written"
        )
    contents = {
        "model": FLAGS.model,
        "quantize": "none",
        "bytes": len(tflite),
        "operators": operators(tflite),
        "data": FLAGS.data,
        "test_images": len(images.y),
        **comparison._asdict(),
    }
    with replacing(labels) as temporary:
        temporary.write_text(_label_text(images))
    with replacing(report) as temporary:
        temporary.write_text(json.dumps(contents, indent=1) + "\n")
    with replacing(output) as temporary:
        temporary.write_bytes(tflite)
    print(
        f"\n{output}: {len(tflite):,} bytes; test accuracy {comparison.tflite_accuracy:.2%} "
        f"(Keras {comparison.keras_accuracy:.2%}), largest difference of a logit "
        f"{comparison.max_difference:.1e}\nlabels: {labels}\nreport: {report}\n"
        "next, time it on this machine:\n"
        f"  litert-benchmark --num_threads=1 --model={shlex.quote(str(output))}"
    )


def load_model(path: str) -> keras.Model:
    """Loads a `.keras` file in safe mode: no code in it is run.

    Raises:
        ValueError: When it is no Keras file, or not one from images to logits.
    """
    if not pathlib.Path(path).is_file() or not path.endswith(".keras"):
        raise ValueError(f"`model` must be an existing .keras file. Received: model={path}")
    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # Keras raises what its many readers raise.
        raise ValueError(f"cannot load the Keras model {path}: {reason(error)}") from None
    shapes = (getattr(model, "input_shape", None), getattr(model, "output_shape", None))
    ranks = [len(shape) if isinstance(shape, tuple) else None for shape in shapes]
    if ranks != [4, 2] or None in shapes[0][1:]:
        raise ValueError(
            f"the model {path} must go from (batch, height, width, channels) to (batch, classes). "
            f"Received: {shapes[0]} to {shapes[1]}"
        )
    return model


def _output_paths():
    output = pathlib.Path(FLAGS.output or pathlib.Path(FLAGS.model).with_suffix(".tflite"))
    if output.suffix != ".tflite":
        raise ValueError(f"`output` must end in .tflite. Received: output={output}")
    if not output.parent.is_dir():
        raise ValueError(f"`output` must lie in an existing folder. Received: output={output}")
    report = output.with_name(f"{output.stem}_report.json")
    _refuse_existing(path for path in (output, report) if path.exists())
    return output, output.with_name("labels.txt"), report


def _refuse_existing(paths):
    names = ", ".join(map(str, paths))
    if names and not FLAGS.overwrite:
        raise ValueError(f"{names} exists already; --overwrite replaces it")


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
