"""Trains one architecture: settings in, `model.keras` out.

python -m fpnas_keras.train --architecture=FILE --output_dir=DIR
"""

import dataclasses
import math
import pathlib
import shlex
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging

from fpnas_keras import data, networks, report, runs
from fpnas_keras.architecture import Architecture
from fpnas_keras.commands import Command, run_command, visible_log
from fpnas_keras.errors import UserError
from fpnas_keras.files import replacing, write_json
from fpnas_keras.runs.settings import (
    RunSettings,
    choose_batch_size,
    make_schedule,
    scale_rate,
)
from fpnas_keras.settings import setting

if TYPE_CHECKING:
    import keras

    from fpnas_keras.runs import TrainingRun

_OPTIMIZER, _AUGMENTATION, _DISTILLATION = "Optimizer", "Augmentation", "Distillation"
_START = "Start and evaluation"
# What a training sees, all epochs together, if their number is not given.
_LEAST_IMAGES = 100_000
_BATCH_SIZE = 128
# MixUp for fewer images: 300 photos gain 4 points, 2,000 nothing, and 10,000 images lose 2
# (docs/training.md).
_MIX_UP, _MIXED_IMAGES = 0.2, 1000
# Learning rates for that batch size.
_DEFAULTS = {
    "sgd": {"learning_rate": 0.2, "weight_decay": 0.001},
    "adamw": {"learning_rate": 0.002, "weight_decay": 0.05},
}
# Number of batches on which the statistics of batch norms are estimated again. It is necessary if
# the moving averages belong to other weights, or if the training has fewer than `_FEW_STEPS` steps.
_RECALIBRATION_BATCHES = 100
_FEW_STEPS = 500
_FEW_STEPS_PER_EPOCH = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings(RunSettings):
    """Settings of a training. Each is a flag of `fpnas train`."""

    architecture: str = setting("Architecture file (JSON) to train.", basic=True, path=True)
    input_size: int | None = setting(
        "Height and width in pixels that images are resized to. Default: those of the "
        "architecture.",
        None,
        least=1,
        group=_START,
    )
    epochs: int | None = setting(
        "Epochs to train. Default: 20, but up to 200 for few images, until it has seen 100,000.",
        None,
        least=1,
        basic=True,
    )
    batch_size: int | None = setting(
        "Images in a batch. Default: 128, but down to 16 for few images, so that an epoch has 200 "
        "steps.",
        None,
        least=2,
        group=_OPTIMIZER,
    )
    optimizer: str = setting(
        "SGD with Nesterov momentum 0.9, or AdamW.",
        "sgd",
        choices=tuple(_DEFAULTS),
        group=_OPTIMIZER,
    )
    learning_rate: float | None = setting(
        "Peak learning rate, cosine to 0. Default: 0.2 for sgd and 0.002 for adamw with batches of "
        "128, scaled by the square root of the batch size.",
        None,
        least=0,
        group=_OPTIMIZER,
    )
    warmup_epochs: float = setting(
        "Epochs over which the learning rate rises from 0.", 1.0, least=0, group=_OPTIMIZER
    )
    weight_decay: float | None = setting(
        "Decoupled weight decay of everything but biases and batch norms, times the learning rate "
        "in each step. Default: 0.001 for sgd and 0.05 for adamw. Raise it against overfitting.",
        None,
        least=0,
        group=_OPTIMIZER,
    )
    label_smoothing: float = setting(
        "Part of each label that is spread over all classes, 0 to 1.",
        0.1,
        least=0,
        most=1,
        group=_OPTIMIZER,
    )
    ema_momentum: float = setting(
        "Momentum of an exponential moving average of the weights, which replaces them at the "
        "end. 0 turns it off, 0.999 is usual.",
        0.0,
        least=0,
        most=0.999999,
        group=_OPTIMIZER,
    )
    mixed_precision: str = setting(
        "Numbers that the layers compute in. The weights, and model.keras, are float32. bfloat16 "
        "and float16 are faster on GPUs.",
        "none",
        choices=("none", "bfloat16", "float16"),
        group=_OPTIMIZER,
    )
    rand_augment: float = setting(
        "Strength of RandAugment's two random distortions of each batch, 0 (off) to 1. 0.1 is "
        "usual: a turn by up to 36 degrees, a shift by up to a tenth of the image. Against "
        "overfitting of large networks in long trainings.",
        0.0,
        least=0,
        most=1,
        group=_AUGMENTATION,
    )
    mix_up: float | None = setting(
        "alpha of MixUp, which adds images to each other, 0 (off) to 1. Default: 0.2 for fewer "
        "than 1,000 images, unless --teacher, --cut_mix or --class_weight=balanced is given, and "
        "otherwise 0.",
        None,
        least=0,
        most=1,
        group=_AUGMENTATION,
    )
    cut_mix: float = setting(
        "alpha of CutMix, which replaces a part of each image by a part of another, 0 (off) to 1. "
        "With --mix_up too, each batch takes one of the two.",
        0.0,
        least=0,
        most=1,
        group=_AUGMENTATION,
    )
    teacher: str | None = setting(
        "Network whose logits are learned beside the labels (distillation): a .keras file; an "
        "architecture (.json) with --teacher_weights; or the name of a network of "
        "keras.applications. One with another number of classes, such as ImageNet's, gets a new "
        "head, which is fitted to the training images. It sees each training image once; one of "
        "the same classes sees every batch if images are flipped, distorted or mixed. Train a "
        "teacher of the same classes with --label_smoothing=0: smoothed labels spoil what it "
        "teaches (arXiv:1906.02629).",
        None,
        group=_DISTILLATION,
        path=True,
    )
    teacher_weights: str | None = setting(
        "Weights (.weights.h5) of a --teacher that has none of its own. Without it a network of "
        "keras.applications has the weights of ImageNet.",
        None,
        group=_DISTILLATION,
    )
    temperature: float = setting(
        "Both networks' logits are divided by it before they are compared. A higher temperature "
        "gives more weight to what the teacher says about the other classes.",
        3.0,
        least=0.1,
        most=100,
        group=_DISTILLATION,
    )
    distillation_weight: float = setting(
        "Share of the teacher in the loss, 0 to 1. The labels have the rest.",
        0.5,
        least=0,
        most=1,
        group=_DISTILLATION,
    )
    init: str = setting(
        "Weights to start from: random ones, or the shared weights of the search that found the "
        "architecture, for short trainings. The search has used all training images, including "
        "those that --validation_split holds out.",
        "random",
        choices=("random", "supernet"),
        group=_START,
    )
    search_dir: str | None = setting(
        "Directory of the search for --init=supernet. Default: the one that --architecture lies "
        "in.",
        None,
        group=_START,
    )
    validation_split: float = setting(
        "Share of the training set to hold out, 0 to 0.9. val_accuracy is the accuracy on these "
        "images, after each epoch (before --ema_momentum averages the weights) and of model.keras. "
        "Use it to choose settings: the test set is read once, at the end.",
        0.0,
        least=0,
        most=0.9,
        group=_START,
    )

    def check(self) -> None:
        """Raises `UserError` when settings do not fit together."""
        super().check()
        of_teacher = self.name_changed(("teacher_weights", "temperature", "distillation_weight"))
        if self.teacher is None and of_teacher:
            raise UserError(f"{of_teacher} needs --teacher")
        if self.init != "supernet" and self.search_dir is not None:
            raise UserError("--search_dir needs --init=supernet")

    @property
    def teaches_each_batch(self) -> bool:
        """Whether a teacher of the same classes sees every batch, after its augmentation.

        Its logits for the images themselves would not fit mirrored, distorted or mixed ones.
        """
        return bool(self.random_flip or self.rand_augment or self.mix_up or self.cut_mix)

    def _choose(self, count, size):
        batch_size = self.batch_size or choose_batch_size(count, 200, 16, _BATCH_SIZE)
        batch_size = max(2, min(batch_size, count))
        epochs = math.ceil(_LEAST_IMAGES / count)
        peak = _DEFAULTS[self.optimizer]["learning_rate"]
        # The weight of an image's class would also count for what is mixed into it.
        is_plain = not (self.teacher or self.cut_mix or self.class_weight == "balanced")
        mixes = is_plain and count < _MIXED_IMAGES
        return super()._choose(count, size) | {
            "batch_size": batch_size,
            "epochs": min(max(epochs, 20), 200),
            "learning_rate": scale_rate(peak, batch_size, _BATCH_SIZE),
            "mix_up": _MIX_UP if mixes else 0.0,
        }

    def make_optimizer(self, steps: int, steps_per_epoch: int) -> "keras.optimizers.Optimizer":
        """The optimizer for a training of some steps."""
        import keras

        defaults = _DEFAULTS[self.optimizer]
        decay = defaults["weight_decay"] if self.weight_decay is None else self.weight_decay
        self._check_averaging(steps)
        warmup_epochs = min(self.warmup_epochs, self.epochs)
        warmup_steps = min(int(warmup_epochs * steps_per_epoch), steps - 1)
        schedule = make_schedule(self.learning_rate, steps, warmup_steps)
        common = {
            "weight_decay": decay,
            "use_ema": self.ema_momentum > 0,
            "ema_momentum": self.ema_momentum,
        }
        if self.optimizer == "sgd":
            optimizer = keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True, **common)
        else:
            optimizer = keras.optimizers.AdamW(schedule, **common)
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
        if self.mixed_precision == "float16":
            # `compile` would do so by the policy of the model, which `TaughtNetwork` does not have.
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        return optimizer

    def _check_averaging(self, steps):
        averaged = 1 / (1 - self.ema_momentum)
        if self.ema_momentum and averaged > steps / 10:
            raise UserError(
                f"`ema_momentum` averages {averaged:.0f} steps, which must be at most a tenth of "
                f"the {steps} steps of the training. Received: ema_momentum={self.ema_momentum}"
            )


def train_architecture(**settings: Any) -> "TrainingRun":
    """Trains one architecture, and writes a run directory.

    If the directory holds an unfinished training with the same settings, it is continued from its
    last checkpoint. A finished training is not run again.

    Args:
        **settings: The fields of `TrainSettings`, which are the flags of `fpnas train`.

    Returns:
        The run directory, with `model()`, `architecture` and `summary`.

    Raises:
        UserError: When a setting is wrong, or the directory holds something else.

    Example:

    ```python
    run = fpnas.train_architecture(
        architecture="runs/mine/architecture.json",
        data="folder:photos",
        random_flip=True,
        output_dir="runs/mine_trained",
    )
    run.summary["test_accuracy"]
    ```
    """
    with visible_log():
        return run_training(TrainSettings(**settings))


def run_training(settings: TrainSettings) -> "TrainingRun":
    """Like `train_architecture`, but takes a `TrainSettings`."""
    run = runs.TrainingRun(settings.output_dir)
    session = runs.Session(run, settings, "fpnas_keras.train")
    with session.working():
        architecture = Architecture.load(settings.architecture)
        known = run.architecture
        if known is not None and known != architecture.fit_to(known.input_shape, known.num_classes):
            raise UserError(
                f"`output_dir` {run.directory} holds a run of another architecture. The file may "
                f"have changed: {settings.architecture}. Choose another directory."
            )
        if session.has_work:
            _Training(session, architecture).run()
        elif not run.report.exists():  # A kill came before it.
            with report.failure_as_warning():
                report.write_report(run.directory)
    return run


def load_teacher_seeing_images_once(
    settings: TrainSettings, image_shape: tuple[int, int, int], num_classes: int
) -> tuple["keras.Model | None", bool]:
    """Loads the teacher if it sees each training image once; `None` if it sees each batch.

    Args:
        settings: Settings of a training with a teacher.
        image_shape: Shape of the student's images.
        num_classes: Number of the student's classes.

    Returns:
        The teacher, and whether it gives features, which need a new head.

    Raises:
        UserError: When the teacher cannot be loaded, does not take square images, or has other
            classes and would have to teach mixed images.
    """
    given = settings.teacher, settings.teacher_weights
    if not runs.is_foreign(*given, num_classes):
        if settings.teaches_each_batch:
            return None, False
        return _load_teacher(settings, image_shape, num_classes), False
    if settings.mix_up or settings.cut_mix:
        raise UserError(
            "--mix_up and --cut_mix mix images, for which a teacher of other classes has no "
            f"logits. Received: mix_up={settings.mix_up or 0.0}, cut_mix={settings.cut_mix}"
        )
    features = runs.load_features(*given)
    height, width = features.input_shape[1:3]
    if height != width:
        raise UserError(f"the teacher must take square images. Received: {height} x {width}")
    return features, True


def _load_teacher(settings, image_shape, num_classes):
    """A teacher of the same classes."""
    return networks.load_teacher(
        settings.teacher, settings.teacher_weights, image_shape, num_classes
    )


class _Training:
    """One training: its data, network and files."""

    def __init__(self, session, architecture):
        self.session = session
        self.settings = session.settings
        self.architecture = architecture

    def run(self):
        """Trains from the last checkpoint to the end."""
        import keras

        settings = self.settings
        keras.utils.set_random_seed(settings.seed)
        checkpoints = runs.Checkpoints(self.session)
        images, held_out = self._load_training_images()
        settings = self.settings = self.session.fit_settings(images)
        images = self._teach(images)
        if settings.teacher:  # Whether it was loaded must not decide how the network starts.
            keras.utils.set_random_seed(settings.seed)
        batches = self._make_batches(images, checkpoints.step)
        network = self._make_network(images, is_new=checkpoints.step == 0)
        steps_per_epoch = checkpoints.steps_per_epoch or int(batches.cardinality())
        self._warn_of_few_steps(steps_per_epoch)
        model = self._compile(network, steps_per_epoch, images.logits is not None)
        self._begin(images)
        rows, callbacks = self._make_callbacks(checkpoints)
        with data.naming_unreadable(images), data.naming_unreadable(held_out):
            checkpoints.fit(
                model,
                batches,
                settings.epochs,
                rows,
                callbacks,
                validation_data=held_out and _test_batches(held_out),
            )
            self._finish(network, batches, held_out, steps_per_epoch * settings.epochs)

    def _load_training_images(self):
        """The images to train on, and those held out or `None`."""
        images, held_out = self._split(self._load_images("train"))
        settings = self.settings
        if settings.class_weight == "balanced":
            images = images.balanced()
        count = self.architecture.count()
        logging.info(
            "%s: %s MACs, %s parameters; %d training images",
            settings.architecture,
            f"{count.macs:,}",
            f"{count.params:,}",
            len(images.y),
        )
        return images, held_out

    def _teach(self, images):
        """The training images with the logits of a teacher, if it sees each of them only once."""
        settings, file = self.settings, self.session.run.teacher_file
        if settings.teacher is None:
            return images
        if file.is_file():  # The run is continued, and the teacher need not be loaded.
            return images._replace(logits=np.load(file, allow_pickle=False))
        teacher, needs_head = load_teacher_seeing_images_once(
            settings, self.architecture.input_shape, self.architecture.num_classes
        )
        if teacher is None:
            return images
        seen = images
        if needs_head:
            size = teacher.input_shape[1]
            seen, _ = self._split(settings.load_images("train", size, again=True))
        with data.naming_unreadable(seen):
            outputs = runs.compute_outputs(teacher, seen)
            if needs_head:
                outputs = runs.fit_head(outputs, seen.y, seen.class_names, settings.seed)
        return images._replace(logits=outputs)

    def _split(self, images):
        """The images to train on, and those held out or `None`."""
        settings = self.settings
        if not settings.validation_split:
            return images, None
        kept, rest = data.split(images.y, settings.validation_split, settings.seed)
        return images.part(kept), images.part(rest)

    def _load_images(self, split, again=False):
        """The images, which the architecture then fits."""
        settings, own = self.settings, self.architecture
        size = settings.input_size or own.input_shape[0]
        images = settings.load_images(split, size, again)
        fitted = own.fit_to(images.image_shape, len(images.class_names))
        if fitted != own:
            logging.info(
                "%s was made for images of %s and %d classes; it is trained for images of %s and "
                "%d classes",
                *(settings.architecture, own.input_shape, own.num_classes),
                *(fitted.input_shape, fitted.num_classes),
            )
            self.architecture = fitted
        return images

    def _make_batches(self, images, first_step):
        settings = self.settings
        augmentation = settings.make_augmentation(
            images.image_shape[0],
            rand_augment=settings.rand_augment,
            mix_up=settings.mix_up,
            cut_mix=settings.cut_mix,
        )
        batches = data.train_batches(
            images, settings.batch_size, settings.seed, augmentation, first_step
        )
        if augmentation.mixes or images.logits is not None:
            return batches
        return _one_hot(batches, len(images.class_names))

    def _make_network(self, images, is_new):
        """The network with the weights to start from."""
        import keras

        settings, policy = self.settings, keras.config.dtype_policy()
        precision = settings.mixed_precision
        is_float32 = precision == "none"
        keras.config.set_dtype_policy("float32" if is_float32 else f"mixed_{precision}")
        try:
            build = networks.build_for_training if is_float32 else networks.build_network
            network = build(self.architecture)
        finally:
            keras.config.set_dtype_policy(policy)
        if settings.init == "supernet" and is_new:
            self._give_shared_weights(network, images)
        return network

    def _give_shared_weights(self, network, images):
        settings = self.settings
        run = runs.SearchRun.of_architecture(settings.architecture)
        if settings.search_dir is not None:
            run = runs.SearchRun(settings.search_dir)
        search = run.load_search()
        try:
            search.space.choices(self.architecture)
        except UserError as error:
            raise UserError(
                f"`init`: {settings.architecture} is not of the search: {error}"
            ) from None
        search.supernet.give_weights(network)
        plain = data.train_batches(images, settings.batch_size, settings.seed)
        networks.recalibrate(network, (x for x, *_ in plain.take(_RECALIBRATION_BATCHES)))

    def _warn_of_few_steps(self, steps_per_epoch):
        if steps_per_epoch < _FEW_STEPS_PER_EPOCH:
            logging.warning(
                "an epoch has %d %s of %d images, which trains little: lower `batch_size`, or "
                "raise `epochs`",
                *(steps_per_epoch, "step" if steps_per_epoch == 1 else "steps"),
                self.settings.batch_size,
            )

    def _compile(self, network, steps_per_epoch, has_logits):
        """The model to fit, the network alone or with its teacher, with all its variables."""
        import keras
        import tensorflow as tf

        settings, architecture, model = self.settings, self.architecture, network
        if settings.teacher and not has_logits:
            teacher = _load_teacher(settings, architecture.input_shape, architecture.num_classes)
            model = networks.TaughtNetwork(network, teacher)
        model.compile(
            optimizer=settings.make_optimizer(steps_per_epoch * settings.epochs, steps_per_epoch),
            loss=self._loss(),
            metrics=[keras.metrics.MeanMetricWrapper(_accuracy, name="accuracy")],
            jit_compile=False,  # XLA takes 8 times as long on CPUs.
        )
        # Variables of optimizer and metrics, which a checkpoint holds too.
        model.optimizer.build(model.trainable_variables)
        nothing = tf.zeros((1, architecture.num_classes))
        model.compute_metrics(None, nothing, nothing)
        model.reset_metrics()
        return model

    def _loss(self):
        import keras

        settings = self.settings
        if settings.teacher:
            return networks.DistillationLoss(
                settings.temperature, settings.distillation_weight, settings.label_smoothing
            )
        return keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=settings.label_smoothing
        )

    def _begin(self, images):
        settings = self.settings
        teacher = settings.teacher
        if teacher is not None and not pathlib.Path(teacher).is_file():
            teacher = None  # a name of keras.applications
        self.session.begin(teacher=teacher, teacher_weights=settings.teacher_weights)
        file = self.session.run.teacher_file
        if images.logits is not None and not file.is_file():
            with replacing(file) as temporary:
                np.save(temporary, images.logits)
        self.architecture.save(self.session.run.architecture_file)

    def _make_callbacks(self, checkpoints):
        """The file with a row for each epoch, and further callbacks."""
        run = self.session.run

        def metrics(epoch, logs):
            return {"step": checkpoints.step, "epoch": epoch + 1} | logs

        def line(epoch, logs):
            return ", ".join(f"{name} {value:.4g}" for name, value in logs.items())

        callbacks = [runs.StopOnDivergence(), runs.Progress(line, first_step=checkpoints.step)]
        if self.settings.tensorboard:
            flags = self.settings.given()
            callbacks.append(runs.TensorBoardFile(run.tensorboard_folder, metrics, flags))
        return [runs.MetricsFile(run.metrics_file, metrics)], callbacks

    def _finish(self, network, batches, held_out, steps):
        """Saves the trained network, in float32 whatever it was trained in, and tests it."""
        settings, architecture, run = self.settings, self.architecture, self.session.run
        model = architecture.build()
        model.set_weights(network.get_weights())
        if settings.ema_momentum or steps < _FEW_STEPS:
            some = batches.repeat().take(_RECALIBRATION_BATCHES)
            networks.recalibrate(model, (x for x, *_ in some))
        # Save first: the evaluation may fail, and the trained network must not be lost.
        with replacing(run.model_file) as temporary:
            model.save(temporary)
        scores = self._score(model, held_out)
        self.session.finish(
            data=settings.data,
            seed=settings.seed,
            epochs=settings.epochs,
            macs=architecture.macs(),
            params=architecture.params(),
            **scores,
            next=_export_command(self.session.run),
        )
        with report.failure_as_warning():
            report.write_report(run.directory)

    def _score(self, model, held_out):
        """Accuracies on the test images and those held out, and the worst mistakes in a file."""
        scores, test = {}, self._load_images("test", again=True)
        for name, images in (("val", held_out), ("test", test)):
            if images is not None:
                with data.naming_unreadable(images):
                    score = runs.score(model, images)
                described = runs.describe_confusion(score.confusion, images.class_names)
                for accuracy in ("accuracy", "balanced_accuracy"):
                    scores[f"{name}_{accuracy}"] = described.pop(accuracy)
        write_json(self.session.run.mistakes_file, score.mistakes)
        return scores | described


def _accuracy(y_true, y_pred):
    """Accuracy for labels that may have a teacher's logits behind them."""
    import keras

    classes = y_pred.shape[-1]
    return keras.metrics.categorical_accuracy(y_true[:, :classes], y_pred)


def _test_batches(images):
    return _one_hot(data.test_batches(images), len(images.class_names))


def _one_hot(batches, num_classes):
    """Keras smooths labels only where they are one-hot."""
    import tensorflow as tf

    return batches.map(lambda x, y, *weights: (x, tf.one_hot(y, num_classes), *weights))


def _train_and_print(settings):
    run = run_training(settings)
    summary = run.summary
    accuracies = [
        f"{name} accuracy {summary[f'{name}_accuracy']:.2%}"
        f" (balanced {summary.get(f'{name}_balanced_accuracy', math.nan):.2%})"
        for name in ("val", "test")
        if f"{name}_accuracy" in summary
    ]
    print(
        f"\n{', '.join(accuracies)}; {summary['macs']:,} MACs, "
        f"{summary['params']:,} parameters; {summary['wall_seconds']:.0f} s\n"
        f"results: {run.directory}\n"
        + (f"report: {run.report}\n" if run.report.exists() else "")
        + f"next, write it for the phone:\n  {_export_command(run)}"
    )


def _export_command(run):
    return f"python -m export.tflite --model={shlex.quote(str(run.model_file))} --quantize=int8"


COMMAND = Command(
    name="fpnas train",
    summary="Trains one architecture and saves it as a Keras model.",
    examples=(
        (
            "Photos, with the architecture that a search found",
            "fpnas train --architecture=runs/mine/architecture.json --data=folder:photos "
            "--random_flip --output_dir=runs/mine_trained",
        ),
    ),
    settings=TrainSettings,
    run=_train_and_print,
)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
