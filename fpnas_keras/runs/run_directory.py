"""The directory of a search or a training: its flags, its lock, what it used, its result."""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import resource
import shlex
import shutil
import time
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf
from absl import flags, logging

from fpnas_keras.commands import Interrupted
from fpnas_keras.errors import UserError
from fpnas_keras.files import flag_values, read_json, replacing

flags.DEFINE_string(
    "output_dir",
    None,
    "Directory of the run: new, empty, or that of the same run, which goes on where it stopped.",
)
FLAGS = flags.FLAGS

# Flags that say where things are, how often they are saved, or what is made of the result; a run
# goes on under others.
_MAY_DIFFER = {
    *("--output_dir", "--data_dir", "--download", "--nodownload", "--checkpoint_every"),
    "--ranked_samples",
}
# What `files.replacing` leaves behind when its process is killed.
_TEMPORARY = re.compile(r"\.\d+\..+")


class Run:
    """A run directory: `flags.txt` first, the results, `summary.json` last.

    One process at a time works in it. When the directory holds an unfinished run with the same
    flags, this one goes on with it.

    Args:
        directory: The directory, made when the run begins.
        module: The module whose flags describe the run.
        command_name: The same as `python -m` takes it.
        writes: Whether this process writes; of several that work together only one does.

    Raises:
        UserError: When the directory holds anything but a run with these very flags, or
            when another process is at work in it.
    """

    def __init__(self, directory: str, module: str, command_name: str, writes: bool = True):
        self.directory = pathlib.Path(directory)
        self.command_name = command_name
        self.writes = writes
        own = sorted(FLAGS.get_key_flags_for_module(module), key=lambda flag: flag.name)
        self._own_flags = own
        self.flags = [flag.serialize() for flag in own if flag.value is not None]
        self.flag_values = {flag.name: flag.value for flag in own if flag.value is not None}
        self.started = time.monotonic()
        self.finished = False
        self._earlier = {"wall_seconds": 0.0, "cpu_seconds": 0.0, "peak_memory_mb": 0}
        self._lock = None
        if self.directory.exists():
            if not self.directory.is_dir():
                raise UserError(
                    f"`output_dir` is not a directory. Received: output_dir={directory}"
                )
            self._take()

    def _take(self):
        """Locks the directory and looks at what it holds."""
        if self.writes and self._lock is None:
            # Held until the process ends, however it ends; nothing is left behind.
            self._lock = os.open(self.directory, os.O_RDONLY)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another process is at work in `output_dir` {self.directory}. Wait for it or "
                    "choose another directory."
                ) from None
            except OSError as error:
                logging.warning(
                    "%s cannot be locked (%s): see to it that no other process uses it",
                    self.directory,
                    error.strerror,
                )
        if any(not _TEMPORARY.fullmatch(path.name) for path in self.directory.iterdir()):
            self.finished = self.path("summary.json").is_file()
            self._check_same_run()
            if self.finished:
                self._remove_checkpoints()  # in case that a kill came in between

    def _check_same_run(self):
        flag_file = self.path("flags.txt")
        if not flag_file.is_file():
            raise UserError(
                f"`output_dir` must be new, empty or hold a run. Received: {self.directory}, which "
                "holds other files"
            )
        theirs = flag_file.read_text(encoding="utf-8", errors="replace").splitlines()
        differing = set(theirs) ^ set(self.flags)
        if self.finished:  # maybe by an earlier version, which did not have all flags
            given = flag_values(theirs)
            differing -= {
                flag.serialize()
                for flag in self._own_flags
                if flag.value == flag.default and flag.name not in given
            }
        differing = {line.split("=")[0] for line in differing} - _MAY_DIFFER
        if differing:
            raise UserError(
                f"`output_dir` {self.directory} holds another run; it differs in "
                f"{', '.join(sorted(differing))}. Choose another directory."
            )

    def begin(self, **files: str | None) -> None:
        """Makes the directory and writes `flags.txt`, a flag file that repeats the run.

        Args:
            **files: By the name of a flag, the user's file that it names. The run keeps a copy,
                and does not go on when the file has changed since.

        Raises:
            UserError: When another process has taken the directory meanwhile, or when a file
                has changed since the run began.
        """
        if self.writes:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._take()
            if self.finished:
                raise UserError(f"another process has just finished `output_dir` {self.directory}")
            for path in self.directory.iterdir():
                if _TEMPORARY.fullmatch(path.name):
                    path.unlink()
            if not self.path("flags.txt").exists():
                with replacing(self.path("flags.txt")) as temporary:
                    temporary.write_text("\n".join(self.flags) + "\n", encoding="utf-8")
        for name, file in files.items():
            if file is not None:
                self._keep(name, pathlib.Path(file))

    def _keep(self, name, file):
        copy = self.path(name + file.suffix)
        if not copy.exists():
            if self.writes:
                with replacing(copy) as temporary:
                    shutil.copyfile(file, temporary)
        elif copy.read_bytes() != file.read_bytes():
            raise UserError(
                f"`{name}` {file} is not what the run in {self.directory} began with, which is "
                f"{copy}. Give it that one or choose another directory."
            )

    @contextlib.contextmanager
    def interruptions(self) -> Iterator[None]:
        """Adds to an interruption inside the block the command that goes on."""
        try:
            yield
        except KeyboardInterrupt as error:
            message = str(error) or "interrupted"
            if self.path("flags.txt").exists():
                message += f"; to go on:\n  {self.command()}"
            raise Interrupted(message, getattr(error, "signal", 2)) from None

    def command(self) -> str:
        """What to type to go on with the run: its flag file, and the flags that differ from it."""
        file = self.path("flags.txt")
        theirs = file.read_text(encoding="utf-8", errors="replace").splitlines()
        differing = [flag for flag in self.flags if flag not in theirs]
        return shlex.join(["python", "-m", self.command_name, f"--flagfile={file}", *differing])

    @property
    def checkpoints(self) -> pathlib.Path:
        """The folder of the checkpoints, there while the run lasts."""
        return self.path("checkpoints")

    def path(self, name: str) -> pathlib.Path:
        """Path of a file of the run."""
        return self.directory / name

    def usage(self) -> dict[str, float]:
        """What the run took until now, earlier parts of it included: time and memory."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        earlier = self._earlier
        return {
            "wall_seconds": round(earlier["wall_seconds"] + time.monotonic() - self.started, 1),
            "cpu_seconds": round(earlier["cpu_seconds"] + usage.ru_utime + usage.ru_stime, 1),
            "peak_memory_mb": max(earlier["peak_memory_mb"], usage.ru_maxrss // 1024),
        }

    def add_usage(self, usage: dict[str, float]) -> None:
        """Takes over what earlier parts of the run took, as their `usage` said."""
        self._earlier = usage

    def finish(self, **summary: Any) -> None:
        """Writes `summary.json`, with what the run took, and removes the checkpoints."""
        if not self.writes:
            return
        summary |= self.usage()
        summary["versions"] = {"keras": keras.__version__, "tensorflow": tf.__version__}
        with replacing(self.path("summary.json")) as temporary:
            temporary.write_text(json.dumps(summary, indent=1) + "\n")
        self.finished = True
        self._remove_checkpoints()

    def _remove_checkpoints(self):
        if self.writes and self.checkpoints.is_dir():
            shutil.rmtree(self.checkpoints)

    def summary(self) -> dict[str, Any]:
        """What `finish` wrote."""
        return read_json(self.path("summary.json"), "a summary", dict)
