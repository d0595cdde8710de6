"""What the pages of searches and trainings have in common."""

import math
from typing import Any, NamedTuple

import jinja2

from fpnas_keras.architecture import Architecture, Head, Part, Stem, expanded_filters
from fpnas_keras.cost import format_cost
from fpnas_keras.report.themes import DARK, LIGHT
from fpnas_keras.runs.run_directory import RunDirectory

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("fpnas_keras.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


class Plot(NamedTuple):
    """A plot as the page shows it.

    Attributes:
        light: Data URI of the picture for a light page.
        dark: Data URI of the picture for a dark page.
        width: Width in CSS pixels.
    """

    light: str
    dark: str
    width: int


def render(template: str, run: RunDirectory, **values: Any) -> str:
    """Makes a page as HTML, which refers to no other file.

    Args:
        template: A file of the folder `templates`.
        run: The run that the page is about.
        **values: The values of the template.
    """
    return _TEMPLATES.get_template(template).render(
        data=run.flags["data"],
        directory=run.directory.resolve().name,
        light=LIGHT,
        dark=DARK,
        **values,
    )


def list_flags(run: RunDirectory) -> list[tuple[str, str]]:
    """Names and values of the flags of a run; of those that it has chosen itself too."""
    chosen = {name: f"{value} (chosen for the images)" for name, value in run.chosen.items()}
    return sorted((chosen | run.flags).items())


def describe_network(architecture: Architecture, costs: list[float], unit: str) -> dict[str, Any]:
    """A network from image to classes, with the cost of each part, for `network_parts`."""
    parts = architecture.parts()
    total, largest = sum(costs), max(costs)
    names = ["stem", *(f"block {index}" for index in range(len(parts) - 2)), "head"]
    return {
        "total": format_cost(total),
        "unit": unit,
        "num_classes": f"{architecture.num_classes:,}",
        "parts": [
            {
                "name": name,
                "shape": " \u00d7 ".join(map(str, (*part.size, part.channels))),
                "description": _describe(part),
                "skipped": getattr(part.layers, "skip", False),
                "cost": format_cost(cost),
                "bar": f"{100 * cost / (largest or 1):.1f}%",
                "share": f"{cost / (total or 1):.1%}",
            }
            for name, part, cost in zip(names, parts, costs)
        ],
    }


def _describe(part: Part) -> str:
    """What a part computes, in words."""
    layers = part.layers
    if isinstance(layers, Head):
        dense = f", dense layer of {layers.dense_units} units" if layers.dense_units else ""
        return (
            f"1\u00d71 convolution to {layers.filters} channels, {layers.activation}, "
            f"average pooling{dense}"
        )
    stride = f", stride {layers.strides}" if layers.strides > 1 else ""
    kernel = f"{layers.kernel_size}\u00d7{layers.kernel_size}"
    if isinstance(layers, Stem):
        return f"{kernel} convolution{stride}, {layers.activation}"
    if layers.skip:
        return "skipped" if part.keeps_shape else f"skipped, with a 1\u00d71 projection{stride}"
    if layers.expansion != 1:
        expanded = expanded_filters(part.channels, layers.expansion)
        kernel += f", expansion {layers.expansion:g} ({expanded} channels)"
    attention = ", squeeze-excite" if layers.splits == 1 else ""
    if layers.splits > 1:
        attention = f", split-attention over {layers.splits} splits"
    residual = ", residual connection" if part.keeps_shape else ""
    return f"{kernel}, {layers.activation}{attention}{stride}{residual}"


def format_totals(summary: dict[str, Any], labels: dict[str, str]) -> list[tuple[str, str]]:
    """Labels and values of a summary, without what has a place of its own on the page."""
    return [
        (labels.get(key, key.replace("_", " ")), _format_value(value))
        for key, value in summary.items()
        if not key.endswith(("confusion_matrix", "class_accuracy")) and key != "next"
    ]


def _format_value(value):
    """A value of the summary, for people."""
    if isinstance(value, list):
        return " x ".join(map(_format_scalar, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_format_scalar(each)}" for key, each in value.items())
    return _format_scalar(value)


def _format_scalar(value):
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        digits = str(abs(value))
        return f"{value:,}" if len(digits) < 15 else f"{digits[0]}.{digits[1]}e{len(digits) - 1}"
    if isinstance(value, float):
        return format_cost(value)
    return value if isinstance(value, str) else "..."


def format_duration(seconds: float) -> str:
    """Such as "1 min 20 s"."""
    if not math.isfinite(seconds):
        return f"{seconds} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
