"""A process at work in a run directory: its lock, the flags of the run, what the run uses."""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import re
import resource
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf
from absl import logging

import fpnas_keras
from fpnas_keras.data import Images
from fpnas_keras.errors import Interrupted, UserError
from fpnas_keras.files import read_json, replacing, write_json
from fpnas_keras.runs.run_directory import RunDirectory, checked_fingerprint
from fpnas_keras.runs.settings import RunSettings
from fpnas_keras.settings import define_flags, flag_values, parse_flags

# What `files.replacing` leaves behind when its process is killed.
_TEMPORARY = re.compile(r"\.\d+\..+")


class Session:
    """A process that starts or continues a run in its directory.

    `flags.txt` is written before the run begins, and `summary.json` last. Only one process at a
    time works in a directory. If the directory holds an unfinished run with the same flags, this
    process continues it. A higher `epochs` also continues a finished run.

    Args:
        run: The run directory.
        settings: The settings of the job.
        module: The module that runs the job as a command. The command to continue names it.
        writes: Whether this process writes. Of several workers only one does.
        may_change: Whether the run can be continued with another value of a flag, by its name.
            Those of `settings.may_change()` can be in any case.

    Raises:
        UserError: When the directory holds anything but a run with these settings, or when another
            process is at work in it.
    """

    def __init__(
        self,
        run: RunDirectory,
        settings: RunSettings,
        module: str,
        writes: bool = True,
        may_change: Callable[[str], bool] = lambda name: False,
    ):
        self.run = run
        self._may_change = may_change
        self.settings = settings
        self.module = module
        self._chosen = []
        self._images = {}
        self._goes_on = False
        self.writes = writes
        self._started = time.monotonic(), time.process_time()
        self._earlier = {"wall_seconds": 0.0, "cpu_seconds": 0.0, "peak_memory_mb": 0}
        self._lock = None
        if run.directory.exists():
            if not run.directory.is_dir():
                raise UserError(
                    f"`output_dir` is not a directory. Received: output_dir={run.directory}"
                )
            self._take()

    def _take(self):
        """Locks the directory and looks at what it holds."""
        if self.writes and self._lock is None:
            self._acquire()
        # A kill may have left those two alone.
        others = set(self.run.directory.iterdir()) - {self.run.chosen_file, self.run.images_file}
        if any(not _TEMPORARY.fullmatch(path.name) for path in others):
            try:
                self._check_same_run()
            except Exception:
                self.close()
                raise
            if self.run.finished:
                self._remove_checkpoints()  # A kill may have prevented it.

    @property
    def has_work(self) -> bool:
        """Whether the run is not at its end."""
        return self._goes_on or not self.run.finished

    @property
    def goes_on_from_end(self) -> bool:
        """Whether the run is finished and is to have more epochs."""
        return self._goes_on and self.run.finished

    def _acquire(self):
        # Held until `close`, or until the process ends, however it ends. Nothing is left behind.
        self._lock = os.open(self.run.directory, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise UserError(
                f"another process is at work in `output_dir` {self.run.directory}. Wait for it or "
                "choose another directory."
            ) from None
        except OSError as error:
            logging.warning(
                "%s cannot be locked (%s): make sure that no other process uses it",
                self.run.directory,
                error.strerror,
            )

    def close(self) -> None:
        """Releases the directory for other processes and jobs."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _check_same_run(self):
        if not self.run.flag_file.is_file():
            raise UserError(
                "`output_dir` must be new, empty or hold a run. "
                f"Received: {self.run.directory}, which holds other files"
            )
        theirs, ours = self.run.flag_lines(), self.settings.to_flags()
        differing = flag_values(set(theirs) ^ set(ours)).keys()
        # An earlier version did not have all flags.
        differing = differing - (self.settings.defaults() - flag_values(theirs).keys())
        differing = differing - self.settings.may_change()
        differing = {name for name in differing if not self._may_change(name)}
        if differing == {"epochs"} and self._has_more_epochs():
            self._goes_on = True
        elif differing:
            names = ", ".join(f"--{name}" for name in sorted(differing))
            raise UserError(
                f"`output_dir` {self.run.directory} holds another run; it differs in {names}. "
                f"{self.settings.way_out(differing)}Choose another directory."
            )

    def _has_more_epochs(self):
        try:
            planned = self.run.planned_epochs
        except UserError:  # of a damaged flag file
            return False
        return self.settings.epochs is not None and self.settings.epochs > planned

    def fit_settings(self, images: Images) -> RunSettings:
        """The settings with those that depend on the training images, which `begin` writes down.

        The settings of the run stay as they were given.
        """
        self._images = {
            "fingerprint": images.fingerprint(),
            "count": len(images.y),
            "class_names": list(images.class_names),
        }
        if self.run.images_file.is_file():
            known = read_json(self.run.images_file, "a fingerprint", checked_fingerprint)
            if known["fingerprint"] != self._images["fingerprint"]:
                raise UserError(
                    f"the training images have changed since the run in {self.run.directory} "
                    f"began: {known['count']} then, {len(images.y)} now, maybe under other names. "
                    "Choose another directory."
                )
        settings = self.settings
        # What an unfinished run has chosen stays, so that its end is that of one run.
        kept = [f"--{name}={value}" for name, value in self.run.chosen.items()]
        kept = parse_flags(define_flags(type(settings)), kept)
        missing = {name: value for name, value in kept.items() if getattr(settings, name) is None}
        fitted = dataclasses.replace(settings, **missing).fit_to(images)
        given = settings.to_flags()
        self._chosen = [flag for flag in fitted.to_flags() if flag not in given]
        return fitted

    def begin(self, **files: str | None) -> None:
        """Makes the directory and writes the flag file.

        Args:
            **files: The user's files, by the name of their flag. The run keeps a copy of each. It
                cannot be continued if a file has changed.

        Raises:
            UserError: When another process has taken the directory meanwhile, or when a file has
                changed since the run began.
        """
        if self.writes:
            self.run.directory.mkdir(parents=True, exist_ok=True)
            self._take()
            if self._goes_on:
                logging.info(
                    "going on with %s: %d epochs instead of %d",
                    *(self.run.directory, self.settings.epochs, self.run.planned_epochs),
                )
                for file in ("summary.json", "report.html", "mistakes.json"):
                    self.run.path(file).unlink(missing_ok=True)
                self.run.write_flags(self.settings.to_flags(), self._chosen)
            elif self.run.finished:
                raise UserError(
                    f"another process has just finished `output_dir` {self.run.directory}"
                )
            for path in self.run.directory.iterdir():
                if _TEMPORARY.fullmatch(path.name):
                    path.unlink()
            write_json(self.run.images_file, self._images)
            if not self.run.flag_file.exists():
                self.run.write_flags(self.settings.to_flags(), self._chosen)
        for name, file in files.items():
            if file is not None:
                self._keep(name, pathlib.Path(file))

    def _keep(self, name, file):
        copy = self.run.path(name + file.suffix)
        if not copy.exists():
            if self.writes:
                with replacing(copy) as temporary:
                    shutil.copyfile(file, temporary)
        elif copy.read_bytes() != file.read_bytes():
            raise UserError(
                f"`{name}` {file} has changed since the run in {self.run.directory} began. Use its "
                f"copy {copy}, or choose another directory."
            )

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Releases the directory at the end. An `Interrupted` names the command that continues."""
        try:
            yield
        except KeyboardInterrupt as error:
            message = str(error) or "interrupted"
            if self.run.flag_file.exists():
                message += f"; to continue:\n  {self._command()}"
            raise Interrupted(message, getattr(error, "signal", signal.SIGINT)) from None
        finally:
            self.close()

    def _command(self):
        """The command that continues the run: its flag file, and the flags that differ from it."""
        theirs = self.run.flag_lines()
        differing = [flag for flag in self.settings.to_flags() if flag not in theirs]
        file = f"--flagfile={self.run.flag_file}"
        return shlex.join(["python", "-m", self.module, file, *differing])

    def usage(self) -> dict[str, float]:
        """Time and memory of the run until now, earlier parts of it included.

        The peak of the memory is that of the process.
        """
        wall, cpu = self._started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        earlier = self._earlier
        return {
            "wall_seconds": round(earlier["wall_seconds"] + time.monotonic() - wall, 1),
            "cpu_seconds": round(earlier["cpu_seconds"] + time.process_time() - cpu, 1),
            "peak_memory_mb": max(earlier["peak_memory_mb"], peak),
        }

    def set_earlier_usage(self, usage: dict[str, float]) -> None:
        """Sets what earlier parts of the run used, as their `usage` said."""
        self._earlier = usage

    def finish(self, **summary: Any) -> None:
        """Writes the summary, with what the run used, and removes old checkpoints."""
        if not self.writes:
            return
        versions = {each.__name__: each.__version__ for each in (fpnas_keras, keras, tf)}
        self.run.write_summary(summary | self.usage() | {"versions": versions})
        self._remove_checkpoints()

    def _remove_checkpoints(self):
        """Removes all checkpoints but the last, from which the run can go on."""
        if self.writes and self.run.checkpoint_folder.is_dir():
            last = next(iter(self.run.checkpoints.values()), None)
            for path in self.run.checkpoint_folder.iterdir():
                if path != last:
                    path.unlink()
