"""A pretrained network as the teacher of one's own classes: its features and a new head."""

from collections.abc import Sequence

import keras
import numpy as np
from absl import logging

from fpnas_keras.data import Images, test_batches
from fpnas_keras.errors import UserError
from fpnas_keras.networks import (
    IMAGENET_CLASSES,
    load_application,
    load_model,
    load_teacher_file,
)
from fpnas_keras.networks.conventions import DATA_FORMAT
from fpnas_keras.progress import track

_FOLDS = 5
# Of networks of keras.applications that take any size.
_SIZE = 224


def is_foreign(teacher: str, teacher_weights: str | None, num_classes: int) -> bool:
    """Whether a teacher has other classes than the student, so that it needs a new head.

    Args:
        teacher: As for `networks.load_teacher`.
        teacher_weights: As for `networks.load_teacher`.
        num_classes: Number of the student's classes.
    """
    if teacher.endswith(".keras"):
        return load_model(teacher, "teacher").output_shape[-1] != num_classes
    if teacher.endswith(".json"):
        return False
    if teacher_weights is None:
        return num_classes != IMAGENET_CLASSES
    try:
        load_application(teacher, teacher_weights, num_classes)
    except UserError:  # They are for ImageNet's classes, or `load_features` says what is wrong.
        return True
    return False


def load_features(teacher: str, teacher_weights: str | None) -> keras.Model:
    """Loads a pretrained network without its head.

    Args:
        teacher: A `.keras` file from pixels 0..255, or the name of a network of
            `keras.applications`. Its last layer with a kernel, such as the dense layer of its
            classes, is the head.
        teacher_weights: A file with the weights of a network of `keras.applications` for ImageNet.
            Without it Keras downloads them.

    Returns:
        A model from pixels 0..255 of shape `(batch, height, width, 3)` to features.

    Raises:
        UserError: When the network cannot be loaded, or has no head.
    """
    if teacher.endswith(".keras"):
        model = load_teacher_file(teacher, teacher_weights)
        return keras.Model(model.inputs, _features(model, teacher))  # `Sequential` has no `input`.
    network, preprocessing = load_application(teacher, teacher_weights)
    height, width = (size or _SIZE for size in network.input_shape[1:3])
    images = keras.Input((height, width, 3), name="image")
    features = keras.Model(network.input, _features(network, teacher))
    return keras.Model(images, features(preprocessing(images)))


def _features(model, name):
    """What the head of a model takes, pooled."""
    layers = [layer for layer in model.layers if getattr(layer, "kernel", None) is not None]
    if not layers or len(model.input_shape) != 4 or model.input_shape[-1] != 3:
        raise UserError(
            f"the teacher {name} must take color images and have a layer of classes. "
            f"Received: input of shape {model.input_shape}"
        )
    features = layers[-1].input
    if len(features.shape) == 4:
        features = keras.layers.GlobalAveragePooling2D(data_format=DATA_FORMAT)(features)
    return features


def compute_outputs(model: keras.Model, images: Images) -> np.ndarray:
    """What a teacher, or the result of `load_features`, gives for each image.

    Args:
        model: Pixels to logits or features.
        images: The images, of the size that the model takes. Grey ones are repeated for a model
            that takes color.

    Returns:
        float32 of shape `(n, outputs)`.
    """
    found = []
    with track(len(images.y), "teacher", "images") as progress:
        for x, y, *_ in test_batches(images, 32):
            if x.shape[-1] == 1 and model.input_shape[-1] == 3:
                x = keras.ops.repeat(x, 3, axis=-1)
            found.append(np.asarray(model.predict_on_batch(x), np.float32))
            progress.update(len(y))
    return np.concatenate(found)


def fit_head(
    features: np.ndarray, y: np.ndarray, class_names: Sequence[str], seed: int
) -> np.ndarray:
    """Fits a head to the features: logistic regression.

    Its strength of regularization is chosen by cross-validation. The logits of an image come from
    heads that were not fitted to it: those would be as certain as the labels, and teach no more.

    Args:
        features: float32 of shape `(n, features)`.
        y: Index of the class, integers of shape `(n,)`.
        class_names: Names of the classes.
        seed: Seed of the folds.

    Returns:
        Logits, float32 of shape `(n, classes)`.

    Raises:
        UserError: When a class has fewer than two images.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    counts = np.bincount(y, minlength=len(class_names))
    if counts.min() < 2:
        raise UserError(
            "a --teacher of other classes is fitted to at least 2 training images of each class. "
            f"Received: {counts.min()} of class {class_names[counts.argmin()]}"
        )
    logging.info("fitting the teacher's new head to %d images", len(y))
    folds = StratifiedKFold(min(_FOLDS, int(counts.min())), shuffle=True, random_state=seed)
    head = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
    choices = {"logisticregression__C": [1e-4, 1e-3, 1e-2]}
    search = GridSearchCV(head, choices, scoring="neg_log_loss", cv=folds, refit=False)
    head.set_params(**search.fit(features, y).best_params_)
    logits = cross_val_predict(head, features, y, cv=folds, method="predict_log_proba")
    logging.info(
        "the teacher's new head gives the class of %.2f%% of the training images, each by a head "
        "that was not fitted to it",
        100 * (logits.argmax(axis=1) == y).mean(),
    )
    return logits.astype(np.float32)
