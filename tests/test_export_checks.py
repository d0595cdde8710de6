"""Exports with the wrong data, models of others, and models that changed since their training."""

import dataclasses
import json
import shutil
import types

import keras
import numpy as np
import PIL.Image
import pytest

import export
import fpnas_keras as fpnas
from export.comparison import Comparison, check
from fpnas_keras.architecture import Architecture, Block, Head, Stem
from fpnas_keras.data.settings import DataSettings
from fpnas_keras.errors import UserError

NAMES = ("blue", "green", "red")
ARCHITECTURE = Architecture(
    (16, 16, 3),
    3,
    Stem(8, 3, 2, "relu"),
    (Block(12, 5, 3, 2, "hard_silu", 1), Block(12, 3, 3, 1, "relu")),
    Head(24, "relu"),
)


def write_photos(folder, names=NAMES):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for index, name in enumerate(names):
            (folder / part / name).mkdir(parents=True)
            for number in range(12):
                pixels = rng.integers(0, 120, (16, 16, 3), np.uint8)
                pixels[..., 2 - index] += 120
                PIL.Image.fromarray(pixels).save(folder / part / name / f"{number}.png")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    write_photos(folder / "photos")
    ARCHITECTURE.save(folder / "architecture.json")
    run = fpnas.train_architecture(
        architecture=folder / "architecture.json",
        data=f"folder:{folder / 'photos'}",
        epochs=15,
        mix_up=0.0,  # A network that knows these few photos by heart.
        output_dir=str(folder / "run"),
        tensorboard=False,
    )
    assert run.summary["test_accuracy"] > 0.9
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    """A copy that a test may change: the run directory, and the photos where the run had them."""
    shutil.copytree(trained / "photos", tmp_path / "photos")
    shutil.copytree(trained / "run", tmp_path / "run")
    flags = tmp_path / "run" / "flags.txt"
    flags.write_text(flags.read_text().replace(str(trained), str(tmp_path)))
    return tmp_path


def written(folder):
    return sorted(path.name for path in folder.iterdir() if "model" in path.name)


def test_the_data_is_that_of_the_training(copied):
    exported = export.export_tflite(model=copied / "run" / "model.keras")
    assert exported.report["data"] == f"folder:{copied / 'photos'}"
    assert exported.labels.read_text().split() == list(NAMES)
    assert exported.report["keras_accuracy"] == exported.report["tflite_accuracy"] > 0.9
    assert export.metadata.read(exported.path.read_bytes())["labels"] == list(NAMES)


def test_a_model_without_its_training_needs_data(copied):
    shutil.move(copied / "run" / "model.keras", copied / "model.keras")
    with pytest.raises(UserError, match=r"`data` must be given: .*model.keras does not lie in"):
        export.export_tflite(model=copied / "model.keras")


def test_a_model_with_another_name_than_its_training_gave_it_needs_data(copied):
    (copied / "run" / "model.keras").rename(copied / "run" / "best.keras")
    with pytest.raises(UserError, match=r"`data` must be given: .*best.keras does not lie in"):
        export.export_tflite(model=copied / "run" / "best.keras")


def test_other_data_of_the_same_shape_is_refused_by_its_classes(copied):
    write_photos(copied / "others", ("cat", "dog", "eel"))
    message = r"was trained on the classes blue, green, red\. Received: .* with cat, dog, eel"
    with pytest.raises(UserError, match=message):
        export.export_tflite(
            model=copied / "run" / "model.keras", data=f"folder:{copied / 'others'}"
        )
    assert written(copied / "run") == ["model.keras"]


def test_a_renamed_class_is_refused_by_name(copied):
    for part in ("train", "test"):
        (copied / "photos" / part / "blue").rename(copied / "photos" / part / "violet")
    with pytest.raises(UserError, match=r"classes blue, green, red. .* with green, red, violet"):
        export.export_tflite(model=copied / "run" / "model.keras")


def test_an_accuracy_below_that_of_the_training_is_refused(copied):
    photos = copied / "photos" / "test"
    (photos / "blue").rename(photos / "x")
    (photos / "red").rename(photos / "blue")
    (photos / "x").rename(photos / "red")
    with pytest.raises(UserError, match=r"an accuracy of .* its training recorded .*%: the images"):
        export.export_tflite(model=copied / "run" / "model.keras")
    exported = export.export_tflite(model=copied / "run" / "model.keras", max_accuracy_drop=1)
    assert exported.report["keras_accuracy"] < 0.6


def read_photos(folder):
    """The test photos, in the order of their paths."""
    paths = sorted((folder / "photos" / "test").rglob("*.png"))
    return np.stack([np.asarray(PIL.Image.open(path)) for path in paths]).astype(np.float32)


def load(folder):
    return keras.saving.load_model(folder / "run" / "model.keras", compile=False)


def scores_of(path, images):
    return export.conversion.Runner(path.read_bytes())(images)


IMAGES = np.random.default_rng(1).integers(0, 256, (10, 16, 16, 3)).astype(np.float32)


def test_logits_and_probabilities_of_models_that_give_either(trained, tmp_path):
    model = load(trained)
    softmax = keras.Model(model.input, keras.layers.Softmax()(model.output))
    model.save(tmp_path / "logits.keras")
    softmax.save(tmp_path / "probabilities.keras")
    expected = softmax.predict(IMAGES, verbose=0)
    for name in ("logits", "probabilities"):
        for scores in ("logits", "probabilities"):
            exported = export.export_tflite(
                model=tmp_path / f"{name}.keras",
                data=f"folder:{trained / 'photos'}",
                scores=scores,
                output=str(tmp_path / f"{name}_{scores}.tflite"),
            )
            received = scores_of(exported.path, IMAGES)
            if scores == "logits":
                received = keras.ops.softmax(received).numpy()
            np.testing.assert_allclose(received, expected, atol=1e-5)


@pytest.mark.parametrize(("low", "high"), [(-1, 1), (0, 1)])
def test_a_model_of_another_range_of_pixels(trained, tmp_path, caplog, low, high):
    model = load(trained)
    pixels = keras.Input((16, 16, 3))
    scaled = keras.layers.Rescaling(255 / (high - low), -low * 255 / (high - low))(pixels)
    keras.Model(pixels, model(scaled)).save(tmp_path / "other.keras")
    settings = {
        "model": tmp_path / "other.keras",
        "data": f"folder:{trained / 'photos'}",
        "overwrite": True,
    }
    export.export_tflite(**settings)
    assert f"it seems to want --input_range={low},{high}" in caplog.text
    for quantize in ("none", "int8"):
        exported = export.export_tflite(**settings, input_range=(low, high), quantize=quantize)
        images = read_photos(trained)
        expected = keras.ops.softmax(model.predict(images, verbose=0)).numpy()
        bound = 1e-5 if quantize == "none" else 0.1
        np.testing.assert_allclose(scores_of(exported.path, images), expected, atol=bound)
        assert exported.report["tflite_accuracy"] > 0.9


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("1", "two numbers.* Received: input_range=1"),
        ("1,0", "two numbers.* Received: input_range=1,0"),
        ("1,2,3", "two numbers.* Received: input_range=1,2,3"),
        ("a,b", "a finite number from -1e.06 to 1e.06. Received: input_range=a"),
        ("", "a list of numbers"),
    ],
)
def test_a_range_of_pixels_is_two_numbers(value, message):
    with pytest.raises(UserError, match=message):
        export.tflite.TfliteSettings.from_flags(["--model=x", f"--input_range={value}"])


QAT = {"quantize": "qat", "qat_epochs": 1, "qat_learning_rate": 1e-4, "qat_batch_size": 12}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--qat_epochs=5"], "--qat_epochs needs --quantize=qat. Received: quantize=none"),
        (["--quantize=int8", "--prune=0.5", "--random_flip"], "--prune, --random_flip needs"),
        (["--quantize=qat", "--representative_images=9"], "needs --quantize=int8. Received"),
        (["--quantize=float16", "--input_type=int8"], "--input_type needs --quantize=int8 or qat"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        export.tflite.TfliteSettings.from_flags(["--model=x", *flags])


def test_images_of_a_fine_tuning_are_changed_as_those_of_the_training():
    run = types.SimpleNamespace(chosen={"random_crop": "4"}, flags={"random_flip": "true"})
    settings = export.tflite.TfliteSettings(model="x", quantize="qat")
    known, unknown = settings.find_augmentation(run), settings.find_augmentation(None)
    assert (known.random_crop, known.random_flip) == (4, True)
    assert (unknown.random_crop, unknown.random_flip) == (2, False)
    given = dataclasses.replace(settings, random_crop=0, random_flip=False).find_augmentation(run)
    assert (given.random_crop, given.random_flip) == (0, False)


def test_other_images_have_a_place_and_a_number_of_their_own():
    theirs = DataSettings(
        data="tfds:a", data_dir="b", download=False, train_images=9, resize="crop"
    )
    assert theirs.replaced({"data": "tfds:a"}) == theirs
    assert theirs.replaced({"data": "folder:c"}) == DataSettings(data="folder:c", resize="crop")
    assert theirs.replaced({"resize": "pad"}) == dataclasses.replace(theirs, resize="pad")


def test_fine_tuned_weights_do_not_replace_the_model(trained, copied):
    model = copied / "run" / "model.keras"
    settings = {**QAT, "model": model, "output": str(copied / "run" / "model.tflite")}
    with pytest.raises(UserError, match=r"the fine-tuned weights would replace the model"):
        export.export_tflite(**settings, overwrite=True)
    assert model.read_bytes() == (trained / "run" / "model.keras").read_bytes()


def test_a_softmax_or_a_wrapping_is_carried_through_fine_tuning(trained, tmp_path):
    model, images = load(trained), read_photos(trained)
    expected = keras.ops.softmax(model.predict(images, verbose=0)).numpy()
    wrapped = keras.Sequential([keras.Input((16, 16, 3)), model, keras.layers.Softmax()])
    wrapped.save(tmp_path / "wrapped.keras")
    exported = export.export_tflite(
        model=tmp_path / "wrapped.keras",
        data=f"folder:{trained / 'photos'}",
        architecture=str(trained / "architecture.json"),
        **QAT,
    )
    np.testing.assert_allclose(scores_of(exported.path, images), expected, atol=0.25)
    tuned = keras.saving.load_model(tmp_path / "wrapped_qat.keras")
    received = keras.ops.softmax(tuned.predict(images, verbose=0)).numpy()
    np.testing.assert_allclose(received, expected, atol=0.25)


def test_what_fine_tuning_would_drop_is_refused(trained, tmp_path):
    model = load(trained)
    keras.Model(model.input, -model.output).save(tmp_path / "operation.keras")
    x = keras.Input((16, 16, 3))
    keras.Model(x, model(255 - keras.layers.Rescaling(1.0)(x))).save(tmp_path / "negative.keras")
    settings = {"data": f"folder:{trained / 'photos'}", **QAT, "max_accuracy_drop": 1}
    settings["architecture"] = str(trained / "architecture.json")
    with pytest.raises(UserError, match=r"must end in a layer that gives logits"):
        export.export_tflite(model=tmp_path / "operation.keras", **settings)
    with pytest.raises(UserError, match=r"must compute what its architecture says.* differ by"):
        export.export_tflite(model=tmp_path / "negative.keras", **settings)
    assert written(tmp_path) == []


def test_a_foreign_model_is_told_that_int8_works(trained, tmp_path, caplog):
    x = keras.Input((16, 16, 3))
    features = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(x))
    foreign = keras.Model(x, keras.layers.Dense(3)(features))
    foreign.save(tmp_path / "foreign.keras")
    settings = {"model": tmp_path / "foreign.keras", "data": f"folder:{trained / 'photos'}"}
    with pytest.raises(UserError, match=r"for networks of this project.*int8, which works"):
        export.export_tflite(**settings, quantize="qat")
    with pytest.raises(UserError, match=r"is not of the architecture in .*int8 works"):
        export.export_tflite(
            **settings, quantize="qat", architecture=str(trained / "architecture.json")
        )
    with caplog.at_level("INFO", logger="absl"):
        exported = export.export_tflite(**settings, quantize="int8")
    assert exported.report["float_operators"] == {}
    assert "TensorFlow's converter rounds the model: there is no architecture.json" in caplog.text


def test_fine_tuned_weights_are_kept_when_the_file_is_refused(copied):
    with pytest.raises(UserError, match=r"Accuracy on the test images: .*, with Keras"):
        export.export_tflite(
            **{**QAT, "qat_learning_rate": 10.0}, model=copied / "run" / "model.keras"
        )
    assert written(copied / "run") == ["model.keras", "model_qat.keras"]


GOOD = Comparison(0.1, 0.9, 1.0, 0.922, 0.956, 0.922, 0.956, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),  # Other classes than Keras, since it is better.
        ({"tflite_accuracy": 0.86}, "loses 6.20% of accuracy.* 86.00%, with Keras 92.20%"),
        ({"agreement": 0.96, "kept": 0.9}, None),
        ({"kept": 0.91}, "class of Keras for 90.00% .* right for 91.00% of those .* 95.00%"),
        ({"keras_accuracy": 0.8, "tflite_accuracy": 0.8}, "80.00% .* recorded 92.00%"),
        ({"keras_accuracy": float("nan")}, "recorded"),
    ],
)
def test_a_file_is_judged_by_the_accuracy_that_it_loses(changes, message):
    comparison = GOOD._replace(**changes)
    if message is None:
        check(comparison, None, 0.95, 0.05, 0.92)
        return
    with pytest.raises(UserError, match=message):
        check(comparison, None, 0.95, 0.05, 0.92)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"agreement": 0.9, "kept": 0.9}, "the class of Keras for 90.00% of the test images"),
        ({"keras_accuracy": 0.95, "tflite_accuracy": 0.85}, "loses 10.00% of accuracy"),
    ],
)
def test_few_images_prove_little(changes, message, caplog):
    """Two of 20 images may be chance. Of 1,000 images, so many are not."""
    comparison = GOOD._replace(tflite_accuracy=0.922)._replace(**changes)
    with caplog.at_level("WARNING", logger="absl"):
        check(comparison, None, 0.95, 0.05, 0.92, count=20)
    assert message in caplog.text and "may be chance" in caplog.text
    with pytest.raises(UserError, match=message):
        check(comparison, None, 0.95, 0.05, 0.92, count=1000)
    with pytest.raises(UserError, match=r"`min_agreement` 100.00%|loses"):
        check(comparison, None, 1.0, 0.0, 0.92, count=20)


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_batches(copied, quantize):
    settings = {"model": copied / "run" / "model.keras", "quantize": quantize}
    single = export.export_tflite(**settings)
    several = export.export_tflite(
        **settings, batch_size=4, output=str(copied / f"several_{quantize}.tflite")
    )
    runner = export.conversion.Runner(several.path.read_bytes())
    assert (runner.batch_size, single.report["batch_size"]) == (4, 1)
    # Ten images: the last part is not full.
    np.testing.assert_allclose(
        runner(IMAGES), scores_of(single.path, IMAGES), atol=1e-5 if quantize == "none" else 0.02
    )
    assert single.report["resizable"]


def test_a_network_with_four_splits_cannot_be_resized():
    network = Architecture(
        (16, 16, 3), 3, Stem(8, 3, 2, "relu"), (Block(12, 3, 2, 2, "relu", 4),), Head(24, "relu")
    ).build()
    assert not export.conversion.resizable(export.conversion.convert(network), IMAGES[:2])


@pytest.fixture(scope="module")
def files(trained, tmp_path_factory):
    """Exported files by format."""
    folder = tmp_path_factory.mktemp("files")
    return {
        quantize: export.export_tflite(
            model=trained / "run" / "model.keras",
            quantize=quantize,
            output=str(folder / f"{quantize}.tflite"),
        ).path
        for quantize in ("none", "int8")
    }


def test_predictions_are_those_of_keras(trained, files, tmp_path):
    folder = trained / "photos" / "test"
    paths = sorted(folder.rglob("*.png"))
    expected = keras.ops.softmax(load(trained).predict(read_photos(trained), verbose=0)).numpy()
    models = {"keras": trained / "run" / "model.keras", **files}
    for name, model in models.items():
        found = export.classify_images(
            model=model, images=[folder], output=str(tmp_path / f"{name}.json")
        )
        assert [each.file for each in found] == [str(path) for path in paths]
        received = [[each.classes[label] for label in NAMES] for each in found]
        np.testing.assert_allclose(received, expected, atol=0.1 if name == "int8" else 1e-4)
        assert json.loads((tmp_path / f"{name}.json").read_text())[0] == {
            "file": str(paths[0]),
            "classes": found[0].classes,
        }
    assert list(found[0].classes.values()) == sorted(found[0].classes.values(), reverse=True)


def test_predictions_skip_hidden_files_in_a_folder_but_not_a_hidden_folder_that_is_named(
    trained, files, tmp_path
):
    photo = next((trained / "photos" / "test").rglob("*.png"))
    for name in (".cache/one.png", ".cache/._one.png", ".cache/.hidden/two.png", ".cache/a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, tmp_path / name)
    found = export.classify_images(model=files["none"], images=[tmp_path / ".cache"])
    assert [each.file for each in found] == [str(tmp_path / ".cache" / "one.png")]


def test_predictions_of_a_photo_that_lies_on_its_side(trained, files, tmp_path):
    pixels = np.random.default_rng(3).integers(0, 256, (40, 30, 3), np.uint8)
    upright, turned = tmp_path / "upright.png", tmp_path / "turned.png"
    PIL.Image.fromarray(pixels).save(upright)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    PIL.Image.fromarray(np.rot90(pixels)).save(turned, exif=exif)
    one, other = export.classify_images(model=files["none"], images=[upright, turned])
    assert one.classes == other.classes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": ["/nonesuch.jpg"]}, "there is no file or folder /nonesuch.jpg"),
        ({"images": ["{empty}"]}, "holds no image"),
        ({"images": ["{text}"]}, "cannot be read: it is no image"),
        ({"model": "{text}"}, "`model` must be an existing .keras file"),
        ({"model": "/nonesuch.tflite"}, "cannot read `model` /nonesuch.tflite"),
        ({"model": "{junk}"}, "is not a file of fpnas export"),
        ({"labels": "{text}"}, "has 3 classes. Received: 1 names"),
        # Before any image is classified.
        ({"output": "/nonesuch/a.json", "images": ["{text}"]}, "`output` must lie in an existing"),
    ],
)
def test_bad_input_of_predictions(trained, files, tmp_path, settings, message):
    places = {
        "empty": tmp_path / "empty",
        "text": tmp_path / "a.png",
        "junk": tmp_path / "a.tflite",
    }
    places["empty"].mkdir()
    places["text"].write_text("no image")
    places["junk"].write_bytes(b"TFL3" * 100)
    photo = next((trained / "photos" / "test").rglob("*.png"))
    filled = {
        name: [each.format(**places) for each in value]
        if isinstance(value, list)
        else value.format(**places)
        for name, value in settings.items()
    }
    with pytest.raises(UserError, match=message):
        export.classify_images(**{"model": files["none"], "images": [photo], **filled})


def test_a_model_without_names_needs_labels(trained, tmp_path):
    load(trained).save(tmp_path / "bare.keras")
    photo = next((trained / "photos" / "test").rglob("*.png"))
    with pytest.raises(UserError, match=r"--labels must be given: .* no names of its 3 classes"):
        export.classify_images(model=tmp_path / "bare.keras", images=[photo])
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    (found,) = export.classify_images(
        model=tmp_path / "bare.keras", images=[photo], labels=str(tmp_path / "names.txt"), top=1
    )
    assert len(found.classes) == 1
