"""The colors of the page and of its plots, light and dark."""

from typing import NamedTuple

PIXELS_PER_INCH = 96  # CSS pixels


class Theme(NamedTuple):
    """Colors for a light or a dark page, as CSS hex codes.

    Text has a contrast of at least 4.5 against the background.

    Attributes:
        ground: Background of the page.
        raised: Background of boxes.
        ink: Text.
        muted: Secondary text.
        line: Borders and grid lines.
        first: The first curve of a plot.
        second: The second curve of a plot.
        target: The target of the search.
        phases: Background of each phase of the search.
        color_map: Matplotlib's color map for probabilities. Probability 0 is close to `ground`.
    """

    ground: str
    raised: str
    ink: str
    muted: str
    line: str
    first: str
    second: str
    target: str
    phases: dict[str, str]
    color_map: str


LIGHT = Theme(
    ground="#ffffff",
    raised="#f5f6f8",
    ink="#1b2230",
    muted="#566073",
    line="#dde1e8",
    first="#1d65b0",
    second="#b4500a",
    target="#a8174f",
    phases={"warm_up": "#f3e3c3", "factorized": "#d5e4f3", "joint": "#e0d9f0"},
    color_map="magma_r",
)
DARK = Theme(
    ground="#14171d",
    raised="#1d222b",
    ink="#e8ebf0",
    muted="#a3adbd",
    line="#323a47",
    first="#6db1f2",
    second="#f0a35e",
    target="#f58bb2",
    phases={"warm_up": "#4f4226", "factorized": "#24405c", "joint": "#3f3660"},
    color_map="magma",
)
