"""The plots of the report, each in a light and a dark theme."""

import base64
import functools
import io
from collections.abc import Callable

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from fpnas_keras.report.heat_maps import draw_heat_maps
from fpnas_keras.report.themes import PIXELS_PER_INCH
from fpnas_keras.runs.search_run import PHASES, SearchRun
from fpnas_keras.runs.training_run import TrainingRun

# Up to this number of epochs, a marker shows each epoch. A single epoch draws no line.
_MAX_MARKED_EPOCHS = 12
# A phase shorter than this share of the steps has no room for its name.
_MIN_NAMED_PHASE = 0.18
# Groups of ranked networks: color, marker and its area in square points. Later groups are drawn
# over earlier ones.
_GROUPS = {
    "sampled": ("first", "o", 28),
    "from a file": ("ink", "s", 30),
    "derived": ("second", "*", 190),
}


def available_plots(run: SearchRun | TrainingRun) -> dict[str, Callable[..., Figure]]:
    """The plots that can be drawn from the files of a run directory.

    Args:
        run: The search or the training.

    Returns:
        The functions that draw the plots, by the name of the plot. It is also the name of its file.
        Their arguments are the run and a theme.
    """
    if isinstance(run, TrainingRun):
        return {name: functools.partial(_draw_curve, name) for name in ("loss", "accuracy")}
    plots = {"entropy": _draw_entropy, "cost": _draw_cost, "loss": _draw_loss}
    ranking = run.ranking
    if ranking and ranking["architectures"]:
        plots["pareto"] = _draw_pareto
    if run.probabilities and any(run.probabilities[0]["blocks"]):
        plots["probabilities"] = draw_heat_maps
    return plots


def to_data_uri(figure: Figure) -> str:
    """Converts a figure to SVG in a data URI. Equal figures give equal URIs."""
    buffer = io.BytesIO()
    settings = {"svg.hashsalt": "fpnas_keras", "svg.fonttype": "path"}
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format="svg", dpi=2 * PIXELS_PER_INCH, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _draw_curve(name, run, theme):
    """Draws a metric of a training over its epochs."""
    figure = Figure((4, 2.6), facecolor=theme.ground)
    axes = figure.add_axes((0.11, 0.17, 0.85, 0.72))
    labels = {name: "training", f"val_{name}": "held out"}
    for (column, label), color in zip(labels.items(), (theme.first, theme.second)):
        if column in run.epochs[-1]:
            axes.plot(run.column("epoch"), run.column(column), color=color, label=label)
    _finish_panel(run, theme, axes, name)
    axes.set_xlabel("epoch", color=theme.muted, fontsize=8.5)
    return figure


def _draw_entropy(run, theme):
    figure, (above, below) = _make_panels(run, theme, 2)
    _plot_columns(run, theme, above, {"entropy": None})
    _finish_panel(run, theme, above, "entropy (nats)")
    _plot_columns(run, theme, below, {"samples": "drawn (K)", "evaluated": "evaluated"})
    _finish_panel(run, theme, below, "samples per step")
    return figure


def _draw_cost(run, theme):
    figure, (above, *below) = _make_panels(run, theme, 1 if run.target is None else 2)
    levels = []
    if run.target is not None:
        levels.append(("target", run.target, theme.target, "--"))
    if run.finished:
        levels.append(("derived", run.summary["found_cost"], theme.second, ":"))
    expected = run.column("expected_cost")
    scale, unit = _scale_costs([*expected, *(value for _, value, *_ in levels)], run.unit)
    above.plot(run.column("step"), expected / scale, color=theme.first, label="expected")
    for label, value, color, style in levels:
        above.axhline(value / scale, color=color, linestyle=style, label=label)
    _finish_panel(run, theme, above, unit)  # More would run into the legend.
    for axes in below:
        _plot_columns(run, theme, axes, {"cost_coefficient": None})
        _finish_panel(run, theme, axes, "beta, the weight of the cost")
        axes.autoscale(axis="y")  # beta may be negative
    return figure


def _draw_loss(run, theme):
    figure, panels = _make_panels(run, theme, 2)
    for axes, name in zip(panels, ("loss", "accuracy")):
        labels = {f"train_{name}": "weights part", f"validation_{name}": "architecture part"}
        _plot_columns(run, theme, axes, labels)
        _finish_panel(run, theme, axes, name)
    return figure


def _make_panels(run, theme, count):
    """Makes a figure of panels that share the axis of the steps, with the phases above them."""
    figure = Figure((4, 3.9), facecolor=theme.ground)
    ratios = [0.1] + [2 / count] * count
    strip, *panels = figure.subplots(1 + count, 1, sharex=True, height_ratios=ratios)
    figure.subplots_adjust(left=0.13, right=0.93, top=0.99, bottom=0.12, hspace=0.3)
    last = run.phases[-1][2]
    strip.set(xlim=(0, last), ylim=(0, 1))
    strip.set_axis_off()
    for name, start, end in run.phases:
        strip.axvspan(start, end, color=theme.phases[name], linewidth=0)
        if end - start > _MIN_NAMED_PHASE * last:
            label = strip.text((start + end) / 2, 0.45, PHASES[name], ha="center", va="center")
            label.set(color=theme.ink, fontsize=7.5)
        for axes in panels:
            axes.axvspan(start, end, color=theme.phases[name], alpha=0.3, linewidth=0)
    panels[-1].set_xlabel("step", color=theme.muted, fontsize=8.5)
    return figure, panels


def _plot_columns(run, theme, axes, labels):
    """Plots one or two columns of `metrics.csv` over the steps; `labels` maps column to label."""
    for (column, label), color in zip(labels.items(), (theme.first, theme.second)):
        axes.plot(run.column("step"), run.column(column), color=color, label=label)


def _finish_panel(run, theme, axes, title):
    """Styles a panel after its curves are drawn. Its vertical axis starts at 0."""
    _style_axes(axes, theme, title)
    for line in axes.lines:
        line.set_linewidth(1.6)
        if len(run.epochs) <= _MAX_MARKED_EPOCHS:
            line.set(marker="o" if line.get_linestyle() == "-" else "", markersize=4)
            line.set_clip_on(False)
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.grid(axis="y", color=theme.line, linewidth=0.7)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if len(axes.get_legend_handles_labels()[1]) > 1:
        _add_legend(axes, theme)


def _style_axes(axes, theme, title):
    axes.set_facecolor("none")
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", color=theme.ink, fontsize=8.5)
    axes.tick_params(colors=theme.muted, labelsize=8, length=0)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.muted)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def _add_legend(axes, theme):
    """Adds a legend above the axes, on the right of the title."""
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderaxespad=0.1,
        ncols=5,
        frameon=False,
        fontsize=8,
        labelcolor=theme.ink,
        handlelength=1.4,
        handletextpad=0.5,
        columnspacing=1,
    )


def _scale_costs(costs, unit):
    """Returns the divisor of the costs for a plot, and the unit after the division."""
    return (1e6, f"million {unit}") if np.nanmax([0, *costs]) >= 1e6 else (1, unit)


def _draw_pareto(run, theme):
    ranking = run.ranking
    networks, unit = ranking["architectures"], ranking["cost_unit"]
    figure = Figure((7.4, 4.4), facecolor=theme.ground)
    axes = figure.add_axes((0.07, 0.11, 0.91, 0.82))
    # The ranking may have another cost than the search.
    target = run.target if unit == run.unit else None
    scale, unit = _scale_costs([each["cost"] for each in networks] + [target or 0], unit)
    _scatter_networks(axes, theme, networks, scale)
    front = sorted(_point(each, scale) for each in networks if each["pareto"])
    if front:
        line, *_ = axes.plot(*zip(*front), drawstyle="steps-post", label="Pareto front")
        line.set(color=theme.first, linewidth=1.3, marker="o", markersize=3)
    if target is not None:
        axes.axvline(target / scale, color=theme.target, linestyle="--", label="target")
    _style_axes(axes, theme, "accuracy with the shared weights (%)")
    axes.grid(color=theme.line, linewidth=0.7)
    axes.margins(0.06, 0.1)
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.set_xlabel(f"cost ({unit})", color=theme.muted, fontsize=8.5)
    _add_legend(axes, theme)
    return figure


def _scatter_networks(axes, theme, networks, scale):
    for group, (color, marker, area) in _GROUPS.items():
        points = [_point(each, scale) for each in networks if _group(each) == group]
        if points:
            color = getattr(theme, color)
            dots = axes.scatter(*zip(*points), area, color, marker, label=group, zorder=3)
            dots.set(edgecolors=theme.ground, linewidths=0.7)


def _point(network, scale):
    return network["cost"] / scale, 100 * network["accuracy"]


def _group(network):
    if network["name"] == "derived":
        return "derived"
    return "sampled" if network["name"].startswith("sample ") else "from a file"
