"""Reads labelled images: digits, tfds:NAME, folder:PATH."""

import contextlib
import hashlib
import math
import os
import pathlib
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from fpnas_keras.data import folders
from fpnas_keras.data.image_files import (
    check_resize,
    decode_file,
    is_grey,
    read_file,
    resize_image,
    size_of,
)
from fpnas_keras.errors import UserError
from fpnas_keras.files import summarize_error
from fpnas_keras.progress import track

# Images that take more bytes than this, decoded and resized, stay on the disk.
MEMORY_LIMIT = 4 * 2**30
# Share of the images held out as test set where the data comes without one.
TEST_FRACTION = 0.2
_HELD_OUT = "from a fifth of train"
# Images that `look_at` looks at.
_FEW = 50
# What `load` keeps while it is `remembering`.
_remembered: dict[tuple, "Images"] = {}
_is_remembering = False
_AUTOTUNE = tf.data.AUTOTUNE


class Images(NamedTuple):
    """One set of labelled images.

    Attributes:
        x: The pixels, uint8 of shape `(n, height, width, channels)`. If the images do not fit into
            memory, their places on the disk, as strings: the file names, of shape `(n,)`, or the
            file and "offset:length:key" of each TFRecord, of shape `(n, 2)`.
        y: Index of the class, int32 of shape `(n,)`.
        class_names: Names of the classes.
        image_shape: `(height, width, channels)`.
        resize: How images that are not square become square: "stretch", "crop" or "pad".
        description: What the data holds, in one line. Empty where `load` remembers them.
        digest: Of the names and sizes of the files, if they are files.
        weights: Weight of each image in the loss, float32 of shape `(n,)`. `None`: all count the
            same.
        logits: Logits of a teacher for each image, float32 of shape `(n, classes)`, or `None`.
            Batches then have labels of shape `(batch, 2 * classes)`: the one-hot label and the
            logits.
    """

    x: np.ndarray
    y: np.ndarray
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    resize: str = "stretch"
    description: str = ""
    digest: str = ""
    weights: np.ndarray | None = None
    logits: np.ndarray | None = None

    def part(self, indices: np.ndarray) -> "Images":
        """The images with the given indices, in the order of the indices."""
        names = ("x", "y", "weights", "logits")
        columns = {name: getattr(self, name) for name in names}
        return self._replace(
            **{name: each[indices] for name, each in columns.items() if each is not None}
        )

    def fingerprint(self) -> str:
        """A text that is different for other images, as far as their names and classes say."""
        content = repr((self.digest, self.class_names, self.image_shape)).encode()
        return hashlib.sha256(content + self.y.tobytes()).hexdigest()

    def balanced(self) -> "Images":
        """The same images, with weights for which all classes count the same: their mean is 1."""
        counts = np.bincount(self.y, minlength=len(self.class_names))
        weights = len(self.y) / (np.count_nonzero(counts) * np.maximum(counts, 1))
        return self._replace(weights=weights[self.y].astype(np.float32))


def load(
    name: str,
    split: str = "train",
    image_size: int = 32,
    data_dir: str | None = None,
    download: bool = True,
    resize: str = "stretch",
) -> Images:
    """Reads the training or the test set.

    Where the data has no test set of its own (no split "test" or "validation", no folder `test` or
    `val`), a stratified fifth of it is held out, the same one for every seed.

    Args:
        name: `digits` (scikit-learn's 1,797 images), `tfds:NAME` (a data set of
            tensorflow_datasets with images and labels) or `folder:PATH` (a folder of class folders,
            or of `train` and `test` or `val` with class folders in each).
        split: "train" or "test".
        image_size: Height and width that the images are resized to.
        data_dir: Where tensorflow_datasets keeps its data.
        download: Whether tensorflow_datasets may download.
        resize: How images that are not square become square: "stretch", "crop" (the largest square
            in the middle) or "pad" (with black).

    Raises:
        UserError: When there is no such data.
    """
    if split not in ("train", "test"):
        raise UserError(f"`split` must be train or test. Received: split={split!r}")
    check_resize(resize)
    key = (name, split, image_size, data_dir, resize)
    if key in _remembered:
        return _remembered[key]._replace(description="")
    kind, rest = _parse_name(name)
    if kind == "digits":
        images = _digits(split, image_size)
    elif kind == "tfds":
        images = _tfds(rest, split, image_size, data_dir, download, resize)
    else:
        images = _folder(pathlib.Path(rest).expanduser(), split, image_size, resize)
    if (
        _is_remembering
        and sum(each.x.nbytes for each in (images, *_remembered.values())) <= MEMORY_LIMIT
    ):
        _remembered[key] = images
    return images


def _parse_name(name):
    """The kind of data, and what follows the colon."""
    kind, _, rest = name.partition(":")
    if name != "digits" and not (kind in ("tfds", "folder") and rest):
        raise UserError(f"`data` must be digits, tfds:NAME or folder:PATH. Received: data={name!r}")
    return kind, rest


@contextlib.contextmanager
def remembering() -> Iterator[None]:
    """Inside the block, `load` reads the same images once, if they take at most 4 GiB together."""
    global _is_remembering
    _is_remembering = True
    try:
        yield
    finally:
        _is_remembering = False
        _remembered.clear()


def look_at(
    name: str, data_dir: str | None = None, download: bool = True
) -> tuple[tuple[int, int, int], int]:
    """The shape of the images as they are, before any resizing, and the number of classes.

    Args:
        name: As for `load`.
        data_dir: As for `load`.
        download: As for `load`.

    Returns:
        `(size, size, channels)`, where size is the median of the shorter sides of up to 50 images,
        and the number of classes.

    Raises:
        UserError: When there is no such data.
    """
    kind, rest = _parse_name(name)
    if kind == "digits":
        return (8, 8, 1), 10
    if kind == "tfds":
        builder, _, dataset = _open_tfds(rest, "train", data_dir, download)
        features = builder.info.features
        image, label = (features[key] for key in builder.info.supervised_keys[:2])
        sizes = [min(x.shape[:2]) for x, _ in dataset.take(_FEW).as_numpy_iterator()]
        channels, num_classes = image.shape[-1] or 3, label.num_classes
    else:
        train = folders.scan(pathlib.Path(rest).expanduser()).train
        some = train.files[:: -(-len(train.files) // _FEW)]
        sizes = [min(size_of(file)) for file in some]
        channels, num_classes = 1 if all(map(is_grey, train.files)) else 3, len(train.names)
    size = int(np.median(sizes))
    return (size, size, channels), num_classes


def split(y: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of two disjoint, stratified parts; the second holds `fraction` of all.

    Each class has an image in the first part and, if it has two, one in the second. Where classes
    have few images, the second part may therefore hold more than `fraction`.

    Args:
        y: Index of the class, integers of shape `(n,)`.
        fraction: Share of the second part, between 0 and 1.
        seed: Seed of the draw.

    Raises:
        UserError: When no class has two images.
    """
    from sklearn.model_selection import train_test_split

    y = np.asarray(y)
    if y.ndim != 1:
        raise UserError(f"`y` must have one class an image. Received: y of shape {y.shape}")
    classes, counts = np.unique(y, return_counts=True)
    single = np.isin(y, classes[counts == 1])
    several = np.flatnonzero(~single)
    if not len(several):
        raise UserError(
            f"too few images to hold out {fraction:.0%} of them: no class has two images. "
            f"Received: {len(y)} images of {len(classes)} classes"
        )
    least = np.count_nonzero(counts > 1)
    count = min(max(math.ceil(fraction * len(several)), least), len(several) - least)
    first, second = train_test_split(
        several, test_size=count, stratify=y[several], random_state=seed
    )
    # scikit-learn may leave a small class out of a part.
    first, second = _give_missing(first, second, y)
    second, first = _give_missing(second, first, y)
    return np.sort(np.concatenate([first, np.flatnonzero(single)])), np.sort(second)


def _give_missing(giver, taker, y):
    """Moves one image of each class that `taker` lacks."""
    missing = np.setdiff1d(y[giver], y[taker])
    moved = np.array([giver[y[giver] == label][0] for label in missing], int)
    return np.setdiff1d(giver, moved), np.concatenate([taker, moved])


def choose_weights_share(count: int) -> float:
    """The share of `count` images of a search that are in the weights part.

    It is 0.8, but down to 0.5 as long as the architecture part has fewer than 1,000 images: few
    images are too noisy to decide on. The paper has 0.5.
    """
    return min(max(1 - 1000 / count, 0.5), 0.8)


@contextlib.contextmanager
def naming_unreadable(images: Images | None) -> Iterator[None]:
    """If an image file cannot be read, raises an error that names the file.

    The error of TensorFlow, in whose graph it is read, does not name it.

    Args:
        images: The images that are read inside the `with` statement; `None` for no images.

    Raises:
        UserError: When one of their files cannot be decoded.
    """
    try:
        yield
    # What an error of a Python function becomes. A lost worker or full memory has another cause.
    except (tf.errors.InvalidArgumentError, tf.errors.UnknownError):
        on_disk = images is not None and images.x.dtype.kind in "SUO" and images.x.ndim == 1
        for file in images.x if on_disk else ():
            read_file(file, images.image_shape[-1])
        raise


def _hold_out(y):
    """Indices of the training and the test set of data that comes without a test set."""
    return split(y, TEST_FRACTION, seed=0)


def _digits(split_name, image_size):
    from sklearn.datasets import load_digits

    digits = load_digits()
    if len(digits.target) * image_size**2 > MEMORY_LIMIT:
        raise UserError(
            f"the data set `digits` does not fit into memory ({MEMORY_LIMIT / 2**30:.0f} GiB) at "
            f"that size. Received: image_size={image_size}"
        )
    train, test = _hold_out(digits.target)
    indices = train if split_name == "train" else test
    x = (digits.images[indices, ..., None] * (255 / 16)).round().astype(np.uint8)
    names = tuple(str(name) for name in digits.target_names)
    return Images(
        resize_image(tf.constant(x), image_size, "stretch").numpy(),
        digits.target[indices].astype(np.int32),
        names,
        (image_size, image_size, 1),
        description=folders.describe(np.bincount(digits.target), names, len(train), _HELD_OUT),
    )


def _open_tfds(name, split_name, data_dir, download):
    """The builder of a data set, its test split if it has one, and a split's images and labels."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
        if download:
            builder.download_and_prepare()
        info = builder.info
        # Some sets have a test split without labels.
        test = next((each for each in ("test", "validation") if _is_labelled(builder, each)), None)
        source = test if split_name == "test" and test else "train"
        dataset = builder.as_dataset(split=source, as_supervised=True, shuffle_files=False)
    except Exception as error:  # Readers and downloads raise errors of many classes.
        raise UserError(
            f"cannot read the data set `{name}` of tensorflow_datasets (data_dir={data_dir}, "
            f"download={download}): {summarize_error(error)}"
        ) from None
    image, label = (info.features[key] for key in info.supervised_keys[:2])
    is_image = len(image.shape or ()) == 3 and image.dtype == np.uint8
    if not is_image or not hasattr(label, "num_classes"):
        raise UserError(
            f"the data set `{name}` must have uint8 images and one class label each. "
            f"Received: {image} and {label}"
        )
    return builder, test, dataset


def _tfds(name, split_name, image_size, data_dir, download, resize):
    builder, test, dataset = _open_tfds(name, split_name, data_dir, download)
    info = builder.info
    source = test if split_name == "test" and test else "train"
    image, label = (info.features[key] for key in info.supervised_keys[:2])
    image_shape = (image_size, image_size, image.shape[-1] or 3)
    count = info.splits[source].num_examples
    if count * np.prod(image_shape, dtype=np.int64) > MEMORY_LIMIT:
        x, y = _tfds_places(builder, source)
    else:
        dataset = dataset.map(
            lambda x, y: (resize_image(x, image_size, resize), y), num_parallel_calls=_AUTOTUNE
        )
        x, y = _collect(dataset.batch(500).prefetch(2), count, image_shape, f"reading {name}")
    if y.min() < 0:
        raise UserError(f"the split `{source}` of the data set `{name}` has no labels")
    names = tuple(label.names)
    if test is None:
        first, second = _hold_out(y)
        description = folders.describe(np.bincount(y), names, len(first), _HELD_OUT)
        indices = first if split_name == "train" else second
        x, y = x[indices], y[indices]
    else:
        train, held_out = (info.splits[each].num_examples for each in ("train", test))
        description = (
            f"{train + held_out:,} images ({train:,} train, {held_out:,} test from the split "
            f"{test}), {len(names)} classes"
        )
    return Images(x, y, names, image_shape, resize, description)


def _is_labelled(builder, split_name):
    """Whether a data set has a split of that name, and labels in it."""
    if split_name not in builder.info.splits:
        return False
    first = builder.as_dataset(split=f"{split_name}[:1]", as_supervised=True)
    return all(label >= 0 for _, label in first.as_numpy_iterator())


def _tfds_places(builder, split_name):
    """Where the images of a prepared data set are on the disk, and their labels."""
    import tensorflow_datasets as tfds

    info = builder.info
    if info.file_format != tfds.core.FileFormat.TFRECORD:
        raise UserError(
            f"the data set `{info.name}` does not fit into memory and must be prepared as "
            f"{tfds.core.FileFormat.TFRECORD.value} files to be read from the disk. "
            f"Received: {info.file_format.value}"
        )
    image, label = info.supervised_keys[:2]
    features = {label: tf.io.FixedLenFeature([], tf.int64)}

    def size_and_label(record):
        return tf.strings.length(record), tf.io.parse_single_example(record, features)[label]

    places, labels, split = [], [], info.splits[split_name]
    with track(split.num_examples, f"indexing {info.name}", "images") as progress:
        for file in map(str, split.filepaths):
            records = tf.data.TFRecordDataset(file, buffer_size=2**24)
            records = records.map(size_and_label, num_parallel_calls=_AUTOTUNE).batch(1000)
            end = 0
            for lengths, own in records.as_numpy_iterator():
                # A record is its length and a checksum, 12 bytes, what it holds, and 4 bytes.
                ends = end + np.cumsum(lengths + 16, dtype=np.int64)
                begins, end = ends - lengths - 4, ends[-1]
                own_places = [
                    (file.encode(), f"{begin}:{length}:{image}".encode())
                    for begin, length in zip(begins, lengths)
                ]
                places.append(np.array(own_places))
                labels.append(own)
                progress.update(len(own))
    return np.concatenate(places), np.concatenate(labels).astype(np.int32)


def _folder(path, split_name, image_size, resize):
    found = folders.scan(path)
    names = found.train.names
    # Decided on the training set for both, so that they agree.
    image_shape = (image_size, image_size, 1 if all(map(is_grey, found.train.files)) else 3)
    own = found.test if found.test and split_name == "test" else found.train
    paths, y = own.files, own.y
    counts, source = np.bincount(found.train.y), _HELD_OUT
    if found.test:
        counts, source = counts + np.bincount(found.test.y), f"from {found.test_name}"
        train = len(found.train.y)
    else:
        first, second = _hold_out(y)
        train, indices = len(first), first if split_name == "train" else second
        paths, y = paths[indices], y[indices]
    description = folders.describe(counts, names, train, source, _notes(found))
    images = Images(paths, y, names, image_shape, resize, description, _digest(path, paths))
    if len(y) * np.prod(image_shape) > MEMORY_LIMIT:
        return images
    dataset = tf.data.Dataset.from_tensor_slices((paths, y))
    dataset = dataset.map(
        lambda file, label: (decode_file(file, image_shape, resize), label),
        num_parallel_calls=_AUTOTUNE,
    )
    with naming_unreadable(images):
        x, y = _collect(dataset.batch(100).prefetch(2), len(y), image_shape, f"reading {path}")
    return images._replace(x=x, y=y)


def _digest(folder, files):
    """Of the names, inside the folder, and sizes of files."""
    digest = hashlib.sha256()
    for file in files:
        name = os.path.relpath(file, os.fsencode(folder))
        digest.update(b"%s %d\n" % (name, os.path.getsize(file)))
    return digest.hexdigest()


def _notes(found):
    """What of an image folder is not used."""
    ignored = found.train.ignored + (found.test.ignored if found.test else Counter())
    notes = []
    if ignored:
        count = ignored.total()
        files = "file" if count == 1 else "files"
        notes.append(f"{count} {files} ignored: {folders.count_endings(ignored)}")
    if found.unused:
        notes.append(f"not used: {', '.join(found.unused)}")
    return notes


def _collect(dataset, count, image_shape, description):
    x, y = np.empty((count, *image_shape), np.uint8), np.empty(count, np.int32)
    with track(count, description, "images") as progress:
        for images, labels in dataset.as_numpy_iterator():
            end = progress.n + len(labels)
            x[progress.n : end], y[progress.n : end] = images, labels
            progress.update(len(labels))
    return x, y
