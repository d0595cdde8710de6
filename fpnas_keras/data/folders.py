"""Folders of images: their classes, their training and test sets, and what is ignored in them."""

import collections
import itertools
import os
import pathlib
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fpnas_keras.data.image_files import suffixes
from fpnas_keras.errors import UserError

# Names of folders that hold class folders, in small letters. The first one that is there is used.
_TRAIN_NAMES = ("train", "training")
_TEST_NAMES = ("test", "testing", "eval", "validation", "valid", "val", "dev")
# What systems and editors leave in folders. Names that begin with a dot are hidden anyway.
_SYSTEM_FOLDERS = ("__macosx", "@eadir", "$recycle.bin", "system volume information")
_SYSTEM_FILES = ("thumbs.db", "desktop.ini")


class ClassFolders(NamedTuple):
    """The image files of a folder of class folders.

    Attributes:
        names: Names of the classes, sorted.
        files: The image files as bytes, sorted by class and name, of shape `(n,)`.
        y: Index of the class of each file, int32 of shape `(n,)`.
        ignored: How many files were ignored, by their ending.
    """

    names: tuple[str, ...]
    files: np.ndarray
    y: np.ndarray
    ignored: collections.Counter


class ImageFolder(NamedTuple):
    """A folder of images as it lies on the disk.

    Attributes:
        train: The training set, or all images.
        test: The test set; `None` where the folder has no training and test sets.
        test_name: Name of the folder of the test set.
        unused: Names of further folders of test sets, which are not used.
    """

    train: ClassFolders
    test: ClassFolders | None = None
    test_name: str = ""
    unused: tuple[str, ...] = ()


def scan(path: pathlib.Path) -> ImageFolder:
    """Lists a folder of class folders, or of training and test sets that hold such folders.

    Raises:
        UserError: When the folder holds neither, or a class without images.
    """
    if not path.is_dir():
        raise UserError(f"`data` names no folder. Received: data=folder:{path}")
    visible, _ = _list(path)
    splits = [each for each in visible if _is_split(each)]
    train = [each for each in splits if each.name.lower() in _TRAIN_NAMES]
    tests = [each for each in splits if each not in train]
    tests.sort(key=lambda each: _TEST_NAMES.index(each.name.lower()))
    if not splits:
        return ImageFolder(_list_classes(path))
    others = [each.name for each in visible if each not in splits]
    if len(train) != 1 or others:
        raise UserError(
            f"the folder {path} must hold one folder {_TRAIN_NAMES[0]} and maybe one of "
            f"{', '.join(_TEST_NAMES)}, in small or capital letters, or class folders only. "
            f"Received: {', '.join(each.name for each in visible)}"
        )
    if not tests:
        return ImageFolder(_list_classes(train[0]))
    parts = _list_classes(train[0]), _list_classes(tests[0])
    differing = set(parts[0].names) ^ set(parts[1].names)
    if differing:
        raise UserError(
            f"{train[0]} and {tests[0]} must have the same classes. "
            f"Received: {', '.join(sorted(differing))} in one of them only"
        )
    return ImageFolder(*parts, tests[0].name, tuple(each.name for each in tests[1:]))


def list_images(folder: pathlib.Path) -> list[pathlib.Path]:
    """The image files in a folder and in the folders in it, sorted, without hidden ones."""
    folders, files = _list(folder)
    inside = itertools.chain.from_iterable(map(list_images, folders))
    return sorted([*filter(_is_image, files), *inside])


def _is_split(folder):
    """Whether a folder has the name of a training or test set, and folders in place of images."""
    if folder.name.lower() not in _TRAIN_NAMES + _TEST_NAMES:
        return False
    folders, files = _list(folder)
    return bool(folders) and not any(map(_is_image, files))


def _list(folder: pathlib.Path) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """The folders in a folder, without hidden ones, and all files in it, sorted by name."""
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda each: each.name):
            path = folder / entry.name
            if not entry.is_dir():
                files.append(path)
            elif not entry.name.startswith(".") and entry.name.lower() not in _SYSTEM_FOLDERS:
                folders.append(path)
    return folders, files


def _is_hidden(file):
    return file.name.startswith(".") or file.name.lower() in _SYSTEM_FILES


def _is_image(file):
    return file.suffix.lower() in suffixes() and not _is_hidden(file)


def _ending(file):
    return "hidden" if _is_hidden(file) else file.suffix.lower() or "without ending"


def _list_classes(folder: pathlib.Path) -> ClassFolders:
    folders, beside = _list(folder)
    ignored = collections.Counter(map(_ending, beside))
    names, files, counts, empty = [], [], [], []
    for each in folders:
        names.append(_class_name(each))
        inside, all_files = _list(each)
        images = [file for file in all_files if _is_image(file)]
        others = collections.Counter(_ending(file) for file in all_files if not _is_image(file))
        if inside:
            raise UserError(
                f"the class folder {each} must hold images. Received: the folder "
                f"{inside[0].name} in it"
            )
        if not images:
            empty.append(f"{each.name} ({count_endings(others)})" if others else each.name)
        ignored += others
        files += map(os.fsencode, images)
        counts.append(len(images))
    if empty or len(names) < 2:
        raise UserError(
            f"the folder {folder} must hold a folder of images for each of at least 2 classes. "
            f"Received: {', '.join(names) or 'no folder'}; without images: "
            f"{', '.join(empty) or 'none'}"
        )
    y = np.repeat(np.arange(len(names), dtype=np.int32), counts)
    return ClassFolders(tuple(names), np.array(files, dtype=bytes), y, ignored)


def _class_name(folder):
    """The name of a class, which goes into files with a line for each class."""
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in folder.name):
        raise UserError(
            f"the name of the class folder {os.fsencode(folder)!r} must be UTF-8 in one line. "
            "Rename it"
        )
    return folder.name


def count_endings(counts: collections.Counter) -> str:
    """Such as "2 .heic, 1 .txt": the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {ending}" for ending, count in ordered)


def describe(
    counts: Sequence[int], names: Sequence[str], train: int, source: str, notes: Sequence[str] = ()
) -> str:
    """What was read, in one line.

    Args:
        counts: Images of each class.
        names: Names of the classes.
        train: Number of training images. The others are the test set.
        source: Where the test set comes from, such as "from test".
        notes: What else is to be said.
    """
    total = sum(counts)
    if len(names) <= 10:
        classes = ": " + ", ".join(f"{name} {count:,}" for name, count in zip(names, counts))
    else:
        classes = f" of {min(counts):,} to {max(counts):,} images"
    line = (
        f"{total:,} images ({train:,} train, {total - train:,} test {source}), "
        f"{len(names)} classes{classes}"
    )
    return "; ".join([line, *notes])
