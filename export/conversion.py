"""Converts Keras models to TFLite flat buffers, and inspects flat buffers."""

import collections
from collections.abc import Iterable

import keras
import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from fpnas_keras import data
from fpnas_keras.commands import quiet_libraries
from fpnas_keras.errors import UserError
from fpnas_keras.files import summarize_error


def convert(
    model: keras.Model,
    quantize: str = "none",
    representative: Iterable[np.ndarray] | None = None,
    input_type: str = "uint8",
    scores: str = "logits",
    batch_size: int = 1,
) -> bytes:
    """Converts a model of one input and one output to a flat buffer.

    The file takes a fixed number of images (a dynamic batch splits the part that XNNPACK runs), has
    builtin operators only, and the signature `serving_default` from `image` to `logits` or
    `probabilities`.

    Args:
        model: A built functional model of Keras or tf_keras. It can be the result of
            quantization-aware training, whose ranges are then used.
        quantize: "none" (float32), "float16" (float16 weights), "dynamic" (int8 weights, float
            activations) or "int8" (int8 weights and activations).
        representative: Inputs of shape `input_shape` from which the ranges for int8 are computed;
            `None` after quantization-aware training.
        input_type: "int8" or "uint8", of the image and the scores of an int8 file.
        scores: What the model gives: "logits" or "probabilities".
        batch_size: Number of images that the file takes at once.

    Raises:
        UserError: When the model needs operators that are not builtin.
    """
    module = tf.Module()
    # The module owns the variables, else the converter leaves them out of the file.
    module.variables_of_model = [
        each if isinstance(each, tf.Variable) else each.value for each in model.variables
    ]
    shape = (batch_size, *model.input_shape[1:])

    image = tf.TensorSpec(shape, tf.float32, name="image")

    @tf.function(input_signature=[image], autograph=False)
    def serve(image):
        return {scores: model(image, training=False)}

    module.serve = serve
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [serve.get_concrete_function()], module
    )
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    if quantize != "none":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if quantize == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if quantize == "int8":
        converter.inference_input_type = converter.inference_output_type = tf.as_dtype(input_type)
        if representative is not None:
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
            converter.representative_dataset = lambda: (
                {"image": np.stack([each] * batch_size).astype(np.float32)}
                for each in representative
            )
    try:
        with quiet_libraries():
            return converter.convert()
    except Exception as error:  # ConverterError is not public.
        message = f"the model {model.name} cannot be converted: {summarize_error(error, line=-1)}"
        raise UserError(message) from None


def representative_images(images: data.Images, count: int) -> data.Images:
    """Random images of a set, equally many of each class where there are enough of it.

    Args:
        images: The set.
        count: Number of images.
    """
    order = np.random.default_rng(0).permutation(len(images.y))
    # Place of each image among those of its class: first come the first ones of all classes.
    places = np.zeros(len(order), int)
    for label in np.unique(images.y):
        own = order[images.y[order] == label]
        places[own] = np.arange(len(own))
    return images.part(order[np.argsort(places[order], kind="stable")][:count])


def representative_pixels(images: data.Images) -> list[np.ndarray]:
    """The pixels of images, float32, for `convert`.

    The first image gets one black and one white pixel value: pixels are then quantized with
    scale 1, whatever the images are.
    """
    found = [x for batch, _ in data.test_batches(images) for x in batch.numpy()]
    found[0][0, 0, 0], found[0][-1, -1, -1] = 0, 255
    return found


class Runner:
    """Runs a flat buffer on any number of images.

    Args:
        content: The flat buffer, with the signature of `convert`.
        batch_size: Number of images to run at once. Default: that of the file, which is resized
            for another one.

    Attributes:
        scores: What the file gives: "logits" or "probabilities".
        image_shape: `(height, width, channels)`.
        batch_size: Number of images that run at once.
    """

    def __init__(self, content: bytes, batch_size: int | None = None):
        interpreter = Interpreter(model_content=content)
        with quiet_libraries():
            interpreter.allocate_tensors()
        self._serve = interpreter.get_signature_runner("serving_default")
        self._image = self._serve.get_input_details()["image"]
        ((self.scores, self._details),) = self._serve.get_output_details().items()
        own, *self.image_shape = map(int, self._image["shape"])
        self.batch_size = batch_size or own

    @property
    def pixels(self) -> tuple[float, int]:
        """Scale and zero point of the image, `(0.0, 0)` where pixels are float32."""
        return self._image["quantization"]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Scores of images.

        Args:
            images: Pixels 0..255, shape `(n, height, width, channels)`.

        Returns:
            float32 of shape `(n, classes)`.
        """
        parts = range(0, len(images), self.batch_size)
        return np.concatenate([self._run(images[i : i + self.batch_size]) for i in parts])

    def _run(self, images):
        count = len(images)
        if count < self.batch_size:  # The last part: repeated to fill the batch.
            images = np.resize(images, (self.batch_size, *images.shape[1:]))
        scale, zero_point = self.pixels
        if scale:
            limits = np.iinfo(self._image["dtype"])
            images = np.clip(np.round(images / scale) + zero_point, limits.min, limits.max)
        scores = self._serve(image=images.astype(self._image["dtype"]))[self.scores][:count]
        scale, zero_point = self._details["quantization"]
        return (scores.astype(np.float32) - zero_point) * (scale or 1.0)


def resizable(content: bytes, images: np.ndarray) -> bool:
    """Whether a file gives the same scores after its batch size is changed.

    Args:
        content: The flat buffer.
        images: Pixels 0..255, shape `(2, height, width, channels)`.
    """
    runner = Runner(content)
    size = 2 * runner.batch_size
    images = np.resize(images, (size, *runner.image_shape))
    expected = runner(images)
    try:
        with quiet_libraries():
            received = Runner(content, size)(images)
    except (RuntimeError, ValueError):
        return False
    return received.shape == expected.shape and bool(np.allclose(received, expected, atol=1e-3))


def operators(content: bytes) -> dict[str, int]:
    """How often each operator occurs in a flat buffer."""
    return _histogram(_operators(content))


def float_operators(content: bytes) -> dict[str, int]:
    """How often each operator occurs that takes or gives floating-point values."""

    def is_float(operator):
        types = [*operator["operand_types"], *operator["result_types"]]
        return any(np.issubdtype(each, np.floating) for each in types)

    return _histogram(filter(is_float, _operators(content)))


def delegated_partitions(content: bytes) -> int:
    """The number of partitions of the graph that XNNPACK runs: 1 if it runs all of it."""
    return sum(each["op_name"] == "DELEGATE" for each in _delegated(content))


def interpreter_operators(content: bytes) -> dict[str, int]:
    """How often each operator occurs that XNNPACK does not run."""
    nodes = _delegated(content)
    # LiteRT lists all operators, and behind them the partitions that replace some of them.
    makers, replaced = {}, set()
    for node in nodes:
        if node["op_name"] != "DELEGATE":
            makers |= {int(tensor): node["index"] for tensor in node["outputs"]}
    inputs = {node["index"]: node["inputs"] for node in nodes}
    for partition in nodes:
        if partition["op_name"] != "DELEGATE":
            continue
        given, left = set(map(int, partition["inputs"])), list(map(int, partition["outputs"]))
        while left:
            maker = makers.get(left.pop())
            if maker is not None and maker not in replaced:
                replaced.add(maker)
                left += [int(each) for each in inputs[maker] if int(each) not in given]
    return _histogram(
        each for each in nodes if each["op_name"] != "DELEGATE" and each["index"] not in replaced
    )


def delegated_share(content: bytes) -> float:
    """Share of the operators that XNNPACK runs."""
    return 1 - sum(interpreter_operators(content).values()) / sum(operators(content).values())


def _delegated(content):
    """The operators, and the partitions of XNNPACK."""
    interpreter = Interpreter(model_content=content)
    with quiet_libraries():
        interpreter.allocate_tensors()
    return interpreter._get_ops_details()


def _operators(content):
    # Without the delegate, which would show as one operator for all that it took.
    interpreter = Interpreter(
        model_content=content,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    return interpreter._get_ops_details()


def _histogram(operators):
    return dict(sorted(collections.Counter(each["op_name"] for each in operators).items()))
