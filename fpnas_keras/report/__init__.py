"""The report of a search: a page and plots, from the files of its run directory alone.

python -m fpnas_keras.report --search_dir=runs/x
"""

import os
import pathlib

from fpnas_keras.errors import UserError
from fpnas_keras.files import replacing
from fpnas_keras.report.page import make_page
from fpnas_keras.report.plots import DARK, LIGHT, PIXELS_PER_INCH, drawings, svg
from fpnas_keras.runs.search_run import read

__all__ = ["write"]


def write(directory: str | os.PathLike) -> pathlib.Path:
    """Writes `report.html` and the plots in `report/` into a run directory.

    Everything comes from the files that the directory holds; what an unfinished search has not
    written yet is left out. The page needs no other file and no network.

    Args:
        directory: The run directory of a search, finished or not.

    Returns:
        Path of the page.

    Raises:
        UserError: When the directory holds no search, or when one of its files is not what it
            should be; the message names it.
        OSError: When a file cannot be read or written.

    Example:

    ```python
    from fpnas_keras import report

    page = report.write("runs/quickstart")
    ```
    """
    search = read(pathlib.Path(directory))
    folder = search.directory / "report"
    folder.mkdir(exist_ok=True)
    pictures = {}
    for name, draw in drawings(search).items():
        light = draw(search, LIGHT)
        with replacing(folder / f"{name}.png") as temporary:
            light.savefig(temporary, dpi=2 * PIXELS_PER_INCH, metadata={"Software": None})
        width = round(light.get_figwidth() * PIXELS_PER_INCH)
        pictures[name] = (svg(light), svg(draw(search, DARK)), width)
    page = search.directory / "report.html"
    with replacing(page) as temporary:
        temporary.write_text(make_page(search, pictures), encoding="utf-8", errors="replace")
    return page
