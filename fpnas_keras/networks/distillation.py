"""Distillation: trained networks whose logits a smaller one learns beside the labels."""

import inspect
import pathlib

import keras

from fpnas_keras.architecture import Architecture
from fpnas_keras.errors import UserError
from fpnas_keras.files import summarize_error
from fpnas_keras.networks.plain_network import load_model

_IMAGENET_CLASSES = 1000


def make_distiller(
    teacher: keras.Model, student: keras.Model, temperature: float, weight: float
) -> keras.distillation.Distiller:
    """A model whose `fit` trains the student on labels and teacher.

    The loss is `(1 - weight) * loss(labels) + weight * T^2 * KL(softmax(t / T) || softmax(s / T))`,
    with the logits t of the teacher and s of the student.

    Args:
        teacher: Pixels to logits; it stays what it is.
        student: The same.
        temperature: T.
        weight: Share of the teacher, 0 to 1.

    Reference: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
    """
    # Named "kl_divergence", its default, Keras 3.15 compares the logits without a softmax.
    loss = keras.distillation.LogitsDistillation(temperature, keras.losses.KLDivergence())
    return keras.distillation.Distiller(teacher, student, loss, student_loss_weight=1 - weight)


def load_teacher(
    name: str, weights: str | None, input_shape: tuple[int, int, int], num_classes: int
) -> keras.Model:
    """Loads a teacher: a network from pixels 0..255 to float32 logits.

    Args:
        name: A `.keras` file, which may end in a softmax; an architecture file (`.json`), whose
            weights are given; or the name of a network of `keras.applications`, whose resizing and
            preprocessing are made part of it.
        weights: File of the weights (`.weights.h5`) of an architecture or of a network of
            `keras.applications`, which without it has those of ImageNet.
        input_shape: `(height, width, channels)` of the student's images.
        num_classes: Number of the student's classes.

    Raises:
        UserError: When there is no such teacher, or it is for other images or classes.
    """
    if name.endswith(".keras"):
        if weights is not None:
            raise UserError(
                f"a .keras file has its weights; `teacher_weights` is for architectures and "
                f"keras.applications. Received: teacher={name}, teacher_weights={weights}"
            )
        model = load_model(name, "teacher")
    elif name.endswith(".json"):
        model = _architecture_with_weights(name, weights)
    else:
        model = _application(name, weights, input_shape, num_classes)
    received = (model.input_shape[1:], model.output_shape[-1])
    if received != (input_shape, num_classes):
        raise UserError(
            f"the teacher {name} must be for images of {input_shape} and {num_classes} classes. "
            f"Received: images of {received[0]} and {received[1]} classes"
        )
    return _to_logits(model, name)


def _architecture_with_weights(name, weights):
    if weights is None:
        raise UserError(f"the architecture {name} needs `teacher_weights`, a .weights.h5 file")
    model = Architecture.load(name).build()
    _load_weights(model, weights, name)
    return model


def _load_weights(model, weights, name):
    if not pathlib.Path(weights).is_file():
        raise UserError(
            f"`teacher_weights` must be an existing file. Received: teacher_weights={weights}"
        )
    try:
        model.load_weights(weights)
    except Exception as error:  # Keras raises what its many readers raise.
        raise UserError(f"{weights} has no weights of {name}: {summarize_error(error)}") from None


def application_names() -> list[str]:
    """Names of the networks of `keras.applications`."""
    return sorted(
        name for name, each in vars(keras.applications).items() if inspect.isfunction(each)
    )


def _application(name, weights, input_shape, num_classes):
    if name not in application_names():
        raise UserError(
            "`teacher` must be a .keras file, an architecture (.json) or one of keras.applications "
            f"({', '.join(application_names())}). Received: teacher={name}"
        )
    if input_shape[-1] not in (1, 3):
        raise UserError(
            f"the teacher {name} is for images of 1 or 3 channels. Received: {input_shape[-1]}"
        )
    if not weights and num_classes != _IMAGENET_CLASSES:
        raise UserError(
            f"the teacher {name} has ImageNet's {_IMAGENET_CLASSES} classes without "
            f"`teacher_weights`. Received: {num_classes} classes"
        )
    build = getattr(keras.applications, name)
    try:
        network = build(
            weights=None if weights else "imagenet",
            classes=num_classes,
            classifier_activation=None,
        )
    except Exception as error:  # what the download raises
        raise UserError(f"cannot load the teacher {name}: {summarize_error(error)}") from None
    if weights:
        _load_weights(network, weights, name)
    images = keras.Input(input_shape, name="image")
    x = images
    if input_shape[-1] == 1:
        x = keras.layers.Concatenate(name="grey_to_rgb")([x, x, x])
    x = keras.layers.Resizing(*network.input_shape[1:3], name="resizing")(x)
    return keras.Model(images, network(_Preprocessing(build, name="preprocessing")(x)))


class _Preprocessing(keras.layers.Layer):
    """Pixels 0..255 as a network of `keras.applications` wants them."""

    def __init__(self, build, **kwargs):
        super().__init__(**kwargs)
        self._preprocess = inspect.getmodule(build).preprocess_input

    def call(self, images):
        # Some change what they are given.
        return self._preprocess(keras.ops.copy(images))


def _to_logits(model, name):
    """The model without its softmax, in float32."""
    last = model
    while isinstance(last, keras.Model):
        last = last.outputs[0]._keras_history.operation
    if not isinstance(last, keras.layers.Layer):
        raise UserError(
            f"the teacher {name} must end in a layer that gives logits, or in a softmax layer. "
            f"Received: it ends in the operation {type(last).__name__}"
        )
    function = keras.activations.get(getattr(last, "activation", None))
    if isinstance(last, keras.layers.Softmax) or function is keras.activations.softmax:
        logits = keras.ops.log(keras.ops.maximum(model.output, keras.config.epsilon()))
    elif function in (None, keras.activations.linear):
        logits = model.output
    else:
        raise UserError(
            f"the teacher {name} must end in logits or in a softmax. Received: its last layer has "
            f"the activation {keras.activations.serialize(function)}"
        )
    if logits is model.output and logits.dtype == "float32":
        return model
    return keras.Model(model.input, keras.ops.cast(logits, "float32"))
