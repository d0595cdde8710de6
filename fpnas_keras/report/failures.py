"""A report that cannot be written."""

import contextlib
from collections.abc import Iterator

from absl import logging

from fpnas_keras.errors import UserError
from fpnas_keras.files import summarize_error


@contextlib.contextmanager
def failure_as_warning() -> Iterator[None]:
    """Inside the block, a report that cannot be written is a warning: the run is not lost.

    Example:

    ```python
    with report.failure_as_warning():
        report.write_report(run.directory)
    ```
    """
    try:
        yield
    except (UserError, OSError) as error:
        logging.warning("no report: %s", summarize_error(error))
