"""The command line of a job: flags to settings, help, errors in one line, signals, exit codes."""

import contextlib
import dataclasses
import errno
import itertools
import logging as stdlib_logging
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from absl import flags, logging

from fpnas_keras.errors import Interrupted, UserError
from fpnas_keras.settings import (
    FLAG_FILE,
    Settings,
    check_required,
    define_flags,
    find_positional,
    format_flag,
    kind_of,
    parse_flags,
)

_Settings = TypeVar("_Settings", bound=Settings)
_HELP = ("--help", "-help", "-h", "--helpshort", "--helpfull")
# Errors of the machine, such as a full disk. They are not bugs.
_MACHINE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EIO, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ESTALE),
}


@dataclasses.dataclass(frozen=True)
class Command(Generic[_Settings]):
    """A job as a command.

    Args:
        name: What the user types before the flags, such as `fpnas search`.
        summary: What it does, in one sentence.
        examples: Command lines to begin with, each after a line that says what it is for.
        settings: Class of its settings.
        run: Runs the job and prints its result.
        needs_tensorflow: Whether the job uses TensorFlow.
    """

    name: str
    summary: str
    examples: Sequence[tuple[str, str]]
    settings: type[_Settings]
    run: Callable[[_Settings], Any]
    needs_tensorflow: bool = True


def run_command(command: Command, arguments: Sequence[str] | None = None) -> int:
    """Runs a command to its end.

    A `UserError` is printed as one line. With `--verbosity=1` its traceback is shown too. Other
    exceptions are bugs and pass. SIGTERM ends the command as Ctrl-C does.

    Args:
        command: The command.
        arguments: Arguments of the command line; by default those of the process.

    Returns:
        The exit code: 0; 1 after a `UserError`, unless it has another; 128 and the number of the
        signal after an interruption.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(each in _HELP for each in arguments):
        with contextlib.suppress(BrokenPipeError):  # as by `fpnas search --help | head`
            print(_help(command), flush=True)
        return 0
    terminated = signal.signal(signal.SIGTERM, _interrupt)
    verbosity = logging.get_verbosity()
    try:
        # Before the flags are read, which may be worth a line: absl would set up a log of its own.
        _set_up_log()
        settings, wanted = _parse(command.settings, arguments)
        _set_verbosity(wanted)
        if command.needs_tensorflow:
            with quiet_libraries():
                import tensorflow  # noqa: F401
        command.run(settings)
        return 0
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _MACHINE_ERRORS:
            raise
        logging.debug("where it happened", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted", file=sys.stderr)
        return 128 + getattr(error, "signal", signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, terminated)
        logging.set_verbosity(verbosity)


def _set_up_log():
    """Shows what this program says as plain lines, and not what TensorFlow says."""
    stdlib_logging.basicConfig(handlers=[_make_handler()])
    logging.set_verbosity(logging.INFO)


def _make_handler():
    handler = stdlib_logging.StreamHandler()
    handler.setFormatter(_Formatter())
    handler.addFilter(
        lambda record: (
            "/tensorflow/" not in record.pathname or logging.get_verbosity() >= logging.DEBUG
        )
    )
    return handler


@contextlib.contextmanager
def visible_log() -> Iterator[None]:
    """Inside the block, the log is shown as by a command: in a notebook, hours would be silent.

    Nothing changes if the verbosity of absl's log is not its default. If the root logger has
    handlers already, those show the log in their own way.
    """
    if logging.get_verbosity() != logging.WARNING:
        yield
        return
    root = stdlib_logging.getLogger()
    handler = None if root.handlers else _make_handler()
    if handler:
        root.addHandler(handler)
    logging.set_verbosity(logging.INFO)
    try:
        yield
    finally:
        logging.set_verbosity(logging.WARNING)
        if handler:
            root.removeHandler(handler)


def _set_verbosity(verbosity):
    """Sets what is shown. With `logging.DEBUG` TensorFlow's lines are, too."""
    if verbosity < logging.DEBUG:
        # Read when TensorFlow is imported, which is later.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        stdlib_logging.getLogger("tensorflow").setLevel(stdlib_logging.ERROR)
    logging.set_verbosity(verbosity)


class _Formatter(stdlib_logging.Formatter):
    """The message; "warning: " before one that is more than information."""

    def formatMessage(self, record):
        mark = "" if record.levelno <= stdlib_logging.INFO else f"{record.levelname.lower()}: "
        return mark + record.message


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Drops what C++ libraries write to stderr inside the block, unless --verbosity=1 asks for it.

    TensorFlow says that there is no GPU when it is imported, and LiteRT that it uses XNNPACK. No
    setting of theirs turns that off.
    """
    if logging.get_verbosity() >= logging.DEBUG:
        yield
        return
    sys.stderr.flush()
    original = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(original, 2)
        os.close(original)


def _interrupt(number, frame):
    raise Interrupted(number=number)


def _parse(cls, arguments):
    """The settings, and the verbosity of the log."""
    values = define_flags(cls)
    flags.DEFINE_integer("verbosity", logging.INFO, "", flag_values=values)
    given = parse_flags(values, arguments, find_positional(cls))
    verbosity = given.pop("verbosity", logging.INFO)
    check_required(cls, given)
    return cls(**given), verbosity


def _help(command):
    fields = dataclasses.fields(command.settings)
    groups = {"Start with these": [field for field in fields if field.metadata["basic"]]}
    for field in fields:
        if not field.metadata["basic"]:
            groups.setdefault(field.metadata["group"], []).append(field)
    positional = find_positional(command.settings)
    sections = [
        f"usage: {command.name} --flag=value ..."
        + (f" {positional.upper()} ..." if positional else ""),
        command.summary,
        *(f"{title}:\n  {line}" for title, line in command.examples),
        *(f"{title}:\n" + "\n".join(map(_describe, group)) for title, group in groups.items()),
        "Every command:\n"
        f"  --{FLAG_FILE}=FILE\n      Reads flags from a file, one per line. Flags after this one "
        "override them.\n"
        "  --verbosity=0\n      1 also shows the traceback of an error, and what TensorFlow "
        "says. -1 shows only warnings.",
    ]
    return "\n\n".join(sections)


def _describe(field):
    """A flag, its help and its default."""
    choices, default = field.metadata["choices"], field.default
    name = f"--{field.name}="
    if field.metadata["of"]:
        name = f"--{field.name}.FLAG=VALUE"
    elif field.metadata["positional"]:
        name = field.name.upper()
    elif kind_of(field) is bool:
        name = f"--[no]{field.name}"
    elif choices:
        name += "|".join(choices)
    elif default in (None, dataclasses.MISSING, ()):
        name += field.name.rpartition("_")[2].upper()
    else:
        name = format_flag(field.name, default)
    text = field.metadata["help"]
    if isinstance(default, bool):
        text += f" Default: {'on' if default else 'off'}."
    elif choices and default is not None:
        text += f" Default: {default}."
    lines = textwrap.wrap(text, 94)
    return "\n".join(itertools.chain([f"  {name}"], (f"      {line}" for line in lines)))
