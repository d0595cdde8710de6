"""Searches a space for an architecture: settings in, a run directory out.

python -m fpnas_keras.search --flagfile=configs/quickstart.flags
"""

import dataclasses
import functools
import math
import shlex
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging

from fpnas_keras import data, method, report, runs, spaces
from fpnas_keras.commands import Command, run_command, visible_log
from fpnas_keras.cost import COSTS, format_cost, latency_table, make_cost, published_tables
from fpnas_keras.errors import UserError
from fpnas_keras.files import replacing, summarize_error
from fpnas_keras.runs.settings import (
    RunSettings,
    choose_batch_size,
    make_schedule,
    scale_rate,
)
from fpnas_keras.settings import setting

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

    from fpnas_keras.architecture import Architecture
    from fpnas_keras.method import ArchitectureSearch, Derivation
    from fpnas_keras.runs import Checkpoints, Evaluation, SearchRun, Session

_SPACE, _COST, _METHOD = "Space", "Cost and target", "Method"
_TRAINING, _RESULT = "Shared weights and logits", "Result"
# Steps of a search whose length is not given, and steps of its epochs.
_STEPS, _STEPS_PER_EPOCH = 1500, 50
_BATCH_SIZE = 64
# Searches whose logits can move less than this are usually undecided at their end.
_LEAST_REACH = 10
# Default learning rates of the shared weights for that batch size.
_LEARNING_RATES = {"sgd": 0.1, "adam": 0.002}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSettings(RunSettings):
    """Settings of a search. Each is a flag of `fpnas search`."""

    space: str = setting(
        f"Search space: {', '.join(spaces.names())}; or the path of a .json or .py file with a "
        "space of your own (configs/spaces/example.json).",
        "mobile_mini",
        group=_SPACE,
        path=True,
    )
    input_size: int = setting(
        "Height and width in pixels that images are resized to. Twice the size costs four times "
        "the MACs.",
        32,
        least=1,
        basic=True,
    )
    cost: str = setting(
        "What --target limits: multiply-adds of one image, trainable parameters, bytes of the int8 "
        "file, or milliseconds on the device of --latency_table.",
        "none",
        choices=tuple(COSTS),
        basic=True,
    )
    target: float | None = setting(
        "Maximum cost of the architecture, in the unit of --cost (3e6 is 3 million MACs, "
        "parameters or bytes; 1.5 is 1.5 ms).",
        None,
        least=0,
        basic=True,
    )
    latency_table: str | None = setting(
        "Latency table for --cost=latency: a .json file that `fpnas latency` measured on your "
        "device, or a .yaml or .csv look-up table of ProxylessNAS or once-for-all.",
        None,
        group=_COST,
        path=True,
    )
    cost_coefficient: float | None = setting(
        "A fixed weight of the cost against the likelihood (the paper's beta). By default a "
        "controller moves the weight so that the expected cost settles at the target. Raise it "
        "when expected_cost ends over the target, lower it when it ends far under.",
        None,
        least=0,
        group=_COST,
    )
    two_sided: bool = setting(
        "Whether the controller also raises an expected cost that is below the target. Without "
        "it small networks often win, because they learn faster (set --least_share=0 then).",
        True,
        group=_COST,
    )
    anneal_steps: int | None = setting(
        "Steps over which the controller moves the expected cost from its start to the target. "
        "Default: a third of the steps after the warm-up. Lower it for a target near the start.",
        None,
        least=0,
        group=_COST,
    )
    cost_window: float = setting(
        "Only architectures that cost the target, more or less by this share of it, are drawn. "
        "Their likelihoods then differ by what they are, and not by what they cost. It needs the "
        "control variate. 0 draws all architectures, as the paper does.",
        0.2,
        least=0,
        group=_COST,
    )
    cost_penalty: str = setting(
        "What the cost coefficient weighs: the expected cost (exact), the paper's mean of "
        "max(0, cost / target - 1) over the samples, or the logarithm of that mean.",
        "expected",
        choices=method.COST_PENALTIES,
        group=_COST,
    )
    least_share: float = setting(
        "Minimum cost of the result as a share of the target, 0 to 1. If no architecture costs as "
        "much, the search warns and ignores the minimum. With 0, the result is the most probable "
        "architecture within the target, which may be much cheaper.",
        0.95,
        least=0,
        most=1,
        group=_RESULT,
    )
    finalists: int = setting(
        "Number of likely architectures within the target that the result is chosen from, by what "
        "they reach with the shared weights on the architecture part. With 0 the result is the "
        "most probable architecture, as in the paper.",
        100,
        least=0,
        group=_RESULT,
    )
    derive_seconds: float = setting(
        "Seconds to prove that no architecture between --least_share and the target is more "
        "probable than the one that is found. After that the best one so far is taken, and "
        "summary.json says how far it may be off (derivation_gap, in nats of log p).",
        60.0,
        least=0,
        group=_RESULT,
    )
    distribution: str = setting(
        "What has a logit. factorized: each choice of a variable, so that there are few logits and "
        "they decide early. joint: each combination of a block's choices, so that the choices "
        "can depend on each other. coarse_to_fine: first factorized, then joint.",
        "factorized",
        choices=method.DISTRIBUTIONS,
        group=_METHOD,
    )
    start: str = setting(
        "The distribution at the start. target: the expected cost is the target already, so that "
        "no step is spent on networks of another cost. uniform: uniform in each variable, as in "
        "the paper.",
        "target",
        choices=method.STARTS,
        group=_METHOD,
    )
    coarse_epochs: int | None = setting(
        "Epochs before coarse_to_fine changes from factorized to joint logits. Default: half of "
        "all epochs.",
        None,
        least=1,
        group=_METHOD,
    )
    sample_scale: float = setting(
        "Architectures drawn in each step for each nat of the distribution's entropy. A larger "
        "scale is less noisy and slower.",
        0.25,
        least=0.001,
        group=_METHOD,
    )
    min_samples: int = setting(
        "Fewest architectures drawn in each step.", 2, least=1, group=_METHOD
    )
    max_samples: int = setting("Most architectures drawn in each step.", 64, least=1, group=_METHOD)
    samples: int | None = setting(
        "A fixed number of architectures in each step, instead of one that follows the entropy.",
        None,
        least=1,
        group=_METHOD,
    )
    warmup_steps: int | None = setting(
        "Steps at the start that train the shared weights alone. Default: a fifth of all steps, "
        "at most 300; with --init none. Under untrained weights the smallest networks look best, "
        "because they learn first. Raise it when the networks are large or learn slowly.",
        None,
        least=0,
        group=_METHOD,
    )
    likelihood_scale: float = setting(
        "Factor of the mean log-likelihoods in the importance weights (tau). A larger factor "
        "makes the best sample of a step count more. The batch size as factor gives the sum over "
        "the batch.",
        1.0,
        least=0,
        group=_METHOD,
    )
    control_variate: bool = setting(
        "Whether 1/K is subtracted from the importance weights of the K samples. Without it (the "
        "paper's formula) the logits mostly follow noise.",
        True,
        group=_METHOD,
    )
    stratified: bool = setting(
        "Whether the samples of a step are stratified: each choice is drawn as close to its "
        "expected number of times as possible.",
        True,
        group=_METHOD,
    )
    deduplicate: bool = setting(
        "Whether an architecture that is drawn twice in a step is evaluated once.",
        True,
        group=_METHOD,
    )
    recompute: bool = setting(
        "Whether the backward pass computes the activations inside each block again instead of "
        "keeping them. For large networks on a GPU with little memory; a step takes longer.",
        False,
        group=_TRAINING,
    )
    batch_size: int | None = setting(
        "Images in a batch, of each part of the data. Default: 64, but down to 16 for few images.",
        None,
        least=2,
        group=_TRAINING,
    )
    architecture_batch_size: int | None = setting(
        "Images in a batch of the architecture part. Default: --batch_size. Larger batches reduce "
        "the noise of the likelihoods that update the logits. They need forward passes only.",
        None,
        least=2,
        group=_TRAINING,
    )
    weights_share: float | None = setting(
        "Share of the training images that trains the shared weights. The others decide which "
        "architectures are good. Default: 0.8, but down to 0.5 as long as fewer than 1,000 images "
        "would decide. The paper has 0.5.",
        None,
        least=0.05,
        most=0.95,
        group=_TRAINING,
    )
    epochs: int | None = setting(
        "Epochs to search. Default: as many as make 1,500 steps, or one pass over the weights part "
        "of the data if that is more.",
        None,
        least=1,
        basic=True,
    )
    steps_per_epoch: int | None = setting(
        "Steps in an epoch. Default: 50, or with --epochs one pass over the weights part of the "
        "data.",
        None,
        least=1,
        group=_TRAINING,
    )
    optimizer: str = setting(
        "Optimizer of the shared weights: SGD with Nesterov momentum 0.9, or Adam.",
        "sgd",
        choices=tuple(_LEARNING_RATES),
        group=_TRAINING,
    )
    learning_rate: float | None = setting(
        "Peak learning rate of the shared weights, cosine to 0. Default: 0.1 for sgd and 0.002 "
        "for adam with batches of 64, scaled by the square root of the batch size.",
        None,
        least=0,
        group=_TRAINING,
    )
    learning_rate_warmup: float = setting(
        "Share of all steps in which the learning rate of the shared weights rises from 0.",
        0.1,
        least=0,
        most=0.9,
        group=_TRAINING,
    )
    clip_norm: float = setting(
        "Largest norm of the gradient of all shared weights together. A longer one is scaled down "
        "to it. Large networks diverge in their first steps without it. 0 turns it off.",
        1.0,
        least=0,
        group=_TRAINING,
    )
    architecture_learning_rate: float = setting(
        "Learning rate of the architecture logits (Adam). A higher rate decides earlier, on less "
        "evidence.",
        0.03,
        least=0,
        group=_TRAINING,
    )
    init: str | None = setting(
        "Directory of a finished search of the same space whose shared weights this search starts "
        "from, such as for another --target. The distribution starts anew. Default: random "
        "weights.",
        None,
        group=_TRAINING,
    )
    strategy: str = setting(
        "How the samples of a step are distributed: none (one replica), over all GPUs of this "
        "machine (mirrored), or over all machines that TF_CONFIG names (multiworker; --output_dir "
        "must be on a file system that they share).",
        "none",
        choices=method.STRATEGIES,
        group="Run",
    )
    ranked_samples: int = setting(
        "Number of architectures to draw from the final distribution and evaluate with the shared "
        "weights, for the Pareto front of the report. Each takes about a second for small "
        "networks. 0 turns it off.",
        16,
        least=0,
        group=_RESULT,
        may_change=True,
    )

    def check(self) -> None:
        """Raises `UserError` when settings do not fit together."""
        super().check()
        self._check_cost()
        fewest = "min_samples" if self.samples is None else "samples"
        if self.control_variate and getattr(self, fewest) < 2:
            raise UserError(
                f"`{fewest}` must be at least 2, or with --nocontrol_variate 1: the control "
                "variate of a single sample makes every gradient of the logits zero. "
                f"Received: {fewest}={getattr(self, fewest)}"
            )
        if self.min_samples > self.max_samples:
            raise UserError(
                "--min_samples must be at most --max_samples. "
                f"Received: min_samples={self.min_samples}, max_samples={self.max_samples}"
            )
        coarse_to_fine = self.distribution == "coarse_to_fine"
        if coarse_to_fine and self.epochs == 1:
            raise UserError(
                "--distribution=coarse_to_fine needs at least 2 --epochs. "
                f"Received: epochs={self.epochs}"
            )
        if self.coarse_epochs is not None and not (
            coarse_to_fine and (self.epochs is None or self.coarse_epochs < self.epochs)
        ):
            raise UserError(
                "--coarse_epochs needs --distribution=coarse_to_fine and must be below --epochs. "
                f"Received: distribution={self.distribution}, coarse_epochs={self.coarse_epochs}, "
                f"epochs={self.epochs}"
            )

    def _check_cost(self):
        if (self.cost == "none") != (self.target is None):
            raise UserError(
                "--target needs --cost=macs, params, bytes or latency, and these need --target. "
                f"Received: cost={self.cost}, target={self.target}"
            )
        if (self.cost == "latency") != (self.latency_table is not None):
            raise UserError(
                "--cost=latency needs --latency_table, and --latency_table needs --cost=latency. "
                f"Received: cost={self.cost}, latency_table={self.latency_table}"
            )
        if self.target is None and (self.cost_coefficient, self.anneal_steps) != (None, None):
            raise UserError("--cost_coefficient and --anneal_steps need --target")
        if self.target is not None and self.cost_window and not self.control_variate:
            raise UserError(
                "--nocontrol_variate needs --cost_window=0: the gradient of the logits would be "
                f"wrong. Received: cost_window={self.cost_window}"
            )
        if None not in (self.cost_coefficient, self.anneal_steps):
            raise UserError(
                "--anneal_steps moves the coefficient, which --cost_coefficient fixes. Give one of "
                "them"
            )

    def way_out(self, differing: set[str]) -> str:
        """What to do where a directory holds a run with other values of these settings."""
        if differing != {"target"}:
            return ""
        return (
            f"For another target, `fpnas rank --search_dir={self.output_dir} "
            f"--budget={self.target:g}` finds the best networks without a search, and "
            f"--init={self.output_dir} with another --output_dir goes on from its weights. "
        )

    def _choose(self, count, size):
        weights = int(count * (self.weights_share or data.choose_weights_share(count)))
        batch_size = self.batch_size or choose_batch_size(weights, 8, 16, _BATCH_SIZE)
        batch_size = max(2, min(batch_size, weights))
        one_pass = max(1, weights // batch_size)
        steps = self.steps_per_epoch or (one_pass if self.epochs else _STEPS_PER_EPOCH)
        return super()._choose(count, size) | {
            "batch_size": batch_size,
            "steps_per_epoch": steps,
            "epochs": math.ceil(max(_STEPS, one_pass) / steps),
            "learning_rate": scale_rate(_LEARNING_RATES[self.optimizer], batch_size, _BATCH_SIZE),
        }

    @property
    def epochs_before_joint(self) -> int | None:
        """Epochs with factorized logits, for coarse_to_fine."""
        if self.distribution != "coarse_to_fine":
            return None
        return self.coarse_epochs or self.epochs // 2

    def make_optimizer(self, steps: int) -> "keras.optimizers.Optimizer":
        """The optimizer of the shared weights for a search of some steps."""
        import keras

        schedule = make_schedule(self.learning_rate, steps, int(self.learning_rate_warmup * steps))
        if self.optimizer == "adam":
            return keras.optimizers.Adam(schedule, name="weights_adam")
        return keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True, name="sgd")

    def count_warmup_steps(self, steps_per_epoch: int) -> int:
        """Steps of the warm-up.

        Raises:
            UserError: When the warm-up leaves no steps for the search.
        """
        steps = steps_per_epoch * self.epochs
        warmup_steps = self.warmup_steps
        if warmup_steps is None:
            warmup_steps = 0 if self.init else min(300, steps // 5)
        if warmup_steps >= steps:
            raise UserError(
                f"`warmup_steps` must be below the {steps} steps of the search (`epochs` times "
                f"`steps_per_epoch`). Received: warmup_steps={warmup_steps}"
            )
        coarse_epochs = self.epochs_before_joint
        if coarse_epochs is not None and steps_per_epoch * coarse_epochs <= warmup_steps:
            raise UserError(
                f"`coarse_epochs` must reach beyond the {warmup_steps} steps of the warm-up. "
                f"Received: coarse_epochs={coarse_epochs}, {steps_per_epoch * coarse_epochs} steps"
            )
        return warmup_steps


def search_architecture(**settings: Any) -> "SearchRun":
    """Searches a space for an architecture, and writes a run directory.

    If the directory holds an unfinished search with the same settings, it is continued from its
    last checkpoint. A finished search is not run again.

    Args:
        **settings: The fields of `SearchSettings`, which are the flags of `fpnas search`.

    Returns:
        The run directory, with `architecture`, `summary`, `report` and `load_search()`.

    Raises:
        UserError: When a setting is wrong, or the directory holds something else.

    Example:

    ```python
    run = fpnas.search_architecture(
        data="folder:photos", input_size=64, cost="macs", target=8e6, output_dir="runs/mine"
    )
    run.architecture.macs()
    ```
    """
    with visible_log():
        return run_search(SearchSettings(**settings))


def run_search(settings: SearchSettings) -> "SearchRun":
    """Like `search_architecture`, but takes a `SearchSettings`."""
    run = runs.SearchRun(settings.output_dir)
    chief = method.is_chief(settings.strategy)
    session = runs.Session(run, settings, "fpnas_keras.search", writes=chief)
    with session.working():
        evaluation = None
        searches = session.has_work
        if searches:
            evaluation = _search(session)
        # A report of the unfinished search may be there already.
        if chief and (searches or not run.report.exists()):
            with report.failure_as_warning():
                _rank_and_report(run, settings, evaluation)
    return run


def _search(session: "Session") -> "Evaluation":
    """Searches from the last checkpoint to the end."""
    import keras

    settings = session.settings
    # First of all: TensorFlow accepts a cluster only before it has done anything else.
    strategy = method.make_strategy(settings.strategy)
    keras.utils.set_random_seed(settings.seed)
    checkpoints = runs.Checkpoints(session)
    with method.worker_failures(strategy):
        method.check_same_step(strategy, checkpoints.step)
        images, space = _load_images_and_space(settings)
        with data.naming_unreadable(images):
            return _search_on(session, checkpoints, strategy, images, space)


def _search_on(
    session: "Session",
    checkpoints: "Checkpoints",
    strategy: "tf.distribute.Strategy | None",
    images: "data.Images",
    space: spaces.Space,
) -> "Evaluation":
    settings = session.fit_settings(images)
    batches = data.search_batches(
        images,
        batch_size=settings.batch_size,
        seed=settings.seed,
        steps_per_epoch=settings.steps_per_epoch,
        architecture_batch_size=settings.architecture_batch_size,
        first_step=checkpoints.step,
        weights_share=settings.weights_share,
        augmentation=settings.make_augmentation(images.image_shape[0]),
    )
    steps_per_epoch = checkpoints.steps_per_epoch or int(batches.cardinality())
    search = _make_search(settings, space, steps_per_epoch, strategy)
    _log_space(search, settings, steps_per_epoch * settings.epochs)
    if settings.init and checkpoints.step == 0:
        _give_weights(runs.SearchRun(settings.init).load_search(), search)
    files = {"space": settings.space, "latency_table": settings.latency_table}
    session.begin(**{name: file for name, file in files.items() if file not in spaces.names()})
    metrics_files, callbacks = _make_callbacks(session, settings, search, checkpoints.step)
    checkpoints.fit(search, batches, settings.epochs, metrics_files, callbacks)
    evaluation = runs.Evaluation(search, images, settings.weights_share)
    _finish(session, evaluation, batches, checkpoints)
    return evaluation


def _load_images_and_space(settings):
    if not settings.space.endswith(".py"):  # which may be for these images only
        spaces.get(settings.space)  # A bad space should not wait for the data.
    images = _load_images(settings)
    return images, spaces.get(settings.space, images.image_shape, len(images.class_names))


def _load_images(settings):
    images = settings.load_images("train", settings.input_size)
    return images.balanced() if settings.class_weight == "balanced" else images


def _make_search(
    settings: SearchSettings,
    space: spaces.Space,
    steps_per_epoch: int,
    strategy: "tf.distribute.Strategy | None",
) -> "ArchitectureSearch":
    """The compiled search."""
    import keras

    steps = steps_per_epoch * settings.epochs
    warmup_steps = settings.count_warmup_steps(steps_per_epoch)
    anneal_steps = settings.anneal_steps
    if anneal_steps is None:
        anneal_steps = (steps - warmup_steps) // 3
    cost_coefficient = settings.cost_coefficient
    if cost_coefficient is None:
        cost_coefficient = method.CostController(settings.two_sided, anneal_steps=anneal_steps)
    search = method.ArchitectureSearch(
        space,
        samples=settings.samples
        or method.AdaptiveSamples(
            settings.sample_scale, settings.min_samples, settings.max_samples
        ),
        cost=make_cost(settings.cost, settings.target, settings.latency_table),
        distribution=settings.distribution,
        start=settings.start,
        cost_window=settings.cost_window,
        cost_coefficient=cost_coefficient,
        cost_penalty=settings.cost_penalty,
        warmup_steps=warmup_steps,
        likelihood_scale=settings.likelihood_scale,
        control_variate=settings.control_variate,
        stratified=settings.stratified,
        deduplicate=settings.deduplicate,
        recompute=settings.recompute,
        seed=settings.seed,
        strategy=strategy,
    )
    search.compile(
        optimizer=settings.make_optimizer(steps),
        # Named, since Keras would number the optimizers of a process, and weight files hold names.
        architecture_optimizer=keras.optimizers.Adam(
            settings.architecture_learning_rate, name="adam"
        ),
        clip_norm=settings.clip_norm or None,
    )
    return search


def _give_weights(source, search):
    """Copies the shared weights of another search."""
    if dataclasses.replace(source.space, name=search.space.name) != search.space:
        raise UserError(f"`init` must be a search of the same space. Received: {source.space!r}")
    for variable, other in zip(search.supernet.variables, source.supernet.variables, strict=True):
        variable.assign(other)


def _log_space(search, settings, steps):
    logging.info(
        "space %s: %.2e architectures, %d logits, %s to %s %s; %d steps",
        search.space.name,
        search.space.num_architectures,
        search.distribution.count_params(),
        format_cost(search.space_cost.least()),
        format_cost(search.space_cost.largest()),
        search.cost.unit,
        steps,
    )
    reach = settings.architecture_learning_rate * (steps - search.warmup_steps)
    if 0 < reach < _LEAST_REACH:
        logging.warning(
            "the search will probably end undecided: its %d steps after the warm-up are few for "
            "`architecture_learning_rate` %g. Raise `epochs`, until there are about %d",
            steps - search.warmup_steps,
            settings.architecture_learning_rate,
            math.ceil(2 * _LEAST_REACH / settings.architecture_learning_rate),
        )


def _make_callbacks(session, settings, search, first_step):
    """The files with rows for each epoch, and further callbacks."""
    run = session.run
    callbacks = [runs.StopOnDivergence()]
    if settings.epochs_before_joint is not None:
        callbacks.append(method.CoarseToFine(settings.epochs_before_joint))
    if not session.writes:
        return [], callbacks

    def metrics(epoch, logs):
        return _metrics_row(search, epoch, logs)

    def probabilities(epoch, logs):
        blocks = search.distribution.probabilities()
        return {"step": int(search.step.numpy()), "epoch": epoch + 1, "blocks": blocks}

    callbacks.append(
        runs.Progress(
            lambda epoch, logs: _epoch_line(search, metrics(epoch, logs)),
            search.cost_of_steps,
            first_step,
        )
    )
    if settings.tensorboard:
        folder, flags = run.tensorboard_folder, settings.given()
        histograms = functools.partial(_entry_probabilities, search)
        callbacks.append(runs.TensorBoardFile(folder, metrics, flags, histograms))
    return [
        runs.MetricsFile(run.metrics_file, metrics),
        runs.MetricsFile(run.probabilities_file, probabilities),
    ], callbacks


def _metrics_row(search, epoch, logs):
    step = int(search.step.numpy())
    phase = "joint" if isinstance(search.distribution, method.JointLogits) else "factorized"
    known = {
        "step": step,
        "epoch": epoch + 1,
        "phase": "warm_up" if step <= search.warmup_steps else phase,
        "total_samples": int(search.total_samples.numpy()),
    }
    return {name: (known | logs)[name] for name in runs.SEARCH_METRICS if name != "seconds"}


def _entry_probabilities(search):
    """For each block, the probabilities of its entries."""
    rows = search.distribution.entry_probabilities().numpy()
    return [row[mask] for row, mask in zip(rows, search.space.entries.mask)]


def _epoch_line(search, row):
    """A row of the metrics for people."""
    cost = f"{format_cost(row['expected_cost'])} {search.cost.unit}"
    if search.cost.target is not None:
        cost += f" (target {format_cost(search.cost.target)})"
    phase = "" if row["phase"] == "factorized" else f"{row['phase'].replace('_', '-')}, "
    return (
        f"{phase}entropy {row['entropy']:.1f} nats, expected cost {cost}, "
        f"{row['samples']:.1f} samples a step, loss {row['train_loss']:.3f} (weights part) and "
        f"{row['validation_loss']:.3f} (architecture part)"
    )


def _finish(session, evaluation, batches, checkpoints):
    """Derives the result and writes what the search leaves."""
    settings, run, search = session.settings, session.run, evaluation.search
    if session.writes:
        with replacing(run.weights_file) as temporary:
            try:
                search.save_weights(temporary)
            except RuntimeError as error:  # what h5py raises when the disk is full
                raise UserError(
                    f"cannot write {run.weights_file}: {summarize_error(error)}"
                ) from None
    derivation = search.derivation(
        seconds=settings.derive_seconds, least_share=settings.least_share
    )
    count, best = _choose(settings, evaluation, derivation.architecture)
    architecture = best[0]
    # What the most probable architecture reaches with the shared weights.
    mode = search.evaluate(
        batches.map(lambda _, validation: validation),
        steps=checkpoints.steps_per_epoch,
        verbose=0,
        return_dict=True,
    )
    mode = {f"mode_validation_{name}": value for name, value in mode.items()}
    mode["mode_macs"] = search.derive(budget=None).macs()
    if session.writes:
        architecture.save(run.architecture_file)
        run.write_finalists(best)
        summary = _summarize(settings, evaluation, derivation, architecture)
        session.finish(**summary, finalists=count, **mode, next=_train_command(run, settings))


def _choose(settings, evaluation, most_probable):
    """The number of architectures that the result is chosen from, and the best of them first."""
    search = evaluation.search
    space = search.space
    if not settings.finalists:
        return 1, [most_probable]
    first = space.entries_of(most_probable)
    others = search.finalists(settings.finalists, least_share=settings.least_share)
    finalists = np.concatenate([first[None], others[(others != first).any(axis=1)]])
    finalists = finalists[: settings.finalists]
    best = space.entries.to_choices(finalists[runs.rank_finalists(evaluation, finalists)])
    return len(finalists), distinct_networks(map(space.architecture, best))


def distinct_networks(architectures: Iterable["Architecture"]) -> list["Architecture"]:
    """The architectures without those that compute the same as an earlier one.

    Which one of two equal blocks is skipped makes another architecture of the space, with other
    shared weights, but the same network.

    Args:
        architectures: Architectures.
    """
    first = {}
    for each in architectures:
        # A skipped block without a projection has no name.
        names = (name for part in each.parts() for name in latency_table.names(part))
        first.setdefault(tuple(names), each)
    return list(first.values())


def _summarize(
    settings: SearchSettings,
    evaluation: "Evaluation",
    derivation: "Derivation",
    architecture: "Architecture",
) -> dict[str, Any]:
    search = evaluation.search
    entries = search.space.entries_of(architecture)
    expected_cost = search.space_cost.expected(search.distribution.entry_probabilities())
    shared = runs.describe_confusion(evaluation.confusion_matrix(entries), evaluation.class_names)
    return {
        "space": search.space.name,
        "input_shape": search.space.input_shape,
        "num_classes": search.space.num_classes,
        "num_architectures": search.space.num_architectures,
        "num_logits": search.distribution.count_params(),
        "distribution": settings.distribution,
        "data": settings.data,
        "seed": settings.seed,
        "weights_share": evaluation.weights_share,
        "steps": int(search.step.numpy()),
        "total_samples": int(search.total_samples.numpy()),
        "total_evaluated": int(search.total_evaluated.numpy()),
        "initial_entropy": float(method.FactorizedLogits(search.space).entropy()),
        "entropy": float(search.distribution.entropy()),
        "cost": settings.cost,
        "target": settings.target,
        "expected_cost": float(expected_cost),
        "found_cost": float(search.space_cost(entries[None])[0]),
        "found_log_prob": float(search.distribution.log_prob(entries)),
        # Of the result, with the shared weights, on the architecture part.
        **{f"shared_{name}": value for name, value in shared.items()},
        "derivation_log_prob": derivation.log_prob,
        "derivation_least": derivation.least,
        "derivation_gap": derivation.gap,
        "macs": architecture.macs(),
        "params": architecture.params(),
    }


def _rank_and_report(run, settings, evaluation=None):
    """Ranks some architectures and writes the report."""
    if settings.ranked_samples:
        if evaluation is None:  # The search was finished before; its report was not.
            images = _load_images(settings)
            with data.naming_unreadable(images):
                evaluation = runs.Evaluation(run.load_search(), images, run.weights_share)
        search = evaluation.search
        architectures = {"derived": run.architecture}
        architectures |= runs.draw_architectures(search, settings.ranked_samples, settings.seed)
        ranked = runs.rank_by_shared_weights(evaluation, architectures)
        run.write_ranking(ranked, search.cost.unit)
    report.write_report(run.directory)


def _search_and_print(settings):
    run = run_search(settings)
    if run.finished and method.is_chief(settings.strategy):
        print(_describe_result(run, settings))


def _describe_result(run, settings):
    """The result of a finished search, and what to type next."""
    summary = run.summary
    sections = [str(run.architecture)]
    if run.verdict:
        sections.append(run.verdict)
    cost = ""
    if summary["cost"] == "latency":
        cost = f", {format_cost(summary['found_cost'])} ms by {settings.latency_table}"
    if summary["cost"] == "bytes":
        cost = f", about {format_cost(summary['found_cost'])} bytes in int8"
    if summary["target"] is not None:
        cost += f" (target {format_cost(summary['target'])})"
    if summary["derivation_gap"] and summary.get("finalists", 1) == 1:
        cost += f", not proven to be the most probable (gap {summary['derivation_gap']:.3g} nats)"
    sections.append(
        f"{summary['macs']:,} MACs, {summary['params']:,} parameters{cost}; "
        f"{summary['total_samples']:,} samples in {summary['steps']:,} steps, "
        f"{summary['wall_seconds']:.0f} s, {summary['peak_memory_mb']:,} MB\n"
        f"results: {run.directory}"
        + (f"\nreport: {run.report}" if run.report.exists() else "")
        + _next_commands(run, settings)
    )
    return "\n" + "\n\n".join(sections)


def _train_command(run, settings):
    output_dir = f"{run.directory}_trained"
    return run.train_command(run.architecture_file, settings.data_arguments(), output_dir)


def _next_commands(run, settings):
    file = shlex.quote(str(run.architecture_file))
    title = "next, train it"
    if run.may_be_mirrored:
        title += " (--random_flip is for photos: leave it out where left and right differ)"
    commands = f"\n{title}:\n  {_train_command(run, settings)}"
    if settings.cost == "latency":
        commands += (
            "\nmeasure it on the device:\n"
            f"  python -m export.latency --architecture={file} "
            f"{_device_arguments(settings.latency_table, run.latency_table)}"
        )
    return commands


def _device_arguments(table, copy):
    """Flags of `export.latency` for the device of a latency table, of which the run has a copy."""
    arguments = [f"--latency_table={table}"]
    known = copy and published_tables.read_own(copy)
    if known:
        device = known["device"]
        arguments += [f"--device={device['kind']}", f"--threads={device['threads']}"]
        if device["kind"] == "adb":
            arguments += ["--benchmark_model=BENCHMARK_MODEL"]
            arguments += [f"--core_mask={device['core_mask']}"] if device["core_mask"] else []
            arguments += [f"--delegate={device['delegate']}"]
    return shlex.join(arguments)


COMMAND = Command(
    name="fpnas search",
    summary="Searches a space for an architecture that meets a target.",
    examples=(
        (
            "Your own photos, one folder of images for each class",
            "fpnas search --data=folder:photos --input_size=64 --cost=macs --target=8e6 "
            "--output_dir=runs/mine",
        ),
        ("The first search, 1 to 2 minutes", "fpnas search --flagfile=configs/quickstart.flags"),
    ),
    settings=SearchSettings,
    run=_search_and_print,
)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
