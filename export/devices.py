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

import export
from fpnas_keras.errors import UserError

# What runs a file on a phone, as flags have it, and its name in benchmark_model's output.
DELEGATES = {"xnnpack": "XNNPACK", "gpu": "GPU", "nnapi": "NNAPI"}
_TIMER = pathlib.Path(__file__).with_name("host_timer.py")
_PHONE_FOLDER = "/data/local/tmp/fpnas_keras"
# What adb says of a phone that is not there, or no more.
_GONE = re.compile(r"device (offline|'.*' not found|not found)|no devices|closed")


class Host:
    """This machine: the LiteRT interpreter with XNNPACK, in a process of its own.

    Args:
        threads: Threads of the interpreter.

    Attributes:
        shares: Share of the operators that XNNPACK runs, of each file that was timed.
    """

    def __init__(self, threads: int = 1):
        self.threads = threads
        self.shares: dict[str, float] = {}
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
            if name not in self.shares:
                self.shares[name] = export.conversion.delegated_share(files[name].read_bytes())
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
        delegate: What runs the files: one of `DELEGATES`.
        rest_seconds: Seconds to let the phone cool down after each round.

    Attributes:
        shares: Share of the operators that the delegate runs, of each file that was timed; `None`
            for a part that benchmark_model does not say.

    Raises:
        UserError: When there is no such phone, or it cannot be used; the message says why.
    """

    def __init__(
        self,
        benchmark_model: str,
        serial: str | None = None,
        threads: int = 1,
        core_mask: str = "",
        delegate: str = "xnnpack",
        rest_seconds: float = 0.0,
    ):
        if not pathlib.Path(benchmark_model).is_file():
            raise UserError(
                "`benchmark_model` must be the benchmark_model binary for the phone. "
                f"Received: benchmark_model={benchmark_model}"
            )
        self.serial, self.threads, self.delegate = serial, threads, delegate
        self.core_mask, self.rest_seconds = core_mask, rest_seconds
        self.shares: dict[str, float | None] = {}
        self._pushed = set()
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
            "delegate": self.delegate,
        }

    def round(self, files: Mapping[str, pathlib.Path], seed: int) -> Iterator[tuple[str, float]]:
        """Milliseconds of each file, as they are measured, in an order drawn by the seed."""
        for name in random.Random(seed).sample(sorted(files), len(files)):
            milliseconds, self.shares[name] = self._run(files[name])
            yield name, milliseconds
        time.sleep(self.rest_seconds)

    def close(self) -> None:
        """Removes what was pushed."""
        try:
            self._adb("shell", f"rm -rf {_PHONE_FOLDER}")
        except UserError as error:  # Often after another error, which must not be hidden by it.
            logging.warning("%s may still be on the phone: %s", _PHONE_FOLDER, error)

    def _run(self, path):
        """Milliseconds of a file, and the share of its operators that the delegate ran."""
        there = f"{_PHONE_FOLDER}/{path.name}"
        if path not in self._pushed:
            self._adb("push", str(path), there)
            self._pushed.add(path)
        delegates = " ".join(
            f"--use_{name}={str(name == self.delegate).lower()}" for name in DELEGATES
        )
        command = (
            f"{_PHONE_FOLDER}/benchmark_model --graph={shlex.quote(there)} "
            f"--num_threads={self.threads} {delegates} --warmup_runs=5 --num_runs=100 "
            "--min_secs=0.2"
        )
        if self.core_mask:  # The shell says on which cores it is, and becomes benchmark_model.
            inside = f"grep Cpus_allowed: /proc/self/status; exec {command}"
            command = f"taskset {self.core_mask} sh -c {shlex.quote(inside)}"
        output = self._adb("shell", command, timeout=300)
        milliseconds = parse_benchmark(output, path.name)
        share = check_conditions(output, path.name, self.threads, self.delegate, self.core_mask)
        return milliseconds, share

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


def check_conditions(
    text: str, name: str, threads: int, delegate: str, core_mask: str = ""
) -> float | None:
    """Checks that `benchmark_model` ran a file as it was asked to.

    Args:
        text: Its output.
        name: Name of the file, for messages.
        threads: Threads that were asked for.
        delegate: One of `DELEGATES`.
        core_mask: The cores that were asked for, as a hexadecimal number; "" for all.

    Returns:
        The share of the operators that the delegate ran; `None` for a part that the output does
        not say.

    Raises:
        UserError: When the threads or the cores are others, or the delegate ran nothing of the
            file.
    """
    used = re.findall(r"(?:Num threads|#threads used for CPU inference) ?: \[(-?\d+)\]", text)
    if used and int(used[-1]) != threads:
        raise UserError(
            f"{name} was to run on {threads} threads. benchmark_model says: {used[-1]} threads"
        )
    if core_mask:
        cores = re.search(r"Cpus_allowed:\s*([\da-fA-F,]+)", text)
        if cores is None or int(cores[1].replace(",", ""), 16) != int(core_mask, 16):
            raise UserError(
                f"{name} was to run on the cores {core_mask}. The phone says: "
                f"{cores[1] if cores else 'nothing'}"
            )
    return _delegated_share(text, name, DELEGATES[delegate])


def _delegated_share(text, name, delegate):
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
    # Another delegate may run the rest, and has a line of its own.
    counts = re.findall(
        rf"(?i)replacing (\d+) out of (\d+) node\(s\) with delegate \(\w*{delegate}\w*\)", text
    )
    if counts:
        replaced, whole = np.sum(np.array(counts, int), axis=0).tolist()
        return replaced / whole
    is_part = re.search(rf"applied {delegate} delegate, .* partially executed", text)
    return None if is_part else 1.0


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
