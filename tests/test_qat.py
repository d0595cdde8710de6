import contextlib
import json

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from helpers import EVERYTHING, SMALL_SPACE, calibrated, random_images

from export import conversion, devices, export_tflite, qat
from export.latency_parts import random_networks
from fpnas_keras import FileSizeCost, data, spaces
from fpnas_keras.architecture import Architecture, Block, Head, Stem

# Enough to prune: two blocks with an expansion.
SMALL = Architecture(
    (16, 16, 3),
    5,
    Stem(8, 3, 2, "relu"),
    (Block(12, 5, 3, 2, "hard_silu", 1), Block(12, 3, 3, 1, "relu6")),
    Head(24, "relu"),
)


def test_the_twin_is_the_same_function():
    model = calibrated(EVERYTHING.build())
    twin = qat.twin(model, EVERYTHING)
    x = 255 * tf.random.stateless_uniform((8, 16, 16, 3), (3, 4))
    np.testing.assert_allclose(twin(x, training=False), model(x, training=False), atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "sparsity", "partitions"),
    # The softmax over four splits stays with the interpreter.
    [(EVERYTHING, 0.0, 2), (SMALL, 0.5, 1)],
    ids=["everything", "pruned"],
)
def test_fine_tuned_networks_are_int8_in_every_part_and_do_what_they_did(
    architecture, sparsity, partitions
):
    model = calibrated(architecture.build())
    images = random_images(200)
    # The labels are the model's own classes: fine-tuning has to adapt to the rounding only.
    logits = model.predict(images.x.astype(np.float32), verbose=0)
    images = images._replace(y=logits.argmax(-1).astype(np.int32))
    batches = data.train_batches(images, 20)
    tuned = qat.fine_tune(qat.twin(model, architecture), batches, 1, 1e-3, sparsity)
    content = conversion.convert(tuned, "int8", input_type="uint8")
    assert conversion.float_operators(content) == {}
    assert conversion.delegated_partitions(content) == partitions
    run = conversion.Runner(content)
    assert run.pixels == (1.0, 0)
    received = run(images.x.astype(np.float32))
    expected = tuned(images.x.astype(np.float32), training=False).numpy()
    assert np.abs(received - expected).max() < 0.1 * np.ptp(expected)
    if sparsity:
        zeros = [
            np.mean(layer.get_weights()[0] == 0)
            for layer in tuned.layers
            if layer.name.startswith("quant_block") and layer.name.endswith(("_expand", "_project"))
        ]
        assert np.mean(zeros) == pytest.approx(sparsity, abs=0.1)


def test_ranges_are_those_of_the_images_and_norms_stay():
    model = calibrated(SMALL.build())
    twin = qat.twin(model, SMALL)
    x = random_images(60).x.astype(np.float32)
    batches = tf.data.Dataset.from_tensor_slices((x, np.zeros(60))).batch(20)
    quantized = qat.quantize(twin, batches)
    norms = [each for each in twin.weights if "moving" in each.name]
    assert norms
    values = {each.name: each.numpy() for each in quantized.weights}
    for each in norms:
        np.testing.assert_array_equal(values[each.name], each.numpy())
    head = tf_keras.Model(twin.input, twin.get_layer("head_activation").output)(x).numpy()
    assert values["quant_head_activation/output_max:0"] == pytest.approx(head.max(), rel=0.05)


def test_a_layer_that_gives_0_for_all_images_runs_on_xnnpack(tmp_path):
    model = calibrated(EVERYTHING.build())
    dead = next(each for each in model.trainable_variables if each.path.endswith("reduce/bias"))
    dead.assign(tf.fill(dead.shape, -1000.0))
    x = random_images(20).x.astype(np.float32)
    batches = tf.data.Dataset.from_tensors((x, np.zeros(20)))
    quantized = qat.quantize(qat.twin(model, EVERYTHING), batches)
    file = tmp_path / "dead.tflite"
    file.write_bytes(conversion.convert(quantized, "int8"))
    with contextlib.closing(devices.Host()) as host:
        assert devices.times(host, {"dead": file}, 1)["dead"][0] > 0


@pytest.mark.parametrize(
    "name, networks",
    [
        ("small", 2),
        pytest.param("everything", 1, marks=pytest.mark.slow),
        pytest.param("mobile_mini", 2, marks=pytest.mark.slow),
        pytest.param("nas_bench_macro", 1, marks=pytest.mark.slow),
        pytest.param("fbnetv2_f", 1, marks=pytest.mark.slow),
        pytest.param("fpnas", 1, marks=pytest.mark.slow),
    ],
)
def test_file_sizes(name, networks, tmp_path):
    """What `FileSizeCost` says is what an int8 file has."""
    small, rng = tmp_path / "small.json", np.random.default_rng(0)
    small.write_text(json.dumps(SMALL_SPACE))
    if name == "everything":
        architectures = [EVERYTHING.fit_to((16, 16, 1), 10)]
    else:
        space = spaces.get(str(small) if name == "small" else name, (16, 16, 1), 10)
        architectures = random_networks(space, networks, seed=3)
    for architecture in architectures:
        model, file = tmp_path / "model.keras", tmp_path / "model_int8.tflite"
        network = architecture.build()
        for variable in network.variables:  # As if trained: equal numbers stand in a file once.
            if not variable.path.endswith("kernel"):
                middle = 0.0 if variable.path.endswith("mean") else 0.5
                variable.assign(middle + rng.uniform(-0.1, 0.1, variable.shape))
        network.save(model)
        architecture.save(tmp_path / "architecture.json")
        export_tflite(
            model=model,
            data="digits",
            quantize="int8",
            overwrite=True,
            output=file,
            min_agreement=0,
            max_accuracy_drop=1,
        )
        cost = sum(map(FileSizeCost(), architecture.parts()))
        assert file.stat().st_size == pytest.approx(cost, rel=0.015)
