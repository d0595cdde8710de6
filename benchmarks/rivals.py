"""What a user writes with Keras Tuner or AutoKeras for the job of `fpnas build`.

python rivals.py METHOD IMAGES.npz FOLDER SECONDS MACS

It runs in an environment of its own, without this project. `build.py` makes the environment and the
file of images (`x_train`, `y_train`), and judges the files. The code of a method is what its
documentation shows, for a limited time.
"""

import contextlib
import pathlib
import sys
import time

import keras
import numpy as np
import tensorflow as tf


class TimeIsUpError(BaseException):
    """The time for trying is over. A tuner catches every `Exception`, but not this."""


class TimeLimit(keras.callbacks.Callback):
    """Ends what a tuner does when the time is up.

    Args:
        seconds: How long it may take from now.
    """

    def __init__(self, seconds: float):
        super().__init__()
        self.end = time.monotonic() + seconds

    def on_train_batch_end(self, batch, logs=None) -> None:
        if time.monotonic() > self.end:
            raise TimeIsUpError

    def __deepcopy__(self, memo):
        return self  # Tuners copy the callbacks of each trial.


def keras_tuner(x, y, seconds: float, macs: float) -> keras.Model:
    """Hyperband over the width of MobileNetV3-Small and the learning rate; then the best one."""
    import keras_tuner as kt

    classes, shape, start = int(y.max()) + 1, x.shape[1:], time.monotonic()
    (x_train, y_train), (x_val, y_val) = _split(x, y)

    def network(alpha):
        model = keras.applications.MobileNetV3Small(
            shape, alpha=alpha, weights=None, classes=classes, classifier_activation=None
        )
        for layer in model.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.momentum = 0.9  # Its own, 0.999, needs thousands of steps.
        return model

    widths = [alpha for alpha in np.arange(0.2, 1.01, 0.05) if count_macs(network(alpha)) <= macs]

    def build(hp):
        inputs = keras.Input(shape)
        augmented = keras.layers.RandomFlip("horizontal")(inputs)
        augmented = keras.layers.RandomTranslation(0.06, 0.06)(augmented)
        model = keras.Model(
            inputs, network(hp.Choice("alpha", [round(w, 2) for w in widths]))(augmented)
        )
        rate = hp.Float("learning_rate", 1e-4, 1e-2, sampling="log")
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])
        return model

    tuner = kt.Hyperband(build, "val_accuracy", max_epochs=20, directory="tuner", overwrite=True)
    with contextlib.suppress(TimeIsUpError):
        tuner.search(
            x_train,
            y_train,
            validation_data=(x_val, y_val),
            callbacks=[TimeLimit(0.6 * seconds)],
            verbose=0,
        )
    model = build(tuner.get_best_hyperparameters()[0])
    print(tuner.get_best_hyperparameters()[0].values, len(tuner.oracle.trials), "trials")
    return _fit_until(model, x, y, seconds - (time.monotonic() - start))


def autokeras(x, y, seconds: float, macs: float) -> keras.Model:
    """`ImageClassifier`, which knows no limit of the cost: the best model when the time is up."""
    import autokeras as ak

    classifier = ak.ImageClassifier(max_trials=100, directory="autokeras", overwrite=True)
    with contextlib.suppress(TimeIsUpError):
        classifier.fit(x, y, validation_split=0.2, callbacks=[TimeLimit(seconds)], verbose=0)
    return classifier.export_model()


def count_macs(model: keras.Model) -> int:
    """MACs of the convolutions and dense layers of a model."""
    total = 0
    for layer in model.layers:
        if isinstance(layer, (keras.layers.Conv2D, keras.layers.DepthwiseConv2D)):
            _, height, width, channels = layer.output.shape
            own = np.prod(layer.kernel.shape[:3])
            if isinstance(layer, keras.layers.DepthwiseConv2D):
                own = np.prod(layer.kernel.shape[:2])
            total += height * width * channels * own
        elif isinstance(layer, keras.layers.Dense):
            total += np.prod(layer.kernel.shape)
    return int(total)


def _split(x, y):
    order = np.random.default_rng(0).permutation(len(y))
    held_out = len(y) // 5
    parts = order[held_out:], order[:held_out]
    return [(x[part], y[part]) for part in parts]


def _fit_until(model, x, y, seconds):
    """Trains on all images with a cosine schedule that ends when the time is up."""
    start = time.monotonic()
    model.fit(x, y, batch_size=32, epochs=1, verbose=0)
    first = time.monotonic() - start
    start = time.monotonic()
    model.fit(x, y, batch_size=32, epochs=1, verbose=0)
    epoch = time.monotonic() - start
    epochs = max(1, int((seconds - first - epoch) / epoch))
    rate = float(model.optimizer.learning_rate)
    steps = epochs * -(-len(y) // 32)
    schedule = keras.optimizers.schedules.CosineDecay(rate, steps)
    model.compile(keras.optimizers.Adam(schedule), model.loss, metrics=["accuracy"])
    model.fit(x, y, batch_size=32, epochs=epochs, verbose=0)
    print(epochs, "epochs")
    return model


def convert(model: keras.Model, x: np.ndarray, is_int8: bool) -> bytes:
    """A model as a file that takes one image, in float32 or int8."""
    inputs = keras.Input(x.shape[1:], batch_size=1, name="image")
    fixed = keras.Model(inputs, model(inputs, training=False))
    converter = tf.lite.TFLiteConverter.from_keras_model(fixed)
    if is_int8:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        order = np.random.default_rng(0).permutation(len(x))[:300]
        few = [x[i : i + 1].astype(np.float32) for i in order]
        converter.representative_dataset = lambda: ([each] for each in few)
        converter.inference_input_type = converter.inference_output_type = tf.uint8
    return converter.convert()


def main() -> None:
    """Runs a method on the images of a file, and writes its files."""
    method, images, folder, seconds, macs = sys.argv[1:]
    keras.utils.set_random_seed(0)
    with np.load(images) as arrays:
        x, y = arrays["x_train"], arrays["y_train"]
    model = {"keras_tuner": keras_tuner, "autokeras": autokeras}[method](
        x, y, float(seconds), float(macs)
    )
    print(model.count_params(), "parameters")
    for name, is_int8 in (("judged.tflite", False), ("judged_int8.tflite", True)):
        pathlib.Path(folder, name).write_bytes(convert(model, x, is_int8))


if __name__ == "__main__":
    main()
