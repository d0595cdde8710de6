"""Writes the report of a search into its run directory."""

import os
import pathlib

from fpnas_keras.files import replacing
from fpnas_keras.report.page import Plot, make_page
from fpnas_keras.report.plots import DARK, LIGHT, PIXELS_PER_INCH, drawings, svg
from fpnas_keras.runs.search_run import read


def write_report(directory: str | os.PathLike) -> pathlib.Path:
    """Writes `report.html` and the plots in `report/` into a run directory.

    The report is made from the files of the directory alone. It leaves out what an unfinished
    search has not written yet. The page needs no other file and no network.

    Args:
        directory: The run directory of a search, finished or not.

    Returns:
        Path of the page.

    Raises:
        UserError: When the directory is not the run directory of a search, or when one of its
            files is not valid. The message names the file.
        OSError: When a file cannot be read or written.

    Example:

    ```python
    from fpnas_keras.report import write_report

    page = write_report("runs/quickstart")
    ```
    """
    search = read(pathlib.Path(directory))
    folder = search.directory / "report"
    folder.mkdir(exist_ok=True)
    plots = {}
    for name, draw in drawings(search).items():
        light = draw(search, LIGHT)
        with replacing(folder / f"{name}.png") as temporary:
            light.savefig(temporary, dpi=2 * PIXELS_PER_INCH, metadata={"Software": None})
        width = round(light.get_figwidth() * PIXELS_PER_INCH)
        plots[name] = Plot(svg(light), svg(draw(search, DARK)), width)
    page = search.directory / "report.html"
    with replacing(page) as temporary:
        temporary.write_text(make_page(search, plots), encoding="utf-8", errors="replace")
    return page
