"""A pretrained teacher for one's own classes."""

import keras
import numpy as np
import pytest

import fpnas_keras as fpnas
from fpnas_keras import data, runs
from fpnas_keras.networks import DistillationLoss
from fpnas_keras.train import TrainSettings, load_teacher_seeing_images_once

CLASSES = 3
NAMES = ("dark", "grey", "bright")


def brightness_images(count=60, size=12):
    """Classes that differ in brightness, with noise."""
    rng = np.random.default_rng(0)
    y = np.arange(count) % CLASSES
    x = rng.integers(0, 60, (count, size, size, 3)) + 80 * y[:, None, None, None]
    return data.Images(x.astype(np.uint8), y.astype(np.int32), NAMES, (size, size, 3))


@pytest.fixture
def teacher(tmp_path):
    """A network of seven other classes."""
    inputs = keras.Input((12, 12, 3))
    x = keras.layers.Rescaling(1 / 255)(inputs)
    x = keras.layers.Conv2D(4, 3, activation="relu")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, keras.layers.Dense(7, activation="softmax")(x))
    model.save(tmp_path / "teacher.keras")
    return str(tmp_path / "teacher.keras"), keras.Model(inputs, x)


def test_the_loss_of_known_logits_is_that_of_keras_distiller():
    rng = np.random.default_rng(0)
    y = np.eye(CLASSES, dtype=np.float32)[rng.integers(0, CLASSES, 8)]
    taught, given = rng.normal(size=(2, 8, CLASSES)).astype(np.float32) * 3
    inputs = keras.Input((CLASSES,))
    same = keras.Model(inputs, keras.layers.Activation("linear")(inputs))
    constant = keras.Model(inputs, keras.layers.Lambda(lambda x: 0 * x + taught)(inputs))
    # An instance: for the name "kl_divergence" Keras 3.15 compares the logits without a softmax.
    teaching = keras.distillation.LogitsDistillation(2.0, keras.losses.KLDivergence())
    distiller = keras.distillation.Distiller(constant, same, teaching, student_loss_weight=0.7)
    plain = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
    distiller.compile(optimizer="sgd", loss=plain)
    expected = distiller.compute_loss(given, y, given, training=True)
    loss = DistillationLoss(2.0, 0.3, 0.1)
    received = loss(np.concatenate([y, taught], axis=1), given)
    assert float(received) == pytest.approx(float(expected), rel=1e-5)
    assert float(loss(y, given)) == pytest.approx(float(plain(y, given)), rel=1e-6)


def test_the_features_are_what_the_last_layer_takes(teacher):
    file, expected = teacher
    images = brightness_images()
    assert runs.is_foreign(file, None, CLASSES)
    assert not runs.is_foreign(file, None, 7)
    received = runs.compute_outputs(runs.load_features(file, None), images)
    np.testing.assert_allclose(received, expected(images.x.astype(np.float32)), rtol=1e-5)


def test_grey_images_have_three_channels_for_the_teacher(teacher):
    file, expected = teacher
    images = brightness_images()
    grey = images._replace(x=images.x[..., :1], image_shape=(12, 12, 1))
    received = runs.compute_outputs(runs.load_features(file, None), grey)
    repeated = np.repeat(grey.x, 3, axis=-1).astype(np.float32)
    np.testing.assert_allclose(received, expected(repeated), rtol=1e-5)


def test_a_network_of_keras_applications_with_imagenets_weights(tmp_path):
    network = keras.applications.MobileNetV3Small(
        weights=None, classes=1000, classifier_activation=None
    )
    network.save_weights(tmp_path / "w.weights.h5")
    arguments = ("MobileNetV3Small", str(tmp_path / "w.weights.h5"))
    assert runs.is_foreign(*arguments, CLASSES)
    assert runs.is_foreign("MobileNetV3Small", None, CLASSES)
    features = runs.load_features(*arguments)
    assert features.input_shape == (None, 224, 224, 3)
    x = np.random.default_rng(0).uniform(0, 255, (2, 224, 224, 3)).astype(np.float32)
    last = next(layer for layer in network.layers if layer.name == "logits")
    expected = keras.Model(network.input, last.input)(x, training=False)
    np.testing.assert_allclose(
        features(x, training=False), keras.ops.mean(expected, axis=(1, 2)), rtol=1e-3, atol=1e-4
    )


def test_logits_come_from_heads_that_did_not_see_the_image():
    """Features that are noise teach nothing: the accuracy is that of chance."""
    rng = np.random.default_rng(0)
    y = np.arange(90) % CLASSES
    noise = runs.fit_head(rng.normal(size=(90, 200)).astype(np.float32), y, NAMES, seed=0)
    assert (noise.argmax(1) == y).mean() < 0.6
    signal = np.eye(CLASSES, dtype=np.float32)[y] + rng.normal(size=(90, CLASSES)) / 10
    logits = runs.fit_head(signal.astype(np.float32), y, NAMES, seed=0)
    assert (logits.argmax(1) == y).mean() > 0.95
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(
        logits, runs.fit_head(signal.astype(np.float32), y, NAMES, seed=0)
    )
    with pytest.raises(ValueError, match="1 of class bright"):
        runs.fit_head(signal[:5].astype(np.float32), np.array([0, 0, 1, 1, 2]), NAMES, seed=0)


def test_labels_hold_the_logits():
    images = brightness_images(6)
    logits = np.arange(18, dtype=np.float32).reshape(6, 3)
    (_, y), *_ = data.test_batches(images._replace(logits=logits).part(np.array([4, 2])))
    np.testing.assert_array_equal(y, [[0, 1, 0, 12, 13, 14], [0, 0, 1, 6, 7, 8]])


@pytest.mark.slow
def test_a_training_with_a_teacher_of_other_classes(teacher, tmp_path, tiny_space, caplog):
    images = brightness_images()
    for index, (x, y) in enumerate(zip(images.x, images.y)):
        path = tmp_path / "photos" / images.class_names[y] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        keras.utils.save_img(path, x, scale=False)
    architecture = tiny_space.architecture([block.entries[0] for block in tiny_space.blocks])
    architecture.save(tmp_path / "a.json")
    settings = {
        "architecture": tmp_path / "a.json",
        "data": f"folder:{tmp_path}/photos",
        "teacher": teacher[0],
        "random_flip": True,
        "validation_split": 0.2,
        "output_dir": tmp_path / "run",
    }
    with caplog.at_level("INFO", logger="absl"):
        run = fpnas.train_architecture(**settings, epochs=2)
    assert "the teacher's new head gives the class of" in caplog.text
    assert "was made for images of (8, 8, 1)" in caplog.text
    logits = np.load(run.teacher_file)
    assert logits.shape == (38, CLASSES)
    # The saved logits are used again.
    caplog.clear()
    with caplog.at_level("INFO", logger="absl"):
        run = fpnas.train_architecture(**settings, epochs=3)
    assert "new head" not in caplog.text
    assert len(run.epochs) == 3
    assert run.model().loss is None
    with pytest.raises(fpnas.UserError, match="--mix_up and --cut_mix"):
        fpnas.train_architecture(**settings | {"output_dir": tmp_path / "x"}, mix_up=0.2)


def test_teachers_without_a_head_are_refused(tmp_path):
    inputs = keras.Input((12, 12, 3))
    keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(inputs)).save(tmp_path / "no.keras")
    with pytest.raises(ValueError, match="must take color images and have a layer of classes"):
        runs.load_features(str(tmp_path / "no.keras"), None)
    with pytest.raises(ValueError, match=r"one of keras\.applications"):
        runs.load_features("NoNet", None)


@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        ((12, 8, 3), {}, "the teacher must take square images. Received: 12 x 8"),
        (
            (12, 12, 3),
            {"mix_up": 0.2},
            "a teacher of other classes has no logits. Received: mix_up",
        ),
    ],
)
def test_teachers_of_other_classes_that_cannot_teach_are_refused(shape, changes, message, tmp_path):
    file = tmp_path / "teacher.keras"
    layers = [keras.Input(shape), keras.layers.Conv2D(4, 3), keras.layers.Flatten()]
    keras.Sequential([*layers, keras.layers.Dense(7)]).save(file)
    settings = TrainSettings(
        architecture="a.json", teacher=str(file), output_dir=str(tmp_path), **changes
    )
    with pytest.raises(fpnas.UserError, match=message):
        load_teacher_seeing_images_once(settings, (12, 12, 3), 2)
