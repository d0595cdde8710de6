"""What a finished search left in its run directory, to go on with."""

import dataclasses
import os
import pathlib

from fpnas_keras import spaces
from fpnas_keras.cost import COSTS, make_cost
from fpnas_keras.errors import UserError
from fpnas_keras.files import check_fields, read_json, summarize_error
from fpnas_keras.method.architecture_search import ArchitectureSearch


def load(directory: str | os.PathLike) -> ArchitectureSearch:
    """The search of a run directory, with its shared weights and logits; not compiled.

    Args:
        directory: The directory of a finished `fpnas_keras.search`.

    Raises:
        UserError: When the directory holds no finished search.

    Example:

    ```python
    from fpnas_keras import searched

    search = searched.load("runs/quickstart")
    search.derive(budget=3e5)
    ```
    """
    directory = pathlib.Path(directory)
    summary = read_json(directory / "summary.json", "a finished search's summary", _checked)
    space_files = [directory / f"space{suffix}" for suffix in spaces.SUFFIXES]
    space = next((file for file in space_files if file.is_file()), summary["space"])
    tables = sorted(directory.glob("latency_table.*"))
    if summary["cost"] == "latency" and not tables:
        raise UserError(f"{directory} lacks the search's latency table (latency_table.json)")
    space = spaces.get(space, tuple(summary["input_shape"]), summary["num_classes"])
    search = ArchitectureSearch(
        dataclasses.replace(space, name=summary["space"]),  # its file was another's copy
        cost=make_cost(summary["cost"], summary["target"], tables[0] if tables else None),
        distribution=summary["distribution"],
        warmup_steps=0,
    )
    weights = directory / "search.weights.h5"
    try:
        search.load_weights(weights)
    except Exception as error:  # Keras raises what its many readers raise.
        raise UserError(
            f"{weights} must hold the weights of the search: {summarize_error(error)}"
        ) from None
    return search


def _checked(summary):
    kinds = {"space": str, "input_shape": list, "num_classes": int, "distribution": str}
    check_fields(summary, "the summary", **kinds, cost=str)
    if summary.get("target", 0) is not None:  # where it is missing too
        check_fields(summary, "the summary", target=float)
    if summary["cost"] not in COSTS:
        raise UserError(f"`cost` must be one of {', '.join(COSTS)}. Received: {summary['cost']}")
    return summary
