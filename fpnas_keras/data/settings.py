"""Which images a job uses."""

import dataclasses
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging

from fpnas_keras import data as images_data
from fpnas_keras.errors import UserError
from fpnas_keras.settings import Settings, setting

if TYPE_CHECKING:
    from fpnas_keras.data import Images

_GROUP = "Data"
# The settings that name the images, to be repeated in the next command.
DATA_FLAGS = ("data", "resize", "data_dir", "train_images", "download")
# How an image that is not square becomes square.
RESIZES = ("stretch", "crop", "pad")
# The largest class may have this many times the images of the smallest without a warning.
_BALANCED = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    """Settings that name the images of a job."""

    data: str = setting(
        "Images to use: digits (1,797 images of 8x8 pixels that come with scikit-learn), "
        "tfds:NAME (a data set of tensorflow_datasets) or folder:PATH (a folder with one folder of "
        "images for each class, or with the folders train and test or val that hold such folders).",
        "digits",
        basic=True,
    )
    resize: str = setting(
        "How an image that is not square becomes square: stretch it, crop to the largest square in "
        "the middle, or pad with black. Do the same in the app.",
        "stretch",
        choices=RESIZES,
        group=_GROUP,
    )
    data_dir: str | None = setting(
        "Folder where tensorflow_datasets keeps its data. Default: ~/tensorflow_datasets.",
        None,
        group=_GROUP,
        may_change=True,
    )
    download: bool = setting(
        "Whether tensorflow_datasets may download data that is not in --data_dir.",
        True,
        group=_GROUP,
        may_change=True,
    )
    train_images: int | None = setting(
        "Use only this many of the training images: the same share of each class, and the same "
        "images every time. For comparing settings in less time.",
        None,
        least=2,
        group=_GROUP,
    )

    def load_images(self, split: str, image_size: int, again: bool = False) -> "Images":
        """Reads the training or the test set, and says what the data holds.

        Args:
            split: "train" or "test".
            image_size: Height and width that the images are resized to.
            again: Whether the job has read a set of the data before, and so has said it.

        Raises:
            UserError: When there is no such data.
        """
        images = images_data.load(
            self.data, split, image_size, self.data_dir, self.download, self.resize
        )
        if images.description and not again:
            logging.info("%s: %s", self.data, images.description)
            _warn_of_classes(images)
        if split != "train" or self.train_images is None:
            return images
        count = len(images.y)
        if not len(images.class_names) <= self.train_images < count:
            raise UserError(
                f"`train_images` must be at least {len(images.class_names)}, the number of "
                f"classes, and below the {count} training images of {self.data}. "
                f"Received: train_images={self.train_images}"
            )
        # scikit-learn rounds a share up to the next image.
        _, kept = images_data.split(images.y, (self.train_images - 0.5) / count, seed=0)
        # The split leaves out classes of a single image.
        lacking = np.setdiff1d(images.y, images.y[kept])
        kept = np.union1d(kept, np.flatnonzero(np.isin(images.y, lacking)))
        logging.info("%s: %d of the training images are used", self.data, len(kept))
        return images.part(kept)

    def load_images_for(
        self,
        owner: str,
        input_shape: tuple[int, int, int],
        num_classes: int,
        split: str,
        again: bool = False,
    ) -> "Images":
        """Reads the images for a network.

        Args:
            owner: What the network is called in the message of the error.
            input_shape: Shape of the images that the network takes.
            num_classes: Number of its classes.
            split: "train" or "test".
            again: Whether the job has read a set of the data before.

        Raises:
            UserError: When the data has other images or another number of classes.
        """
        images = self.load_images(split, input_shape[0], again)
        received = (images.image_shape, len(images.class_names))
        if received != (input_shape, num_classes):
            raise UserError(
                f"{owner} is for images of {input_shape} and {num_classes} classes. Received: "
                f"data={self.data} with images of {received[0]} and {received[1]} classes"
            )
        return images

    def replaced(self, given: Mapping[str, Any]) -> "DataSettings":
        """These settings with some replaced.

        Other data has a place and a number of images of its own: only `resize` stays.

        Args:
            given: Values by the names of `DATA_FLAGS`.
        """
        is_other = given.get("data", self.data) != self.data
        kept = ("resize",) if is_other else DATA_FLAGS
        return DataSettings(**{name: getattr(self, name) for name in kept} | dict(given))

    def data_arguments(self) -> str:
        """The flags that name the images, to be typed in another command."""
        others = self.to_arguments(DATA_FLAGS[1:])
        return " ".join([shlex.quote(f"--data={self.data}"), *([others] if others else [])])


def _warn_of_classes(images):
    """Says which classes have far more images than others, and far fewer."""
    counts = np.bincount(images.y, minlength=len(images.class_names))
    least, most = counts.argmin(), counts.argmax()
    if counts[most] >= _BALANCED * counts[least]:
        logging.warning(
            "classes of unequal size: %d images of %s, %d of %s",
            *(counts[most], images.class_names[most], counts[least], images.class_names[least]),
        )
