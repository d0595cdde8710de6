"""The plots of the report, each in a light and a dark style."""

import base64
import io
from collections.abc import Callable

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from fpnas_keras.runs.search_run import PHASES, Search

# Colours of the page and of the plots; those of text have a contrast of 4.5 and more.
LIGHT = {
    "ground": "#ffffff",
    "raised": "#f5f6f8",
    "ink": "#1b2230",
    "muted": "#566073",
    "line": "#dde1e8",
    "first": "#1d65b0",
    "second": "#b4500a",
    "target": "#a8174f",
    "warm_up": "#f3e3c3",
    "factorized": "#d5e4f3",
    "joint": "#e0d9f0",
}
DARK = {
    "ground": "#14171d",
    "raised": "#1d222b",
    "ink": "#e8ebf0",
    "muted": "#a3adbd",
    "line": "#323a47",
    "first": "#6db1f2",
    "second": "#f0a35e",
    "target": "#f58bb2",
    "warm_up": "#4f4226",
    "factorized": "#24405c",
    "joint": "#3f3660",
}
# Ink where the probability is: from the ground of the page to its opposite.
_COLOR_MAPS = {LIGHT["ground"]: "magma_r", DARK["ground"]: "magma"}
PIXELS_PER_INCH = 96  # of CSS
# Heat maps, in inches: height of a choice, space between variables, width of a map, of a letter
# and of all that lies side by side.
_ROW, _GAP, _MAP, _LETTER, _PAGE_WIDTH = 0.165, 0.07, 1.4, 0.055, 12
# Operations as latency tables name them; in full they are wider than their map.
_BRIEF = {"skip=True": "skip", "kernel_size=": "k", "expansion=": "e", "activation=": "", ", ": " "}


def drawings(search: Search) -> dict[str, Callable[[Search, dict[str, str]], Figure]]:
    """What draws each plot, by the name of its file."""
    drawings = {"entropy": _draw_entropy, "cost": _draw_cost, "loss": _draw_loss}
    if search.ranking and search.ranking["architectures"]:
        drawings["pareto"] = _draw_pareto
    if search.probabilities and any(search.probabilities[0]["blocks"]):
        drawings["probabilities"] = _draw_probabilities
    return drawings


def _draw_entropy(search, theme):
    figure, (above, below) = _course(search, theme)
    _lines(search, theme, above, "entropy (nats)", {"entropy": None})
    _lines(
        search, theme, below, "samples a step", {"samples": "drawn (K)", "evaluated": "evaluated"}
    )
    return figure


def _draw_cost(search, theme):
    figure, (above, *below) = _course(search, theme, panels=1 + (search.target is not None))
    levels = [
        ("target", search.target, theme["target"], "--"),
        ("derived", search.summary and search.summary["found_cost"], theme["second"], ":"),
    ]
    levels = [level for level in levels if level[1] is not None]
    expected = search.column("expected_cost")
    scale, unit = _scale([*expected, *(level[1] for level in levels)], search.unit)
    above.plot(search.column("step"), expected / scale, color=theme["first"], label="expected")
    for label, value, color, style in levels:
        above.axhline(value / scale, color=color, linestyle=style, label=label)
    _finish(search, theme, above, unit)
    for axes in below:
        _lines(search, theme, axes, "weight of the cost (beta)", {"cost_coefficient": None})
        axes.autoscale(axis="y")  # it may be negative
    return figure


def _draw_loss(search, theme):
    figure, panels = _course(search, theme)
    for axes, name in zip(panels, ("loss", "accuracy")):
        columns = {f"train_{name}": "weights part", f"validation_{name}": "architecture part"}
        _lines(search, theme, axes, name, columns)
    return figure


def _course(search, theme, panels=2):
    """A figure of panels over the steps, below a strip that names the phases."""
    figure = Figure((4, 3.9), facecolor=theme["ground"])
    ratios = [0.1] + [2 / panels] * panels
    strip, *axes = figure.subplots(1 + panels, 1, sharex=True, height_ratios=ratios)
    figure.subplots_adjust(left=0.13, right=0.93, top=0.99, bottom=0.12, hspace=0.3)
    last = search.phases[-1][2]
    strip.set(xlim=(0, last), ylim=(0, 1))
    strip.set_axis_off()
    for name, start, end in search.phases:
        strip.axvspan(start, end, color=theme[name], linewidth=0)
        if end - start > 0.18 * last:  # else its name, which the page has too, is too wide
            label = strip.text((start + end) / 2, 0.45, PHASES[name], ha="center", va="center")
            label.set(color=theme["ink"], fontsize=7.5)
        for each in axes:
            each.axvspan(start, end, color=theme[name], alpha=0.3, linewidth=0)
    axes[-1].set_xlabel("step", color=theme["muted"], fontsize=8.5)
    return figure, axes


def _lines(search, theme, axes, title, columns):
    """Draws up to two columns of `metrics.csv`, given with their labels."""
    for (column, label), color in zip(columns.items(), ("first", "second")):
        axes.plot(search.column("step"), search.column(column), color=theme[color], label=label)
    _finish(search, theme, axes, title)


def _finish(search, theme, axes, title):
    """Style, title and legend of a panel over the steps, from 0 upwards."""
    _style(axes, theme, title)
    for line in axes.lines:
        line.set_linewidth(1.6)
        if len(search.epochs) <= 12:  # one epoch would be no line at all
            line.set(marker="o" if line.get_linestyle() == "-" else "", markersize=4)
            line.set_clip_on(False)
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.grid(axis="y", color=theme["line"], linewidth=0.7)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if len(axes.get_legend_handles_labels()[1]) > 1:
        _legend(axes, theme, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1)


def _style(axes, theme, title):
    axes.set_facecolor("none")
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", color=theme["ink"], fontsize=8.5)
    axes.tick_params(colors=theme["muted"], labelsize=8, length=0)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(theme["muted"])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def _legend(axes, theme, **place):
    axes.legend(
        **place,
        ncols=5,
        frameon=False,
        fontsize=8,
        labelcolor=theme["ink"],
        handlelength=1.4,
        handletextpad=0.5,
        columnspacing=1,
    )


def _scale(costs, unit):
    """What costs are divided by in a plot, and the unit that they have then."""
    return (1e6, f"million {unit}") if np.nanmax([0, *costs]) >= 1e6 else (1, unit)


def _draw_pareto(search, theme):
    networks, unit = search.ranking["architectures"], search.ranking["cost_unit"]
    figure = Figure((7.4, 4.4), facecolor=theme["ground"])
    axes = figure.add_axes((0.07, 0.11, 0.91, 0.82))
    target = search.target if unit == search.unit else None
    scale, unit = _scale([each["cost"] for each in networks] + [target or 0], unit)
    groups = (  # the later over the earlier
        ("sampled", "first", "o", 28),
        ("from a file", "ink", "s", 30),
        ("derived", "second", "*", 190),
    )
    for group, color, marker, size in groups:
        points = [_point(each, scale) for each in networks if _group(each) == group]
        if points:
            dots = axes.scatter(*zip(*points), size, theme[color], marker, label=group, zorder=3)
            dots.set(edgecolors=theme["ground"], linewidths=0.7)
    front = sorted(_point(each, scale) for each in networks if each["pareto"])
    if front:
        line, *_ = axes.plot(*zip(*front), drawstyle="steps-post", label="Pareto front")
        line.set(color=theme["first"], linewidth=1.3, marker="o", markersize=3)
    if target is not None:
        axes.axvline(target / scale, color=theme["target"], linestyle="--", label="target")
    _style(axes, theme, "accuracy with the shared weights (%)")
    axes.grid(color=theme["line"], linewidth=0.7)
    axes.margins(0.06, 0.1)
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.set_xlabel(f"cost ({unit})", color=theme["muted"], fontsize=8.5)
    _legend(axes, theme, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1)
    return figure


def _point(network, scale):
    return network["cost"] / scale, 100 * network["accuracy"]


def _group(network):
    if network["name"] == "derived":
        return "derived"
    return "sampled" if network["name"].startswith("sample ") else "from a file"


def _draw_probabilities(search, theme):
    """A heat map a block, all of one scale; the coordinates are inches from the top left."""
    first = search.probabilities[0]["blocks"]
    shown = [index for index, block in enumerate(first) if block]
    labels = [
        (_brief(name), _brief(choice))
        for index in shown
        for name, choices in first[index].items()
        for choice in choices
    ]
    widths = [0.1 + _LETTER * max(map(len, texts)) for texts in zip(*labels)]
    panel = sum(widths) + _MAP + 0.22
    columns = max(1, min(len(shown), int(_PAGE_WIDTH // panel)))
    rows = [shown[start : start + columns] for start in range(0, len(shown), columns)]
    heights = [max(_map_height(first[index]) for index in row) + 0.75 for row in rows]
    width, height = max(columns * panel, 3.2), 0.5 + sum(heights)
    figure = Figure((width, height), facecolor=theme["ground"])
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    axes.set_axis_off()
    _color_bar(axes, theme, sum(widths))
    top = 0.5
    for row, row_height in zip(rows, heights):
        for column, index in enumerate(row):
            left = column * panel + sum(widths)
            _block_steps(search, theme, axes, index, left, top, _map_height(first[index]))
            _heat_map(search, theme, axes, index, left, top + 0.32, widths)
        top += row_height
    return figure


def _map_height(variables):
    return _ROW * sum(map(len, variables.values())) + _GAP * (len(variables) - 1)


def _heat_map(search, theme, axes, index, left, top, widths):
    """Draws the probabilities of a block: a row a choice, variables apart, names at the left."""
    series = [row["blocks"][index] for row in search.probabilities]
    steps = np.array([0] + [row["step"] for row in search.probabilities])
    for name, choices in series[0].items():
        edges = top + _ROW * np.arange(len(choices) + 1)
        for choice, edge in zip(choices, edges):
            label = axes.text(left - 0.07, edge + _ROW / 2, _brief(choice), ha="right")
            label.set(va="center", fontsize=8, color=theme["ink"], parse_math=False)
        label = axes.text(left - sum(widths), top + _ROW / 2, _brief(name), va="center")
        label.set(fontsize=8, color=theme["muted"], parse_math=False)
        rows = [[each[name][choice] for each in series] for choice in choices]
        _shade(axes, theme, left + _MAP * steps / steps[-1], edges, rows)
        top = edges[-1] + _GAP


def _shade(axes, theme, x, y, probabilities):
    # As one picture inside the SVG, drawn before all else: thousands of rectangles are heavy.
    mesh = axes.pcolormesh(x, y, probabilities, vmin=0, vmax=1, rasterized=True, zorder=0)
    mesh.set(cmap=_COLOR_MAPS[theme["ground"]])


def _block_steps(search, theme, axes, index, left, top, height):
    """Title, phases and steps around the heat map of a block."""
    title = axes.text(left, top + 0.12, f"block {index}", va="center", fontweight="bold")
    title.set(fontsize=9, color=theme["ink"])
    top, last = top + 0.32, search.probabilities[-1]["step"]
    for name, start, end in search.phases:
        x = left + _MAP * np.minimum([start, end], last) / last
        axes.fill_between(x, top - 0.09, top - 0.03, color=theme[name], linewidth=0)
        if 0 < start < last:
            axes.vlines(x[0], top, top + height, theme["muted"], "dotted", linewidth=0.8)
    for x, label, side in ((0, "0", "left"), (_MAP, f"step {last:,}", "right")):
        label = axes.text(left + x, top + height + 0.05, label, ha=side, va="top")
        label.set(fontsize=7.5, color=theme["muted"])


def _color_bar(axes, theme, left):
    label = axes.text(left - 0.07, 0.16, "probability", ha="right", va="center")
    label.set(fontsize=8, color=theme["ink"])
    _shade(axes, theme, left + np.linspace(0, _MAP, 257), (0.1, 0.22), np.linspace([0], [1], 256).T)
    for value, side in ((0, "left"), (0.5, "center"), (1, "right")):
        label = axes.text(left + value * _MAP, 0.26, f"{value:g}", ha=side, va="top")
        label.set(fontsize=7.5, color=theme["muted"])


def _brief(name):
    """A name as a heat map has room for it, and as it can be drawn."""
    name = name.encode(errors="replace").decode()  # JSON may hold halves of characters
    for long, brief in _BRIEF.items():
        name = name.replace(long, brief)
    return name if len(name) <= 24 else name[:23] + "\u2026"


def svg(figure: Figure) -> str:
    """A figure as a data URI, the same for the same figure."""
    buffer = io.BytesIO()
    settings = {"svg.hashsalt": "fpnas_keras", "svg.fonttype": "path"}
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format="svg", dpi=2 * PIXELS_PER_INCH, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
