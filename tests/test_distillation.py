"""Distillation: its loss, and teachers from files and from keras.applications."""

import inspect

import keras
import numpy as np
import pytest
from helpers import make_tiny_space

from fpnas_keras import UserError
from fpnas_keras.networks import distillation

SHAPE, CLASSES = (8, 8, 1), 3
IMAGES = np.random.default_rng(0).uniform(0, 255, (5, *SHAPE)).astype(np.float32)


def network(space=None):
    space = space or make_tiny_space()
    return space.architecture(np.zeros(space.cardinalities.shape, int))


def load(name, weights=None, shape=SHAPE, classes=CLASSES):
    weights = None if weights is None else str(weights)
    return distillation.load_teacher(str(name), weights, shape, classes)


def test_a_model_with_the_loss_is_saved_and_loaded(tmp_path):
    student = network().build()
    student.compile("sgd", distillation.DistillationLoss(4.0, 0.3, 0.1))
    student.save(tmp_path / "student.keras")
    loss = keras.saving.load_model(tmp_path / "student.keras").loss
    assert (loss.temperature, loss.distillation_weight, loss.label_smoothing) == (4.0, 0.3, 0.1)


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 0.5), (4.0, 0.3), (2.0, 1.0)])
def test_the_loss_of_a_step_is_the_formula(temperature, weight):
    space = make_tiny_space()
    teacher = space.architecture(space.cardinalities - 1).build()
    student = network().build()
    for weights in (teacher.trainable_weights, student.trainable_weights):
        weights[-1].assign(2 * keras.random.normal((CLASSES,), seed=len(weights)))
    model = distillation.TaughtNetwork(student, teacher)
    model.compile("sgd", distillation.DistillationLoss(temperature, weight, 0.0), jit_compile=False)
    y = np.eye(CLASSES)[[0, 1, 2, 1, 0]].astype(np.float32)
    shares = np.array([1, 3, 2, 0, 1], np.float32)
    logits = student(IMAGES, training=True)
    received = model.train_on_batch(IMAGES, y, shares)
    p, q = (
        keras.ops.softmax(each / temperature) for each in (teacher(IMAGES, training=False), logits)
    )
    divergence = np.sum(p * np.log(p / q), axis=-1)
    labels = -np.sum(y * keras.ops.log_softmax(logits), axis=-1)
    losses = (1 - weight) * labels + weight * temperature**2 * divergence
    assert float(received) == pytest.approx(float(np.mean(shares * losses)), rel=1e-4)


def test_a_teacher_is_read_once_and_not_trained():
    teacher, student = network().build(), network().build()
    model = distillation.TaughtNetwork(student, teacher)
    assert model.variables == student.variables
    model.compile("sgd", distillation.DistillationLoss(1.0, 1.0, 0.0), jit_compile=False)
    y = np.eye(CLASSES)[[0, 1, 2, 1, 0]].astype(np.float32)
    before = teacher.get_weights()
    model.train_on_batch(IMAGES, y)
    for value, expected in zip(teacher.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, expected)
    # Evaluated, the loss is that of the labels, whatever the teacher says.
    labels = keras.losses.CategoricalCrossentropy(from_logits=True)
    expected = labels(y, student(IMAGES))
    assert float(model.test_on_batch(IMAGES, y)) == pytest.approx(float(expected), rel=1e-5)


def test_a_keras_file(tmp_path):
    model = network().build()
    model.save(tmp_path / "teacher.keras")
    teacher = load(tmp_path / "teacher.keras")
    np.testing.assert_array_equal(teacher(IMAGES), model(IMAGES))


@pytest.mark.parametrize("kind", ["activation", "layer", "nested"])
def test_a_softmax_is_removed(tmp_path, kind):
    inputs = keras.Input(SHAPE)
    x = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(inputs))
    dense = keras.layers.Dense(CLASSES, activation="softmax" if kind == "activation" else None)
    y = dense(x) if kind == "activation" else keras.layers.Softmax()(dense(x))
    model = keras.Model(inputs, y)
    if kind == "nested":
        outer = keras.Input(SHAPE)
        model = keras.Model(outer, model(outer))
    model.save(tmp_path / "teacher.keras")
    logits = load(tmp_path / "teacher.keras")(IMAGES)
    np.testing.assert_allclose(keras.ops.softmax(logits), model(IMAGES), rtol=1e-5)
    assert keras.ops.min(logits) < 0


def test_an_architecture_with_weights(tmp_path):
    model = network().build()
    model.save_weights(tmp_path / "teacher.weights.h5")
    network().save(tmp_path / "teacher.json")
    teacher = load(tmp_path / "teacher.json", tmp_path / "teacher.weights.h5")
    np.testing.assert_array_equal(teacher(IMAGES), model(IMAGES))


@pytest.fixture(params=["channels_last", "channels_first"])
def data_format(request):
    """What a user's `keras.json` may say."""
    yield request.param
    keras.config.set_image_data_format("channels_last")


def test_a_network_of_keras_applications_is_resized_and_preprocessed(tmp_path, data_format):
    original = keras.applications.MobileNetV2(
        weights=None, classes=CLASSES, classifier_activation=None
    )
    for weight in original.trainable_weights:  # with the initial ones, logits are near 0
        weight.assign_add(0.1 * keras.random.normal(weight.shape, seed=1))
    original.save_weights(tmp_path / "teacher.weights.h5")
    rgb = keras.ops.image.resize(np.repeat(IMAGES, 3, axis=-1), (224, 224))
    expected = original(rgb / 127.5 - 1, training=False)
    assert np.abs(expected).max() > 1e-3
    keras.config.set_image_data_format(data_format)
    teacher = load("MobileNetV2", tmp_path / "teacher.weights.h5")
    assert keras.config.image_data_format() == data_format
    # As `keras.distillation.Distiller` calls it.
    np.testing.assert_allclose(teacher(IMAGES, training=False), expected, rtol=1e-4)


def test_all_networks_of_keras_applications_have_a_preprocessing_for_a_data_format():
    names = distillation.application_names()
    assert {"MobileNetV3Small", "EfficientNetB0", "ResNet50"} <= set(names)
    for name in names:
        module = inspect.getmodule(getattr(keras.applications, name))
        assert "data_format" in inspect.signature(module.preprocess_input).parameters, name


def test_bad_teachers_are_refused(tmp_path):
    network().build().save(tmp_path / "teacher.keras")
    network().save(tmp_path / "teacher.json")
    inputs = keras.Input(SHAPE)
    flat = keras.layers.Flatten()(inputs)
    sigmoid = keras.Model(inputs, keras.layers.Dense(CLASSES, activation="sigmoid")(flat))
    sigmoid.save(tmp_path / "sigmoid.keras")
    softmax = keras.Model(inputs, keras.ops.softmax(keras.layers.Dense(CLASSES)(flat)))
    softmax.save(tmp_path / "operation.keras")
    (tmp_path / "bad.weights.h5").write_bytes(b"no weights")
    for message, *arguments in (
        ("`teacher` must be an existing .keras", "missing.keras"),
        ("must be for images of", tmp_path / "teacher.keras", None, (8, 8, 3)),
        ("and 4 classes. Received: .* 3 classes", tmp_path / "teacher.keras", None, SHAPE, 4),
        ("a .keras file has its own weights", tmp_path / "teacher.keras", "x.weights.h5"),
        ("needs `teacher_weights`", tmp_path / "teacher.json"),
        ("`teacher_weights` must be an existing", tmp_path / "teacher.json", "x.weights.h5"),
        ("does not hold the weights of", tmp_path / "teacher.json", tmp_path / "bad.weights.h5"),
        ("must end in logits or in a softmax.*sigmoid", tmp_path / "sigmoid.keras"),
        ("it ends in the operation Softmax", tmp_path / "operation.keras"),
        ("is for images of 1 or 3 channels", "MobileNetV2", None, (8, 8, 4)),
        ("cannot load the teacher MobileNetV2", "MobileNetV2"),
        ("one of keras.applications .*MobileNetV2", "MobileNetV9"),
    ):
        with pytest.raises(UserError, match=message):
            load(*arguments)
