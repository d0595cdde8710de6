"""Exported files in what apps and tools read them with: MediaPipe, and Arm's compiler Vela.

They are installed from requirements-clients.txt.
"""

import pathlib
import subprocess
import sys

import keras
import mediapipe
import numpy as np
import PIL.Image
import pytest
from mediapipe.tasks.metadata import metadata_schema_py_generated as schema
from mediapipe.tasks.python import BaseOptions, vision

import export
from export import conversion, metadata
from fpnas_keras.architecture import Architecture, Block, Head, Stem

LABELS = ("Löwenzahn", "daisy", "dog rose", "rose", "tulip")  # in the order of folders
ARCHITECTURE = Architecture(
    (16, 16, 3),
    5,
    Stem(8, 3, 2, "relu"),
    (
        Block(12, 5, 3, 2, "hard_silu", 1),
        Block(12, 3, 3, 1, "relu6"),
        Block(12, 3, 2, 1, "relu", 2),
    ),
    Head(24, "hard_silu"),
)
QAT = {"qat_epochs": 1, "qat_learning_rate": 1e-4, "qat_batch_size": 20}
# Largest difference of a probability from Keras, of each format.
BOUNDS = {"none": 1e-5, "float16": 0.01, "dynamic": 0.05, "int8": 0.15, "qat": 0.15}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model, its image folder, and the pixels of the test images."""
    folder = tmp_path_factory.mktemp("clients")
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    y = np.arange(400) % len(LABELS)
    colors = rng.integers(0, 256, (len(LABELS), 1, 1, 3))[y] + rng.normal(0, 60, (400, 16, 16, 3))
    colors += rng.normal(0, 20, (400, 1, 1, 3))
    pixels = np.clip(colors, 0, 255).astype(np.uint8)
    model = ARCHITECTURE.build()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(pixels[:200].astype(np.float32), y[:200], batch_size=20, epochs=15, verbose=0)
    for part, indices in (("train", range(200)), ("test", range(200, 400))):
        for label in LABELS:
            (folder / "photos" / part / label).mkdir(parents=True)
        for index in indices:
            file = folder / "photos" / part / LABELS[y[index]] / f"{index}.png"
            PIL.Image.fromarray(pixels[index]).save(file)
    model.save(folder / "model.keras")
    ARCHITECTURE.save(folder / "architecture.json")
    return folder, model, pixels[200:]


@pytest.fixture(scope="module")
def exported(trained):
    """The exported file of each format."""
    folder, *_ = trained
    return {
        quantize: export.export_tflite(
            model=folder / "model.keras",
            data=f"folder:{folder / 'photos'}",
            quantize=quantize,
            output=str(folder / f"{quantize}.tflite"),
            **(QAT if quantize == "qat" else {}),
            model_name="flowers",
            model_version="7",
            author="someone",
            license="CC0",
        )
        for quantize in BOUNDS
    }


@pytest.mark.parametrize("quantize", BOUNDS)
def test_mediapipe_gives_the_classes_and_probabilities_of_keras(trained, exported, quantize):
    folder, model, pixels = trained
    if quantize == "qat":  # It has other weights than the model that was given.
        model = keras.saving.load_model(folder / "qat.keras")
    expected = keras.ops.softmax(model.predict(pixels.astype(np.float32), verbose=0)).numpy()
    assert len(set(expected.argmax(-1))) == len(LABELS)
    options = vision.ImageClassifierOptions(
        base_options=BaseOptions(model_asset_path=str(exported[quantize].path))
    )
    with vision.ImageClassifier.create_from_options(options) as classifier:
        received = np.array([_classify(classifier, each) for each in pixels])
    assert np.abs(received - expected).max() < BOUNDS[quantize]
    agreement = (received.argmax(-1) == expected.argmax(-1)).mean()
    assert agreement == 1.0 if quantize == "none" else agreement >= 0.9


def _classify(classifier, pixels):
    image = mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=pixels)
    (result,) = classifier.classify(image).classifications
    scores = {each.category_name: each.score for each in result.categories}
    assert scores.keys() == set(LABELS)
    return [scores[label] for label in LABELS]


def test_the_metadata_say_what_was_given_by_the_schema_of_mediapipe(exported):
    content = exported["int8"].path.read_bytes()
    found = _read_metadata(content)
    assert (found.Name(), found.Version(), found.Author(), found.License()) == (
        *(b"flowers", b"7"),
        *(b"someone", b"CC0"),
    )
    graph = found.SubgraphMetadata(0)
    image, scores = graph.InputTensorMetadata(0), graph.OutputTensorMetadata(0)
    assert image.Content().ContentPropertiesType() == schema.ContentProperties.ImageProperties
    properties = schema.ImageProperties()
    table = image.Content().ContentProperties()
    properties.Init(table.Bytes, table.Pos)
    assert properties.ColorSpace() == schema.ColorSpaceType.RGB
    unit = image.ProcessUnits(0)
    assert unit.OptionsType() == schema.ProcessUnitOptions.NormalizationOptions
    options = schema.NormalizationOptions()
    options.Init(unit.Options().Bytes, unit.Options().Pos)
    assert (options.Mean(0), options.Std(0)) == (0.0, 1.0)
    labels = scores.AssociatedFiles(0)
    assert labels.Type() == schema.AssociatedFileType.TENSOR_AXIS_LABELS
    assert labels.Name() == b"labels.txt"
    assert metadata.read(content) == {
        "labels": list(LABELS),
        "scores": "probabilities",
        "resize": "stretch",
    }


def test_tensors_are_named_after_their_layer(exported):
    """Names of many joined operations would be a tenth of a small file."""
    for each in exported.values():
        model = metadata.flatbuffer_utils.read_model(str(each.path))
        (graph,) = model.subgraphs
        names = [tensor.name for tensor in graph.tensors]
        assert len({*names}) == len(names)
        ends = {*graph.inputs, *graph.outputs}
        inner = [t.name.decode() for index, t in enumerate(graph.tensors) if index not in ends]
        assert any("block_0_project" in name for name in inner)
        assert not any(";" in name or name.startswith("scores") for name in inner)
        assert sum(map(len, inner)) < 40 * len(inner)


def _read_metadata(content):
    model = metadata.flatbuffer_utils.convert_bytearray_to_object(content)
    (entry,) = [each for each in model.metadata if each.name == b"TFLITE_METADATA"]
    buffer = bytes(model.buffers[entry.buffer].data)
    assert buffer[4:8] == b"M001"
    return schema.ModelMetadata.GetRootAsModelMetadata(buffer, 0)


def test_the_same_model_gives_the_same_bytes(trained, exported, tmp_path):
    folder, *_ = trained
    again = export.export_tflite(
        model=folder / "model.keras",
        data=f"folder:{folder / 'photos'}",
        output=str(tmp_path / "none.tflite"),
        model_name="flowers",
        model_version="7",
        author="someone",
        license="CC0",
    )
    assert again.path.read_bytes() == exported["none"].path.read_bytes()


@pytest.mark.parametrize("quantize", ["int8", "qat"])
def test_all_operators_run_on_an_ethos_npu(exported, quantize, tmp_path):
    file = exported[quantize].path
    vela = pathlib.Path(sys.executable).with_name("vela")
    command = [vela, file, f"--output-dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "CPU operators = 0 (0.0%)" in done.stdout, done.stdout


def test_int8_probabilities_have_the_scale_of_a_byte(exported):
    for quantize in ("int8", "qat"):
        runner = conversion.Runner(exported[quantize].path.read_bytes())
        assert runner.scores == "probabilities"
        assert runner.pixels == (1.0, 0)
        assert runner._details["quantization"] == (1 / 256, 0)
        assert runner._details["dtype"] == np.uint8
