"""The target of a build as text: `2ms`, `8M` multiply-adds, `300kB`; and its time: `2h`."""

import math
import re
from typing import NamedTuple

from fpnas_keras.errors import UserError

_TARGET = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|us|k|M|G|kB|MB)")
# Kind and factor of each unit.
_UNITS = {
    "ms": ("latency", 1.0),
    "us": ("latency", 1e-3),
    "k": ("macs", 1e3),
    "M": ("macs", 1e6),
    "G": ("macs", 1e9),
    "kB": ("bytes", 1e3),
    "MB": ("bytes", 1e6),
}
# The size of a file is predicted to about 1%.
_BYTES_MARGIN = 1.01
_TIME = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")


class Target(NamedTuple):
    """What the file of a build may cost.

    Attributes:
        kind: "macs", "latency" or "bytes".
        value: Number of multiply-adds, of milliseconds or of bytes.
    """

    kind: str
    value: float

    @property
    def aim(self) -> float:
        """The cost that the search aims at.

        For a size it is 1% lower, because the size of a file is predicted to about 1%.
        """
        return self.value / (_BYTES_MARGIN if self.kind == "bytes" else 1.0)

    def check_reachable(self, least: float, largest: float, bounds: str, received: str) -> None:
        """Raises `UserError` when no network costs what the search aims at.

        Args:
            least: The least cost of a network.
            largest: The largest one; infinite if it is not known.
            bounds: What the two are, for the message.
            received: The target as the user gave it.
        """
        if least <= self.aim <= largest:
            return
        margin = self.value / self.aim
        # A limit that has three digits must not be missed by a rounding error.
        low, high = least * margin * (1 + 1e-9), largest * margin * (1 - 1e-9)
        limits = f"at least {format_with_unit(self.kind, _round(low, math.ceil))}"
        if high < math.inf:
            limits += f" and at most {format_with_unit(self.kind, _round(high, math.floor))}"
            if _round(low, math.ceil) > _round(high, math.floor):  # Nearly the same.
                limits = f"about {format_with_unit(self.kind, low)}"
        if margin > 1:
            bounds += ", and 1% for the error of the prediction"
        raise UserError(f"`target` must be {limits}, {bounds}. Received: target={received}")


def _round(value, rounding):
    """Three digits, as `format_with_unit` shows. A limit in a message is within the limit."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return rounding(value / unit) * unit


def parse_target(text: str) -> Target:
    """Reads a target with its unit.

    Raises:
        UserError: When it is no number above 0 with one of the units.

    Example:

    >>> parse_target("8M")
    Target(kind='macs', value=8000000.0)
    """
    match = _TARGET.fullmatch(text)
    if not match or not float(match[1]):
        raise UserError(
            "`target` must be a number above 0 with its unit: milliseconds (2ms or 500us), "
            "multiply-adds (800k, 8M or 1.2G), or the size of the file (300kB or 1.5MB). "
            f"Received: target={text}"
        )
    kind, factor = _UNITS[match[2]]
    return Target(kind, float(match[1]) * factor)


def parse_time(text: str) -> float:
    """Seconds of a time such as 2h, 90m, 1h30m or 45s.

    Raises:
        UserError: When it is no such time.

    Example:

    >>> parse_time("1h30m")
    5400.0
    """
    match = _TIME.fullmatch(text)
    hours, minutes, seconds = (float(each or 0) for each in match.groups()) if match else (0, 0, 0)
    total = 3600 * hours + 60 * minutes + seconds
    if not total:
        raise UserError(
            "`time` must be hours, minutes or seconds, such as 2h, 90m, 1h30m or 600s. "
            f"Received: time={text}"
        )
    return total


def format_with_unit(kind: str, value: float) -> str:
    """A cost with its unit, such as "7.92M MACs", "1.97 ms" or "298 kB".

    Args:
        kind: "macs", "latency" or "bytes".
        value: The cost.
    """
    if kind == "latency":
        return f"{value:.3g} ms"
    if kind == "bytes":
        return f"{value / 1e3:.3g} kB" if value < 100e3 else f"{value / 1e3:,.0f} kB"
    return f"{value / 1e9:.3g}G MACs" if value >= 1e9 else f"{value / 1e6:.3g}M MACs"
