"""configs/architectures against published numbers, keras.applications and TFLite graphs."""

import keras
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from helpers import ROOT, counted_macs

from export.conversion import convert
from fpnas_keras import Architecture, spaces
from fpnas_keras.published import scale_published

FOLDER = ROOT / "configs" / "architectures"
# Accuracy in %, MACs and parameters in the published table.
NAS_BENCH_MACRO = {
    "22212220": (93.13, 85_164_544, 1_985_514),
    "22222221": (93.11, 98_865_664, 2_504_810),
    "22222200": (93.08, 79_266_304, 1_269_610),
}


def load(name):
    return Architecture.load(FOLDER / f"{name}.json")


def trainable(model):
    return sum(w.value.shape.num_elements() for w in model.trainable_weights)


def counted_macs_of_tflite(tflite):
    """Counts the MACs of a TFLite file from the shapes of the tensors of its operators."""
    interpreter = Interpreter(
        model_content=tflite,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    interpreter.allocate_tensors()
    shapes = {each["index"]: each["shape"] for each in interpreter.get_tensor_details()}
    total = 0
    for operator in interpreter._get_ops_details():
        name, weights, output = (
            operator["op_name"],
            shapes.get(operator["inputs"][1]) if len(operator["inputs"]) > 1 else None,
            shapes[operator["outputs"][0]],
        )
        if name in ("CONV_2D", "FULLY_CONNECTED"):  # (out, [height, width,] in)
            total += np.prod(output) * np.prod(weights[1:])
        elif name == "DEPTHWISE_CONV_2D":  # (1, height, width, channels)
            total += np.prod(output) * np.prod(weights[1:3])
    return total


def test_mobilenet_v2():
    architecture = load("mobilenet_v2")
    published = keras.applications.MobileNetV2(weights=None)
    assert architecture.params() == trainable(published)
    assert architecture.macs() == counted_macs(published)
    assert round(architecture.macs() / 1e6, 1) == 300.8


def test_mobilenet_v3_large():
    architecture = load("mobilenet_v3_large")
    published = keras.applications.MobileNetV3Large((224, 224, 3), weights=None)
    # Our hidden dense layer has no bias.
    assert architecture.params() == trainable(published) - 1280
    assert architecture.macs() == counted_macs(published)
    assert round(architecture.macs() / 1e6, 1) == 216.6


@pytest.mark.parametrize("code", NAS_BENCH_MACRO)
def test_nas_bench_macro(code):
    architecture = load(f"nas_bench_macro_{code}")
    assert (architecture.macs(), architecture.params()) == NAS_BENCH_MACRO[code][1:]
    choices = spaces.get("nas_bench_macro").choices(architecture)
    operations = {(1, 0, 0): "0", (0, 0, 0): "1", (0, 1, 1): "2"}
    assert "".join(operations[tuple(each)] for each in choices[:, [0, 2, 3]]) == code


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_macs_of_the_built_model_and_of_its_tflite_graph(file):
    architecture = Architecture.load(file)
    model = architecture.build()
    assert counted_macs(model) == architecture.macs()
    assert counted_macs_of_tflite(convert(model)) == architecture.macs()
    assert trainable(model) == architecture.params()


def test_mobilenet_v3_small_as_it_was_published():
    """56.5M MACs at width 1; ours lacks the hidden dense layer of its head."""
    network = scale_published("MobileNetV3-Small", (224, 224, 3), 1000, 56.5e6, stem_strides=4)
    assert 0.93 * 56.5e6 < network.macs() <= 56.5e6
    assert network.stem.filters == 16
    assert network.parts()[-1].size == (7, 7)
