"""Writes the report of a search, a training or a build into its directory."""

import os
import pathlib
from types import ModuleType

from fpnas_keras.files import replacing
from fpnas_keras.report import build_page, search_page, training_page
from fpnas_keras.report.parts import Plot
from fpnas_keras.report.plots import available_plots, to_data_uri
from fpnas_keras.report.themes import DARK, LIGHT, PIXELS_PER_INCH
from fpnas_keras.runs.build_run import BuildRun
from fpnas_keras.runs.run_directory import RunDirectory
from fpnas_keras.runs.search_run import SearchRun
from fpnas_keras.runs.training_run import TrainingRun


def write_report(directory: str | os.PathLike) -> pathlib.Path:
    """Writes `report.html` and the plots in `report/` into a run directory.

    The report is made from the files of the directory alone. It leaves out what an unfinished run
    has not written yet. The page needs no other file and no network.

    Args:
        directory: The directory of a search, a training or a build, finished or not.

    Returns:
        Path of the page.

    Raises:
        UserError: When the directory is not a run directory, or when one of its files is not
            valid. The message names the file. Nothing is written then.
        OSError: When a file cannot be read or written.

    Example:

    ```python
    from fpnas_keras.report import write_report

    page = write_report("runs/quickstart")
    ```
    """
    run, module = _open(directory)
    run.check()
    figures = _draw(run)
    plots = {
        name: Plot(
            light=to_data_uri(light),
            dark=to_data_uri(dark),
            width=round(light.get_figwidth() * PIXELS_PER_INCH),
        )
        for name, (light, dark) in figures.items()
    }
    page = module.make_page(run, plots)
    run.plot_folder.mkdir(exist_ok=True)
    for name, (light, _) in figures.items():
        with replacing(run.plot_folder / f"{name}.png") as temporary:
            light.savefig(temporary, dpi=2 * PIXELS_PER_INCH, metadata={"Software": None})
    with replacing(run.report) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")
    return run.report


def _open(directory: str | os.PathLike) -> tuple[RunDirectory, ModuleType]:
    """The run, and the module of its page."""
    if (build := BuildRun(directory)).is_build:
        return build, build_page
    if (training := TrainingRun(directory)).is_training:
        return training, training_page
    return SearchRun(directory), search_page


def _draw(run):
    """The plots by name, each light and dark. Those of a build are those of its finished steps."""
    if not isinstance(run, BuildRun):
        return {
            name: (draw(run, LIGHT), draw(run, DARK)) for name, draw in available_plots(run).items()
        }
    figures = {}
    for step, own, names in (
        ("search", run.search, ("entropy", "cost")),
        ("training", run.training, ("loss", "accuracy")),
    ):
        if own.finished:
            drawn = _draw(own)
            figures |= {f"{step}_{name}": drawn[name] for name in names}
    return figures
