"""What Keras users type: `fit` on arrays and datasets, callbacks, saving, copies, displays."""

import dataclasses
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf

import fpnas_keras as fpnas

IMAGES = 24


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (IMAGES, 8, 8, 1), np.uint8), np.arange(IMAGES) % 3


def make_search(space, **changes):
    keras.utils.set_random_seed(0)
    arguments = {"samples": 2, "warmup_steps": 0, "cost": fpnas.MacsCost(30e3)} | changes
    search = fpnas.ArchitectureSearch(space, **arguments)
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    search.compile(optimizer, keras.optimizers.Adam(0.1))
    return search


def weights_of(search):
    return [variable.numpy() for variable in search.variables]


def assert_same(one, other):
    for a, b in zip(weights_of(one), weights_of(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def small(tiny_space):
    return dataclasses.replace(tiny_space, blocks=tiny_space.blocks[:1])


def test_fit_takes_what_keras_takes(small, images):
    x, y = images

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return x[8 * index : 8 * index + 8], y[8 * index : 8 * index + 8]

    search = make_search(small)
    expected = next(iter(fpnas.data.search_batches(x, y, batch_size=4)))
    pairs = tf.data.Dataset.from_tensor_slices((x, y))
    forms = {
        "arrays": (x, y),
        "floats": (x.astype(np.float32), y.astype(np.float32)),
        "column": (x, y[:, None]),
        "one-hot": (x, keras.utils.to_categorical(y, 3)),
        "lists": (x.tolist(), y.tolist()),
        "tensors": (tf.constant(x), tf.constant(y)),
        "pairs": (pairs,),
        "batches": (pairs.batch(7),),
        "PyDataset": (Batches(),),
        "weights": (tf.data.Dataset.from_tensor_slices((x, y, np.ones(IMAGES))),),
    }
    seen = []
    search.train_step = lambda data: seen.append(data) or {"train_loss": tf.constant(0.0)}
    search.compile(run_eagerly=True)
    for name, arguments in forms.items():
        seen.clear()
        search.fit(*arguments, batch_size=4, verbose=0)
        assert len(seen) == 3, name
        for part, (pixels, labels) in zip(seen[0], expected, strict=True):
            np.testing.assert_array_equal(part[0], pixels, err_msg=name)
            np.testing.assert_array_equal(part[1], labels, err_msg=name)


def test_weights_multiply_the_losses(small, images):
    x, y = images
    doubled = make_search(small)
    logs = doubled.fit(x, y, batch_size=4, sample_weight=np.full(IMAGES, 2), verbose=0).history
    plain = make_search(small)
    expected = plain.fit(x, y, batch_size=4, verbose=0, steps_per_epoch=1).history
    first = make_search(small).fit(
        x, y, batch_size=4, class_weight={0: 2, 1: 2, 2: 2}, verbose=0, steps_per_epoch=1
    )
    assert first.history["train_loss"][0] == pytest.approx(2 * expected["train_loss"][0], rel=1e-5)
    assert first.history["train_accuracy"] == expected["train_accuracy"]
    assert len(logs["train_loss"]) == 1


def test_weights_of_zero_leave_images_out(small, images):
    x, y = images
    entries = make_search(small).ask()
    search = make_search(small)
    weights = np.where(np.arange(8) < 5, 1, 0).astype(np.float32)
    batch = (tf.constant(x[:8], tf.float32), tf.constant(y[:8]), tf.constant(weights))
    loss, accuracy = search.evaluate_samples(entries, batch)[0].numpy()
    logits = search.supernet(batch[0], search._choices(entries.entries[0]))
    losses = keras.losses.sparse_categorical_crossentropy(y[:8], logits, from_logits=True)
    assert loss == pytest.approx(float(np.mean(losses * weights)), rel=1e-5)
    right = np.argmax(logits, -1) == y[:8]
    assert accuracy == pytest.approx(right[:5].mean())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: {"x": x, "y": y[:-1]}, "`x` and `y` must be of the same length"),
        (lambda x, y: {"x": x}, "with the labels in `y`"),
        (lambda x, y: {"x": x, "y": y.astype(str)}, "np.unique"),
        (lambda x, y: {"x": x, "y": y + 1}, "from 1 to 3; subtract 1"),
        (lambda x, y: {"x": x, "y": y + 0.5}, "index of the class"),
        (lambda x, y: {"x": x, "y": np.ones((IMAGES, 3))}, "single 1"),
        (lambda x, y: {"x": x[:, :6], "y": y}, r"must be of shape \(n, 8, 8, 1\)"),
        (lambda x, y: {"x": x[..., 0], "y": y}, r"x\[..., None\] adds the channel"),
        (lambda x, y: {"x": x * np.nan, "y": y}, "`x` must be finite"),
        (lambda x, y: {"x": x[:0], "y": y[:0]}, "must have images"),
        (lambda x, y: {"x": x, "y": y, "sample_weight": [1.0]}, "one weight an image"),
        (lambda x, y: {"x": x, "y": y, "class_weight": {0: 1.0}}, r"Missing: \[1, 2\]"),
        (lambda x, y: {"x": x, "y": y, "validation_split": 0.1}, "`validation_split` cannot"),
        (
            lambda x, y: {"x": tf.data.Dataset.from_tensors((x, y)).repeat()},
            "without `repeat",
        ),
        (lambda x, y: {"x": tf.data.Dataset.from_tensors(x)}, "dataset of images and labels"),
        (lambda x, y: {"x": fpnas.data.search_batches(x, y, 4), "y": y}, "`y` must not be given"),
    ],
)
def test_bad_arguments_are_refused_by_name(small, images, change, message):
    search = make_search(small)
    with pytest.raises(ValueError, match=message):
        search.fit(**change(*images), verbose=0)


@pytest.mark.parametrize("factor", [1 / 255, 257])
def test_pixels_of_another_range_are_a_warning(small, images, factor):
    x, y = images
    with pytest.warns(UserWarning, match=r"`x` has pixels from 0 to .*made for 0..255"):
        make_search(small).fit(
            x.astype(float) * factor, y, batch_size=4, steps_per_epoch=1, verbose=0
        )


@pytest.mark.parametrize(
    ("monitor", "values", "stops_after"),
    [
        ("validation_accuracy", [0.1, 0.2, 0.3, 0.3], 4),
        ("train_loss", [3, 2, 1, 1], 4),
        ("val_accuracy", [0.1, 0.2, 0.2], 3),
        ("expected_cost", [1, 2], 2),
    ],
)
def test_callbacks_know_which_way_is_better(small, images, monitor, values, stops_after):
    """A callback before them sets the metric of each epoch."""
    epochs = []

    class Set(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            logs[monitor] = values[epoch]
            epochs.append(epoch)

    x, y = images
    stop = keras.callbacks.EarlyStopping(monitor, patience=1)
    make_search(small).fit(
        x, y, batch_size=4, epochs=6, verbose=0, steps_per_epoch=1, callbacks=[Set(), stop]
    )
    assert len(epochs) == stops_after


def test_validation_data_evaluate_and_predict(small, images):
    x, y = images
    search = make_search(small)
    history = search.fit(
        x, y, batch_size=4, verbose=0, validation_data=(x.astype(np.float32), y)
    ).history
    loss, accuracy = search.evaluate(x.astype(np.float32), y, verbose=0)
    assert history["val_loss"][0] == pytest.approx(loss, rel=1e-4)
    assert history["val_accuracy"][0] == pytest.approx(accuracy, rel=1e-4)
    logits = search.predict(x.astype(np.float32), verbose=0)
    assert logits.shape == (IMAGES, 3)
    expected = keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)
    assert loss == pytest.approx(float(np.mean(expected)), rel=1e-3)
    search.summary(print_fn=lambda *_: None)


@pytest.mark.parametrize(
    "distribution",
    [
        pytest.param("factorized", marks=pytest.mark.slow),
        pytest.param("joint", marks=pytest.mark.slow),
        "coarse_to_fine",
    ],
)
def test_a_saved_search_goes_on_as_if_it_had_not_been_saved(tmp_path, small, images, distribution):
    search = make_search(small, distribution=distribution, seed=3)
    search.compile(search.optimizer, search.architecture_optimizer, clip_norm=0.01)
    search.fit(fpnas.data.search_batches(*images, batch_size=4), verbose=0)
    if distribution == "coarse_to_fine":
        search.refine()
    search.save(tmp_path / "search.keras")
    loaded = keras.saving.load_model(tmp_path / "search.keras", safe_mode=True)
    copy = pickle.loads(pickle.dumps(search))
    assert_same(loaded, search)
    for each in (search, loaded, copy):
        batches = fpnas.data.search_batches(*images, batch_size=4, first_step=3)
        each.fit(batches, verbose=0)
    assert_same(loaded, search)
    assert_same(copy, search)
    assert loaded.space == search.space
    assert loaded.derive() == search.derive()
    assert loaded.get_config() == search.get_config()


def test_clones_start_again(small):
    search = make_search(small, cost=fpnas.ParamsCost(1500), samples=fpnas.AdaptiveSamples(0.5))
    clone = keras.models.clone_model(search)
    assert clone.get_config() == search.get_config()
    assert clone.cost.target == 1500
    assert clone.cost.unit == "parameters"


def test_the_cost_cannot_be_replaced(small):
    with pytest.raises(ValueError, match="`cost` of a search cannot be replaced"):
        make_search(small).cost = fpnas.ParamsCost(1000)


def test_architectures_and_spaces_are_shown_as_tables(tiny_space):
    architecture = tiny_space.architecture([block.entries[-1] for block in tiny_space.blocks])
    assert repr(architecture) == (
        f"Architecture(space='tiny', input_shape=(8, 8, 1), num_classes=3, 6 blocks, "
        f"{architecture.macs():,} MACs, {architecture.params():,} parameters)"
    )
    head, *rows = str(architecture).splitlines()
    assert head.split() == [
        "block",
        "stride",
        "filters",
        *["kernel", "expansion", "activation"],
    ] + ["splits"]
    assert len(rows) == len(architecture.blocks)
    assert rows[0].split() == ["0", "2", "8", "5x5", "3", "hard_silu", "1"]
    assert str(architecture) in architecture._repr_html_()
    assert repr(tiny_space).startswith("Space(name='tiny', input_shape=(8, 8, 1), num_classes=3")
    assert len(str(tiny_space).splitlines()) == 1 + len(tiny_space.blocks)
    assert "kernel_size 3, 5" in str(tiny_space)
    assert "kernel_size 3, 5" in tiny_space._repr_html_()


def test_one_budget_and_a_list_of_budgets_give_the_same(small):
    search = make_search(small)
    budget = search.cost.target
    assert search.derive() == search.derive(budget) == search.derive([budget])[0]
    assert search.derivation().least == pytest.approx(0.95 * budget)


def test_fit_goes_on_in_the_order_of_the_images(small, images):
    search, seen = make_search(small), []
    whole = fpnas.data.search_batches(*images, batch_size=4)
    expected = [pixels.numpy() for (pixels, _), _ in whole]
    step = search.train_step

    def train_step(data):
        seen.append(data[0][0].numpy())
        return step(data)

    search.train_step = train_step
    search.compile(run_eagerly=True)
    for _ in range(3):
        search.fit(*images, batch_size=4, steps_per_epoch=1, verbose=0)
    np.testing.assert_array_equal(seen, expected)


def test_images_have_their_labels_and_weights(small, images):
    x, y = images
    data = fpnas.data.Images(x, y.astype(np.int32), tuple("abc"), (8, 8, 1))
    make_search(small).fit(data, batch_size=4, steps_per_epoch=1, verbose=0)
    with pytest.raises(ValueError, match="the images `x` have labels"):
        make_search(small).fit(data, class_weight={0: 1}, verbose=0)
    with pytest.raises(ValueError, match="`x` must have images of"):
        make_search(small).fit(data._replace(class_names=tuple("ab")), verbose=0)


def test_one_hot_labels_are_evaluated(small, images):
    x, y = images[0].astype(np.float32), images[1]
    search = make_search(small)
    expected = search.evaluate(x, y, verbose=0)
    received = search.evaluate(x, keras.utils.to_categorical(y, 3), verbose=0)
    assert received == pytest.approx(expected)


def test_steps_cost_what_they_draw(small):
    search = make_search(small, warmup_steps=10, samples=4)
    assert search.cost_of_steps(0, 10) == 10 * 7
    assert search.cost_of_steps(8, 12) == 2 * 7 + 2 * 16
    assert search.cost_of_steps(12, 15) == 3 * 16
