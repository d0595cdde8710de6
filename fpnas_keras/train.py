"""Trains one architecture from scratch: flags in, `model.keras` out.

python -m fpnas_keras.train --architecture=FILE --output_dir=DIR
"""

import shlex

import keras
import tensorflow as tf
from absl import flags, logging

from fpnas_keras import checkpoints, cli, data, run_directory
from fpnas_keras.architecture import Architecture
from fpnas_keras.callbacks import MetricsFile, StopOnDivergence
from fpnas_keras.checkpoints import Checkpoints
from fpnas_keras.files import replacing
from fpnas_keras.run_directory import Run

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
    "Part of the training set held out to report val_accuracy an epoch (of the weights before "
    "--ema_momentum averages them), 0 to 0.9. Choose flags by it: the test set is read once, at "
    "the end.",
    lower_bound=0,
    upper_bound=0.9,
)
flags.DEFINE_integer("seed", 0, "Seed of everything that is random.", lower_bound=0)

_DEFAULTS = {
    "sgd": {"learning_rate": 0.1, "weight_decay": 0.001},
    "adamw": {"learning_rate": 0.002, "weight_decay": 0.05},
}
# Batches that the batch norms' moving statistics are estimated on after averaging.
_RECALIBRATION_BATCHES = 100


def main() -> None:
    """Runs the training that the flags describe."""
    run = Run(FLAGS.output_dir, __name__, "fpnas_keras.train")
    architecture = Architecture.load(FLAGS.architecture)
    with run.interruptions():
        if not run.finished:
            _train(run, architecture)
        elif run.summary()["architecture"] != architecture.to_dict():
            raise ValueError(
                f"`output_dir` {run.directory} holds a run of another architecture than "
                f"{FLAGS.architecture} is now. Choose another directory."
            )
        _report(run)


def _train(run, architecture):
    keras.utils.set_random_seed(FLAGS.seed)
    checkpoints = Checkpoints(run, FLAGS.checkpoint_every)
    batches, held_out = _batches(architecture, checkpoints.step)
    model = architecture.build()
    optimizer = _optimizer(checkpoints.steps_per_epoch or int(batches.cardinality()))
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=FLAGS.label_smoothing
        ),
        metrics=["accuracy"],
        jit_compile=False,  # XLA takes 8 times as long on CPUs.
    )
    _build_variables(model, architecture.num_classes)
    run.begin(architecture=FLAGS.architecture)

    def row(epoch, logs):
        step = int(optimizer.iterations.numpy())
        return {"step": step, "epoch": epoch + 1} | logs

    checkpoints.fit(
        model,
        batches,
        epochs=FLAGS.epochs,
        metrics_file=MetricsFile(run.path("metrics.csv"), row),
        callbacks=[StopOnDivergence()],
        validation_data=held_out,
    )
    if FLAGS.ema_momentum:
        _recalibrate(model, batches)
    # Before anything that may fail: the training is worth more than its figures.
    with replacing(run.path("model.keras")) as temporary:
        model.save(temporary)
    run.finish(
        architecture=architecture.to_dict(),
        data=FLAGS.data,
        seed=FLAGS.seed,
        epochs=FLAGS.epochs,
        macs=architecture.macs(),
        params=architecture.params(),
        test_accuracy=_test_accuracy(model, architecture),
    )


def _build_variables(model, num_classes):
    """Makes the variables of optimizer and metrics, which a checkpoint holds too."""
    model.optimizer.build(model.trainable_variables)
    nothing = tf.zeros((1, num_classes))
    model.compute_metrics(None, nothing, nothing)
    model.reset_metrics()


def _batches(architecture, first_step):
    """Batches to train on, and those of the held out images or `None`."""
    images = _load(architecture, "train")
    if FLAGS.random_crop >= architecture.input_shape[0]:
        raise ValueError(
            f"`random_crop` must be below the image size, {architecture.input_shape[0]}. "
            f"Received: random_crop={FLAGS.random_crop}"
        )
    held_out = None
    if FLAGS.validation_split:
        kept, rest = data.split(images.y, FLAGS.validation_split, FLAGS.seed)
        validation = images._replace(x=images.x[rest], y=images.y[rest])
        held_out = _one_hot(data.test_batches(validation), architecture)
        images = images._replace(x=images.x[kept], y=images.y[kept])
    logging.info(
        "%s: %s MACs, %s parameters; %d training images",
        FLAGS.architecture,
        f"{architecture.macs():,}",
        f"{architecture.params():,}",
        len(images.y),
    )
    batches = data.train_batches(
        images, FLAGS.batch_size, FLAGS.seed, FLAGS.random_crop, FLAGS.random_flip, first_step
    )
    return _one_hot(batches, architecture), held_out


def _test_accuracy(model, architecture):
    test = data.test_batches(_load(architecture, "test"))
    return model.evaluate(_one_hot(test, architecture))[1]


def _load(architecture, split):
    owner = f"the architecture {FLAGS.architecture}"
    return cli.load_data_for(owner, architecture.input_shape, architecture.num_classes, split)


def _one_hot(batches, architecture):
    """Keras smooths labels only where they are one-hot."""
    return batches.map(lambda x, y: (x, tf.one_hot(y, architecture.num_classes)))


def _optimizer(steps_per_epoch):
    defaults = _DEFAULTS[FLAGS.optimizer]
    peak = defaults["learning_rate"] if FLAGS.learning_rate is None else FLAGS.learning_rate
    decay = defaults["weight_decay"] if FLAGS.weight_decay is None else FLAGS.weight_decay
    steps = steps_per_epoch * FLAGS.epochs
    averaged = 1 / (1 - FLAGS.ema_momentum)
    if FLAGS.ema_momentum and averaged > steps / 10:
        raise ValueError(
            f"`ema_momentum` averages {averaged:.0f} steps, which must be at most a tenth of the "
            f"{steps} steps of the training. Received: ema_momentum={FLAGS.ema_momentum}"
        )
    warmup_steps = min(int(FLAGS.warmup_epochs * steps_per_epoch), steps - 1)
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


def _recalibrate(model, batches):
    """Estimates the moving statistics anew: they belong to the weights before averaging."""
    for images, _ in batches.repeat().take(_RECALIBRATION_BATCHES):
        model(images, training=True)


def _report(run):
    """Prints the result of a finished run and what to type next."""
    summary = run.summary()
    print(
        f"\ntest accuracy {summary['test_accuracy']:.2%}; {summary['macs']:,} MACs, "
        f"{summary['params']:,} parameters; {summary['wall_seconds']:.0f} s\n"
        f"results: {run.directory}\n"
        "next, write it for the phone:\n"
        f"  python -m export.tflite --model={shlex.quote(str(run.path('model.keras')))} "
        f"{cli.data_arguments()}"
    )


if __name__ == "__main__":
    cli.run(main)
