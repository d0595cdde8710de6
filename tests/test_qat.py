import numpy as np
import pytest
import tensorflow as tf
from test_export_tflite import calibrated, random_images

from export import conversion, qat
from fpnas_keras import data
from fpnas_keras.architecture import Architecture, Block, Head, Stem

# Every activation, every attention, a projection, a residual, no expansion, a dense layer.
EVERYTHING = Architecture(
    (16, 16, 3),
    5,
    Stem(8, 3, 2, "hard_silu"),
    (
        Block(8, 3, 1, 1, "relu", 1),
        Block(12, 5, 3, 2, "hard_silu", 2),
        Block(12, 3, 3, 1, "relu6", 4),
        Block(16, skip=True),
        Block(16, 7, 2, 1, "hard_silu", 0),
    ),
    Head(24, "hard_silu", 16),
)
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
    tuned = qat.fine_tune(model, architecture, batches, 1, 1e-3, sparsity)
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
