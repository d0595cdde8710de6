"""What the report is made of: the files of a run directory, read strictly."""

import csv
import itertools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fpnas_keras.architecture import Architecture, Part
from fpnas_keras.cost import COSTS, MacsCost, make_cost
from fpnas_keras.errors import UserError
from fpnas_keras.files import KINDS, abbreviate, check_fields, check_format, flag_values, read_json
from fpnas_keras.runs.ranking import FORMAT

UNITS = {name: cost.unit for name, cost in COSTS.items()}
PHASES = {"warm_up": "warm-up", "factorized": "factorized", "joint": "joint"}
# Columns of metrics.csv that the report needs.
_COLUMNS = {"step": int, "epoch": int, "phase": str, "total_samples": int} | dict.fromkeys(
    (
        *("samples", "evaluated", "entropy", "expected_cost", "cost_coefficient", "seconds"),
        *("train_loss", "train_accuracy", "validation_loss", "validation_accuracy"),
    ),
    float,
)


class Search(NamedTuple):
    """What the files of a run directory say; `None` or empty what is not there."""

    directory: pathlib.Path
    flags: dict[str, str]
    target: float | None
    planned_epochs: int
    epochs: list[dict[str, Any]]
    probabilities: list[dict[str, Any]]
    architecture: Architecture | None
    cost: Callable[[Part], float]
    summary: dict[str, Any] | None
    ranking: dict[str, Any] | None

    @property
    def unit(self) -> str:
        """Unit of the costs."""
        return UNITS[self.flags["cost"]]

    @property
    def phases(self) -> list[tuple[str, int, int]]:
        """Name, first and last step of each phase, to an epoch."""
        phases, start = [], 0
        for name, rows in itertools.groupby(self.epochs, key=lambda row: row["phase"]):
            end = list(rows)[-1]["step"]
            phases.append((name, start, end))
            start = end
        return phases

    def column(self, name: str) -> np.ndarray:
        """A column of `metrics.csv`; what has no place in a plot, as infinity, as NaN."""
        values = np.array([row[name] for row in self.epochs], float)
        return np.where(np.abs(values) < 1e300, values, np.nan)


def read(directory: pathlib.Path) -> Search:
    """Reads the files of a run directory, or raises `UserError`."""
    for name in ("flags.txt", "metrics.csv"):
        if not (directory / name).is_file():
            raise UserError(
                "`search_dir` must be the run directory of a search, with flags.txt and "
                f"metrics.csv. Received: {directory}, which lacks {name}"
            )
    flag_file = directory / "flags.txt"
    values = _read_flags(flag_file)

    def optional(name, read, missing=None):
        return read(directory / name) if (directory / name).is_file() else missing

    return Search(
        directory=directory,
        flags=values,
        target=_number(values, "target", float, flag_file) if "target" in values else None,
        planned_epochs=_number(values, "epochs", int, flag_file),
        epochs=_read_metrics(directory / "metrics.csv"),
        probabilities=optional("probabilities.jsonl", _read_probabilities, []),
        architecture=optional("architecture.json", Architecture.load),
        cost=_cost(directory, values),
        summary=optional("summary.json", _read_summary),
        ranking=optional("ranking.json", _read_ranking),
    )


def _read_flags(path):
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} must be text in UTF-8. Received: {error}") from None
    values = flag_values(lines)
    for name in ("space", "data", "cost", "epochs"):
        if name not in values:
            raise UserError(f"{path} must hold the flags of a search. It lacks --{name}")
    if values["cost"] not in UNITS:
        raise UserError(
            f"--cost in {path} must be one of {', '.join(UNITS)}. Received: {values['cost']}"
        )
    return values


def _number(values, name, kind, path):
    try:
        number = kind(values[name])
        if 0 < number < math.inf:
            return number
    except ValueError:
        pass
    raise UserError(
        f"--{name} in {path} must be a number above 0. Received: --{name}={values[name]}"
    )


def _read_metrics(path):
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if reader.fieldnames and missing:
                raise UserError(
                    f"it lacks the columns {', '.join(missing)}. "
                    f"Received: {abbreviate(','.join(reader.fieldnames))}"
                )
            for row in reader:
                row = {name: _cell(row, name) for name in _COLUMNS}
                _check_step(rows, row)
                rows.append(row)
            if not rows:
                raise UserError("no epoch has ended yet")
        except (ValueError, csv.Error) as error:
            raise UserError(
                f"{path} is not the metrics of a search: line {reader.line_num}: {error}"
            ) from None
    return rows


def _cell(row, name):
    kind, received = _COLUMNS[name], abbreviate(row[name])
    if name == "phase" and row[name] not in PHASES:
        raise UserError(f"`phase` must be one of {', '.join(PHASES)}. Received: {received}")
    try:
        # A search that diverged has NaN among its metrics.
        return kind(row[name])
    except (TypeError, ValueError):
        raise UserError(f"`{name}` must be {KINDS[kind]}. Received: {received}") from None


def _check_step(rows, row):
    before = rows[-1]["step"] if rows else 0
    if not before < row["step"] < 1e15:
        raise UserError(
            f"`step` must rise from line to line. Received: {row['step']} after {before}"
        )


def _read_probabilities(path):
    rows = []
    with path.open(encoding="utf-8") as file:
        try:
            for line in file:
                row = json.loads(line)
                check_fields(row, "it", step=int, epoch=int, blocks=list)
                _check_step(rows, row)
                if _choices(row) != _choices(rows[0] if rows else row):
                    raise UserError("it must have the blocks and choices of line 1")
                rows.append(row)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path} is not the probabilities of a search: line {len(rows) + 1}: {error}"
            ) from None
    return rows


def _choices(row):
    """Names of the choices of each variable of each block."""
    for block in row["blocks"]:
        variables = block.values() if isinstance(block, dict) else [block]
        for each in variables:
            if not isinstance(each, dict) or not each:
                raise UserError(
                    "a block must hold {variable: {choice: probability}}. "
                    f"Received: {abbreviate(block)}"
                )
            for value in each.values():
                # A search that diverged has NaN.
                if type(value) not in (int, float) or value < 0 or value > 1:
                    raise UserError(
                        f"a probability must be from 0 to 1. Received: {abbreviate(value)}"
                    )
    return [{name: list(each) for name, each in block.items()} for block in row["blocks"]]


def _read_summary(path):
    numbers = dict.fromkeys(("found_cost", "wall_seconds", "cpu_seconds", "peak_memory_mb"), float)
    counts = dict.fromkeys(("macs", "params", "steps", "total_samples", "total_evaluated"), int)

    def checked(data):
        check_fields(data, "the summary", **counts, **numbers)
        return data

    return read_json(path, "a summary", checked)


def _read_ranking(path):
    def checked(data):
        check_fields(data, "the ranking", format=int, images=int, cost_unit=str, architectures=list)
        check_format(data, FORMAT)
        if data["cost_unit"] not in UNITS.values():
            raise UserError(
                f"`cost_unit` must be one of {', '.join(dict.fromkeys(UNITS.values()))}. "
                f"Received: {abbreviate(data['cost_unit'])}"
            )
        for index, each in enumerate(data["architectures"]):
            numbers = {"accuracy": float, "loss": float, "cost": float, "macs": int, "params": int}
            if isinstance(each, dict) and each.get("log_prob") is not None:
                numbers["log_prob"] = float
            where = f"`architectures[{index}]`"
            check_fields(each, where, name=str, rank=int, pareto=bool, **numbers)
        return data

    return read_json(path, "a ranking", checked)


def _cost(directory, values):
    """What a part of the network costs; MACs where the copy of the latency table is gone."""
    suffix = pathlib.Path(values.get("latency_table", "")).suffix
    table = directory / f"latency_table{suffix}"
    if values["cost"] == "latency" and not table.is_file():
        return MacsCost()
    return make_cost(values["cost"], table=table)
