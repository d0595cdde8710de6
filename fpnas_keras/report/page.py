"""The page of the report: the values and texts that `templates/report.html` shows."""

import math
import pathlib
from typing import NamedTuple

import jinja2

from fpnas_keras.architecture import Head, Stem, expanded_filters
from fpnas_keras.cost import format_cost
from fpnas_keras.errors import UserError
from fpnas_keras.report.plots import DARK, LIGHT
from fpnas_keras.runs.search_run import PHASES, Search

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("fpnas_keras.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_LABELS = {
    "num_architectures": "architectures in the space",
    "num_logits": "logits",
    "total_samples": "samples drawn",
    "total_evaluated": "samples evaluated (equal ones of a step once)",
    "entropy": "entropy at the end (nats)",
    "expected_cost": "expected cost at the end",
    "found_cost": "cost of the derived network",
    "derivation_log_prob": "log p of the derived network (nats)",
    "derivation_least": "least cost that was asked for",
    "derivation_gap": "log p that a better one might have more (nats)",
    "macs": "MACs of the derived network",
    "params": "parameters of the derived network",
    "mode_validation_loss": "loss of the most probable network, shared weights",
    "mode_validation_accuracy": "accuracy of the most probable network, shared weights",
    "mode_macs": "MACs of the most probable network, whatever it costs",
    "wall_seconds": "time (seconds)",
    "cpu_seconds": "CPU time (seconds)",
    "peak_memory_mb": "peak memory (MB)",
}


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


def make_page(search: Search, plots: dict[str, Plot]) -> str:
    """Makes the page of a search.

    Args:
        search: The search.
        plots: The plots, by name, as `plots.drawings` names them.

    Returns:
        The page as HTML. It refers to no other file.
    """
    name = pathlib.Path(search.flags["space"]).stem
    return _TEMPLATES.get_template("report.html").render(
        title=f"Search of {name}",
        data=search.flags["data"],
        directory=search.directory.resolve().name,
        light=LIGHT,
        dark=DARK,
        unfinished=search.summary is None,
        missing=_missing(search),
        tiles=_tiles(search),
        sections={
            "course": _course(search, plots),
            "network": _network(search),
            "ranking": _ranking(search, plots),
            "probabilities": _probabilities(search, plots),
            "totals": _totals(search),
            "flags": sorted(search.flags.items()),
        },
    )


def _missing(search):
    """What the run directory lacks: pairs of content and file name."""
    contents = (
        ("the network that was found", "architecture.json", search.architecture),
        ("accuracy against cost", "ranking.json", search.ranking),
        ("the probabilities", "probabilities.jsonl", search.probabilities),
    )
    return [(what, file) for what, file, content in contents if not content]


def _tiles(search):
    """The most important totals: label, value and note of each."""
    last, summary = search.epochs[-1], search.summary
    done = f"{last['epoch']:,} of {search.planned_epochs:,} epochs"
    if summary is None:
        tiles = [
            _cost_tile(search, "expected cost", last["expected_cost"]),
            ("samples", f"{last['total_samples']:,}", ""),
            ("steps", f"{last['step']:,}", done),
            ("time", _duration(last["seconds"]), ""),
        ]
    else:
        tiles = [
            _cost_tile(search, "found cost", summary["found_cost"]),
            (
                "samples",
                f"{summary['total_samples']:,}",
                f"{summary['total_evaluated']:,} evaluated",
            ),
            ("steps", f"{summary['steps']:,}", done),
            (
                "time",
                _duration(summary["wall_seconds"]),
                f"{_duration(summary['cpu_seconds'])} CPU",
            ),
            ("memory", f"{summary['peak_memory_mb'] / 1000:.1f} GB", "at its peak"),
        ]
    return [dict(zip(("label", "value", "note"), tile)) for tile in tiles]


def _cost_tile(search, label, cost):
    note = "no target"
    if search.target is not None:
        note = f"{cost / search.target:.1%} of the target {format_cost(search.target)}"
    return label, f"{format_cost(cost)} {search.unit}", note


def _course(search, plots):
    """The phases, and a plot of each group of metrics over the steps."""
    first, last = search.epochs[0], search.epochs[-1]

    def course(column, form="{:.3g}".format):
        return f"from {form(first[column])} to {form(last[column])}"

    costs = f"{course('expected_cost', format_cost)} {search.unit}"
    target = "" if search.target is None else f", target {format_cost(search.target)}"
    figures = [
        (
            "entropy",
            "Entropy and samples",
            f"Entropy {course('entropy')} nats; samples a step {course('samples')}.",
        ),
        ("cost", "Expected cost", f"Expected cost {costs}{target}."),
        (
            "loss",
            "Loss and accuracy, means of the samples",
            f"Loss of the weights part {course('train_loss')}, of the architecture part "
            f"{course('validation_loss')}.",
        ),
    ]
    return {
        "phases": [
            {"key": key, "name": PHASES[key], "end": f"{end:,}"} for key, _, end in search.phases
        ],
        "figures": [
            {"plot": plots[name], "title": title, "alt": alt} for name, title, alt in figures
        ],
    }


def _network(search):
    """The derived network from image to classes, with the cost of each part."""
    if search.architecture is None:
        return None
    parts = search.architecture.parts()
    try:
        costs = [search.cost(part) for part in parts]
    except KeyError as error:
        raise UserError(
            f"architecture.json in {search.directory} has a part that its latency table lacks: "
            f"{error}"
        ) from None
    total, largest = sum(costs), max(costs)
    names = ["stem", *(f"block {index}" for index in range(len(parts) - 2)), "head"]
    return {
        "total": format_cost(total),
        "unit": search.cost.unit,
        "num_classes": f"{search.architecture.num_classes:,}",
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


def _describe(part):
    """What a part computes, for people."""
    layers = part.layers
    if isinstance(layers, Head):
        dense = f", dense layer of {layers.dense_units}" if layers.dense_units else ""
        return f"1\u00d71 to {layers.filters} channels, {layers.activation}, average pooling{dense}"
    stride = f", stride {layers.strides}" if layers.strides > 1 else ""
    kernel = f"{layers.kernel_size}\u00d7{layers.kernel_size}"
    if isinstance(layers, Stem):
        return f"{kernel} convolution{stride}, {layers.activation}"
    keeps_shape = layers.strides == 1 and layers.filters == part.channels
    if layers.skip:
        return "skipped" if keeps_shape else f"skipped, with a 1\u00d71 projection{stride}"
    if layers.expansion != 1:
        expanded = expanded_filters(part.channels, layers.expansion)
        kernel += f", expansion {layers.expansion:g} to {expanded} channels"
    attention = {0: "", 1: ", squeeze-excite"}.get(
        layers.splits, f", split-attention over {layers.splits}"
    )
    adds_input = ", adds its input" if keeps_shape else ""
    return f"{kernel}, {layers.activation}{attention}{stride}{adds_input}"


def _ranking(search, plots):
    """The ranked networks: a plot and the rows of a table."""
    if "pareto" not in plots:
        return None
    networks, unit = search.ranking["architectures"], search.ranking["cost_unit"]
    best = max(networks, key=lambda each: each["accuracy"])
    head = ("rank", "network", "accuracy", "loss", f"cost ({unit})", "MACs", "parameters")
    return {
        "count": f"{len(networks):,}",
        "images": f"{search.ranking['images']:,}",
        "plot": plots["pareto"],
        "alt": (
            f"{len(networks)} networks, cost against accuracy; the best, {best['name']}, reaches "
            f"{best['accuracy']:.2%} at {format_cost(best['cost'])} {unit}."
        ),
        "head": (*head, "log p", "on the Pareto front"),
        "rows": [_ranking_row(each) for each in sorted(networks, key=lambda each: each["rank"])],
    }


def _ranking_row(network):
    log_prob = network["log_prob"]
    return (
        str(network["rank"]),
        network["name"],
        f"{network['accuracy']:.2%}",
        f"{network['loss']:.4f}",
        format_cost(network["cost"]),
        f"{network['macs']:,}",
        f"{network['params']:,}",
        "" if log_prob is None else f"{log_prob:.2f}",
        "yes" if network["pareto"] else "",
    )


def _probabilities(search, plots):
    """The probability of each choice: a plot over the steps and the rows of a table."""
    if "probabilities" not in plots:
        return None
    last = search.probabilities[-1]
    step = f"{last['step']:,}"
    return {
        "step": step,
        "plot": plots["probabilities"],
        "alt": (
            "Heat maps over the steps, one a block, of the probability of each choice; the table "
            f"below has the values after step {step}."
        ),
        "rows": [
            (f"block {index}", name, _list_choices(choices))
            for index, block in enumerate(last["blocks"])
            for name, choices in block.items()
        ],
    }


def _list_choices(choices):
    """Choices and their probabilities, the most probable first."""
    ranked = sorted(choices.items(), key=lambda item: -item[1])
    return ", ".join(f"{choice}: {probability:.1%}" for choice, probability in ranked)


def _totals(search):
    """Labels and values of the summary; empty while there is none."""
    return [
        (_LABELS.get(key, key.replace("_", " ")), _value(value))
        for key, value in (search.summary or {}).items()
    ]


def _value(value):
    """A value of the summary, for people."""
    if isinstance(value, list):
        return " x ".join(map(_scalar, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_scalar(each)}" for key, each in value.items())
    return _scalar(value)


def _scalar(value):
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        digits = str(abs(value))
        return f"{value:,}" if len(digits) < 15 else f"{digits[0]}.{digits[1]}e{len(digits) - 1}"
    if isinstance(value, float):
        return format_cost(value)
    return value if isinstance(value, str) else "..."


def _duration(seconds):
    if not math.isfinite(seconds):
        return f"{seconds} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
