"""Ranks architectures of a finished search by its shared weights, to pick one from.

python -m fpnas_keras.rank --search_dir=runs/quickstart
"""

import dataclasses
import math
import sys
from typing import TYPE_CHECKING, Any

from fpnas_keras import data, report, runs
from fpnas_keras.architecture import Architecture
from fpnas_keras.commands import Command, run_command, visible_log
from fpnas_keras.cost import format_cost
from fpnas_keras.data.settings import DATA_FLAGS, DataSettings
from fpnas_keras.errors import UserError
from fpnas_keras.settings import MAX_SEED, Settings, setting

if TYPE_CHECKING:
    from fpnas_keras.runs import Ranked, SearchRun

_IMAGES = "Images"
_AS_SEARCHED = " Default: as the search."


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankSettings(Settings):
    """Settings of a ranking. Each is a flag of `fpnas rank`."""

    search_dir: str = setting("Directory of a finished search.", basic=True)
    budget: float | None = setting(
        "Maximum cost of the architectures, in the unit of the search's cost. The derived one is "
        "derived anew, and all others are drawn within it. Default: the derived one is that of the "
        "search, and the others cost whatever the distribution gives.",
        None,
        least=0,
        basic=True,
    )
    samples: int = setting(
        "Architectures to draw from the search's distribution, beside the derived one and those of "
        "--architectures. Equal ones are ranked once, so that fewer may come out.",
        32,
        least=0,
        basic=True,
    )
    architectures: tuple[str, ...] = setting(
        "Further architecture files of the same space to rank, separated by commas.",
        (),
        basic=True,
    )
    evaluation_images: int = setting(
        "Maximum number of images of the architecture part to evaluate on. More images are less "
        "noisy: with n images, the standard error of an accuracy p is sqrt(p * (1 - p) / n).",
        5000,
        least=2,
        group=_IMAGES,
    )
    batch_size: int | None = setting(
        "Images in a batch, about. Batch normalization uses the statistics of each. Default: up to "
        "250, as many as the memory allows.",
        None,
        least=2,
        group=_IMAGES,
    )
    data: str | None = setting("Images to use." + _AS_SEARCHED, None, group=_IMAGES)
    data_dir: str | None = setting(
        "Folder where tensorflow_datasets keeps its data." + _AS_SEARCHED, None, group=_IMAGES
    )
    download: bool | None = setting(
        "Whether tensorflow_datasets may download data." + _AS_SEARCHED, None, group=_IMAGES
    )
    train_images: int | None = setting(
        "Number of training images. It must be that of the search.", None, least=2, group=_IMAGES
    )
    seed: int = setting("Seed of the architectures that are drawn.", 0, least=0, most=MAX_SEED)

    def find_images(self, run: "SearchRun") -> DataSettings:
        """Which images to use: those of the search, unless others are given.

        Raises:
            UserError: When the search's flag file is damaged, or when `train_images` is not that
                of the search: nobody would know which images trained the shared weights.
        """
        theirs = run.data_settings()
        if self.train_images not in (None, theirs.train_images):
            raise UserError(
                f"`train_images` must be that of {run.flag_file}, {theirs.train_images}. "
                f"Received: train_images={self.train_images}"
            )
        given = {name: value for name, value in self.given().items() if name in DATA_FLAGS}
        return theirs.replaced(given | {"train_images": theirs.train_images})


def rank_architectures(**settings: Any) -> "list[Ranked]":
    """Ranks architectures of a finished search by what they reach with its shared weights.

    The ranking is written into the directory of the search, and its report is made again. The
    architectures on the Pareto front are written to files, to train one of them.

    Args:
        **settings: The fields of `RankSettings`, which are the flags of `fpnas rank`.

    Returns:
        The architectures, the most accurate first.

    Raises:
        UserError: When a setting is wrong, or the directory holds no finished search.

    Example:

    ```python
    ranked = fpnas.rank_architectures(search_dir="runs/quickstart", samples=32)
    ranked[0].accuracy, ranked[0].architecture
    ```
    """
    with visible_log():
        return run_ranking(RankSettings(**settings))


def run_ranking(settings: RankSettings) -> "list[Ranked]":
    """Like `rank_architectures`, but takes a `RankSettings`."""
    run = runs.SearchRun(settings.search_dir)
    search = run.load_search()
    images_settings = settings.find_images(run)
    if settings.budget is None:
        architectures = {"derived": Architecture.load(run.architecture_file)}
    else:
        architectures = {"derived": search.derive(settings.budget)}
    architectures |= {path: Architecture.load(path) for path in settings.architectures}
    if settings.samples:
        architectures |= runs.draw_architectures(
            search, settings.samples, settings.seed, settings.budget
        )
    images = images_settings.load_images_for(
        f"the search {run.directory}", search.space.input_shape, search.space.num_classes, "train"
    )
    if run.flags.get("class_weight") == "balanced":
        images = images.balanced()
    with data.naming_unreadable(images):
        evaluation = runs.Evaluation(
            search, images, run.weights_share, settings.evaluation_images, settings.batch_size
        )
    ranked = runs.rank_by_shared_weights(evaluation, architectures)
    run.write_ranking(ranked, search.cost.unit)
    run.write_pareto_front(ranked)
    with report.failure_as_warning():
        report.write_report(run.directory)
    return ranked


def _rank_and_print(settings):
    ranked = run_ranking(settings)
    run = runs.SearchRun(settings.search_dir)
    print(_describe(run, ranked))
    front = [each for each in ranked if each.pareto]
    print(f"\nranking: {run.ranking_file}\nPareto front:")
    print("\n".join(f"  {run.pareto_file(each)}" for each in front))
    if run.report.exists():
        print(f"report: {run.report}")
    target = settings.budget or run.target or math.inf
    # The derived network is within the target, but for the rounding of sums of milliseconds.
    best = next((each for each in ranked if each.cost <= target), ranked[0])
    file = run.pareto_file(best)
    data_arguments = settings.find_images(run).data_arguments()
    command = run.train_command(file, data_arguments, f"{run.directory}_{file.stem}")
    print(f"next, train one of them:\n  {command}")


def _describe(run, ranked):
    """The ranking as a table."""
    lines = [f"\n{'rank':>4} {'accuracy':>8} {'loss':>6} {run.unit:>12} {'log p':>7} Pareto name"]
    for number, each in enumerate(ranked, 1):
        mark = "*" if each.pareto else ""
        lines.append(
            f"{number:4} {each.accuracy:8.2%} {each.loss:6.3f} {format_cost(each.cost):>12} "
            f"{each.log_prob:7.1f} {mark:6} {each.name}"
        )
    return "\n".join(lines)


COMMAND = Command(
    name="fpnas rank",
    summary="Ranks architectures of a finished search by its shared weights.",
    examples=(
        (
            "Draws 32 architectures from a search and ranks them",
            "fpnas rank --search_dir=runs/mine --samples=32",
        ),
    ),
    settings=RankSettings,
    run=_rank_and_print,
)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
