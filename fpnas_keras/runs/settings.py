"""Settings that searches and trainings have in common."""

import dataclasses
import math
import re
from typing import TYPE_CHECKING, Self

from absl import logging

from fpnas_keras import data
from fpnas_keras.data.settings import DataSettings
from fpnas_keras.errors import UserError
from fpnas_keras.settings import MAX_SEED, format_flag, setting

if TYPE_CHECKING:
    import keras

# Settings of a search that its training should have too.
TRAINING_FLAGS = ("batch_size", "random_crop", "random_flip", "class_weight")
_CHECKPOINT_EVERY = re.compile(r"([1-9][0-9]{0,8})(s?)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings(DataSettings):
    """Settings of a job that has a run directory."""

    output_dir: str = setting(
        "Directory of the run: new, empty, or that of the same run, which is then continued where "
        "it stopped.",
        basic=True,
        may_change=True,
    )
    random_crop: int | None = setting(
        "Pixels that a training image may move in each direction. Default: a sixteenth of the "
        "image size, at least 2.",
        None,
        least=0,
        group="Augmentation",
    )
    random_flip: bool = setting(
        "Mirror half of the training images left to right. For photos; not for digits or text.",
        False,
        basic=True,
    )
    class_weight: str = setting(
        "balanced: images of small classes count more in the loss, so that all classes count the "
        "same.",
        "none",
        choices=("none", "balanced"),
        group="Augmentation",
    )
    checkpoint_every: str = setting(
        "How often a checkpoint is saved: seconds (60s) or steps (500). A kill loses what was done "
        "since the last one. Ctrl-C and SIGTERM save first and lose nothing.",
        "60s",
        group="Run",
        may_change=True,
    )
    tensorboard: bool = setting(
        "Whether TensorBoard files are written to the folder `tensorboard`: scalars, the flags, "
        "and for a search histograms of the probabilities.",
        True,
        group="Run",
    )
    seed: int = setting(
        "Seed of everything that is random.", 0, least=0, most=MAX_SEED, group="Run"
    )

    def check(self) -> None:
        """Raises `UserError` when settings do not fit together."""
        if not _CHECKPOINT_EVERY.fullmatch(self.checkpoint_every):
            raise UserError(
                "`checkpoint_every` must be a number of seconds above 0 with an s (60s) or of "
                f"steps (500). Received: checkpoint_every={self.checkpoint_every}"
            )

    def fit_to(self, images: "data.Images") -> Self:
        """These settings, with a value for each one that depends on the training images.

        Args:
            images: The training images.
        """
        values = self._choose(len(images.y), images.image_shape[0])
        chosen = {name: value for name, value in values.items() if getattr(self, name) is None}
        if chosen:
            flags = " ".join(format_flag(name, value) for name, value in chosen.items())
            logging.info("chosen for %d training images: %s", len(images.y), flags)
        return dataclasses.replace(self, **chosen)

    def _choose(self, count, size):
        """Values for `count` images of `size` pixels, by the names of the settings."""
        return {"random_crop": min(max(2, size // 16), size - 1)}

    def make_augmentation(self, size: int, **others: float) -> "data.Augmentation":
        """What changes the training images.

        Args:
            size: Height and width of the images in pixels.
            **others: Further arguments of `data.Augmentation`.

        Raises:
            UserError: When `random_crop` is too large for the images.
        """
        if self.random_crop >= size:
            raise UserError(
                f"`random_crop` must be below the image size, {size}. "
                f"Received: random_crop={self.random_crop}"
            )
        return data.Augmentation(self.random_crop, self.random_flip, **others)

    def way_out(self, differing: set[str]) -> str:
        """What to do where a directory holds a run with other values of these settings."""
        return ""

    def checkpoint_interval(self) -> tuple[float, float]:
        """Seconds and steps between two checkpoints; one of them is infinite."""
        number, is_seconds = _CHECKPOINT_EVERY.fullmatch(self.checkpoint_every).groups()
        return (int(number), float("inf")) if is_seconds else (float("inf"), int(number))


def choose_batch_size(count: int, batches: int, least: int, most: int) -> int:
    """The largest power of 2 that gives an epoch of `count` images so many batches."""
    return min(max(2 ** int(math.log2(max(count // batches, 1))), least), most)


def scale_rate(peak: float, batch_size: int, usual: int) -> float:
    """A learning rate for a batch size: in proportion to its square root, with 4 digits.

    Args:
        peak: The learning rate for the usual batch size.
        batch_size: The batch size.
        usual: The usual batch size.
    """
    return float(f"{peak * math.sqrt(batch_size / usual):.4g}")


def make_schedule(
    peak: float, steps: int, warmup_steps: int
) -> "keras.optimizers.schedules.LearningRateSchedule":
    """A learning rate that rises from 0 and then falls to 0 along a cosine.

    Args:
        peak: The highest learning rate.
        steps: All steps.
        warmup_steps: Steps in which it rises.
    """
    import keras

    return keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0 if warmup_steps else peak,
        decay_steps=steps - warmup_steps,
        warmup_target=peak if warmup_steps else None,
        warmup_steps=warmup_steps,
    )
