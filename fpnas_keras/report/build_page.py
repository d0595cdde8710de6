"""The page of a build: the values and texts that `templates/build.html` shows."""

from fpnas_keras.report.parts import (
    Plot,
    format_duration,
    format_totals,
    list_flags,
    render,
)
from fpnas_keras.report.training_page import describe_mistakes, learning_curves, network_of
from fpnas_keras.runs.build_run import BuildRun

_LABELS = {
    "description": "images",
    "keras_accuracy": "accuracy of the Keras model",
    "macs": "MACs",
    "params": "parameters",
    "wall_seconds": "time (seconds)",
    "cpu_seconds": "CPU time (seconds)",
    "peak_memory_mb": "peak memory of the last process (MB)",
}
# What has a place of its own on the page.
_SHOWN = ("notes", "baseline", "class_counts")
_STEPS = {
    "latency table": "Measures what the parts of networks take on the device.",
    "search": "Searches for a network within the target.",
    "training": "Trains the network from scratch, and finalists before it if there is time.",
    "export": "Writes the files for the app and checks them.",
    "baseline": "Trains MobileNetV3-Small to compare with.",
}


def make_page(run: BuildRun, plots: dict[str, Plot]) -> str:
    """Makes the page of a build.

    Args:
        run: The build.
        plots: The plots of its search and its training, by name, as `plots.available_plots` names
            them.

    Returns:
        The page as HTML. It refers to no other file.
    """
    summary = run.summary or {}
    training = run.training
    notice = ""
    if not run.finished:
        done = ", ".join(step["name"] for step in run.steps) or "none"
        notice = f"The build is not finished. Steps that are done: {done}."
    return render(
        "build.html",
        run,
        title="A network for your images",
        notice=notice,
        verdict="",
        command=run.next_command,
        tiles=_tiles(summary),
        sections={
            "comparison": _comparison(summary),
            "data": _data(summary),
            "search": _search(run, plots),
            "finalists": _finalists(run),
            "network": network_of(training),
            "curves": learning_curves(training, _of("training", plots))
            if training.finished
            else None,
            **describe_mistakes(training, training.summary or {}),
            "files": [
                row
                for name in ("model", "baseline")
                for quantize in ("none", "int8", "qat")
                if (row := _file_row(run, quantize, name))
            ],
            "steps": [_step_row(step) for step in run.steps],
            "totals": format_totals(
                {name: each for name, each in summary.items() if name not in _SHOWN}, _LABELS
            ),
            "flags": list_flags(run),
        },
    )


def _of(step, plots):
    """The plots of one step."""
    start = f"{step}_"
    return {
        name.removeprefix(start): plot for name, plot in plots.items() if name.startswith(start)
    }


def _tiles(summary):
    if not summary:
        return []
    baseline = summary["baseline"]
    note = f"MobileNetV3-Small {baseline['accuracy']:.2%}" if baseline else ""
    return [
        ("test accuracy of the file", f"{summary['accuracy']:.2%}", note),
        ("time on the device", f"{summary['milliseconds']:.3g} ms", summary["device"]),
        ("size of the file", f"{summary['bytes'] / 1000:,.0f} kB", summary["file"]),
        ("target", summary["target"], f"{summary['macs']:,} MACs"),
        ("the build took", format_duration(summary["wall_seconds"]), _of_time(summary)),
    ]


def _of_time(summary):
    return f"of {summary['time']}" if summary["time"] else ""


def _comparison(summary):
    """Rows of the network that was found and of MobileNetV3-Small."""
    if not summary or not summary["baseline"]:
        return None
    difference = 100 * (summary["accuracy"] - summary["baseline"]["accuracy"])
    rows = [
        (
            name,
            each["file"],
            f"{each['accuracy']:.2%}",
            f"{each['milliseconds']:.3g}",
            f"{each['bytes']:,}",
            f"{each['macs']:,}",
            f"{each['params']:,}",
            f"{each['epochs']:,}",
            format_duration(each["training_seconds"]),
        )
        for name, each in (
            ("found by the search", summary),
            ("MobileNetV3-Small", summary["baseline"]),
        )
    ]
    return {"rows": rows, "difference": f"{difference:+.1f}"}


def _data(summary):
    """What the images are."""
    if not summary:
        return None
    counts = summary["class_counts"]
    most = max(counts.values())
    return {
        "description": summary["description"],
        "rows": [(name, f"{count:,}", f"{count / most:.1%}") for name, count in counts.items()],
    }


def _search(run, plots):
    """What the search decided."""
    search = run.search
    if not search.finished:
        return None
    summary = search.summary
    return {
        "decision": search.decision,
        "space": summary["space"],
        "networks": f"{summary['num_architectures']:.2g}",
        "samples": f"{summary['total_samples']:,}",
        "finalists": f"{summary.get('finalists', 1):,}",
        "plots": [
            (plot, f"The course of the {name}") for name, plot in _of("search", plots).items()
        ],
    }


def _finalists(run):
    """Rows of the finalists that were trained."""
    chosen = run.architecture
    return [
        (
            f"{number}, chosen" if training.architecture == chosen else f"{number}",
            f"{summary['val_accuracy']:.2%}",
            f"{summary['macs']:,}",
            f"{summary['params']:,}",
            f"{summary['epochs']:,}",
            format_duration(summary["wall_seconds"]),
        )
        for number, training in enumerate(run.trained_finalists, 1)
        if (summary := training.summary) and "val_accuracy" in summary
    ]


def _file_row(run, quantize, name):
    exported = run.export_report(quantize, name)
    if exported is None:
        return None
    return (
        run.tflite_file(quantize, name).name,
        exported["quantize"],
        f"{exported['bytes']:,}",
        f"{exported['tflite_accuracy']:.2%}",
        f"{exported['keras_accuracy']:.2%}",
        f"{exported['agreement']:.2%}",
        f"{exported['host_milliseconds']:.3g}",
    )


def _step_row(step):
    return (
        step["name"],
        _STEPS.get(step["name"], ""),
        format_duration(step["seconds"]),
        "; ".join(step["notes"]),
    )
