import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from fpnas_keras import data


def test_digits_are_split_the_same_way_whatever_is_asked_first():
    train, test = data.load("digits", "train", 16), data.load("digits", "test", 16)
    assert (len(train.y), len(test.y)) == (1437, 360)
    assert train.x.shape == (1437, 16, 16, 1)
    assert (train.x.dtype, train.x.min(), train.x.max()) == (np.uint8, 0, 255)
    assert train.class_names == tuple("0123456789")
    assert not {x.tobytes() for x in train.x} & {x.tobytes() for x in test.x}
    assert np.bincount(test.y).min() >= 34  # stratified


def test_split_is_disjoint_stratified_and_reproducible():
    y = np.repeat([0, 1, 2], [10, 20, 30])
    first, second = data.split(y, 0.5, seed=1)
    assert sorted([*first, *second]) == list(range(60))
    assert np.bincount(y[second]).tolist() == [5, 10, 15]
    assert np.array_equal(first, data.split(y, 0.5, seed=1)[0])
    assert not np.array_equal(first, data.split(y, 0.5, seed=2)[0])


@pytest.mark.parametrize(
    ("counts", "fraction", "second"),
    [
        ([1, 2, 3], 0.5, [0, 1, 1]),  # an image alone trains
        ([4] * 300, 0.2, [1] * 300),
        ([2] * 5, 0.2, [1] * 5),
        ([100, 2], 0.2, [20, 1]),
        ([100, 3], 0.95, [96, 2]),
    ],
)
def test_each_class_with_two_images_is_in_both_parts(counts, fraction, second):
    y = np.repeat(np.arange(len(counts)), counts)
    for seed in range(5):
        parts = data.split(y, fraction, seed)
        assert sorted(np.concatenate(parts)) == list(range(len(y)))
        received = np.bincount(y[parts[1]], minlength=len(counts))
        assert np.abs(received - second).max() <= 1
        assert (received > 0).tolist() == [count > 1 for count in counts]


def test_what_cannot_be_split():
    with pytest.raises(ValueError, match=r"no class has two images\. Received: 3 images of 3 cl"):
        data.split(np.arange(3), 0.5, seed=0)
    with pytest.raises(ValueError, match=r"y of shape \(10, 1\)"):
        data.split(np.zeros((10, 1), int), 0.5, seed=0)


def numbered_images(count):
    """Images that say which one they are."""
    x = np.zeros((count, 4, 4, 1), np.float32) + np.arange(count)[:, None, None, None]
    return x, np.arange(count) % 2


def test_the_architecture_part_may_have_batches_of_its_own():
    x, y = numbered_images(200)
    batches = data.search_batches(x, y, batch_size=10, architecture_batch_size=40)
    ((x_t, y_t), (x_v, y_v)) = next(iter(batches))
    assert (len(x_t), len(y_t), len(x_v), len(y_v)) == (10, 10, 40, 40)
    assert len(set(x_v.numpy()[:, 0, 0, 0])) == 40


def test_search_batches_are_passes_over_two_disjoint_parts():
    x, y = numbered_images(80)
    batches = data.search_batches(x, y, batch_size=10, weights_share=0.5)
    assert int(batches.cardinality()) == 4
    epochs = [
        [
            [part[:, 0, 0, 0] for part in (x_t, x_v)]
            for (x_t, _), (x_v, _) in batches.as_numpy_iterator()
        ]
        for _ in range(3)
    ]
    passes = np.array(epochs).transpose(0, 2, 1, 3).reshape(3, 2, 40)
    for weights, architecture in passes:
        assert sorted([*weights, *architecture]) == list(range(80))
    assert not np.array_equal(passes[0, 0], passes[1, 0])
    again = [
        x_t[:, 0, 0, 0]
        for (x_t, _), _ in data.search_batches(
            x, y, batch_size=10, weights_share=0.5
        ).as_numpy_iterator()
    ]
    assert np.array_equal(np.concatenate(again), passes[0, 0])
    for (x_t, y_t), (x_v, y_v) in batches.as_numpy_iterator():
        assert np.array_equal(x_t[:, 0, 0, 0] % 2, y_t)
        assert np.array_equal(x_v[:, 0, 0, 0] % 2, y_v)


def test_what_a_search_cannot_do_with_its_images_is_refused():
    x, y = numbered_images(40)
    with pytest.raises(ValueError, match="must not mix images in a search"):
        data.search_batches(x, y, augmentation=data.Augmentation(mix_up=0.2))
    with pytest.raises(ValueError, match=r"`weights_share` must be from 0.05 to 0.95"):
        data.search_batches(x, y, weights_share=2.0)


@pytest.mark.parametrize("share", [0.5, 0.8, 0.9])
def test_the_weights_part_has_its_share(share):
    x, y = numbered_images(200)
    batches = data.search_batches(x, y, batch_size=10, weights_share=share)
    seen = [set(), set()]
    for (x_t, _), (x_v, _) in batches.repeat(20).as_numpy_iterator():
        seen[0].update(x_t[:, 0, 0, 0])
        seen[1].update(x_v[:, 0, 0, 0])
    assert [len(part) for part in seen] == [round(200 * share), round(200 * (1 - share))]
    assert not seen[0] & seen[1]


@pytest.mark.parametrize(
    ("count", "share"), [(10, 0.5), (2000, 0.5), (4000, 0.75), (5000, 0.8), (50_000, 0.8)]
)
def test_few_images_decide_on_half_of_them(count, share):
    assert data.choose_weights_share(count) == share


def test_only_the_weights_part_is_augmented_and_by_seed_and_step():
    x = np.random.default_rng(0).uniform(0, 255, (60, 8, 8, 1)).astype(np.float32)
    y = np.arange(60) % 2
    augmentation = data.Augmentation(random_crop=2, random_flip=True)

    def read(**changes):
        batches = data.search_batches(x, y, batch_size=8, **changes)
        return list(batches.repeat(2).as_numpy_iterator())

    plain, changed = read(), read(augmentation=augmentation)
    for ((x_t, y_t), (x_v, y_v)), ((a_t, b_t), (a_v, b_v)) in zip(plain, changed):
        assert (x_t != a_t).any()
        np.testing.assert_array_equal(y_t, b_t)
        np.testing.assert_array_equal(x_v, a_v)
        np.testing.assert_array_equal(y_v, b_v)
    resumed = read(augmentation=augmentation, first_step=3)
    for one, other in zip(changed[3:], resumed):
        np.testing.assert_array_equal(one[0][0], other[0][0])


@pytest.mark.parametrize("count", [80, 6000])
def test_the_order_of_batches_is_random(count):
    """On data sorted by class, as folders are: mixed batches, unrelated passes."""
    x, _ = numbered_images(count)
    y = np.arange(count) * 4 // count
    images = data.Images(x, y, tuple("abcd"), (4, 4, 1))

    def passes(seed):
        batches = data.train_batches(images, 20, seed)
        return [[(x[:, 0, 0, 0], y) for x, y in batches.as_numpy_iterator()] for _ in range(2)]

    first, second = passes(0)
    other, _ = passes(1)
    orders = [np.concatenate([x for x, _ in epoch]) for epoch in (first, second, other)]
    limit = 4.5 / np.sqrt(count)
    assert np.all(np.abs(np.corrcoef([*orders, np.arange(count)]) - np.eye(4)) < limit)
    classes = np.array([np.bincount(y, minlength=4) for _, y in first])
    # Pearson's statistic of the batches' class counts; drawing without replacement lowers it.
    statistic = ((classes - 5) ** 2 / 5).sum()
    freedom = 3 * len(classes)
    assert statistic < freedom + 4.5 * np.sqrt(2 * freedom)


def test_keras_takes_each_epoch_once():
    x, y = numbered_images(80)
    seen = []

    class Watcher(keras.Model):
        def train_step(self, batch):
            tf.py_function(lambda v: seen.append(v.numpy()), [batch[0][0][:, 0, 0, 0]], [])
            return {"loss": 0.0}

    watcher = Watcher()
    watcher.compile(optimizer="sgd", jit_compile=False)
    watcher.fit(data.search_batches(x, y, batch_size=10), epochs=2, verbose=0, shuffle=False)
    expected = data.search_batches(x, y, batch_size=10)
    order = [x_t[:, 0, 0, 0] for _ in range(2) for (x_t, _), _ in expected.as_numpy_iterator()]
    assert np.array_equal(seen, order)


def test_batches_may_be_larger_than_the_data():
    x, y = numbered_images(6)
    ((x_t, _), _) = next(data.search_batches(x, y, batch_size=8).as_numpy_iterator())
    counts = np.unique(x_t[:, 0, 0, 0], return_counts=True)[1]
    assert sorted(counts) == [2, 3, 3]


def test_augmentation_moves_and_mirrors_and_is_reproducible():
    x = np.zeros((64, 8, 8, 1), np.uint8)
    x[:, 3, 2] = 200  # one bright pixel
    images = data.Images(x, np.zeros(64, np.int32), ("a", "b"), (8, 8, 1))

    def positions(seed=0, **changes):
        batches = data.train_batches(images, 64, seed, data.Augmentation(**changes))
        x, _ = next(batches.as_numpy_iterator())
        assert x.shape == (64, 8, 8, 1)
        return np.argwhere(x[..., 0])[:, 1:]

    assert np.all(positions() == [3, 2])
    assert np.unique(positions(random_flip=True), axis=0).tolist() == [[3, 2], [3, 5]]
    cropped = positions(random_crop=2)
    rows, columns = np.unique(cropped[:, 0]), np.unique(cropped[:, 1])
    assert rows.tolist() == [1, 2, 3, 4, 5]
    assert columns.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(cropped, positions(random_crop=2))
    assert not np.array_equal(cropped, positions(random_crop=2, seed=1))


class Noise(tfds.core.GeneratorBasedBuilder):
    """A data set of tensorflow_datasets: 30 images to train on, 6 to test, 4 without labels."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = pathlib.Path(__file__).parent

    def _info(self):
        image = tfds.features.Image(shape=(9, 9, 3))
        label = tfds.features.ClassLabel(names=["cat", "dog"])
        features = tfds.features.FeaturesDict({"image": image, "label": label})
        return tfds.core.DatasetInfo(
            builder=self, features=features, supervised_keys=("image", "label")
        )

    def _split_generators(self, _):
        return {
            "train": self._generate_examples(30),
            "validation": self._generate_examples(6),
            "test": self._generate_examples(4, labelled=False),
        }

    def _generate_examples(self, count, labelled=True):
        rng = np.random.default_rng(count)
        for index in range(count):
            image = rng.integers(0, 256, (9, 9, 3), np.uint8)
            yield index, {"image": image, "label": index % 2 if labelled else -1}


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dätä")
    config = tfds.download.DownloadConfig(num_shards=3)
    Noise(data_dir=folder).download_and_prepare(download_config=config)
    return folder


@pytest.mark.parametrize("split", ["train", "test"])
def test_tfds_sets_that_do_not_fit_into_memory_are_read_from_their_files(
    tfds_folder, monkeypatch, split
):
    arguments = ("tfds:noise", split, 8, str(tfds_folder), False)
    in_memory = data.load(*arguments)
    monkeypatch.setattr("fpnas_keras.data.reading.MEMORY_LIMIT", 100)
    on_disk = data.load(*arguments)
    assert on_disk.x.shape == ({"train": 30, "test": 6}[split], 2)
    assert np.array_equal(on_disk.y, in_memory.y)
    assert on_disk[2:] == in_memory[2:]
    for (x, y), (expected_x, expected_y) in zip(
        data.test_batches(on_disk, 7), data.test_batches(in_memory, 7), strict=True
    ):
        assert np.array_equal(x, expected_x)
        assert np.array_equal(y, expected_y)
    one = data.search_batches(on_disk, batch_size=2)
    other = data.search_batches(*in_memory[:2], batch_size=2)
    for a, b in zip(tf.nest.flatten(next(iter(one))), tf.nest.flatten(next(iter(other)))):
        assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonesuch", "`data` must be digits, tfds:NAME or folder:PATH. Received: data='nonesuch'"),
        ("tfds:", "`data` must be"),
        ("tfds:nonesuch_data_set", "cannot read the data set `nonesuch_data_set`"),
        ("tfds:mnist", "cannot read the data set `mnist`.*download=False"),
        ("folder:/nonesuch", "`data` names no folder"),
    ],
)
def test_data_that_is_not_there(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        data.load(name, data_dir=str(tmp_path), download=False)


def test_a_look_at_images_as_they_are(tmp_path, tfds_folder):
    assert data.look_at("digits") == ((8, 8, 1), 10)
    assert data.look_at("tfds:noise", str(tfds_folder), False) == ((9, 9, 3), 2)
    rng = np.random.default_rng(0)
    for name, sizes in (("a", [(40, 60), (50, 30)]), ("b", [(90, 44)])):
        (tmp_path / name).mkdir()
        for index, (height, width) in enumerate(sizes):
            pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
            keras.utils.save_img(tmp_path / name / f"{index}.png", pixels, scale=False)
    # The median of the shorter sides 40, 30 and 44.
    assert data.look_at(f"folder:{tmp_path}") == ((40, 40, 3), 2)
    with pytest.raises(ValueError, match="must be digits, tfds:NAME or folder:PATH"):
        data.look_at("photos")


def test_images_are_read_once_while_they_are_remembered(monkeypatch):
    with data.remembering():
        first = data.load("digits", image_size=8)
        again = data.load("digits", image_size=8)
        assert again.x is first.x
        # What has been said is not said again.
        assert (bool(first.description), again.description) == (True, "")
        assert data.load("digits", image_size=9).image_shape == (9, 9, 1)
        assert data.load("digits", "test", 8).x is not first.x
    assert data.load("digits", image_size=8).x is not first.x
    monkeypatch.setattr("fpnas_keras.data.reading.MEMORY_LIMIT", 1_100_000)
    with data.remembering():
        first = data.load("digits", image_size=16)
        small = data.load("digits", image_size=16)
        assert small.x is first.x
        large = data.load("digits", image_size=24)  # Both together are too large.
        assert data.load("digits", image_size=24).x is not large.x
