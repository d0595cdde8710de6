"""Progress of long work: a bar on a terminal, a line now and then in a log file."""

import contextlib
import datetime
import sys
import time
from collections.abc import Callable, Iterator
from typing import Self

from absl import logging
from tqdm import tqdm

_LINE_SECONDS = 30
# Says where the whole is of which the work is a part.
_describe_whole: Callable[[float], str] | None = None


def track(total: int, description: str, unit: str, first_seconds: float = 5) -> "tqdm | _Lines":
    """Shows how far some work is: a bar on a terminal, elsewhere a line every 30 seconds.

    Args:
        total: Number of units.
        description: What is done, such as "ranking".
        unit: Name of a unit, such as "images".
        first_seconds: Seconds before anything is shown.

    Returns:
        An object for a `with` statement. Its `update(n)` says that n more units are done, and its
        `n` is the number of all that are.
    """
    if not sys.stderr.isatty():
        return _Lines(total, description, unit, first_seconds)
    return tqdm(total=total, desc=description, unit=f" {unit}", delay=first_seconds, leave=False)


def format_seconds(seconds: float) -> str:
    """Such as 0:01:30."""
    return str(datetime.timedelta(seconds=round(seconds)))


def describe_left(seconds: float) -> str:
    """Such as "0:01:30 left", and what `part_of` adds."""
    text = f"{format_seconds(seconds)} left"
    return text if _describe_whole is None else f"{text}; {_describe_whole(seconds)}"


@contextlib.contextmanager
def part_of(describe: Callable[[float], str]) -> Iterator[None]:
    """The work inside the block is a part of something larger, which its lines also describe.

    Args:
        describe: Describes the whole, from the seconds that are left of the part.
    """
    global _describe_whole
    before, _describe_whole = _describe_whole, describe
    try:
        yield
    finally:
        _describe_whole = before


class _Lines:
    """Logs a line every 30 seconds."""

    def __init__(self, total, description, unit, first_seconds):
        self.n, self._total = 0, total
        self._description, self._unit = description, unit
        self._start = time.monotonic()
        self._due = self._start + first_seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Nothing to do: a line is whole."""

    def update(self, n: int = 1) -> None:
        self.n += n
        now = time.monotonic()
        if now >= self._due and 0 < self.n < self._total:
            self._due = now + _LINE_SECONDS
            left = describe_left((now - self._start) / self.n * (self._total - self.n))
            logging.info(
                "%s: %d of %d %s, %s",
                *(self._description, self.n, self._total, self._unit, left),
            )
