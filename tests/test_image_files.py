"""Image folders and image files as people have them."""

import pathlib

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import tensorflow as tf

from fpnas_keras import data
from fpnas_keras.data import image_files


def write_image(path, value, size=(9, 7), channels=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = tf.fill((*size, channels), tf.constant(value, tf.uint8))
    tf.io.write_file(str(path), tf.io.encode_png(image))


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_folder_with_its_own_test_set(tmp_path, test_name):
    root = tmp_path / "mit Leerzeichen und ä"
    for part, count in (("train", 4), (test_name, 2)):
        for label, name in enumerate(["cat", "dog", "emu"]):
            for index in range(count):
                write_image(root / part / name / f"{index}.png", 50 * label + index)
    train = data.load(f"folder:{root}", "train", 8)
    assert train.x.shape == (12, 8, 8, 3)
    assert train.class_names == ("cat", "dog", "emu")
    assert np.array_equal(train.x[:, 0, 0, 0], 50 * train.y + np.tile(np.arange(4), 3))
    assert len(data.load(f"folder:{root}", "test", 8).y) == 6


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_folder_of_classes_is_split_and_grey_stays_grey(tmp_path, channels):
    for label, name in enumerate(["cat", "dog"]):
        for index in range(10):
            write_image(tmp_path / name / f"{index}.png", 100 * label + index, channels=channels)
    train, test = (data.load(f"folder:{tmp_path}", split, 8) for split in ("train", "test"))
    assert train.image_shape == (8, 8, 1 if channels == 1 else 3)
    assert (len(train.y), np.bincount(test.y).tolist()) == (16, [2, 2])
    assert not set(train.x[:, 0, 0, 0]) & set(test.x[:, 0, 0, 0])


def test_images_that_do_not_fit_into_memory_stay_on_the_disk(tmp_path, monkeypatch):
    for label, name in enumerate(["cat", "dog"]):
        for index in range(10):
            write_image(tmp_path / name / f"{index}.png", 100 * label + index)
    in_memory = data.load(f"folder:{tmp_path}", "train", 8)
    monkeypatch.setattr("fpnas_keras.data.reading.MEMORY_LIMIT", 100)
    on_disk = data.load(f"folder:{tmp_path}", "train", 8)
    assert on_disk.x.shape == (16,)
    for one, other in zip(
        data.search_batches(on_disk, batch_size=4),
        data.search_batches(*in_memory[:2], batch_size=4),
    ):
        for a, b in zip(tf.nest.flatten(one), tf.nest.flatten(other)):
            assert np.array_equal(a, b)


def test_folders_that_hold_no_classes(tmp_path):
    with pytest.raises(ValueError, match="Received: no folder"):
        data.load(f"folder:{tmp_path}")
    write_image(tmp_path / "cat" / "1.png", 1)
    with pytest.raises(ValueError, match="at least 2 classes"):
        data.load(f"folder:{tmp_path}")
    (tmp_path / "dog").mkdir()
    with pytest.raises(ValueError, match="without images: dog"):
        data.load(f"folder:{tmp_path}")
    (tmp_path / "dog" / "1.png").write_bytes(b"no image")
    for index in range(5):
        write_image(tmp_path / "cat" / f"{index}.png", 1)
        (tmp_path / "dog" / f"{index}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"the image .*dog/0.png cannot be read"):
        data.load(f"folder:{tmp_path}")
    write_image(tmp_path / "dog" / "0.png", 1)  # the first image of the class is whole
    with pytest.raises(ValueError, match=r"the image .*/[1-4].png cannot be read: it is no image"):
        data.load(f"folder:{tmp_path}")


def test_only_errors_of_reading_read_all_images_again(tmp_path):
    (tmp_path / "1.png").write_bytes(b"no image")
    images = data.Images(np.array([str(tmp_path / "1.png")]), np.array([0]), ("a",), (8, 8, 3))
    with pytest.raises(ValueError, match="cannot be read"), data.naming_unreadable(images):
        raise tf.errors.InvalidArgumentError(None, None, "of numpy_function")
    # A lost worker or full memory: nothing is wrong with the images.
    for error in (tf.errors.UnavailableError, tf.errors.ResourceExhaustedError):
        with pytest.raises(error), data.naming_unreadable(images):
            raise error(None, None, "")


def test_training_and_test_folder_must_agree(tmp_path):
    for part, names in (("train", ["cat", "dog"]), ("test", ["dog", "emu"])):
        for name in names:
            write_image(tmp_path / part / name / "1.png", 1)
    for split in ("train", "test"):
        with pytest.raises(ValueError, match="Received: cat, emu in one of them only"):
            data.load(f"folder:{tmp_path}", split)


def test_one_grey_image_does_not_make_the_data_grey(tmp_path):
    for label, name in enumerate(["cat", "dog"]):
        for index in range(10):
            channels = 1 if (name, index) == ("cat", 0) else 3
            write_image(tmp_path / name / f"{index}.png", 100 * label + index, channels=channels)
    shapes = {data.load(f"folder:{tmp_path}", split, 8).image_shape for split in ("train", "test")}
    assert shapes == {(8, 8, 3)}


def picture(width=60, height=40, mode="RGB"):
    """A picture whose pixels say where they are."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 6, columns * 4, rows + columns], axis=-1).astype(np.uint8)
    return PIL.Image.fromarray(pixels).convert(mode)


def saved(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def expected_pixels(image, size):
    """What TensorFlow makes of the upright pixels."""
    pixels = tf.constant(np.asarray(image.convert("RGB")))
    return tf.image.resize(pixels, (size, size), antialias=True).numpy()


def make_folder(root, image, suffix, **options):
    """Two classes of five images each."""
    for name in ("cat", "dog"):
        for index in range(5):
            saved(root / name / f"{index}{suffix}", image, **options)
    return f"folder:{root}"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_photos_are_upright_in_memory_and_from_the_disk(tmp_path, monkeypatch, orientation, suffix):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    name = make_folder(tmp_path, picture(), suffix, exif=exif)
    upright = PIL.ImageOps.exif_transpose(PIL.Image.open(tmp_path / "cat" / f"0{suffix}"))
    assert upright.size == ((60, 40) if orientation < 5 else (40, 60))
    expected = expected_pixels(upright, 16)
    in_memory = data.load(name, "train", 16)
    monkeypatch.setattr("fpnas_keras.data.reading.MEMORY_LIMIT", 100)
    on_disk = data.load(name, "train", 16)
    (read, _), *_ = data.test_batches(on_disk)
    assert np.abs(in_memory.x - expected).max() <= 0.51
    np.testing.assert_array_equal(read, in_memory.x)
    single = data.read_image(tmp_path / "cat" / f"0{suffix}", (16, 16, 3))
    np.testing.assert_array_equal(single, in_memory.x[0])


@pytest.mark.parametrize("suffix", [".JPG", ".jfif", ".webp", ".tiff", ".avif", ".bmp", ".jp2"])
def test_the_formats_that_people_have(tmp_path, suffix):
    path = tmp_path / f"photo{suffix}"
    saved(path, picture(64, 64))
    with PIL.Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(data.read_image(path, (64, 64, 3)), expected)


def test_a_photo_of_an_iphone_is_upright():
    path = pathlib.Path(__file__).parent / "turned.heic"  # written by pillow-heif, orientation 6
    upright = np.asarray(picture().transpose(PIL.Image.Transpose.ROTATE_270))
    expected = expected_pixels(PIL.Image.fromarray(upright), 20)
    assert np.abs(data.read_image(path, (20, 20, 3)) - expected).max() < 8


def as_palette_with_transparency(image):
    made = image.convert("P", palette=PIL.Image.Palette.ADAPTIVE)
    made.info["transparency"] = 3
    return made


@pytest.mark.parametrize(
    ("make", "suffix"),
    [
        (lambda image: image.convert("P", palette=PIL.Image.Palette.ADAPTIVE), ".png"),
        (as_palette_with_transparency, ".png"),
        (lambda image: image.convert("RGBA"), ".png"),
        (lambda image: image.convert("LA"), ".png"),
        (lambda image: image.convert("1"), ".png"),
        (lambda image: image.convert("CMYK"), ".jpg"),
        (lambda image: image.convert("CMYK"), ".tif"),
        (lambda image: image.convert("YCbCr"), ".jpg"),
    ],
)
def test_pixels_of_all_kinds_are_those_of_pillow(tmp_path, make, suffix):
    path = saved(tmp_path / f"image{suffix}", make(picture(32, 32)))
    with PIL.Image.open(path) as image:
        expected = np.asarray(image.convert("RGBA").convert("RGB"))
    np.testing.assert_array_equal(data.read_image(path, (32, 32, 3)), expected)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_16_bits_are_not_nearly_black(tmp_path, suffix):
    deep = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    path = saved(tmp_path / f"deep{suffix}", PIL.Image.fromarray(deep))
    expected = np.round(deep / 257)
    received = data.read_image(path, (64, 64, 1))[..., 0]
    np.testing.assert_array_equal(received, expected)
    np.testing.assert_array_equal(data.read_image(path, (64, 64, 3))[..., 2], expected)
    name = make_folder(tmp_path / "set", PIL.Image.fromarray(deep), suffix)
    assert data.load(name, "train", 8).image_shape == (8, 8, 1)


def test_32_bits_are_refused_by_name(tmp_path):
    deep = PIL.Image.fromarray(np.ones((8, 8), np.float32))
    name = make_folder(tmp_path, deep, ".tif")
    with pytest.raises(ValueError, match=r"cat/\d.tif cannot be read: its pixels have 32 bits"):
        data.load(name, "train", 8)


def test_an_animation_gives_its_first_image(tmp_path):
    frames = [PIL.Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    for suffix in (".gif", ".webp", ".png"):
        path = saved(
            tmp_path / f"moving{suffix}",
            frames[0],
            save_all=True,
            append_images=frames[1:],
            lossless=True,
        )
        received = data.read_image(path, (16, 16, 3))
        assert received[..., 0].min() > 250
        assert received[..., 1:].max() < 5


def test_large_photos_are_decoded_at_a_fraction_of_their_size(tmp_path):
    path = saved(tmp_path / "large.jpg", picture(60, 40).resize((2400, 1600)), quality=95)
    with PIL.Image.open(path) as image:
        expected = expected_pixels(image, 32)
    assert np.abs(data.read_image(path, (32, 32, 3)) - expected).max() < 4


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_images_become_square(tmp_path, monkeypatch, resize, shape):
    image = picture(*shape)
    name = make_folder(tmp_path, image, ".png")
    in_memory = data.load(name, "train", 20, resize=resize)
    if resize == "pad":
        pixels = tf.image.resize(image, (13, 20)[:: 1 if shape[0] > 40 else -1], antialias=True)
        border = [(3, 4), (0, 0)][:: 1 if shape[0] > 40 else -1]
        expected = np.pad(pixels, [*border, (0, 0)])
    else:
        square = PIL.ImageOps.fit(image, (40, 40)) if resize == "crop" else image
        expected = expected_pixels(square, 20)
    assert np.abs(in_memory.x - expected).max() <= 0.51
    assert in_memory.resize == resize
    monkeypatch.setattr("fpnas_keras.data.reading.MEMORY_LIMIT", 100)
    (read, _), *_ = data.test_batches(data.load(name, "train", 20, resize=resize))
    np.testing.assert_array_equal(read, in_memory.x)


def test_an_unknown_resize():
    with pytest.raises(
        ValueError, match=r"`resize` must be stretch, crop, pad\. Received: resize="
    ):
        data.load("digits", resize="squash")


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING"])
@pytest.mark.parametrize(
    "test", ["test", "Test", "testing", "validation", "Valid", "val", "DEV", "eval"]
)
def test_names_of_training_and_test_sets(tmp_path, train, test):
    for part, count in ((train, 3), (test, 1)):
        for name in ("cat", "dog"):
            for index in range(count):
                write_image(tmp_path / part / name / f"{index}.png", 1)
    for split, count in (("train", 6), ("test", 2)):
        images = data.load(f"folder:{tmp_path}", split, 8)
        assert len(images.y) == count
        assert images.description == f"8 images (6 train, 2 test from {test}), 2 classes: " + (
            "cat 4, dog 4"
        )


def test_one_of_several_test_sets_is_used_and_the_others_are_named(tmp_path):
    for part, count in (("train", 3), ("val", 2), ("test", 1), ("dev", 2)):
        for name in ("cat", "dog"):
            for index in range(count):
                write_image(tmp_path / part / name / f"{index}.png", 1)
    images = data.load(f"folder:{tmp_path}", "test", 8)
    assert len(images.y) == 2
    assert images.description.endswith(
        "test from test), 2 classes: cat 4, dog 4; not used: val, dev"
    )


@pytest.mark.parametrize("names", [("train", "other"), ("test", "val"), ("train", "Train")])
def test_what_lies_beside_the_sets_is_refused(tmp_path, names):
    for part in names:
        for name in ("cat", "dog"):
            write_image(tmp_path / part / name / "1.png", 1)
    with pytest.raises(ValueError, match="must hold one folder train and maybe one of") as error:
        data.load(f"folder:{tmp_path}")
    assert all(name in str(error.value) for name in names)


def test_classes_may_be_named_like_sets(tmp_path):
    for name in ("bus", "test", "train"):
        for index in range(5):
            write_image(tmp_path / name / f"{index}.png", 1)
    assert data.load(f"folder:{tmp_path}", "train", 8).class_names == ("bus", "test", "train")


def test_what_systems_leave_in_folders_is_skipped_and_counted(tmp_path):
    for name in ("cat", "dog"):
        for index in range(5):
            write_image(tmp_path / name / f"{index}.png", 1)
        (tmp_path / name / "._0.png").write_bytes(b"resource fork")
        write_image(tmp_path / name / ".ipynb_checkpoints" / "0.png", 1)
    write_image(tmp_path / "__MACOSX" / "cat" / "0.png", 1)
    (tmp_path / "cat" / "Thumbs.db").write_bytes(b"")
    (tmp_path / "cat" / "notes.txt").write_text("cats")
    (tmp_path / "dog" / "README").write_text("dogs")
    (tmp_path / "dog" / "film.mov").write_bytes(b"")
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    images = data.load(f"folder:{tmp_path}", "train", 8)
    assert images.class_names == ("cat", "dog")
    assert images.description == (
        "10 images (8 train, 2 test from a fifth of train), 2 classes: cat 5, dog 5; "
        "7 files ignored: 3 hidden, 2 .txt, 1 .mov, 1 without ending"
    )


def test_an_empty_class_is_named_with_what_it_holds(tmp_path):
    write_image(tmp_path / "cat" / "1.png", 1)
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "1.cr2").write_bytes(b"")
    with pytest.raises(ValueError, match=r"without images: dog \(1 \.cr2\)"):
        data.load(f"folder:{tmp_path}")


def test_small_classes(tmp_path):
    for name, count in (("ant", 1), ("bee", 2), ("cat", 3), ("dog", 10)):
        for index in range(count):
            write_image(tmp_path / name / f"{index}.png", 1)
    train, test = (data.load(f"folder:{tmp_path}", split, 8) for split in ("train", "test"))
    assert np.bincount(train.y).tolist() == [1, 1, 2, 8]
    assert np.bincount(test.y).tolist() == [0, 1, 1, 2]
    batches = data.search_batches(train, batch_size=4)
    assert len(next(iter(batches))) == 2


def test_many_classes_of_four_images(tmp_path):
    image = PIL.Image.new("L", (8, 8))
    for label in range(300):
        for index in range(4):
            saved(tmp_path / f"{label:03}" / f"{index}.png", image)
    train, test = (data.load(f"folder:{tmp_path}", split, 8) for split in ("train", "test"))
    assert set(np.bincount(train.y)) == {3}
    assert set(np.bincount(test.y)) == {1}
    assert train.description == (
        "1,200 images (900 train, 300 test from a fifth of train), 300 classes of 4 to 4 images"
    )


def test_names_that_are_not_utf8(tmp_path):
    for name in ("cat", "dog"):
        for index in range(5):
            write_image(tmp_path / name / f"{index}.png", 1)
    (tmp_path / "cat" / "0.png").rename(
        tmp_path / "cat" / b"\xff0.png".decode(errors="surrogateescape")
    )
    assert len(data.load(f"folder:{tmp_path}", "train", 8).y) == 8
    (tmp_path / "cat").rename(tmp_path / b"k\xe4tzchen".decode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"class folder .*k\\xe4tzchen' must be UTF-8 in one line"):
        data.load(f"folder:{tmp_path}")


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_folder(tmp_path / "photos", picture(), ".png")
    assert len(data.load("folder:~/photos", "train", 8).y) == 8
    settings = data.DataSettings(data="folder:~/photos", data_dir="~/sets")
    assert settings.data_dir == str(tmp_path / "sets")


def test_an_unknown_resize_of_one_image(tmp_path):
    path = saved(tmp_path / "image.png", picture())
    with pytest.raises(ValueError, match=r"`resize` must be stretch, crop, pad\. Received"):
        data.read_image(path, (8, 8, 3), "Crop")


def test_photos_of_200_million_pixels_are_opened(tmp_path):
    """Only the header is read here: it takes a second to write such a file, and more to read it."""
    path = saved(tmp_path / "huge.png", PIL.Image.new("1", (16_320, 12_240)))
    assert image_files.is_grey(str(path))


def test_training_images_are_of_all_classes(tmp_path):
    for name, count in (("ant", 1), ("bee", 50), ("cat", 50)):
        for index in range(count):
            write_image(tmp_path / name / f"{index}.png", 1)
    settings = data.DataSettings(data=f"folder:{tmp_path}", train_images=20)
    images = settings.load_images("train", 8)
    assert np.bincount(images.y).tolist()[0] == 1
    assert len(images.y) == 21
