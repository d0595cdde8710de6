"""Files that are either whole or not there."""

import contextlib
import os
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Gives a temporary path that becomes `path` when the block ends well.

    The temporary file lies beside `path` and keeps its suffix (Keras reads the
    format from it). When the block raises, the temporary file is removed and
    what was at `path` stays as it was.

    Args:
        path: The file to write.

    Yields:
        The path to write to.

    Example:

    ```python
    with replacing("model.keras") as temporary:
        model.save(temporary)
    ```
    """
    path = pathlib.Path(path)
    # The suffix stays last, in full: Keras wants ".weights.h5" for weights.
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
