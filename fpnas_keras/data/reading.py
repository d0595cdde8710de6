"""Reads labelled images: digits, tfds:NAME, folder:PATH."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from fpnas_keras.errors import UserError
from fpnas_keras.files import summarize_error

# Images that take more bytes than this, decoded and resized, stay on the disk.
MEMORY_LIMIT = 4 * 2**30
# Share of the images held out as test set where the data comes without one.
TEST_FRACTION = 0.2
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
    """

    x: np.ndarray
    y: np.ndarray
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]

    def part(self, indices: np.ndarray) -> "Images":
        """The images with the given indices, in the order of the indices."""
        return self._replace(x=self.x[indices], y=self.y[indices])


def load(
    name: str,
    split: str = "train",
    image_size: int = 32,
    data_dir: str | None = None,
    download: bool = True,
) -> Images:
    """Reads the training or the test set.

    Where the data has no test set of its own (no split "test" or "validation", no
    folder `test` or `val`), a stratified fifth of it is held out, the same
    one for every seed.

    Args:
        name: `digits` (scikit-learn's 1,797 images), `tfds:NAME` (a data set of
            tensorflow_datasets with images and labels) or `folder:PATH` (a
            folder of class folders, or of `train` and `test` or `val` with class
            folders in each).
        split: "train" or "test".
        image_size: Height and width that the images are resized to.
        data_dir: Where tensorflow_datasets keeps its data.
        download: Whether tensorflow_datasets may download.

    Raises:
        UserError: When there is no such data.
    """
    if split not in ("train", "test"):
        raise UserError(f"`split` must be train or test. Received: split={split!r}")
    kind, _, rest = name.partition(":")
    if name == "digits":
        return _digits(split, image_size)
    if kind == "tfds" and rest:
        return _tfds(rest, split, image_size, data_dir, download)
    if kind == "folder" and rest:
        return _folder(pathlib.Path(rest), split, image_size)
    raise UserError(f"`data` must be digits, tfds:NAME or folder:PATH. Received: data={name!r}")


def split(y: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of two disjoint, stratified parts; the second holds `fraction` of all.

    Raises:
        UserError: When a class has too few images to be in both parts.
    """
    from sklearn.model_selection import train_test_split

    y = np.asarray(y)
    if y.ndim != 1:
        raise UserError(f"`y` must have one class an image. Received: y of shape {y.shape}")
    classes, counts = np.unique(y, return_counts=True)
    smaller = round(len(y) * min(fraction, 1 - fraction))
    if counts.min() < 2 or smaller < len(classes):
        raise UserError(
            f"too few images to hold out {fraction:.0%} of them with every class in both parts. "
            f"Received: {len(y)} images of {len(classes)} classes, {counts.min()} of class "
            f"{classes[counts.argmin()]}"
        )
    first, second = train_test_split(
        np.arange(len(y)), test_size=fraction, stratify=y, random_state=seed
    )
    return np.sort(first), np.sort(second)


def choose_weights_share(count: int) -> float:
    """The share of `count` images of a search that are in the weights part.

    It is 0.8, but down to 0.5 as long as the architecture part has fewer than 1,000 images: few
    images are too noisy to decide on. The paper has 0.5.
    """
    return min(max(1 - 1000 / count, 0.5), 0.8)


def decode(encoded: tf.Tensor, image_shape: tuple[int, int, int]) -> tf.Tensor:
    """An encoded image as uint8 pixels of `image_shape`."""
    image = tf.io.decode_image(encoded, channels=image_shape[-1], expand_animations=False)
    return _resize(image, image_shape[0])


@contextlib.contextmanager
def naming_unreadable(images: Images | None) -> Iterator[None]:
    """If TensorFlow cannot read an image file, raises an error that names the file.

    TensorFlow's own error does not name it.

    Args:
        images: The images that are read inside the `with` statement; `None` for no images.

    Raises:
        UserError: When one of their files cannot be decoded.
    """
    try:
        yield
    except tf.errors.OpError:
        on_disk = images is not None and images.x.dtype.kind in "SUO" and images.x.ndim == 1
        for file in images.x if on_disk else ():
            _decode_file(file)
        raise


def _resize(image, image_size):
    """uint8 image or batch of images -> uint8 of `image_size`, with anti-aliasing."""
    if image.shape[-3:-1] != (image_size, image_size):
        image = tf.image.resize(image, (image_size, image_size), antialias=True)
        image = tf.clip_by_value(tf.round(image), 0, 255)
    return tf.cast(image, tf.uint8)


def _hold_out(y, split_name):
    """Indices of the training or the test set of data that comes without a test set."""
    train, test = split(y, TEST_FRACTION, seed=0)
    return train if split_name == "train" else test


def _digits(split_name, image_size):
    from sklearn.datasets import load_digits

    digits = load_digits()
    if len(digits.target) * image_size**2 > MEMORY_LIMIT:
        raise UserError(
            f"the data set `digits` does not fit into memory ({MEMORY_LIMIT / 2**30:.0f} GiB) at "
            f"that size. Received: image_size={image_size}"
        )
    indices = _hold_out(digits.target, split_name)
    x = (digits.images[indices, ..., None] * (255 / 16)).round().astype(np.uint8)
    return Images(
        _resize(tf.constant(x), image_size).numpy(),
        digits.target[indices].astype(np.int32),
        tuple(str(name) for name in digits.target_names),
        (image_size, image_size, 1),
    )


def _tfds(name, split_name, image_size, data_dir, download):
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
    image_shape = (image_size, image_size, image.shape[-1] or 3)
    count = info.splits[source].num_examples
    if count * np.prod(image_shape, dtype=np.int64) > MEMORY_LIMIT:
        x, y = _tfds_places(builder, source)
    else:
        dataset = dataset.map(
            lambda x, y: (_resize(x, image_size), y), num_parallel_calls=_AUTOTUNE
        )
        x, y = _collect(dataset.batch(500).prefetch(2), count, image_shape, f"reading {name}")
    if y.min() < 0:
        raise UserError(f"the split `{source}` of the data set `{name}` has no labels")
    if test is None:
        indices = _hold_out(y, split_name)
        x, y = x[indices], y[indices]
    return Images(x, y, tuple(label.names), image_shape)


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
    with tqdm(total=split.num_examples, desc=f"indexing {info.name}", unit=" images") as progress:
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


def _folder(path, split_name, image_size):
    if not path.is_dir():
        raise UserError(f"`data` names no folder. Received: data=folder:{path}")
    train = path / "train"
    test = next((path / name for name in ("test", "val") if (path / name).is_dir()), None)
    if not train.is_dir():
        train, test = path, None
    names, paths, y = _list_classes(train)
    # Decided on the training set for both, so that they agree.
    image_shape = (image_size, image_size, _channels(paths, y))
    if test is not None:
        test_names, test_paths, test_y = _list_classes(test)
        if test_names != names:
            raise UserError(
                f"{train} and {test} must have the same classes. "
                f"Received: {', '.join(sorted(set(names) ^ set(test_names)))} in one of them only"
            )
        if split_name == "test":
            paths, y = test_paths, test_y
    else:
        indices = _hold_out(y, split_name)
        paths, y = paths[indices], y[indices]
    if len(y) * np.prod(image_shape) > MEMORY_LIMIT:
        return Images(paths, y, names, image_shape)
    dataset = tf.data.Dataset.from_tensor_slices((paths, y))
    dataset = dataset.map(
        lambda file, label: (decode(tf.io.read_file(file), image_shape), label),
        num_parallel_calls=_AUTOTUNE,
    )
    with naming_unreadable(Images(paths, y, names, image_shape)):
        x, y = _collect(dataset.batch(100).prefetch(2), len(y), image_shape, f"reading {path}")
    return Images(x, y, names, image_shape)


def _list_classes(folder):
    """Names of the classes, names of the files and class of each file."""
    import keras

    try:
        files = keras.utils.image_dataset_from_directory(
            folder, labels="inferred", batch_size=None, shuffle=False, verbose=False
        )
    except ValueError as error:
        raise UserError(
            f"the folder {folder} must hold one folder of images for each class: {error}"
        ) from None
    names, paths = tuple(files.class_names), np.array(files.file_paths)
    parts = [pathlib.Path(file).relative_to(folder).parts for file in paths]
    deep = next((each for each in parts if len(each) > 2), None)
    if deep:
        raise UserError(
            f"the class folder {folder / deep[0]} must hold images. Received: the folder {deep[1]} "
            "in it (splits are named train and test or val)"
        )
    missing = sorted(set(names) - {each[0] for each in parts})
    if missing or len(names) < 2:
        raise UserError(
            f"the folder {folder} must hold images of at least 2 classes, and no empty class. "
            f"Received: classes {', '.join(names)}; without images: {', '.join(missing) or 'none'}"
        )
    return names, paths, np.array([names.index(each[0]) for each in parts], np.int32)


def _channels(paths, y):
    """1 where the first image of every class is grey, else 3."""
    channels = set()
    for file in paths[np.unique(y, return_index=True)[1]]:
        channels.add(_decode_file(file).shape[-1])
    return 1 if channels == {1} else 3


def _decode_file(file):
    try:
        return tf.io.decode_image(tf.io.read_file(file), expand_animations=False)
    except tf.errors.OpError as error:
        # TensorFlow puts the name of a graph node before the message.
        message = error.message.rpartition("}} ")[2]
        raise UserError(f"the image {file} cannot be read: {message}") from None


def _collect(dataset, count, image_shape, description):
    x, y = np.empty((count, *image_shape), np.uint8), np.empty(count, np.int32)
    with tqdm(total=count, desc=description, unit=" images", delay=5, mininterval=1) as progress:
        for images, labels in dataset.as_numpy_iterator():
            end = progress.n + len(labels)
            x[progress.n : end], y[progress.n : end] = images, labels
            progress.update(len(labels))
    return x, y
