"""Finished searches: loaded again, their architectures ranked by shared weights."""

import dataclasses
import json
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import make_tiny_space, random_choices, write_latency_table

import fpnas_keras as fpnas
from fpnas_keras import data
from fpnas_keras.networks import recalibrate
from fpnas_keras.runs import (
    Evaluation,
    SearchRun,
    draw_architectures,
    rank_by_shared_weights,
    rank_finalists,
    ranking,
)

SPACE = """
import sys
sys.path.insert(0, {tests!r})
from helpers import make_tiny_space
space = make_tiny_space
"""


def images(count=80):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 255, (count, 8, 8, 1)).astype(np.uint8)
    return data.Images(x, np.arange(count, dtype=np.int32) % 3, ("a", "b", "c"), (8, 8, 1))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, request):
    """A search, and the run directory that it could have left."""
    keras.utils.set_random_seed(0)
    directory = tmp_path_factory.mktemp("run")
    space = make_tiny_space()
    table = write_latency_table(directory / "latency_table.json", space, lambda part: 0.5)
    search = fpnas.ArchitectureSearch(
        space,
        samples=2,
        cost=fpnas.LatencyCost(table, 3.5),
        distribution="coarse_to_fine",
        warmup_steps=1,
    )
    search.compile("sgd", keras.optimizers.Adam(0.2))
    batches = data.search_batches(images().x, images().y, 8, steps_per_epoch=3)
    search.fit(batches, epochs=2, verbose=0, callbacks=[fpnas.CoarseToFine(1)])
    search.save_weights(directory / "search.weights.h5")
    tests = str(request.path.parent)
    (directory / "space.py").write_text(SPACE.format(tests=tests))
    summary = {"space": "tiny", "input_shape": [8, 8, 1], "num_classes": 3, "cost": "latency"}
    summary |= {"target": 3.5, "distribution": "coarse_to_fine", "seed": 0}
    (directory / "summary.json").write_text(json.dumps(summary))
    return search, directory


def test_a_finished_search_is_loaded_whole(finished):
    search, directory = finished
    loaded = SearchRun(directory).load_search()
    assert loaded.space == search.space
    assert loaded.derive() == search.derive()
    assert loaded.distribution.probabilities() == search.distribution.probabilities()
    choices = search.space.entries.to_choices(search.distribution.mode())
    x = images().x[:8].astype(np.float32)
    np.testing.assert_array_equal(loaded.supernet(x, choices), search.supernet(x, choices))
    assert loaded.cost.target == search.cost.target


@pytest.mark.parametrize(
    "missing", ["summary.json", "search.weights.h5", "latency_table.json", "distribution"]
)
def test_what_is_no_finished_search_is_refused(finished, tmp_path, missing):
    _, directory = finished
    other = shutil.copytree(directory, tmp_path / "run")
    if missing == "distribution":
        summary = json.loads((other / "summary.json").read_text())
        del summary["distribution"]
        (other / "summary.json").write_text(json.dumps(summary))
    else:
        (other / missing).unlink()
    with pytest.raises(ValueError, match=missing):
        SearchRun(other).load_search()


def test_recalibrated_networks_give_what_the_supernet_gives_on_that_batch():
    space = make_tiny_space()
    supernet = fpnas.ArchitectureSearch(space).supernet
    x = images().x.astype(np.float32)
    for seed in range(3):
        choices = random_choices(space, np.random.default_rng(seed))
        model = space.architecture(choices).build()
        supernet.give_weights(model)
        recalibrate(model, [x])
        expected = supernet(x, tf.constant(choices))
        np.testing.assert_allclose(model(x, training=False), expected, atol=1e-5)


def test_statistics_are_the_mean_over_the_batches():
    model = keras.Sequential([keras.Input((4, 4, 2)), keras.layers.BatchNormalization(name="bn")])
    norm = model.get_layer("bn")
    norm.moving_mean.assign([7.0, 7.0])
    batches = np.random.default_rng(0).normal(3, 2, (5, 6, 4, 4, 2)).astype(np.float32)
    batches = [*batches, batches[0, :2]]  # the last one is smaller
    recalibrate(model, batches)
    means = [each.mean(axis=(0, 1, 2)) for each in batches]
    variances = [each.var(axis=(0, 1, 2)) for each in batches]
    sizes = [len(each) for each in batches]
    np.testing.assert_allclose(norm.moving_mean, np.average(means, 0, sizes), rtol=1e-5)
    np.testing.assert_allclose(norm.moving_variance, np.average(variances, 0, sizes), rtol=1e-5)
    assert norm.momentum == 0.99


def test_the_ranking_is_in_order_and_knows_the_pareto_front(finished, tmp_path):
    search, _ = finished
    architectures = {"derived": search.derive()} | draw_architectures(search, 12, seed=1)
    # Equal ones count once, with a space's name or without it, as one writes it by hand.
    architectures["again"] = dataclasses.replace(search.derive(), space=None)
    ranked = rank_by_shared_weights(Evaluation(search, images()), architectures)
    assert [each.name for each in ranked].count("again") == 0
    assert len(ranked) == len(set(architectures.values())) - 1 > 4
    accuracies = [each.accuracy for each in ranked]
    assert accuracies == sorted(accuracies, reverse=True)
    front = [each for each in ranked if each.pareto]
    for each in ranked:
        better = [f for f in front if f.accuracy >= each.accuracy and f.cost <= each.cost]
        assert better
    assert len({(each.accuracy, each.cost) for each in front}) == len({each.cost for each in front})
    for each in ranked:
        entries = search.space.entries.from_choices(search.space.choices(each.architecture))
        assert each.log_prob == pytest.approx(float(search.distribution.log_prob(entries)))
        assert each.cost == pytest.approx(float(search.space_cost(entries[None])[0]))
    run = SearchRun(tmp_path)
    run.write_ranking(ranked, search.cost.unit)
    saved = json.loads(run.ranking_file.read_text())
    assert run.ranking == saved
    assert saved["cost_unit"] == "ms"
    assert [row["rank"] for row in saved["architectures"]] == list(range(1, len(ranked) + 1))
    for row, each in zip(saved["architectures"], ranked):
        assert fpnas.Architecture.from_dict(row["architecture"]) == each.architecture


def test_an_evaluation_is_that_of_the_plain_network_on_the_batch(finished):
    """The plain network's batch norms get the statistics of the same batch."""
    search, _ = finished
    evaluation = Evaluation(search, images(), 0.25, count=50)
    assert evaluation.images == 50
    assert evaluation.weights_share == 0.25
    ((x, y),) = evaluation.batches
    (one,) = rank_by_shared_weights(evaluation, {"derived": search.derive()})
    model = one.architecture.build()
    search.supernet.give_weights(model)
    x = tf.cast(x, tf.float32)
    recalibrate(model, [x])
    logits = model(x, training=False)
    loss = keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)
    assert one.loss == pytest.approx(float(np.mean(loss)), rel=1e-4)
    assert one.accuracy == float(np.mean(np.argmax(logits, -1) == y))
    assert one.images == 50


def test_an_evaluation_reads_each_image_once_in_batches_of_almost_one_size(finished, monkeypatch):
    search, _ = finished
    monkeypatch.setattr(ranking, "_IMAGES", 25)
    evaluation = Evaluation(search, images(), 0.25)
    sizes = [len(y) for _, y in evaluation.batches]
    assert sizes == [20, 20, 20]
    seen = np.concatenate([x for x, _ in evaluation.batches])
    _, part = data.split(images().y, 0.75, 0)
    assert {each.tobytes() for each in seen} == {each.tobytes() for each in images().x[part]}
    entries = search.finalists(3, budget=None)
    parts = [evaluation(entries, first, first + 1) for first in range(3)]
    np.testing.assert_allclose(evaluation(entries), np.sum(parts, axis=0), rtol=1e-6)


class KnownLosses:
    """Stands in for an `Evaluation`: the loss of a network is its number, and noise."""

    def __init__(self, batches, noise):
        self.batches, self.images = [None] * batches, 250 * batches
        self.noise = noise
        self.evaluated = {}

    def __call__(self, entries, first, last):
        for each in entries[:, 0]:
            assert self.evaluated.get(each, 0) == first
            self.evaluated[each] = last
        rng = np.random.default_rng(first)
        losses = entries[:, 0] + self.noise * rng.normal(size=len(entries)) * (first == 0)
        return np.stack([losses * (last - first), np.zeros(len(entries))], axis=1)


@pytest.mark.parametrize(("batches", "noise"), [(1, 0), (2, 0), (20, 0), (20, 2.0)])
def test_finalists_are_ranked_by_their_loss(batches, noise):
    evaluation = KnownLosses(batches, noise)
    order = np.random.default_rng(1).permutation(64)
    ranked = order[rank_finalists(evaluation, order[:, None])]
    assert sorted(ranked) == list(range(64))
    if noise:
        assert ranked[0] == 0
    else:
        assert list(ranked) == list(range(64))
    # All networks see 500 images, the best quarter four times as many, and so on.
    expected = {1: {1: 64}, 2: {2: 64}, 20: {2: 48, 8: 12, 20: 4}}[batches]
    seen = list(evaluation.evaluated.values())
    assert {each: seen.count(each) for each in seen} == expected


def test_the_best_finalists_are_kept(tmp_path):
    space = make_tiny_space()
    rng = np.random.default_rng(0)
    networks = [space.architecture(random_choices(space, rng)) for _ in range(12)]
    run = SearchRun(tmp_path)
    run.write_finalists(networks)
    assert [file.name for file in run.finalist_files] == [f"{n}.json" for n in range(1, 9)]
    assert [fpnas.Architecture.load(file) for file in run.finalist_files] == networks[:8]
    assert SearchRun.of_architecture(run.finalist_files[1]).directory == tmp_path
    run.write_finalists(networks[9:])  # The search went on.
    assert [fpnas.Architecture.load(file) for file in run.finalist_files] == networks[9:]


def test_an_architecture_of_another_space_is_refused(finished):
    search, _ = finished
    other = fpnas.spaces.get("mobile_mini", (8, 8, 1), 3)
    architecture = other.architecture(np.zeros(other.cardinalities.shape, int))
    with pytest.raises(ValueError, match=r"other is not of the search: `stem` must be"):
        rank_by_shared_weights(Evaluation(search, images()), {"other": architecture})
