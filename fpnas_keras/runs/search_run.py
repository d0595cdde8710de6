"""What a search leaves in its run directory."""

import csv
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fpnas_keras.cost import COSTS, Cost, MacsCost, make_cost
from fpnas_keras.errors import UserError
from fpnas_keras.files import (
    KINDS,
    abbreviate,
    check_fields,
    check_format,
    read_json,
    summarize_error,
    write_json,
)
from fpnas_keras.runs.run_directory import RunDirectory
from fpnas_keras.runs.settings import TRAINING_FLAGS
from fpnas_keras.spaces import SUFFIXES
from fpnas_keras.spaces import get as get_space

if TYPE_CHECKING:
    from fpnas_keras.architecture import Architecture
    from fpnas_keras.method import ArchitectureSearch
    from fpnas_keras.runs.ranking import Ranked

_RANKING_FORMAT = 1
# Folder of the finalists, and how many are kept.
_FINALISTS, KEPT_FINALISTS = "finalists", 8
_UNITS = {name: cost.unit for name, cost in COSTS.items()}
# Values of the column `phase`, and what reports call them.
PHASES = {"warm_up": "warm-up", "factorized": "factorized", "joint": "joint"}
# Columns of a search's metrics.csv, in their order.
SEARCH_METRICS = {
    "step": int,
    "epoch": int,
    "phase": str,
    "samples": float,
    "total_samples": int,
    "cost_coefficient": float,
    "entropy": float,
    "evaluated": float,
    "expected_cost": float,
    "train_accuracy": float,
    "train_loss": float,
    "validation_accuracy": float,
    "validation_loss": float,
    "seconds": float,
}
_SUMMARY_OF_SEARCH = dict.fromkeys(
    ("macs", "params", "steps", "total_samples", "total_evaluated"), int
) | dict.fromkeys(("found_cost", "wall_seconds", "cpu_seconds", "peak_memory_mb"), float)


class SearchRun(RunDirectory):
    """What a search left in its run directory. Unfinished searches can be read as well.

    Example:

    ```python
    run = fpnas.search_architecture(data="digits", output_dir="runs/digits", ...)
    run.architecture.build()
    search = run.load_search()
    search.derive(budget=3e5)
    ```
    """

    @property
    def probabilities_file(self) -> pathlib.Path:
        """One JSON object after each epoch, with the probability of each choice."""
        return self.path("probabilities.jsonl")

    @property
    def weights_file(self) -> pathlib.Path:
        """Shared weights and logits."""
        return self.path("search.weights.h5")

    @property
    def ranking_file(self) -> pathlib.Path:
        """Architectures ranked by the shared weights."""
        return self.path("ranking.json")

    @property
    def latency_table(self) -> pathlib.Path | None:
        """The run's copy of the latency table, `None` where the search has none."""
        tables = sorted(self.directory.glob("latency_table.*"))
        return tables[0] if tables else None

    @property
    def is_decided(self) -> bool | None:
        """Whether half of the entropy is gone; `None` before the end."""
        summary = self.summary
        if not summary or "initial_entropy" not in summary:  # which earlier versions did not have
            return None
        return summary["entropy"] <= summary["initial_entropy"] / 2

    @property
    def decision(self) -> str:
        """Whether a finished search has decided, in words; empty before the end."""
        if self.is_decided is None:
            return ""
        summary = self.summary
        return (
            f"The search is {'decided' if self.is_decided else 'undecided'}: "
            f"{summary['entropy']:.1f} of {summary['initial_entropy']:.1f} nats of entropy are "
            "left."
        )

    @property
    def verdict(self) -> str:
        """The decision, and what to do if there is none."""
        if self.is_decided is False:
            return f"{self.decision} Raise --epochs: the command then goes on from here."
        return self.decision

    @property
    def cost_kind(self) -> str:
        """The flag `--cost`: one of `COSTS`."""
        return self._flag("cost")

    @property
    def unit(self) -> str:
        """Unit of the costs."""
        return _UNITS[self.cost_kind]

    @property
    def target(self) -> float | None:
        """The target of the cost."""
        return self._number("target", float) if "target" in self.flags else None

    @property
    def weights_share(self) -> float:
        """Share of the images in the weights part of a finished search. It was 0.5 before 0.3."""
        return self.summary.get("weights_share", 0.5)

    @property
    def may_be_mirrored(self) -> bool:
        """Whether the images have color, and the search has not mirrored them."""
        return self.architecture.input_shape[-1] == 3 and self.flags.get("random_flip") != "true"

    def train_command(
        self, architecture_file: pathlib.Path, data_arguments: str, output_dir: str
    ) -> str:
        """The command that trains an architecture of the search.

        It has the flags of the search that a training should have too, and mirrors images with
        color.

        Args:
            architecture_file: The architecture.
            data_arguments: The flags that name the images.
            output_dir: Directory of the training.
        """
        values = {name: self.flags[name] for name in TRAINING_FLAGS if name in self.flags}
        values |= {"random_flip": "true"} if self.may_be_mirrored else {}
        flags = [
            f"--{name}" if value == "true" else f"--{name}={value}"
            for name, value in values.items()
            if value not in ("false", "none")
        ]
        return (
            f"python -m fpnas_keras.train --architecture={shlex.quote(str(architecture_file))} "
            f"{data_arguments} {shlex.join([*flags, f'--output_dir={output_dir}'])}"
        )

    @functools.cached_property
    def cost(self) -> Cost:
        """The cost of the search. MACs where the copy of the latency table is gone."""
        if self.lacks_table:
            return MacsCost()
        return make_cost(self.cost_kind, table=self.latency_table)

    @property
    def lacks_table(self) -> bool:
        """Whether the copy of the latency table is gone from a search for milliseconds."""
        return self.cost_kind == "latency" and self.latency_table is None

    @functools.cached_property
    def epochs(self) -> list[dict[str, Any]]:
        """The rows of the metrics, with the columns `SEARCH_METRICS`.

        Raises:
            UserError: When no epoch has ended yet, or the file is damaged.
        """
        return _read_metrics(self.metrics_file)

    @property
    def phases(self) -> list[tuple[str, int, int]]:
        """Name, first and last step of each phase. The steps are rounded to whole epochs."""
        phases, start = [], 0
        for name, rows in itertools.groupby(self.epochs, key=lambda row: row["phase"]):
            end = list(rows)[-1]["step"]
            phases.append((name, start, end))
            start = end
        return phases

    @functools.cached_property
    def probabilities(self) -> list[dict[str, Any]]:
        """`{"step": ..., "epoch": ..., "blocks": [{variable: {choice: probability}}]}` by epoch.

        Raises:
            UserError: When the file is damaged.
        """
        file = self.probabilities_file
        return _read_probabilities(file) if file.is_file() else []

    @property
    def ranking(self) -> dict[str, Any] | None:
        """What `write_ranking` wrote, `None` before that.

        Raises:
            UserError: When the file is damaged.
        """
        if not self.ranking_file.is_file():
            return None
        return read_json(self.ranking_file, "a ranking", _checked_ranking)

    def write_ranking(self, ranked: "Sequence[Ranked]", unit: str) -> None:
        """Writes a ranking.

        Args:
            ranked: Architectures, best first.
            unit: Unit of their costs.
        """
        rows = []
        for number, each in enumerate(ranked, 1):
            count = each.architecture.count()
            row = each._asdict() | {"rank": number, "macs": count.macs, "params": count.params}
            rows.append(row | {"architecture": each.architecture.to_dict()})
        contents = {"format": _RANKING_FORMAT, "images": ranked[0].images, "cost_unit": unit}
        write_json(self.ranking_file, contents | {"architectures": rows})

    @property
    def finalist_files(self) -> list[pathlib.Path]:
        """The result and the best of the other finalists, the best one first."""
        folder = self.path(_FINALISTS)
        return sorted(folder.glob("*.json"), key=lambda file: (len(file.name), file.name))

    def write_finalists(self, architectures: "Sequence[Architecture]") -> None:
        """Writes the result and the best of the other finalists.

        Args:
            architectures: The finalists, the best one first.
        """
        for file in self.finalist_files:  # of a search that went on
            file.unlink()
        for number, architecture in enumerate(architectures[:KEPT_FINALISTS], 1):
            file = self.path(f"{_FINALISTS}/{number}.json")
            file.parent.mkdir(exist_ok=True)
            architecture.save(file)

    def write_pareto_front(self, ranked: "Sequence[Ranked]") -> None:
        """Writes the architectures on the Pareto front of a ranking to files of their own."""
        for each in ranked:
            if each.pareto:
                file = self.pareto_file(each)
                file.parent.mkdir(exist_ok=True)
                each.architecture.save(file)

    def pareto_file(self, ranked: "Ranked") -> pathlib.Path:
        """The file of an architecture on the Pareto front.

        Its name depends on its content. A later ranking does not overwrite it, since trainings
        refer to it.
        """
        content = json.dumps(ranked.architecture.to_dict(), sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:8]
        name = pathlib.Path(ranked.name).stem.replace(" ", "_")
        return self.path("pareto") / f"{name}_{digest}.json"

    @classmethod
    def of_architecture(cls, file: str | os.PathLike) -> "SearchRun":
        """The run directory of an architecture file.

        It is the folder of the file, or the parent of `pareto/` and `finalists/`.
        """
        folder = pathlib.Path(file).parent
        return cls(folder.parent if folder.name in ("pareto", _FINALISTS) else folder)

    def load_search(self) -> "ArchitectureSearch":
        """The search with its shared weights and logits, not compiled.

        Raises:
            UserError: When the directory holds no finished search, or one of its files is damaged.
        """
        from fpnas_keras.method import ArchitectureSearch

        summary = read_json(self.summary_file, "a finished search's summary", _checked_for_loading)
        if summary["cost"] == "latency" and self.latency_table is None:
            raise UserError(
                f"{self.directory} lacks the search's latency table (latency_table.json)"
            )
        copies = [self.path(f"space{suffix}") for suffix in SUFFIXES]
        space = get_space(
            next((file for file in copies if file.is_file()), summary["space"]),
            tuple(summary["input_shape"]),
            summary["num_classes"],
        )
        search = ArchitectureSearch(
            dataclasses.replace(space, name=summary["space"]),  # not that of the copied file
            cost=make_cost(summary["cost"], summary["target"], self.latency_table),
            distribution=summary["distribution"],
            start="uniform",  # The weights replace it.
            warmup_steps=0,
        )
        try:
            search.load_weights(self.weights_file)
        except Exception as error:  # The readers inside Keras raise errors of many classes.
            raise UserError(
                f"{self.weights_file} must hold the weights of the search: {summarize_error(error)}"
            ) from None
        return search

    def _check_flags(self):
        for name in ("space", "data", "cost", "epochs"):
            self._flag(name)
        if self.cost_kind not in _UNITS:
            raise UserError(
                f"--cost in {self.flag_file} must be one of {', '.join(_UNITS)}. "
                f"Received: {self.cost_kind}"
            )

    def _checked_summary(self, summary: Any) -> dict[str, Any]:
        check_fields(summary, "the summary", **_SUMMARY_OF_SEARCH)
        return summary


def _checked_for_loading(summary):
    kinds = {"space": str, "input_shape": list, "num_classes": int, "distribution": str}
    check_fields(summary, "the summary", **kinds, cost=str)
    if summary.get("target", 0) is not None:  # where it is missing too
        check_fields(summary, "the summary", target=float)
    if summary["cost"] not in COSTS:
        raise UserError(f"`cost` must be one of {', '.join(COSTS)}. Received: {summary['cost']}")
    return summary


def _read_metrics(path):
    if not path.is_file():
        raise UserError(f"{path} is missing: no epoch has ended yet, or this is no search")
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            missing = [name for name in SEARCH_METRICS if name not in (reader.fieldnames or ())]
            if reader.fieldnames and missing:
                raise UserError(
                    f"it lacks the columns {', '.join(missing)}. "
                    f"Received: {abbreviate(','.join(reader.fieldnames))}"
                )
            for cells in reader:
                row = {name: _read_cell(cells, name) for name in SEARCH_METRICS}
                _check_step(rows, row)
                rows.append(row)
            if not rows:
                raise UserError("no epoch has ended yet")
        except (ValueError, csv.Error) as error:
            raise UserError(
                f"{path} is not the metrics of a search: line {reader.line_num}: {error}"
            ) from None
    return rows


def _read_cell(cells, name):
    kind, received = SEARCH_METRICS[name], abbreviate(cells[name])
    if name == "phase" and cells[name] not in PHASES:
        raise UserError(f"`phase` must be one of {', '.join(PHASES)}. Received: {received}")
    try:
        # A search that diverged has NaN among its metrics.
        return kind(cells[name])
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
                if _choice_names(row) != _choice_names(rows[0] if rows else row):
                    raise UserError("it must have the blocks and choices of line 1")
                rows.append(row)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path} is not the probabilities of a search: line {len(rows) + 1}: {error}"
            ) from None
    return rows


def _choice_names(row):
    """Names of the choices of each variable of each block, after a check of their values."""
    for block in row["blocks"]:
        variables = block.values() if isinstance(block, dict) else [block]
        for choices in variables:
            if not isinstance(choices, dict) or not choices:
                raise UserError(
                    "a block must hold {variable: {choice: probability}}. "
                    f"Received: {abbreviate(block)}"
                )
            for value in choices.values():
                # A search that diverged has NaN.
                if type(value) not in (int, float) or value < 0 or value > 1:
                    raise UserError(
                        f"a probability must be from 0 to 1. Received: {abbreviate(value)}"
                    )
    return [{name: list(each) for name, each in block.items()} for block in row["blocks"]]


def _checked_ranking(data):
    check_fields(data, "the ranking", format=int, images=int, cost_unit=str, architectures=list)
    check_format(data, _RANKING_FORMAT)
    if data["cost_unit"] not in _UNITS.values():
        raise UserError(
            f"`cost_unit` must be one of {', '.join(dict.fromkeys(_UNITS.values()))}. "
            f"Received: {abbreviate(data['cost_unit'])}"
        )
    for index, each in enumerate(data["architectures"]):
        numbers = {"accuracy": float, "loss": float, "cost": float, "macs": int, "params": int}
        if isinstance(each, dict) and each.get("log_prob") is not None:
            numbers["log_prob"] = float
        where = f"`architectures[{index}]`"
        check_fields(each, where, name=str, rank=int, pareto=bool, **numbers)
    return data
