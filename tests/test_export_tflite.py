import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from helpers import calibrated, make_tiny_space, random_images

from export import comparison, conversion, devices, tflite
from fpnas_keras import data
from fpnas_keras.architecture import Architecture, Block, Head, Stem
from fpnas_keras.errors import UserError
from fpnas_keras.networks import load_model

BLOCKS = [
    Block(8, 3, 3, 1, "relu", 0),
    Block(8, 5, 1, 1, "relu6", 1),
    Block(12, 5, 6, 2, "hard_silu", 1),
    Block(12, 7, 2.5, 1, "hard_silu", 0),
    Block(12, 5, 2.5, 2, "hard_silu", 2),
    Block(8, 3, 3, 1, "relu", 4),
    Block(16, skip=True, strides=2),
]


def make_model(block, activation="relu"):
    architecture = Architecture(
        (16, 16, 3),
        5,
        Stem(8, 3, 2, activation),
        (block, Block(12, skip=True)),
        Head(24, activation),
    )
    return calibrated(architecture.build())


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_choice_is_exported_and_gives_the_same_logits(block):
    model = make_model(block, block.activation)
    content = conversion.convert(model)
    compared = comparison.compare(model, content, random_images())
    assert compared.max_difference < 1e-4
    assert compared.agreement == 1.0
    names = set(conversion.operators(content))
    assert not {name for name in names if "Flex" in name or "CUSTOM" in name}
    assert "DELEGATE" not in names
    interpreter = Interpreter(model_content=content)
    assert max(len(each["shape"]) for each in interpreter.get_tensor_details()) <= 4
    assert ("HARD_SWISH" in names) == (block.activation == "hard_silu")
    assert Interpreter(model_content=content).get_signature_list() == {
        "serving_default": {"inputs": ["image"], "outputs": ["logits"]}
    }


def assert_quantized(model, quantize, bound):
    """Converts, and compares logits with a bound relative to their range; the file."""
    images = random_images(100)
    few = conversion.representative_images(images, 50)
    representative = conversion.representative_pixels(few)
    content = conversion.convert(model, quantize, representative, "int8")
    compared = comparison.compare(model, content, images)
    logits = model.predict(images.x.astype(np.float32), verbose=0)
    assert compared.max_difference < bound * np.ptp(logits)
    names = conversion.operators(content)
    assert not [name for name in names if "Flex" in name or "CUSTOM" in name]
    return content


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_choice_is_int8_in_every_part(block):
    content = assert_quantized(make_model(block, block.activation), "int8", 0.1)
    assert conversion.float_operators(content) == {}
    assert conversion.Runner(content).pixels == (1.0, -128)


@pytest.mark.parametrize(("quantize", "bound"), [("float16", 0.005), ("dynamic", 0.1)])
def test_weights_alone_are_smaller_and_do_the_same(quantize, bound):
    model = make_model(Block(256, 5, 60, 2, "hard_silu", 2), "hard_silu")
    content = assert_quantized(model, quantize, bound)
    share = {"float16": 0.5, "dynamic": 0.25}[quantize]
    assert len(content) < 1.25 * share * len(conversion.convert(model))


def test_compare_sees_a_file_that_is_another_model():
    one, other = make_model(Block(8)), make_model(Block(8))
    compared = comparison.compare(one, conversion.convert(other), random_images())
    assert compared.max_difference > 0.1
    assert compared.agreement < 1.0


def test_compare_sees_a_file_that_gives_nan():
    good, bad = make_model(Block(8)), make_model(Block(8))
    bad.trainable_variables[-1].assign([float("nan")] * 5)
    compared = comparison.compare(good, conversion.convert(bad), random_images())
    assert np.isnan(compared.max_difference)


def test_a_file_that_fails_its_check_is_not_left(tmp_path, monkeypatch):
    space = make_tiny_space((16, 16, 1), 10)
    space.architecture(0 * space.cardinalities).build().save(tmp_path / "model.keras")
    monkeypatch.setattr(comparison, "MAX_DIFFERENCE", -1.0)
    with pytest.raises(UserError, match=r"differs from Keras by .* No .tflite file is written"):
        tflite.export_tflite(model=tmp_path / "model.keras", data="digits")
    assert [path.name for path in tmp_path.iterdir()] == ["model.keras"]


def test_a_file_that_xnnpack_refuses_is_an_error_in_one_line(tmp_path):
    model = make_model(Block(8, splits=1))
    dead = next(each for each in model.trainable_variables if each.path.endswith("reduce/bias"))
    dead.assign(tf.fill(dead.shape, -1000.0))  # 0 after the ReLU, whatever comes in
    file = tmp_path / "dead.tflite"
    file.write_bytes(conversion.convert(model, "int8", random_images().x.astype(np.float32)))
    with (
        contextlib.closing(devices.Host()) as host,
        pytest.raises(ValueError, match=r"dead cannot be run: .*XNNPACK refuses"),
    ):
        devices.times(host, {"dead": file}, 1)


def test_models_that_are_no_classifiers_are_refused(tmp_path):
    path = str(tmp_path / "dense.keras")
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save(path)
    with pytest.raises(ValueError, match="must go from"):
        load_model(path)


def test_representative_images_are_of_all_classes():
    y = np.repeat([0, 1, 2], [100, 12, 3]).astype(np.int32)
    x = np.arange(len(y), dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    images = data.Images(x, y, ("a", "b", "c"), (2, 2, 1))
    few = conversion.representative_images(images, 24)
    assert np.bincount(few.y).tolist() == [11, 10, 3]
    assert len(np.unique(few.x[:, 0, 0, 0])) == 24
    assert len(conversion.representative_images(images, 1000).y) == len(y)
