"""Knowledge distillation: a student learns from labels and from the logits of a teacher."""

import contextlib
import inspect
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from fpnas_keras.architecture import Architecture
from fpnas_keras.errors import UserError
from fpnas_keras.files import summarize_error
from fpnas_keras.networks.conventions import DATA_FORMAT, check_floatx
from fpnas_keras.networks.plain_network import load_model, to_logits

IMAGENET_CLASSES = 1000


class TaughtNetwork(keras.Model):
    """A network that `fit` trains on labels and on the logits of a teacher.

    Compile it with a `DistillationLoss`, which explains the loss. The teacher takes the images that
    the network takes, after their augmentation. When it is evaluated, the loss is that of the
    labels.

    `keras.distillation.Distiller` does the same, in more time: here the teacher's weights are
    constants of the graph, so that TensorFlow folds its batch norms into the convolutions.

    Args:
        network: The network to train, the student. Pixels to logits.
        teacher: Pixels to logits, of the same images and classes. Its weights are read now, and do
            not change.
    """

    def __init__(self, network: keras.Model, teacher: keras.Model):
        super().__init__()
        self.network = network
        self._teach = teacher.stateless_call  # Not the teacher: its weights are not ours.
        self._teacher_weights = [
            [each.numpy() for each in variables]
            for variables in (teacher.trainable_variables, teacher.non_trainable_variables)
        ]
        self.built = True

    def call(self, images: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        return self.network(images, training=training)

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ) -> tf.Tensor:
        if training:
            logits, _ = self._teach(*self._teacher_weights, x, training=False)
            y = tf.concat([y, logits], axis=1)
        return super().compute_loss(x, y, y_pred, sample_weight, training)


@keras.saving.register_keras_serializable("fpnas_keras")
class DistillationLoss(keras.losses.Loss):
    """The loss of a network that learns from labels and from the logits of a teacher.

    With the logits t of the teacher, s of the network and the temperature T, it is

        (1 - distillation_weight) * cross_entropy(labels, s)
        + distillation_weight * T^2 * KL(softmax(t / T) || softmax(s / T))

    The labels hold the shares of the classes and then the teacher's logits: float32 of shape
    `(batch, 2 * classes)`. Labels without logits, of shape `(batch, classes)`, have the loss of the
    labels alone.

    Args:
        temperature: T.
        distillation_weight: Weight of the teacher's term, 0 to 1.
        label_smoothing: Part of each label that is spread over all classes.
        name: Name of the loss.
        reduction: As for all losses of Keras.

    Reference: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv:1503.02531,
    section 2, "Distillation".
    """

    def __init__(
        self,
        temperature: float,
        distillation_weight: float,
        label_smoothing: float,
        name: str = "distillation",
        reduction: str = "sum_over_batch_size",
    ):
        super().__init__(name=name, reduction=reduction)
        self.temperature = temperature
        self.distillation_weight = distillation_weight
        self.label_smoothing = label_smoothing

    def get_config(self) -> dict[str, Any]:
        names = ("temperature", "distillation_weight", "label_smoothing")
        return super().get_config() | {name: getattr(self, name) for name in names}

    def call(self, y_true: keras.KerasTensor, y_pred: keras.KerasTensor) -> keras.KerasTensor:
        """The loss of each image."""
        classes = y_pred.shape[-1]
        labels = keras.losses.categorical_crossentropy(
            y_true[:, :classes], y_pred, from_logits=True, label_smoothing=self.label_smoothing
        )
        if y_true.shape[-1] == classes:
            return labels
        taught = keras.ops.softmax(y_true[:, classes:] / self.temperature)
        divergence = keras.losses.kl_divergence(
            taught, keras.ops.softmax(y_pred / self.temperature)
        )
        weight = self.distillation_weight
        return (1 - weight) * labels + weight * self.temperature**2 * divergence


def load_teacher(
    teacher: str,
    teacher_weights: str | None,
    input_shape: tuple[int, int, int],
    num_classes: int,
) -> keras.Model:
    """Loads a teacher: a network from pixels 0..255 to float32 logits.

    Args:
        teacher: One of

            * a `.keras` file. Its model gives logits or ends in a softmax, which is removed.
            * an architecture file (`.json`), which needs `teacher_weights`.
            * the name of a network of `keras.applications`. Its preprocessing and the resizing of
              the images to its own size become part of the teacher. Without `teacher_weights` it
              has the weights of ImageNet, which Keras downloads.
        teacher_weights: A `.weights.h5` file, for an architecture or `keras.applications`.
        input_shape: `(height, width, channels)` of the student's images.
        num_classes: Number of the student's classes.

    Raises:
        UserError: When the teacher cannot be loaded, or is for other images or classes.
    """
    if teacher.endswith(".keras"):
        model = load_teacher_file(teacher, teacher_weights)
    elif teacher.endswith(".json"):
        model = _load_architecture(teacher, teacher_weights)
    else:
        model = _load_application(teacher, teacher_weights, input_shape, num_classes)
    received = (model.input_shape[1:], model.output_shape[-1])
    if received != (input_shape, num_classes):
        raise UserError(
            f"the teacher {teacher} must be for images of {input_shape} and {num_classes} classes. "
            f"Received: images of {received[0]} and {received[1]} classes"
        )
    return to_logits(model, f"the teacher {teacher}")


def load_teacher_file(teacher: str, teacher_weights: str | None) -> keras.Model:
    """Loads the model of a `.keras` file.

    Raises:
        UserError: When it cannot be loaded, or when weights are given too.
    """
    if teacher_weights is not None:
        raise UserError(
            "`teacher_weights` is for architectures and keras.applications; a .keras file has its "
            f"own weights. Received: teacher={teacher}, teacher_weights={teacher_weights}"
        )
    return load_model(teacher, "teacher")


def application_names() -> list[str]:
    """Returns the names of the networks of `keras.applications`."""
    return sorted(
        name for name, value in vars(keras.applications).items() if inspect.isfunction(value)
    )


def _load_architecture(path, weights):
    if weights is None:
        raise UserError(
            f"the architecture {path} needs `teacher_weights`, a .weights.h5 file. "
            "Received: teacher_weights=None"
        )
    model = Architecture.load(path).build()
    _load_weights(model, weights, path)
    return model


def _load_weights(model, weights, teacher):
    if not pathlib.Path(weights).is_file():
        raise UserError(
            f"`teacher_weights` must be an existing file. Received: teacher_weights={weights}"
        )
    try:
        model.load_weights(weights)
    except Exception as error:  # The readers inside Keras raise errors of many classes.
        message = f"{weights} does not hold the weights of {teacher}: {summarize_error(error)}"
        raise UserError(message) from None


def load_application(
    name: str, weights: str | None, num_classes: int = IMAGENET_CLASSES
) -> tuple[keras.Model, keras.layers.Layer]:
    """Loads a network of `keras.applications`.

    Args:
        name: Its name.
        weights: A `.weights.h5` file. Without it the network has the weights of ImageNet, which
            Keras downloads.
        num_classes: Number of its classes.

    Returns:
        The network, from its own input to logits, and the layer that makes its input of pixels
        0..255.

    Raises:
        UserError: When there is no such network, or when its weights cannot be loaded.
    """
    if name not in application_names():
        raise UserError(
            "`teacher` must be a .keras file, an architecture (.json) or one of keras.applications "
            f"({', '.join(application_names())}). Received: teacher={name}"
        )
    build = getattr(keras.applications, name)
    network = _build_application(build, weights, num_classes)
    if weights is not None:
        _load_weights(network, weights, name)
    return network, _Preprocessing(build, name="preprocessing")


def _load_application(name, weights, input_shape, num_classes):
    """A network of `keras.applications` behind its resizing and preprocessing."""
    if input_shape[-1] not in (1, 3):
        raise UserError(
            f"the teacher {name} is for images of 1 or 3 channels. "
            f"Received: channels={input_shape[-1]}"
        )
    network, preprocessing = load_application(name, weights, num_classes)
    images = keras.Input(input_shape, name="image")
    x = images
    if input_shape[-1] == 1:
        x = keras.layers.Concatenate(name="grey_to_rgb")([x, x, x])
    height, width = network.input_shape[1:3]
    x = keras.layers.Resizing(height, width, data_format=DATA_FORMAT, name="resizing")(x)
    return keras.Model(images, network(preprocessing(x)))


def _build_application(build, weights, num_classes):
    check_floatx()
    try:
        with _default_data_format():
            return build(
                weights="imagenet" if weights is None else None,
                classes=num_classes,
                classifier_activation=None,
            )
    except Exception as error:  # The download raises errors of many classes.
        message = f"cannot load the teacher {build.__name__}: {summarize_error(error)}"
        raise UserError(message) from None


@contextlib.contextmanager
def _default_data_format() -> Iterator[None]:
    """Makes `DATA_FORMAT` Keras' default: `keras.applications` have no argument for it."""
    default = keras.config.image_data_format()
    keras.config.set_image_data_format(DATA_FORMAT)
    try:
        yield
    finally:
        keras.config.set_image_data_format(default)


class _Preprocessing(keras.layers.Layer):
    """Converts pixels 0..255 to what a network of `keras.applications` expects.

    Args:
        build: The function of `keras.applications` that builds the network.
    """

    def __init__(self, build: Callable[..., keras.Model], **kwargs):
        super().__init__(**kwargs)
        self._preprocess = inspect.getmodule(build).preprocess_input

    def call(self, images):
        # A copy, since some of these functions change their argument.
        return self._preprocess(keras.ops.copy(images), data_format=DATA_FORMAT)
