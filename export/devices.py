"""Devices that `.tflite` files are timed on: this machine, and Android phones through adb.

A device times many files in rounds. In a round each file is timed once, in random order. If other
work slows the device down for a while, it affects a few rounds of every file instead of all rounds
of a few files.
"""

import collections
import contextlib
import json
import math
import pathlib
import platform
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from fpnas_keras.errors import UserError

_TIMER = pathlib.Path(__file__).with_name("host_timer.py")
_PHONE_FOLDER = "/data/local/tmp/fpnas_keras"
# What adb says of a phone that is not there, or no more.
_GONE = re.compile(r"device (offline|'.*' not found|not found)|no devices|closed")


class Host:
    """This machine: the LiteRT interpreter with XNNPACK, in a process of its own.

    Args:
        threads: Threads of the interpreter.
    """

    def __init__(self, threads: int = 1):
        self.threads = threads
        # Where LiteRT says that it found XNNPACK, and why it dies.
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, str(_TIMER), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def describe(self) -> dict[str, Any]:
        """What the times belong to, for the table."""
        return {"kind": "host", "name": _processor(), "threads": self.threads}

    def round(self, files: Mapping[str, pathlib.Path], seed: int) -> Iterator[tuple[str, float]]:
        """Milliseconds of each file, as they are measured, in an order drawn by the seed."""
        for name in random.Random(seed).sample(sorted(files), len(files)):
            with contextlib.suppress(BrokenPipeError):  # The process has died.
                print(json.dumps(str(files[name])), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
            if not answer:
                raise UserError(
                    f"the file for {name} cannot be run: LiteRT crashed. (In int8 XNNPACK "
                    "refuses layers that give 0 for all representative images.) Its last words: "
                    f"{self._last_words()}"
                )
            yield name, float(answer)

    def _last_words(self):
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return lines[-1] if lines else "none"

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._log.close()


def _processor():
    lines = pathlib.Path("/proc/cpuinfo")
    if lines.exists():
        found = re.search(r"model name\s*:\s*(.+)", lines.read_text())
        if found:
            return found[1]
    return platform.processor() or platform.machine()


class Adb:
    """An Android phone: TensorFlow's `benchmark_model`, run there through adb.

    Args:
        benchmark_model: The binary for the phone, from
            https://ai.google.dev/edge/litert/models/measurement.
        serial: Serial number of the phone, as `adb devices` lists it; `None` where there is one.
        threads: Threads of the interpreter.
        core_mask: Cores to run on, as taskset takes them (a hexadecimal number); "" for all.
        gpu: Whether the GPU runs what it can.
        rest_seconds: Seconds to let the phone cool down after each round.

    Raises:
        UserError: When there is no such phone, or it cannot be used; the message says why.
    """

    def __init__(
        self,
        benchmark_model: str,
        serial: str | None = None,
        threads: int = 1,
        core_mask: str = "",
        gpu: bool = False,
        rest_seconds: float = 0.0,
    ):
        if not pathlib.Path(benchmark_model).is_file():
            raise UserError(
                "`benchmark_model` must be the benchmark_model binary for the phone. "
                f"Received: benchmark_model={benchmark_model}"
            )
        self.serial, self.threads, self.gpu = serial, threads, gpu
        self.core_mask, self.rest_seconds = core_mask, rest_seconds
        self._pushed, self._is_partial = set(), False
        self._adb("get-state")
        self._adb("shell", f"mkdir -p {_PHONE_FOLDER}")
        self._adb("push", benchmark_model, f"{_PHONE_FOLDER}/benchmark_model")
        self._adb("shell", f"chmod +x {_PHONE_FOLDER}/benchmark_model")

    def describe(self) -> dict[str, Any]:
        """What the times belong to, for the table."""
        model = self._adb("shell", "getprop ro.product.model").strip()
        build = self._adb("shell", "getprop ro.build.fingerprint").strip()
        return {
            "kind": "adb",
            "name": model,
            "build": build,
            "threads": self.threads,
            "core_mask": self.core_mask,
            "gpu": self.gpu,
        }

    def round(self, files: Mapping[str, pathlib.Path], seed: int) -> Iterator[tuple[str, float]]:
        """Milliseconds of each file, as they are measured, in an order drawn by the seed."""
        for name in random.Random(seed).sample(sorted(files), len(files)):
            yield name, self._run(files[name])
        time.sleep(self.rest_seconds)

    def close(self) -> None:
        """Removes what was pushed."""
        try:
            self._adb("shell", f"rm -rf {_PHONE_FOLDER}")
        except UserError as error:  # Often after another error, which must not be hidden by it.
            logging.warning("%s may still be on the phone: %s", _PHONE_FOLDER, error)

    def _run(self, path):
        there = f"{_PHONE_FOLDER}/{path.name}"
        if path not in self._pushed:
            self._adb("push", str(path), there)
            self._pushed.add(path)
        command = (
            f"{_PHONE_FOLDER}/benchmark_model --graph={shlex.quote(there)} "
            f"--num_threads={self.threads} --use_xnnpack={str(not self.gpu).lower()} "
            f"--use_gpu={str(self.gpu).lower()} --warmup_runs=5 --num_runs=100 --min_secs=0.2"
        )
        if self.core_mask:
            command = f"taskset {self.core_mask} {command}"
        output = self._adb("shell", command, timeout=300)
        milliseconds = parse_benchmark(output, path.name)
        delegate = "GPU" if self.gpu else "XNNPACK"
        if check_conditions(output, path.name, self.threads, delegate) and not self._is_partial:
            self._is_partial = True
            logging.warning(
                "%s runs only a part of %s, and the interpreter the rest; others may be alike",
                *(delegate, path.name),
            )
        return milliseconds

    def _adb(self, *arguments, timeout=120):
        serial = ["-s", self.serial] if self.serial else []
        command = ["adb", *serial, *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        except FileNotFoundError:
            raise UserError("adb is not installed, or not on the PATH") from None
        except subprocess.TimeoutExpired:
            raise UserError(f"`{shlex.join(command)}` gave no answer in {timeout} s") from None
        if done.returncode:
            lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no message"]
            reason = next((line for line in lines if "error" in line), lines[-1])
            if "unauthorized" in reason:  # The other lines are advice.
                reason = " ".join(map(str.strip, lines))
            if _GONE.search(reason):
                raise UserError(f"the phone does not answer: {reason}")
            raise UserError(f"`{shlex.join(command)}` failed: {reason}")
        return done.stdout + done.stderr


def parse_benchmark(text: str, name: str) -> float:
    """Milliseconds of an inference in the output of `benchmark_model`.

    The last line says that the run has ended. Its average is the time, or the median of the last
    line `count=...` where there is one. The line before is that of the warm-up.

    Args:
        text: The output, in the format of any version since 2019.
        name: Name of the file, for messages.

    Raises:
        UserError: When the run has not ended, or its time is no number above 0.
    """
    number = r"([\d.]+(?:e[+-]?\d+)?|[a-z]+)"
    ends = re.findall(rf"(?:Inference \(avg\)|no stats): {number}", text)
    if not ends:
        lines = text.strip().splitlines() or ["nothing"]
        reason = next((line for line in lines if re.search("Failed|ERROR", line)), lines[-1])
        raise UserError(f"benchmark_model gave no time for {name}: {reason}")
    counts = re.findall(r"\bcount=\d+.*", text)
    medians = re.findall(rf"\bmedian={number}", counts[-1]) if counts else []
    found = (medians or ends)[-1]
    microseconds = float(found) if re.match(r"\d|nan|inf", found) else math.nan
    if not 0 < microseconds < math.inf:
        raise UserError(
            f"the time of {name} must be a number above 0. Received: {found} microseconds"
        )
    return microseconds / 1000


def check_conditions(text: str, name: str, threads: int, delegate: str) -> bool:
    """Checks that `benchmark_model` ran a file as it was asked to.

    Args:
        text: Its output.
        name: Name of the file, for messages.
        threads: Threads that were asked for.
        delegate: "GPU" or "XNNPACK".

    Returns:
        Whether the delegate ran only a part of the file.

    Raises:
        UserError: When the threads are others, or the delegate ran nothing of the file.
    """
    used = re.findall(r"(?:Num threads|#threads used for CPU inference) ?: \[(-?\d+)\]", text)
    if used and int(used[-1]) != threads:
        raise UserError(
            f"{name} was to run on {threads} threads. benchmark_model says: {used[-1]} threads"
        )
    refusals = (
        rf"(Failed to apply|Could not create|Couldn't create) .*{delegate}.*",
        rf"Though {delegate} delegate is explicitly applied, .* not be executed.*",
        rf".*{delegate} delegate.* (not supported|not available|failed).*",
        r"ModifyGraphWithDelegate is disallowed.*",
    )
    for pattern in refusals:
        refused = re.search(pattern, text)
        if refused:
            raise UserError(f"{delegate} does not run {name}. benchmark_model says: {refused[0]}")
    applied = re.search(
        rf"[aA]pplied {delegate} delegate|Created TensorFlow Lite .*{delegate}.*", text
    )
    if not applied:
        raise UserError(
            f"{delegate} was to run {name}, and benchmark_model does not say that it did. A newer "
            "benchmark_model may"
        )
    return bool(re.search(rf"applied {delegate} delegate, .* partially executed", text))


def times(
    device: Host | Adb, files: Mapping[str, pathlib.Path], rounds: int, seconds: float = 0.0
) -> dict[str, list[float]]:
    """Milliseconds of files in some rounds, and in more of them until some seconds are over."""
    found = collections.defaultdict(list)
    start = time.monotonic()
    seed = 0
    while seed < rounds or time.monotonic() < start + seconds:
        for name, milliseconds in device.round(files, seed):
            found[name].append(milliseconds)
        seed += 1
    return found


def tenth_percentile(times: Sequence[float]) -> float:
    """The 10th percentile: other work on the device makes times longer, never shorter."""
    return float(np.percentile(times, 10))
