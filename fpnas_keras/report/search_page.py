"""The page of a search: the values and texts that `templates/search.html` shows."""

import pathlib

from fpnas_keras.cost import format_cost
from fpnas_keras.errors import UserError
from fpnas_keras.report.parts import (
    Plot,
    describe_network,
    format_duration,
    format_totals,
    list_flags,
    render,
)
from fpnas_keras.runs.search_run import PHASES, SearchRun

# Labels of the keys of summary.json that do not explain themselves.
_LABELS = {
    "num_classes": "classes",
    "num_architectures": "architectures in the space",
    "num_logits": "logits of the distribution",
    "total_samples": "samples",
    "total_evaluated": "samples evaluated (equal samples of a step are evaluated once)",
    "initial_entropy": "entropy at the start (nats)",
    "entropy": "entropy at the end (nats)",
    "expected_cost": "expected cost at the end",
    "weights_share": "share of the training images in the weights part",
    "finalists": "architectures that the derived network was chosen from",
    "found_cost": "cost of the derived network",
    "found_log_prob": "log p of the derived network (nats)",
    "derivation_log_prob": "log p of the most probable network within the target (nats)",
    "derivation_least": "lowest cost allowed for the derived network",
    "derivation_gap": "log p of the optimum minus that, at most (nats)",
    "macs": "MACs of the derived network",
    "params": "parameters of the derived network",
    "shared_accuracy": "accuracy of the derived network, with the shared weights",
    "shared_balanced_accuracy": "its mean over the classes",
    "mode_validation_loss": "loss of the most probable network, with the shared weights",
    "mode_validation_accuracy": "accuracy of the most probable network, with the shared weights",
    "mode_macs": "MACs of the most probable network, without a cost limit",
    "wall_seconds": "time (seconds)",
    "cpu_seconds": "CPU time (seconds)",
    "peak_memory_mb": "peak memory (MB)",
}
_PHASE_NOTES = {
    "warm_up": "The warm-up trains the shared weights alone.",
    "factorized": "In the factorized phase, each variable of a block has its own distribution.",
    "joint": (
        "In the joint phase, each block has one distribution over the combinations of its choices."
    ),
}


def make_page(run: SearchRun, plots: dict[str, Plot]) -> str:
    """Makes the page of a search.

    Args:
        run: The search.
        plots: The plots, by name, as `plots.available_plots` names them.

    Returns:
        The page as HTML. It refers to no other file.
    """
    name = pathlib.Path(run.flags["space"]).stem
    return render(
        "search.html",
        run,
        title=f"Search of {name}",
        notice=_notice(run),
        verdict=run.verdict,
        command=run.next_command,
        tiles=_tiles(run),
        sections={
            "progress": _progress(run, plots),
            "network": _network(run),
            "ranking": _ranking(run, plots),
            "probabilities": _probabilities(run, plots),
            "totals": _totals(run),
            "flags": list_flags(run),
        },
    )


def _notice(run):
    """What is not on the page, or an empty text."""
    contents = (
        ("the derived network", "architecture.json", run.architecture),
        ("accuracy against cost", "ranking.json", run.ranking),
        ("the probability of each choice", "probabilities.jsonl", run.probabilities),
    )
    texts = []
    if not run.finished:
        texts.append(
            "The search is not finished. This page shows its state after the last complete epoch."
        )
    missing = [f"{what} (no {file})" for what, file, content in contents if not content]
    if missing:
        texts.append(f"Not on this page: {', '.join(missing)}.")
    if run.lacks_table:
        texts.append("The network is shown with its MACs: the run's latency_table.json is gone.")
    return " ".join(texts)


def _tiles(run):
    """The most important totals: label, value and note of each."""
    last, summary = run.epochs[-1], run.summary
    epochs = f"{last['epoch']:,} of {run.planned_epochs:,} epochs"
    if summary is None:
        tiles = [
            _cost_tile(run, "expected cost", last["expected_cost"]),
            ("samples", f"{last['total_samples']:,}", ""),
            ("steps", f"{last['step']:,}", epochs),
            ("time", format_duration(last["seconds"]), ""),
        ]
    else:
        evaluated = f"{summary['total_evaluated']:,} evaluated"
        cpu_time = f"{format_duration(summary['cpu_seconds'])} of CPU time"
        tiles = [
            _cost_tile(run, "derived network", summary["found_cost"]),
            ("samples", f"{summary['total_samples']:,}", evaluated),
            ("steps", f"{summary['steps']:,}", epochs),
            ("time", format_duration(summary["wall_seconds"]), cpu_time),
            ("peak memory", f"{summary['peak_memory_mb'] / 1000:.1f} GB", ""),
            *_accuracy_tile(summary),
        ]
    return tiles


def _accuracy_tile(summary):
    if "shared_accuracy" not in summary:  # of an earlier version
        return []
    balanced = f"balanced {summary['shared_balanced_accuracy']:.1%}"
    note = f"of the derived network, on the architecture part; {balanced}"
    return [("accuracy with the shared weights", f"{summary['shared_accuracy']:.1%}", note)]


def _cost_tile(run, label, cost):
    note = "no target"
    if run.target is not None:
        note = f"{cost / run.target:.1%} of the target {format_cost(run.target)}"
    return label, f"{format_cost(cost)} {run.unit}", note


def _progress(run, plots):
    """The phases, and a plot of each group of metrics over the steps."""
    phases = run.phases
    return {
        "phases": [{"key": key, "name": PHASES[key], "end": f"{end:,}"} for key, _, end in phases],
        "phase_notes": [_PHASE_NOTES[key] for key in dict.fromkeys(key for key, *_ in phases)],
        "plots": plots,
        "alt": _describe_curves(run),
        "has_controller": run.target is not None and "cost_coefficient" not in run.flags,
    }


def _describe_curves(run):
    """What each plot over the steps shows, for readers who do not see it."""
    first, last = run.epochs[0], run.epochs[-1]

    def change(column, form="{:.3g}".format):
        return f"from {form(first[column])} to {form(last[column])}"

    target = "" if run.target is None else f" The target is {format_cost(run.target)}."
    return {
        "entropy": f"Entropy {change('entropy')} nats. Samples per step {change('samples')}.",
        "cost": f"Expected cost {change('expected_cost', format_cost)} {run.unit}.{target}",
        "loss": (
            f"Loss on the weights part {change('train_loss')}. "
            f"Loss on the architecture part {change('validation_loss')}."
        ),
    }


def _network(run):
    """The derived network from image to classes, with the cost of each part."""
    architecture = run.architecture
    if architecture is None:
        return None
    parts = architecture.parts()
    try:
        costs = [run.cost(part) for part in parts]
    except KeyError as error:
        raise UserError(
            f"architecture.json in {run.directory} has a part that its latency table lacks: {error}"
        ) from None
    return describe_network(architecture, costs, run.cost.unit)


def _ranking(run, plots):
    """The ranked networks: a plot and the rows of a table."""
    if "pareto" not in plots:
        return None
    ranking = run.ranking
    networks, unit = ranking["architectures"], ranking["cost_unit"]
    best = max(networks, key=lambda each: each["accuracy"])
    count = f"{len(networks):,}"
    return {
        "count": count,
        "images": f"{ranking['images']:,}",
        "unit": unit,
        "plot": plots["pareto"],
        "alt": (
            f"Cost and accuracy of {count} networks. The most accurate one, {best['name']}, "
            f"reaches {best['accuracy']:.2%} at {format_cost(best['cost'])} {unit}."
        ),
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


def _probabilities(run, plots):
    """The probability of each choice: a plot over the steps and the rows of a table."""
    if "probabilities" not in plots:
        return None
    last = run.probabilities[-1]
    step = f"{last['step']:,}"
    return {
        "step": step,
        "plot": plots["probabilities"],
        "alt": (
            "One heat map per block, with the probability of each choice over the steps. "
            f"The table below has the values after step {step}."
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


def _totals(run):
    """Labels and values of the summary. Empty for an unfinished search."""
    return format_totals(run.summary or {}, _LABELS)
