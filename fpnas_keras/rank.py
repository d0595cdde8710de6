"""Ranks architectures of a finished search by its shared weights, to pick one from.

python -m fpnas_keras.rank --search_dir=runs/quickstart
"""

import hashlib
import json
import math
import pathlib
import shlex

from absl import flags, logging

from fpnas_keras import cli, ranking, report, searched
from fpnas_keras.architecture import Architecture
from fpnas_keras.cost import format_cost

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(cli)
flags.DEFINE_string(
    "search_dir",
    None,
    "Directory of a finished fpnas_keras.search. Its data is used where --data is not given.",
    required=True,
)
flags.DEFINE_integer(
    "samples",
    32,
    "Architectures to draw from the search's distribution, beside the derived one and those of "
    "--architectures. Equal ones are ranked once, so that fewer may come out.",
    lower_bound=0,
)
flags.DEFINE_list(
    "architectures",
    [],
    "Further architecture files of the same space to rank, separated by commas.",
)
flags.DEFINE_integer(
    "evaluation_images",
    5000,
    "Most images of the architecture part to evaluate on. More are less noisy: with n images an "
    "accuracy p is known to sqrt(p * (1 - p) / n).",
    lower_bound=1,
)
flags.DEFINE_integer(
    "recalibration_images",
    2000,
    "Most images of the weights part for the statistics of the batch norms.",
    lower_bound=2,
)
flags.DEFINE_integer("seed", 0, "Seed of what is drawn.", lower_bound=0)


def main() -> None:
    """Ranks, prints the ranking and writes it into the directory of the search."""
    directory = pathlib.Path(FLAGS.search_dir)
    search = searched.load(directory)
    cli.take_data_flags(directory / "flags.txt")
    architectures = {"derived": Architecture.load(directory / "architecture.json")}
    architectures |= {path: Architecture.load(path) for path in FLAGS.architectures}
    if FLAGS.samples:
        architectures |= ranking.draw(search, FLAGS.samples, FLAGS.seed)
    images = cli.load_data_for(
        f"the search {directory}",
        search.space.input_shape,
        search.space.num_classes,
        "train",
    )
    ranked = ranking.rank(
        search,
        architectures,
        images,
        int(search.seed.numpy()),
        FLAGS.evaluation_images,
        FLAGS.recalibration_images,
    )
    _print(ranked, search.cost)
    ranking.save(directory / "ranking.json", ranked, search.cost.unit)
    (directory / "pareto").mkdir(exist_ok=True)
    files = {}
    for each in ranked:
        if each.pareto:
            files[each.name] = _front_file(directory, each)
            each.architecture.save(files[each.name])
    _report(directory, ranked, search.cost, files)


def _print(ranked, cost):
    """Prints the ranking."""
    print(f"\n{'rank':>4} {'accuracy':>8} {'loss':>6} {cost.unit:>12} {'log p':>7} Pareto name")
    for number, each in enumerate(ranked, 1):
        mark = "*" if each.pareto else ""
        print(
            f"{number:4} {each.accuracy:8.2%} {each.loss:6.3f} {format_cost(each.cost):>12} "
            f"{each.log_prob:7.1f} {mark:6} {each.name}"
        )


def _report(directory, ranked, cost, files):
    """Makes the report and prints where all is and what to type next."""
    print(f"\nranking: {directory / 'ranking.json'}\nPareto front:")
    for file in files.values():
        print(f"  {file}")
    try:
        print(f"report: {report.write(directory)}")
    except (ValueError, OSError) as error:  # The ranking is there all the same.
        logging.warning("no report: %s", error)
    # The first one within the target; there is always the derived network. It is on the front.
    target = math.inf if cost.target is None else cost.target
    best = next((each for each in ranked if each.cost <= target), ranked[0])
    file = files[best.name]
    print(
        "next, train one of them:\n  python -m fpnas_keras.train "
        f"--architecture={shlex.quote(str(file))} {cli.data_arguments()} "
        f"--output_dir={shlex.quote(f'{directory}_{file.stem}')}"
    )


def _front_file(directory, ranked):
    """A name that no other architecture gets in a later ranking: trainings refer to the file."""
    content = json.dumps(ranked.architecture.to_dict(), sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    name = pathlib.Path(ranked.name).stem.replace(" ", "_")
    return directory / "pareto" / f"{name}_{digest}.json"


if __name__ == "__main__":
    cli.run(main)
