"""The page of a training: the values and texts that `templates/training.html` shows."""

import pathlib
from typing import Any

from fpnas_keras.architecture import count_part
from fpnas_keras.report.parts import (
    Plot,
    describe_network,
    format_duration,
    format_totals,
    list_flags,
    render,
)
from fpnas_keras.runs.training_run import TrainingRun

# A larger confusion matrix is not readable: the most frequent confusions replace it.
_MOST_COLUMNS = 25
_MOST_CONFUSIONS = 20
_LABELS = {
    "macs": "MACs",
    "params": "parameters",
    "test_balanced_accuracy": "mean of the test accuracies of the classes",
    "val_accuracy": "accuracy on the held-out training images",
    "val_balanced_accuracy": "its mean over the classes",
    "wall_seconds": "time (seconds)",
    "cpu_seconds": "CPU time (seconds)",
    "peak_memory_mb": "peak memory (MB)",
}


def make_page(run: TrainingRun, plots: dict[str, Plot]) -> str:
    """Makes the page of a training.

    Args:
        run: The training.
        plots: The plots, by name, as `plots.available_plots` names them.

    Returns:
        The page as HTML. It refers to no other file.
    """
    name = "/".join(pathlib.Path(run.flags["architecture"]).parts[-2:])
    summary = run.summary or {}
    notice = ""
    if not run.finished:
        notice = "The training is not finished. This page shows its state after the last epoch."
    return render(
        "training.html",
        run,
        title=f"Training of {name}",
        notice=notice,
        verdict="",
        command=run.next_command,
        tiles=_tiles(run, summary),
        sections={
            "progress": learning_curves(run, plots),
            **describe_mistakes(run, summary),
            "network": network_of(run),
            "exports": [_export_row(file, each) for file, each in run.exports.items()],
            "totals": format_totals(summary, _LABELS),
            "flags": list_flags(run),
        },
    )


def _tiles(run, summary):
    last = run.epochs[-1]
    tiles = [("epochs", f"{last['epoch']:,.0f} of {run.planned_epochs:,}", "")]
    if "test_accuracy" in summary:
        balanced = summary.get("test_balanced_accuracy")
        note = "" if balanced is None else f"mean over the classes {balanced:.2%}"
        tiles.insert(0, ("test accuracy", f"{summary['test_accuracy']:.2%}", note))
    if "macs" in summary:
        tiles.append(("MACs", f"{summary['macs']:,}", ""))
        tiles.append(("parameters", f"{summary['params']:,}", ""))
    tiles.append(("time", format_duration(summary.get("wall_seconds", last["seconds"])), ""))
    return tiles


def learning_curves(run: TrainingRun, plots: dict[str, Plot]) -> dict[str, Any]:
    """The curves of a training, for the macro of that name.

    Args:
        run: The training.
        plots: Its plots by the name of the metric.
    """
    first, last = run.epochs[0], run.epochs[-1]
    return {
        "held_out": "val_loss" in last,
        "plots": [
            (plot, f"{name} from {first[name]:.3g} to {last[name]:.3g}")
            for name, plot in plots.items()
        ],
    }


def describe_mistakes(run: TrainingRun, summary: dict[str, Any]) -> dict[str, Any]:
    """The sections `classes`, `confusion` and `mistakes` of a page.

    Args:
        run: The training.
        summary: Its summary; empty for an unfinished one.
    """
    return {
        "classes": _classes(summary),
        "confusion": _confusion(summary),
        "mistakes": [each | {"probability": f"{each['probability']:.0%}"} for each in run.mistakes],
    }


def _classes(summary):
    """Name, accuracy and width of the bar of each class, the worst first."""
    shares = summary.get("class_accuracy", {})
    known = sorted((share, name) for name, share in shares.items() if share is not None)
    rows = [(name, f"{share:.1%}", f"{share:.1%}") for share, name in known]
    return rows + [(name, "no image", "0%") for name, share in shares.items() if share is None]


def _confusion(summary):
    matrix = summary.get("confusion_matrix")
    if matrix is None:
        return None
    names = list(summary["class_accuracy"])
    if len(names) <= _MOST_COLUMNS:
        rows = [
            (name, [(count, round(count / max(sum(row), 1), 3)) for count in row])
            for name, row in zip(names, matrix)
        ]
        return {"names": names, "rows": rows}
    pairs = [
        (names[i], names[j], matrix[i][j])
        for i in range(len(names))
        for j in range(len(names))
        if i != j and matrix[i][j]
    ]
    pairs.sort(key=lambda each: -each[2])
    return {"names": names, "rows": [], "pairs": pairs[:_MOST_CONFUSIONS]}


def network_of(run: TrainingRun) -> dict[str, Any] | None:
    """The network of a training with its MACs, for the macro `network_parts`; `None` before that.

    Args:
        run: The training.
    """
    architecture = run.architecture
    if architecture is None:
        return None
    costs = [count_part(part).macs for part in architecture.parts()]
    return describe_network(architecture, costs, "MACs")


def _export_row(file: str, report: dict[str, Any]) -> tuple[str, ...]:
    lost = sorted((each, name) for name, each in report.get("class_changes", {}).items())
    worst = ", ".join(f"{name} {change:+.1%}" for change, name in lost[:3] if change < 0)
    return (
        file,
        report["quantize"],
        f"{report['bytes']:,}",
        f"{report['tflite_accuracy']:.2%}",
        f"{report['agreement']:.2%}",
        f"{report['host_milliseconds']:.3g}",
        worst or "none",
    )
