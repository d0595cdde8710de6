"""Searches a space for an architecture: flags in, a run directory out.

python -m fpnas_keras.search --flagfile=configs/quickstart.flags
"""

import math
import shlex

import keras
import tensorflow as tf
from absl import flags, logging

from fpnas_keras import (
    checkpoints,
    cli,
    data,
    ranking,
    replicas,
    run_directory,
    searched,
    spaces,
)
from fpnas_keras.architecture import Architecture
from fpnas_keras.cost import COSTS, format_cost, latency, make_cost
from fpnas_keras.errors import UserError
from fpnas_keras.files import replacing, summarize_error
from fpnas_keras.method.architecture_search import ArchitectureSearch
from fpnas_keras.method.distributions import FactorizedLogits, JointLogits
from fpnas_keras.method.estimator import AdaptiveSamples, CostController
from fpnas_keras.runs.callbacks import (
    CoarseToFine,
    EpochLine,
    MetricsFile,
    StopOnDivergence,
    TensorBoardFile,
)
from fpnas_keras.runs.checkpoints import Checkpoints
from fpnas_keras.runs.run_directory import Run

FLAGS = flags.FLAGS
for _module in (cli, run_directory, checkpoints):
    flags.adopt_module_key_flags(_module)
flags.mark_flag_as_required("output_dir")
flags.DEFINE_string(
    "space",
    "mobile_mini",
    f"Search space, one of {', '.join(spaces.names())}; or the path of a .json or .py file with a "
    "space of your own (configs/spaces/example.json).",
)
flags.DEFINE_integer(
    "input_size",
    32,
    "Height and width in pixels that images are resized to. Larger sees more and costs its square.",
    lower_bound=1,
)
flags.DEFINE_enum(
    "cost",
    "none",
    list(COSTS),
    "What --target limits: multiply-adds of one image, trainable parameters, or milliseconds on "
    "the device of --latency_table.",
)
flags.DEFINE_string(
    "latency_table",
    None,
    "Table for --cost=latency: a .json file that `python -m export.latency` measured on your "
    "device, or a .yaml or .csv look-up table of ProxylessNAS or once-for-all.",
)
flags.DEFINE_float(
    "target",
    None,
    "What the architecture may cost, in the unit of --cost (3e6 is 3 million MACs or parameters, "
    "1.5 is 1.5 ms).",
    lower_bound=0,
)
flags.DEFINE_float(
    "cost_coefficient",
    None,
    "A fixed weight of the cost against the likelihood (the paper's beta), instead of one that "
    "is moved so that the expected cost settles at the target. Raise it when expected_cost ends "
    "over the target, lower it when it ends far under.",
    lower_bound=0,
)
flags.DEFINE_boolean(
    "two_sided",
    True,
    "Whether the expected cost is also pulled up to the target from below; without it small "
    "networks, which learn faster, often win (set --least_share=0 then).",
)
flags.DEFINE_integer(
    "anneal_steps",
    None,
    "Steps over which the expected cost is brought from its start to the target; by default a "
    "third of those after the warm-up. Lower it for a target that is near the start.",
    lower_bound=0,
)
flags.DEFINE_enum(
    "cost_penalty",
    "expected",
    ["expected", "hinge", "log"],
    "What the cost coefficient weighs: the expected cost (exact), the paper's mean of "
    "max(0, cost / target - 1) over the samples, or the logarithm of that mean.",
)
flags.DEFINE_float(
    "least_share",
    0.95,
    "Least share of the target that the result should cost, 0 to 1 (less, with a warning, where "
    "there is no such architecture). 0 takes the most probable one within the target, which may "
    "be much cheaper.",
    lower_bound=0,
    upper_bound=1,
)
flags.DEFINE_float(
    "derive_seconds",
    60.0,
    "Seconds to prove that no architecture between --least_share and the target is more "
    "probable; after them the best so far is taken, and summary.json says how far it may be off "
    "(derivation_gap, in nats of log p).",
    lower_bound=0,
)
flags.DEFINE_enum(
    "distribution",
    "factorized",
    ["factorized", "joint", "coarse_to_fine"],
    "Logits of each variable alone (fewer, decided sooner), of each combination of a block's "
    "variables (they may depend on each other), or the first, then the second.",
)
flags.DEFINE_integer(
    "coarse_epochs",
    None,
    "Epochs before coarse_to_fine turns from factorized to joint; by default half of all.",
    lower_bound=1,
)
flags.DEFINE_float(
    "sample_scale",
    0.25,
    "Architectures drawn a step for each nat of the distribution's entropy. Larger is less "
    "noisy and slower.",
    lower_bound=0.001,
)
flags.DEFINE_integer("min_samples", 2, "Fewest architectures drawn a step.", lower_bound=1)
flags.DEFINE_integer("max_samples", 64, "Most architectures drawn a step.", lower_bound=1)
flags.DEFINE_integer(
    "samples",
    None,
    "A fixed number of architectures a step, instead of one that follows the entropy.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "warmup_steps",
    None,
    "Steps at the start that train the shared weights alone; by default a fifth of all steps, at "
    "most 300. Untrained weights favour the smallest networks, which "
    "learn first; raise it when the networks are large or learn slowly.",
    lower_bound=0,
)
flags.DEFINE_float(
    "likelihood_scale",
    1.0,
    "Factor of the mean log-likelihoods in the importance weights (tau). Larger makes the best "
    "sample of a step count more; the batch size gives the sum over the batch.",
    lower_bound=0,
)
flags.DEFINE_boolean(
    "control_variate",
    True,
    "Whether 1/K is subtracted from the importance weights; without it (the paper's formula) "
    "the logits follow mostly noise.",
)
flags.DEFINE_boolean(
    "stratified",
    True,
    "Whether each choice is drawn as near to its expected number of times as can be, instead of "
    "independently.",
)
flags.DEFINE_boolean(
    "deduplicate", True, "Whether an architecture that is drawn twice in a step is evaluated once."
)
flags.DEFINE_boolean(
    "recompute",
    False,
    "Whether the backward pass computes the activations inside each block anew instead of keeping "
    "them. For large networks on a GPU of little memory; a step takes longer.",
)
flags.DEFINE_integer("batch_size", 64, "Images a batch, of each part of the data.", lower_bound=2)
flags.DEFINE_integer(
    "architecture_batch_size",
    None,
    "Images a batch of the architecture part, by default as --batch_size. More make the "
    "likelihoods that decide less noisy, at the price of a forward pass.",
    lower_bound=2,
)
flags.DEFINE_integer("epochs", 30, "Epochs to search.", lower_bound=1)
flags.DEFINE_integer(
    "steps_per_epoch",
    None,
    "Steps an epoch; by default one pass over the weights part of the data.",
    lower_bound=1,
)
flags.DEFINE_float(
    "learning_rate", 0.1, "Peak learning rate of the shared weights (SGD, cosine to 0).", 0
)
flags.DEFINE_float(
    "architecture_learning_rate",
    0.03,
    "Learning rate of the architecture logits (Adam). Higher decides earlier, on less evidence.",
    lower_bound=0,
)
flags.DEFINE_enum(
    "strategy",
    "none",
    replicas.STRATEGIES,
    "Who shares the samples of a step: one replica, all GPUs of this machine (mirrored), or all "
    "machines that TF_CONFIG names (multiworker; --output_dir on a file system that they share).",
)
flags.DEFINE_integer(
    "ranked_samples",
    16,
    "Architectures drawn from the result and evaluated with the shared weights, for the Pareto "
    "front of report.html; about a second each for small networks. 0 is off.",
    lower_bound=0,
)
flags.DEFINE_boolean(
    "tensorboard",
    True,
    "Whether scalars, histograms of the probabilities and the flags are written for TensorBoard, "
    "to the folder `tensorboard`.",
)
flags.DEFINE_integer("seed", 0, "Seed of everything that is random.", lower_bound=0)

flags.register_multi_flags_validator(
    ["min_samples", "max_samples"],
    lambda values: values["min_samples"] <= values["max_samples"],
    "--min_samples must be at most --max_samples",
)
flags.register_multi_flags_validator(
    ["cost", "target"],
    lambda values: (values["cost"] == "none") == (values["target"] is None),
    "--target needs --cost=macs, params or latency, and the other way round",
)
flags.register_multi_flags_validator(
    ["cost", "latency_table"],
    lambda values: (values["cost"] == "latency") == (values["latency_table"] is not None),
    "--cost=latency needs --latency_table, and the other way round",
)

flags.register_multi_flags_validator(
    ["target", "cost_coefficient", "anneal_steps"],
    lambda values: (
        values["target"] is not None
        or (values["cost_coefficient"] is None and values["anneal_steps"] is None)
    ),
    "--cost_coefficient and --anneal_steps need --target",
)
flags.register_multi_flags_validator(
    ["cost_coefficient", "anneal_steps"],
    lambda values: values["cost_coefficient"] is None or values["anneal_steps"] is None,
    "--anneal_steps moves the coefficient, which --cost_coefficient fixes",
)
flags.register_multi_flags_validator(
    ["distribution", "epochs"],
    lambda values: values["distribution"] != "coarse_to_fine" or values["epochs"] > 1,
    "--distribution=coarse_to_fine needs at least 2 --epochs",
)
flags.register_multi_flags_validator(
    ["distribution", "coarse_epochs", "epochs"],
    lambda values: (
        values["coarse_epochs"] is None
        or (
            values["distribution"] == "coarse_to_fine"
            and values["coarse_epochs"] < values["epochs"]
        )
    ),
    "--coarse_epochs needs --distribution=coarse_to_fine and must be below --epochs",
)


def main() -> None:
    """Runs the search that the flags describe."""
    chief = replicas.is_chief(FLAGS.strategy)
    run = Run(FLAGS.output_dir, __name__, "fpnas_keras.search", writes=chief)
    with run.interruptions():
        if not run.finished:
            _search(run)
        if chief:
            if not run.path("report.html").exists():
                try:
                    _visualize(run)
                except (ValueError, OSError, tf.errors.OpError) as error:
                    # The result is there all the same.
                    logging.warning("no report: %s", summarize_error(error))
            _report(run)


def _search(run):
    # First of all: TensorFlow takes a cluster only before it has done anything else.
    strategy = replicas.make_strategy(FLAGS.strategy)
    keras.utils.set_random_seed(FLAGS.seed)
    checkpoints = Checkpoints(run, FLAGS.checkpoint_every)
    replicas.check_same_step(strategy, checkpoints.step)
    search, batches = _set_up(checkpoints, strategy)
    files = {"space": FLAGS.space, "latency_table": FLAGS.latency_table}
    run.begin(**{name: file for name, file in files.items() if file not in spaces.names()})
    files, callbacks = [], [StopOnDivergence(), *_coarse_to_fine()]
    if run.writes:
        files, more = _records(run, search)
        callbacks += more
    checkpoints.fit(search, batches, FLAGS.epochs, files, callbacks)
    if run.writes:
        with replacing(run.path("search.weights.h5")) as temporary:
            try:
                search.save_weights(temporary)
            except RuntimeError as error:  # what h5py raises when the disk is full
                raise OSError(f"cannot write search.weights.h5: {summarize_error(error)}") from None
    derivation = search.derivation(seconds=FLAGS.derive_seconds, least_share=FLAGS.least_share)
    # What the most probable architecture reaches with the shared weights.
    mode = search.evaluate(
        batches.map(lambda _, validation: validation),
        steps=checkpoints.steps_per_epoch,
        verbose=0,
        return_dict=True,
    )
    mode = {f"mode_{name}": value for name, value in mode.items()}
    mode["mode_macs"] = search.derive(budget=None).macs()
    if run.writes:
        derivation.architecture.save(run.path("architecture.json"))
        run.finish(**_summary(search, derivation), **mode)


def _records(run, search):
    """What the run writes down every epoch: its files, and further callbacks."""

    def row(epoch, logs):
        return _row(search, epoch, logs)

    def probabilities(epoch, logs):
        blocks = search.distribution.probabilities()
        return {"step": int(search.step.numpy()), "epoch": epoch + 1, "blocks": blocks}

    files = [
        MetricsFile(run.path("metrics.csv"), row),
        MetricsFile(run.path("probabilities.jsonl"), probabilities),
    ]
    callbacks = [EpochLine(lambda epoch, logs: _line(search, row(epoch, logs)))]
    if FLAGS.tensorboard:
        callbacks.append(
            TensorBoardFile(
                run.path("tensorboard"),
                row,
                run.flag_values,
                lambda: _entry_probabilities(search.distribution),
            )
        )
    return files, callbacks


def _entry_probabilities(distribution):
    rows = zip(distribution.entry_probabilities().numpy(), distribution.entries.exists)
    return [row[exists] for row, exists in rows]


def _visualize(run):
    """Ranks some architectures and makes the report."""
    from fpnas_keras import report  # and matplotlib, which the first step need not wait for

    if FLAGS.ranked_samples:
        search = searched.load(run.directory)
        architectures = {"derived": Architecture.load(run.path("architecture.json"))}
        architectures |= ranking.draw(search, FLAGS.ranked_samples, FLAGS.seed)
        images = cli.load_data("train", FLAGS.input_size)
        ranked = ranking.rank(search, architectures, images, FLAGS.seed)
        ranking.save(run.path("ranking.json"), ranked, search.cost.unit)
    report.write(run.directory)


def _coarse_to_fine():
    if FLAGS.distribution != "coarse_to_fine":
        return []
    return [CoarseToFine(_coarse_epochs())]


def _coarse_epochs():
    return FLAGS.coarse_epochs or FLAGS.epochs // 2


def _set_up(checkpoints, strategy):
    """The compiled search and its data, or a `UserError` about the flags."""
    if not FLAGS.space.endswith(".py"):  # which may be for these images only
        spaces.get(FLAGS.space)  # A bad space should not wait for the data.
    images = cli.load_data("train", FLAGS.input_size)
    space = spaces.get(FLAGS.space, images.image_shape, len(images.class_names))
    batches = data.search_batches(
        images.x,
        images.y,
        FLAGS.batch_size,
        FLAGS.seed,
        FLAGS.steps_per_epoch,
        images.image_shape,
        FLAGS.architecture_batch_size,
        checkpoints.step,
    )
    steps_per_epoch = checkpoints.steps_per_epoch or int(batches.cardinality())
    search = _make_search(space, steps_per_epoch, strategy)
    logging.info(
        "space %s: %.2e architectures, %d logits, %s to %s %s; %d steps",
        space.name,
        space.num_architectures,
        search.distribution.count_params(),
        format_cost(search.cost_table.least()),
        format_cost(search.cost_table.largest()),
        search.cost.unit,
        steps_per_epoch * FLAGS.epochs,
    )
    return search, batches


def _make_search(space, steps_per_epoch, strategy):
    """The compiled search, or a `UserError` about the flags."""
    steps = steps_per_epoch * FLAGS.epochs
    warmup_steps = _warmup_steps(steps_per_epoch)
    adaptive = AdaptiveSamples(FLAGS.sample_scale, FLAGS.min_samples, FLAGS.max_samples)
    anneal_steps = FLAGS.anneal_steps
    if anneal_steps is None:
        anneal_steps = (steps - warmup_steps) // 3
    controller = CostController(FLAGS.two_sided, anneal_steps=anneal_steps)
    search = ArchitectureSearch(
        space,
        samples=FLAGS.samples or adaptive,
        cost=make_cost(FLAGS.cost, FLAGS.target, FLAGS.latency_table),
        distribution=FLAGS.distribution,
        cost_coefficient=controller if FLAGS.cost_coefficient is None else FLAGS.cost_coefficient,
        cost_penalty=FLAGS.cost_penalty,
        warmup_steps=warmup_steps,
        likelihood_scale=FLAGS.likelihood_scale,
        control_variate=FLAGS.control_variate,
        stratified=FLAGS.stratified,
        deduplicate=FLAGS.deduplicate,
        recompute=FLAGS.recompute,
        seed=FLAGS.seed,
        strategy=strategy,
    )
    search.compile(
        optimizer=keras.optimizers.SGD(
            keras.optimizers.schedules.CosineDecay(FLAGS.learning_rate, steps),
            momentum=0.9,
            nesterov=True,
        ),
        architecture_optimizer=keras.optimizers.Adam(FLAGS.architecture_learning_rate),
    )
    return search


def _warmup_steps(steps_per_epoch):
    steps = steps_per_epoch * FLAGS.epochs
    warmup_steps = min(300, steps // 5) if FLAGS.warmup_steps is None else FLAGS.warmup_steps
    if warmup_steps >= steps:
        raise UserError(
            f"`warmup_steps` must be below the {steps} steps of the search (`epochs` times "
            f"`steps_per_epoch`). Received: warmup_steps={warmup_steps}"
        )
    if FLAGS.distribution == "coarse_to_fine":
        coarse_steps = steps_per_epoch * _coarse_epochs()
        if coarse_steps <= warmup_steps:
            raise UserError(
                f"`coarse_epochs` must reach beyond the {warmup_steps} steps of the warm-up. "
                f"Received: coarse_epochs={_coarse_epochs()}, {coarse_steps} steps"
            )
    return warmup_steps


def _row(search, epoch, logs):
    step = int(search.step.numpy())
    phase = "joint" if isinstance(search.distribution, JointLogits) else "factorized"
    first = {
        "step": step,
        "epoch": epoch + 1,
        "phase": "warm_up" if step <= search.warmup_steps else phase,
        "samples": logs["samples"],
        "total_samples": int(search.total_samples.numpy()),
    }
    return first | {name: value for name, value in logs.items() if name != "samples"}


def _line(search, row):
    """A row for people."""
    cost = f"{format_cost(row['expected_cost'])} {search.cost.unit}"
    if search.cost.target is not None:
        cost += f" of {format_cost(search.cost.target)}"
    return (
        f"{row['phase']}, {row['samples']:.1f} samples a step, entropy {row['entropy']:.1f} nats, "
        f"expected cost {cost}, loss {row['train_loss']:.3f} (weights part), "
        f"{row['validation_loss']:.3f} (architecture part)"
    )


def _summary(search, derivation):
    table, architecture = search.cost_table, derivation.architecture
    return {
        "space": search.space.name,
        "input_shape": search.space.input_shape,
        "num_classes": search.space.num_classes,
        "num_architectures": search.space.num_architectures,
        "num_logits": search.distribution.count_params(),
        "distribution": FLAGS.distribution,
        "data": FLAGS.data,
        "seed": FLAGS.seed,
        "steps": int(search.step.numpy()),
        "total_samples": int(search.total_samples.numpy()),
        "total_evaluated": int(search.total_evaluated.numpy()),
        "initial_entropy": float(FactorizedLogits(search.space.blocks).entropy()),
        "entropy": float(search.distribution.entropy()),
        "cost": FLAGS.cost,
        "target": FLAGS.target,
        "expected_cost": float(table.expected(search.distribution.entry_probabilities())),
        "found_cost": derivation.cost,
        "derivation_log_prob": derivation.log_prob,
        "derivation_least": derivation.least,
        "derivation_gap": derivation.gap,
        "macs": architecture.macs(),
        "params": architecture.params(),
    }


def _report(run):
    """Prints the result of a finished run and what to type next."""
    summary = run.summary()
    architecture = Architecture.load(run.path("architecture.json"))
    print(f"\n{'block':>5} {'stride':>6} {'filters':>7} kernel expansion activation splits")
    for index, block in enumerate(architecture.blocks):
        row = f"{index:5} {block.strides:6} {block.filters:7} "
        if block.skip:
            print(row + "skip")
        else:
            kernel = f"{block.kernel_size}x{block.kernel_size}"
            print(row + f"{kernel:6} {block.expansion:<9g} {block.activation:10} {block.splits}")
    target = ""
    if summary["cost"] == "latency":
        target = f", {format_cost(summary['found_cost'])} ms by {FLAGS.latency_table}"
    if summary["target"] is not None:
        target += f" (target {format_cost(summary['target'])})"
    if summary["derivation_gap"]:
        target += f", not proven to be the most probable (gap {summary['derivation_gap']:.3g} nats)"
    initial = summary.get("initial_entropy", math.inf)  # earlier versions did not have it
    if summary["entropy"] > initial / 2:
        print(
            f"\nThe search is undecided: entropy {summary['entropy']:.1f} nats of {initial:.1f} at "
            "its start. More --epochs, or a larger --architecture_learning_rate, decide more."
        )
    file = shlex.quote(str(run.path("architecture.json")))
    page = run.path("report.html")
    page = f"report: {page}\n" if page.exists() else ""
    print(
        f"\n{summary['macs']:,} MACs, {summary['params']:,} parameters{target}; "
        f"{summary['total_samples']:,} samples in {summary['steps']:,} steps, "
        f"{summary['wall_seconds']:.0f} s, {summary['peak_memory_mb']:,} MB\n"
        f"results: {run.directory}\n{page}"
        "next, train it:\n"
        f"  python -m fpnas_keras.train --architecture={file} {cli.data_arguments()} "
        f"--output_dir={shlex.quote(str(run.directory) + '_trained')}"
    )
    if summary["cost"] == "latency":
        print(
            "measure it on the device:\n"
            f"  python -m export.latency --architecture={file} {_device_arguments()}"
        )


def _device_arguments():
    """Flags of `export.latency` for the device of the table."""
    arguments = [f"--latency_table={FLAGS.latency_table}"]
    if FLAGS.latency_table.endswith(".json"):
        device = latency.read(FLAGS.latency_table)["device"]
        arguments += [f"--device={device['kind']}", f"--threads={device['threads']}"]
        if device["kind"] == "adb":
            arguments += ["--benchmark_model=BENCHMARK_MODEL"]
            arguments += [f"--core_mask={device['core_mask']}"] if device["core_mask"] else []
            arguments += ["--gpu"] if device["gpu"] else []
    return shlex.join(arguments)


if __name__ == "__main__":
    cli.run(main)
