"""Trains one architecture: flags in, `model.keras` out.

python -m fpnas_keras.train --architecture=FILE --output_dir=DIR
"""

import pathlib
import shlex

import keras
import tensorflow as tf
from absl import flags, logging

from fpnas_keras import checkpoints, cli, data, distillation, run_directory, searched
from fpnas_keras.architecture import Architecture
from fpnas_keras.errors import UserError
from fpnas_keras.files import replacing
from fpnas_keras.networks.plain_network import recalibrate
from fpnas_keras.runs.callbacks import EpochLine, MetricsFile, StopOnDivergence, TensorBoardFile
from fpnas_keras.runs.checkpoints import Checkpoints
from fpnas_keras.runs.run_directory import Run

FLAGS = flags.FLAGS
for _module in (cli, run_directory, checkpoints):
    flags.adopt_module_key_flags(_module)
flags.mark_flag_as_required("output_dir")
flags.DEFINE_string("architecture", None, "Architecture file (JSON) to train.", required=True)
flags.DEFINE_integer("epochs", 20, "Epochs to train.", lower_bound=1)
flags.DEFINE_integer("batch_size", 128, "Images a batch.", lower_bound=2)
flags.DEFINE_enum("optimizer", "sgd", ["sgd", "adamw"], "SGD with Nesterov momentum 0.9, or AdamW.")
flags.DEFINE_float(
    "learning_rate",
    None,
    "Peak learning rate, cosine to 0; by default 0.1 for sgd and 0.002 for adamw. Scale it with "
    "the batch size.",
    lower_bound=0,
)
flags.DEFINE_float("warmup_epochs", 1.0, "Epochs over which the learning rate rises from 0.", 0)
flags.DEFINE_float(
    "weight_decay",
    None,
    "Decoupled weight decay of all but biases and batch norms, times the learning rate a step; "
    "by default 0.001 for sgd and 0.05 for adamw. Raise it against overfitting.",
    lower_bound=0,
)
flags.DEFINE_float(
    "label_smoothing",
    0.1,
    "Part of each label spread over all classes, 0 to 1.",
    lower_bound=0,
    upper_bound=1,
)
flags.DEFINE_integer(
    "random_crop",
    2,
    "Pixels that an image may move in each direction; about an eighth of small images.",
    lower_bound=0,
)
flags.DEFINE_boolean(
    "random_flip",
    False,
    "Mirror half of the images left to right. For photos; not for digits or text.",
)
flags.DEFINE_float(
    "rand_augment",
    0.0,
    "Strength of RandAugment's two random distortions of each batch, 0 (off) to 1; 0.1 is usual "
    "(a turn by up to 36 degrees, a shift by up to a tenth of the image). "
    "Against overfitting of large networks in long trainings.",
    lower_bound=0,
    upper_bound=1,
)
flags.DEFINE_float(
    "mix_up",
    0.0,
    "alpha of MixUp, which adds images to each other, 0 (off) to 1; 0.2 is usual. Against "
    "overfitting, in trainings of 50 epochs and more.",
    lower_bound=0,
    upper_bound=1,
)
flags.DEFINE_float(
    "cut_mix",
    0.0,
    "alpha of CutMix, which replaces a part of each image by one of another, 0 (off) to 1. With "
    "--mix_up too each batch takes one of the two.",
    lower_bound=0,
    upper_bound=1,
)
flags.DEFINE_string(
    "teacher",
    None,
    "Network whose logits are learned beside the labels (distillation): a .keras file, an "
    "architecture (.json) with --teacher_weights, or the name of a network of keras.applications "
    "(without --teacher_weights for ImageNet's 1,000 classes in ImageNet's order alone). Train it "
    "with --label_smoothing=0: smoothed labels spoil what it teaches (arXiv:1906.02629).",
)
flags.DEFINE_string(
    "teacher_weights",
    None,
    "Weights (.weights.h5) of the --teacher that has none of its own; a network of "
    "keras.applications has those of ImageNet without it.",
)
flags.DEFINE_float(
    "temperature",
    3.0,
    "What the logits of both are divided by when they are compared. Higher shows more of what the "
    "teacher thinks of the other classes.",
    lower_bound=0.1,
    upper_bound=100,
)
flags.DEFINE_float(
    "distillation_weight",
    0.5,
    "Share of the teacher in the loss, 0 to 1; the labels have the rest.",
    lower_bound=0,
    upper_bound=1,
)
flags.DEFINE_enum(
    "init",
    "random",
    ["random", "supernet"],
    "Weights to start from: random ones, or the shared weights of the search that found the "
    "architecture, for short trainings. Those have seen all training images, what "
    "--validation_split holds out too.",
)
flags.DEFINE_string(
    "search_dir",
    None,
    "Directory of the search for --init=supernet; by default that which --architecture lies in.",
)
flags.DEFINE_enum(
    "mixed_precision",
    "none",
    ["none", "bfloat16", "float16"],
    "Numbers that the layers compute in; the weights, and model.keras, are float32. bfloat16 and "
    "float16 are faster on GPUs.",
)
flags.DEFINE_float(
    "ema_momentum",
    0.0,
    "Momentum of an exponential moving average of the weights that replaces them at the end; "
    "0 is off, 0.999 usual.",
    lower_bound=0,
    upper_bound=0.999999,
)
flags.DEFINE_float(
    "validation_split",
    0.0,
    "Part of the training set held out to report val_accuracy, 0 to 0.9: an epoch (of the weights "
    "before --ema_momentum averages them) and of model.keras. Choose flags by it: the test set is "
    "read once, at the end.",
    lower_bound=0,
    upper_bound=0.9,
)
flags.DEFINE_boolean(
    "tensorboard",
    True,
    "Whether scalars and the flags are written for TensorBoard, to the folder `tensorboard`.",
)
flags.DEFINE_integer("seed", 0, "Seed of everything that is random.", lower_bound=0)

flags.register_multi_flags_validator(
    ["teacher", "teacher_weights"],
    lambda values: values["teacher"] is not None or values["teacher_weights"] is None,
    "--teacher_weights needs --teacher",
)
flags.register_multi_flags_validator(
    ["init", "search_dir"],
    lambda values: values["init"] == "supernet" or values["search_dir"] is None,
    "--search_dir needs --init=supernet",
)

_DEFAULTS = {
    "sgd": {"learning_rate": 0.1, "weight_decay": 0.001},
    "adamw": {"learning_rate": 0.002, "weight_decay": 0.05},
}
# Batches that the batch norms' statistics are estimated on where moving ones will not do: those are
# of other weights, or lag behind in trainings of fewer steps than this.
_RECALIBRATION_BATCHES = 100
_FEW_STEPS = 500
_FEW_STEPS_PER_EPOCH = 10


def main() -> None:
    """Runs the training that the flags describe."""
    run = Run(FLAGS.output_dir, __name__, "fpnas_keras.train")
    architecture = Architecture.load(FLAGS.architecture)
    with run.interruptions():
        if not run.finished:
            _train(run, architecture)
        elif run.summary()["architecture"] != architecture.to_dict():
            raise UserError(
                f"`output_dir` {run.directory} holds a run of another architecture than "
                f"{FLAGS.architecture} is now. Choose another directory."
            )
        _report(run)


def _train(run, architecture):
    keras.utils.set_random_seed(FLAGS.seed)
    checkpoints = Checkpoints(run, FLAGS.checkpoint_every)
    images, held_out = _images(architecture)
    batches = _batches(images, checkpoints.step)
    student = _student(architecture, images, is_new=checkpoints.step == 0)
    model = student
    if FLAGS.teacher:
        model = distillation.make_distiller(
            _teacher(architecture), student, FLAGS.temperature, FLAGS.distillation_weight
        )
    steps_per_epoch = checkpoints.steps_per_epoch or int(batches.cardinality())
    if steps_per_epoch < _FEW_STEPS_PER_EPOCH:
        logging.warning(
            "an epoch has %d steps of %d images, which trains little: lower `batch_size`, or raise "
            "`epochs`",
            steps_per_epoch,
            FLAGS.batch_size,
        )
    optimizer = _optimizer(steps_per_epoch)
    if FLAGS.mixed_precision == "float16":
        # `compile` would do so by the policy of the model, which a distiller does not have.
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model.compile(
        optimizer=optimizer,
        loss=_loss(),
        metrics=["accuracy"],
        jit_compile=False,  # XLA takes 8 times as long on CPUs.
    )
    _build_variables(model, architecture.num_classes)
    run.begin(
        architecture=FLAGS.architecture,
        teacher=FLAGS.teacher if FLAGS.teacher and pathlib.Path(FLAGS.teacher).is_file() else None,
        teacher_weights=FLAGS.teacher_weights,
    )
    files, callbacks = _records(run, checkpoints)
    checkpoints.fit(
        model,
        batches,
        FLAGS.epochs,
        files,
        callbacks,
        validation_data=held_out and _test_batches(held_out),
    )
    _finish(run, architecture, student, batches, held_out, steps_per_epoch * FLAGS.epochs)


def _finish(run, architecture, student, batches, held_out, steps):
    """Saves the trained network, in float32 whatever it was trained in, and tests it."""
    model = architecture.build()
    model.set_weights(student.get_weights())
    if FLAGS.ema_momentum or steps < _FEW_STEPS:
        recalibrate(model, (x for x, _ in batches.repeat().take(_RECALIBRATION_BATCHES)))
    # Before anything that may fail: the training is worth more than its figures.
    with replacing(run.path("model.keras")) as temporary:
        model.save(temporary)
    model.compile(loss=_loss(), metrics=["accuracy"], jit_compile=False)
    accuracies = {"test_accuracy": _load(architecture, "test")}
    if held_out:
        accuracies["val_accuracy"] = held_out
    run.finish(
        architecture=architecture.to_dict(),
        data=FLAGS.data,
        seed=FLAGS.seed,
        epochs=FLAGS.epochs,
        macs=architecture.macs(),
        params=architecture.params(),
        **{name: model.evaluate(_test_batches(each))[1] for name, each in accuracies.items()},
    )


def _records(run, checkpoints):
    """What the run writes down every epoch: its file, and further callbacks."""

    def row(epoch, logs):
        return {"step": checkpoints.step, "epoch": epoch + 1} | logs

    def line(epoch, logs):
        return ", ".join(f"{name} {value:.4g}" for name, value in logs.items())

    callbacks = [StopOnDivergence(), EpochLine(line)]
    if FLAGS.tensorboard:
        callbacks.append(TensorBoardFile(run.path("tensorboard"), row, run.flag_values))
    return [MetricsFile(run.path("metrics.csv"), row)], callbacks


def _loss():
    return keras.losses.CategoricalCrossentropy(
        from_logits=True, label_smoothing=FLAGS.label_smoothing
    )


def _build_variables(model, num_classes):
    """Makes the variables of optimizer and metrics, which a checkpoint holds too."""
    model.optimizer.build(model.trainable_variables)
    nothing = tf.zeros((1, num_classes))
    model.compute_metrics(None, nothing, nothing)
    model.reset_metrics()


def _student(architecture, images, is_new):
    """The network with the weights to start from."""
    policy = "float32" if FLAGS.mixed_precision == "none" else f"mixed_{FLAGS.mixed_precision}"
    keras.config.set_dtype_policy(policy)
    try:
        model = architecture.build()
    finally:
        keras.config.set_dtype_policy("float32")
    if FLAGS.init == "supernet" and is_new:
        search = searched.load(_search_dir())
        try:
            search.space.choices(architecture)
        except ValueError as error:
            raise UserError(f"`init`: {FLAGS.architecture} is not of the search: {error}") from None
        search.supernet.give_weights(model)
        plain = data.train_batches(images, FLAGS.batch_size, FLAGS.seed)
        recalibrate(model, (x for x, _ in plain.take(_RECALIBRATION_BATCHES)))
    return model


def _search_dir():
    """Where the architecture comes from, itself or by way of `fpnas_keras.rank`."""
    folder = pathlib.Path(FLAGS.architecture).parent
    return FLAGS.search_dir or (folder.parent if folder.name == "pareto" else folder)


def _teacher(architecture):
    shape, num_classes = architecture.input_shape, architecture.num_classes
    return distillation.load_teacher(FLAGS.teacher, FLAGS.teacher_weights, shape, num_classes)


def _images(architecture):
    """The images to train on, and those held out or `None`."""
    images = _load(architecture, "train")
    held_out = None
    if FLAGS.validation_split:
        kept, rest = data.split(images.y, FLAGS.validation_split, FLAGS.seed)
        held_out, images = images.part(rest), images.part(kept)
    logging.info(
        "%s: %s MACs, %s parameters; %d training images",
        FLAGS.architecture,
        f"{architecture.macs():,}",
        f"{architecture.params():,}",
        len(images.y),
    )
    return images, held_out


def _batches(images, first_step):
    size = images.image_shape[0]
    if FLAGS.random_crop >= size:
        raise UserError(
            f"`random_crop` must be below the image size, {size}. "
            f"Received: random_crop={FLAGS.random_crop}"
        )
    augmentation = data.Augmentation(
        FLAGS.random_crop, FLAGS.random_flip, FLAGS.rand_augment, FLAGS.mix_up, FLAGS.cut_mix
    )
    batches = data.train_batches(images, FLAGS.batch_size, FLAGS.seed, augmentation, first_step)
    return batches if augmentation.mixes else _one_hot(batches, len(images.class_names))


def _load(architecture, split):
    owner = f"the architecture {FLAGS.architecture}"
    return cli.load_data_for(owner, architecture.input_shape, architecture.num_classes, split)


def _test_batches(images):
    return _one_hot(data.test_batches(images), len(images.class_names))


def _one_hot(batches, num_classes):
    """Keras smooths labels only where they are one-hot."""
    return batches.map(lambda x, y: (x, tf.one_hot(y, num_classes)))


def _optimizer(steps_per_epoch):
    defaults = _DEFAULTS[FLAGS.optimizer]
    peak = defaults["learning_rate"] if FLAGS.learning_rate is None else FLAGS.learning_rate
    decay = defaults["weight_decay"] if FLAGS.weight_decay is None else FLAGS.weight_decay
    steps = steps_per_epoch * FLAGS.epochs
    averaged = 1 / (1 - FLAGS.ema_momentum)
    if FLAGS.ema_momentum and averaged > steps / 10:
        raise UserError(
            f"`ema_momentum` averages {averaged:.0f} steps, which must be at most a tenth of the "
            f"{steps} steps of the training. Received: ema_momentum={FLAGS.ema_momentum}"
        )
    warmup_steps = min(int(min(FLAGS.warmup_epochs, FLAGS.epochs) * steps_per_epoch), steps - 1)
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0 if warmup_steps else peak,
        decay_steps=steps - warmup_steps,
        warmup_target=peak if warmup_steps else None,
        warmup_steps=warmup_steps,
    )
    common = {
        "weight_decay": decay,
        "use_ema": FLAGS.ema_momentum > 0,
        "ema_momentum": FLAGS.ema_momentum,
    }
    if FLAGS.optimizer == "sgd":
        optimizer = keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True, **common)
    else:
        optimizer = keras.optimizers.AdamW(schedule, **common)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return optimizer


def _report(run):
    """Prints the result of a finished run and what to type next."""
    summary = run.summary()
    names = ("val_accuracy", "test_accuracy")
    accuracies = [
        f"{name.replace('_', ' ')} {summary[name]:.2%}" for name in names if name in summary
    ]
    print(
        f"\n{', '.join(accuracies)}; {summary['macs']:,} MACs, "
        f"{summary['params']:,} parameters; {summary['wall_seconds']:.0f} s\n"
        f"results: {run.directory}\n"
        "next, write it for the phone:\n"
        f"  python -m export.tflite --model={shlex.quote(str(run.path('model.keras')))} "
        f"{cli.data_arguments()}"
    )


if __name__ == "__main__":
    cli.run(main)
