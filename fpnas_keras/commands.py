"""What the command lines share: flags, errors in one line, signals."""

import math
import pathlib
import shlex
import signal
import sys
from collections.abc import Callable

import tensorflow as tf
from absl import app, flags, logging

from fpnas_keras import data
from fpnas_keras.errors import UserError
from fpnas_keras.files import flag_values, summarize_error

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
_PLACES = ("data_dir", "download")
_DATA_FLAGS = ("data", *_PLACES, "train_images")
# What collective operations raise when a worker has died.
_UNREACHED = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.InternalError,
    tf.errors.DeadlineExceededError,
    tf.errors.CancelledError,
)


def load_data(split: str, image_size: int) -> data.Images:
    """Reads the data that the flags name."""
    images = data.load(FLAGS.data, split, image_size, FLAGS.data_dir, FLAGS.download)
    if split != "train" or FLAGS.train_images is None:
        return images
    count = len(images.y)
    if FLAGS.train_images >= count:
        raise UserError(
            f"`train_images` must be below the {count} training images of {FLAGS.data}. "
            f"Received: train_images={FLAGS.train_images}"
        )
    # scikit-learn rounds a share up to the next image.
    _, kept = data.split(images.y, (FLAGS.train_images - 0.5) / count, seed=0)
    return images.part(kept)


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
        UserError: When the data has other images or another number of classes.
    """
    images = load_data(split, input_shape[0])
    received = (images.image_shape, len(images.class_names))
    if received != (input_shape, num_classes):
        raise UserError(
            f"{owner} is for images of {input_shape} and {num_classes} classes. Received: "
            f"data={FLAGS.data} with images of {received[0]} and {received[1]} classes"
        )
    return images


def take_data_flags(flag_file: pathlib.Path) -> None:
    """Takes the flags that name the data from the flag file of a run, but for those given.

    Raises:
        UserError: When the file is not a flag file, or `train_images` is given and is another:
            which images trained the run's weights would not be known.
    """
    given = {name for name in _DATA_FLAGS if FLAGS[name].present}
    count = FLAGS.train_images
    try:
        values = flag_values(flag_file.read_text(encoding="utf-8").splitlines())
        for name in _DATA_FLAGS:
            # Other data has a place of its own; that it is the same, moved, is up to the user.
            if name in values and name not in given and not ("data" in given and name in _PLACES):
                FLAGS[name].parse(values[name])
        theirs = int(values["train_images"]) if "train_images" in values else None
    except (ValueError, flags.Error) as error:
        raise UserError(f"{flag_file} is not the flag file of a run: {error}") from None
    if "train_images" in given and count != theirs:
        raise UserError(
            f"`train_images` must be that of {flag_file}, {theirs}. Received: train_images={count}"
        )


def data_arguments() -> str:
    """The flags that name the data, to be typed in another command."""
    arguments = [f"--data={FLAGS.data}"]
    arguments += [f"--data_dir={FLAGS.data_dir}"] if FLAGS.data_dir else []
    arguments += [f"--train_images={FLAGS.train_images}"] if FLAGS.train_images else []
    return shlex.join(arguments + ["--nodownload"] * (not FLAGS.download))


class Interrupted(KeyboardInterrupt):
    """A signal asks the process to end.

    Args:
        message: What to tell the user.
        number: Number of the signal.
    """

    def __init__(self, message: str = "interrupted", number: int = signal.SIGINT):
        super().__init__(message)
        self.signal = int(number)


def run(main: Callable[[], None]) -> None:
    """Parses the flags and runs `main`; bad input ends in one line and exit code 1.

    SIGTERM ends it as Ctrl-C does, with 128 and the signal's number. With `--verbosity=1`
    the traceback is shown as well.
    """

    def terminate(number, _):
        raise Interrupted(number=number)

    def checked(argv):
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]!r}; flags begin with --")
        signal.signal(signal.SIGTERM, terminate)
        try:
            _check_finite()
            main()
        except (ValueError, OSError) as error:
            logging.debug("where it happened", exc_info=True)
            sys.exit(f"error: {error}")
        except tf.errors.OpError as error:  # An image on the disk that cannot be decoded, say.
            logging.debug("where it happened", exc_info=True)
            several = "strategy" in FLAGS and FLAGS.strategy == "multiworker"
            if several and isinstance(error, _UNREACHED):
                print(
                    "error: another worker is not reached any more. Start all workers again with "
                    f"the same command; they go on from the last checkpoint. ({summarize_error(error)})",
                    file=sys.stderr,
                )
                # Kubernetes' TFJob restarts what ends with this code.
                sys.exit(128 + signal.SIGUSR1)
            sys.exit(f"error: {error.message.strip().splitlines()[0]}")
        except KeyboardInterrupt as error:
            print(error if str(error) else "interrupted", file=sys.stderr)
            sys.exit(128 + getattr(error, "signal", signal.SIGINT))

    app.run(checked, flags_parser=_parse_flags)


def _parse_flags(argv):
    """As absl parses flags; a flag file may hold anything."""
    try:
        return app.parse_flags_with_usage(argv)
    except UnicodeDecodeError as error:
        sys.exit(f"error: `flagfile` must be text in UTF-8. Received: {error}")
    except RecursionError:
        sys.exit("error: `flagfile` is nested too deeply")


def _check_finite():
    for name, value in FLAGS.flag_values_dict().items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"`{name}` must be a finite number. Received: {name}={value}")
