"""What the command lines share: flags, run directories, errors in one line."""

import json
import math
import pathlib
import resource
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from absl import app, flags, logging

from fpnas_keras import data
from fpnas_keras.files import replacing

flags.DEFINE_string(
    "data",
    "digits",
    "Images to use: digits (1,797 images of 8x8 pixels that come with scikit-learn), "
    "tfds:NAME (a data set of tensorflow_datasets) or folder:PATH (a folder of class folders, "
    "or of train and test or val with class folders in each).",
)
flags.DEFINE_string(
    "data_dir",
    None,
    "Folder where tensorflow_datasets keeps its data; by default ~/tensorflow_datasets.",
)
flags.DEFINE_boolean(
    "download", True, "Whether tensorflow_datasets may download data that is not in data_dir."
)
flags.DEFINE_integer(
    "train_images",
    None,
    "Use only so many of the training images, the same share of each class and the same ones "
    "every time; to compare settings in less time.",
    lower_bound=2,
)
FLAGS = flags.FLAGS


def load_data(split: str, image_size: int) -> data.Images:
    """Reads the data that the flags name."""
    images = data.load(FLAGS.data, split, image_size, FLAGS.data_dir, FLAGS.download)
    if split != "train" or FLAGS.train_images is None:
        return images
    count = len(images.y)
    if FLAGS.train_images >= count:
        raise ValueError(
            f"`train_images` must be below the {count} training images of {FLAGS.data}. "
            f"Received: train_images={FLAGS.train_images}"
        )
    # scikit-learn rounds a share up to the next image.
    _, kept = data.split(images.y, (FLAGS.train_images - 0.5) / count, seed=0)
    return images._replace(x=images.x[kept], y=images.y[kept])


def load_data_for(
    owner: str, input_shape: tuple[int, int, int], num_classes: int, split: str
) -> data.Images:
    """Reads the data that the flags name for a network.

    Args:
        owner: What the network is called in the message of the error.
        input_shape: Shape of the images that it takes.
        num_classes: Number of its classes.
        split: "train" or "test".

    Raises:
        ValueError: When the data has other images or another number of classes.
    """
    images = load_data(split, input_shape[0])
    received = (images.image_shape, len(images.class_names))
    if received != (input_shape, num_classes):
        raise ValueError(
            f"{owner} is for images of {input_shape} and {num_classes} classes. Received: "
            f"data={FLAGS.data} with images of {received[0]} and {received[1]} classes"
        )
    return images


def data_arguments() -> str:
    """The flags that name the data, to be typed in another command."""
    arguments = [f"--data={FLAGS.data}"]
    arguments += [f"--data_dir={FLAGS.data_dir}"] if FLAGS.data_dir else []
    arguments += [f"--train_images={FLAGS.train_images}"] if FLAGS.train_images else []
    return shlex.join(arguments + ["--nodownload"] * (not FLAGS.download))


def run(main: Callable[[], None]) -> None:
    """Parses the flags and runs `main`; bad input ends in one line and exit code 1.

    With `--verbosity=1` the traceback is shown as well.
    """

    def checked(argv):
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]!r}; flags begin with --")
        try:
            _check_finite()
            main()
        except (ValueError, OSError) as error:
            logging.debug("where it happened", exc_info=True)
            sys.exit(f"error: {error}")
        except tf.errors.OpError as error:  # An image on the disk that cannot be decoded, say.
            logging.debug("where it happened", exc_info=True)
            sys.exit(f"error: {error.message.strip().splitlines()[0]}")
        except KeyboardInterrupt:
            sys.exit("interrupted")

    app.run(checked)


def _check_finite():
    for name, value in FLAGS.flag_values_dict().items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"`{name}` must be a finite number. Received: {name}={value}")


class Run:
    """A run directory: `flags.txt` first, the results, `summary.json` last.

    Args:
        directory: The directory, made when the run begins.
        module: The module whose flags describe the run.

    Raises:
        ValueError: When the directory holds anything but a finished run with
            these very flags.
    """

    def __init__(self, directory: str, module: str):
        self.directory = pathlib.Path(directory)
        own = sorted(FLAGS.get_key_flags_for_module(module), key=lambda flag: flag.name)
        self.flags = [flag.serialize() for flag in own if flag.value is not None]
        self.started = time.monotonic()
        self.finished = False
        if not self.directory.exists():
            return
        if not self.directory.is_dir():
            raise ValueError(f"`output_dir` is not a directory. Received: output_dir={directory}")
        if any(self.directory.iterdir()):
            self._check_same_run()
            self.finished = True

    def _check_same_run(self):
        flag_file = self.directory / "flags.txt"
        if not flag_file.is_file():
            raise ValueError(
                f"`output_dir` must be new, empty or hold a run. Received: {self.directory}, which "
                "holds other files"
            )
        theirs = flag_file.read_text().splitlines()
        differing = {line.split("=")[0] for line in set(theirs) ^ set(self.flags)}
        # One directory may be spelled in several ways.
        differing = sorted(differing - {"--output_dir"})
        if differing:
            raise ValueError(
                f"`output_dir` {self.directory} holds another run; it differs in "
                f"{', '.join(differing)}. Choose another directory."
            )
        if not (self.directory / "summary.json").is_file():
            raise ValueError(
                f"`output_dir` {self.directory} holds an unfinished run. Remove it or choose "
                "another directory."
            )

    def begin(self) -> None:
        """Makes the directory and writes `flags.txt`, a flag file that repeats the run."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with replacing(self.directory / "flags.txt") as temporary:
            temporary.write_text("\n".join(self.flags) + "\n")

    def path(self, name: str) -> pathlib.Path:
        """Path of a file of the run."""
        return self.directory / name

    def finish(self, **summary: Any) -> None:
        """Writes `summary.json`, with the seconds and the memory that the run took."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        summary |= {
            "wall_seconds": round(time.monotonic() - self.started, 1),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
            "peak_memory_mb": usage.ru_maxrss // 1024,
            "versions": {"keras": keras.__version__, "tensorflow": tf.__version__},
        }
        with replacing(self.path("summary.json")) as temporary:
            temporary.write_text(json.dumps(summary, indent=1) + "\n")

    def summary(self) -> dict[str, Any]:
        """What `finish` wrote."""
        return json.loads(self.path("summary.json").read_text())
