"""Searches, trainings, rankings and exports called from Python: any number in one process."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers import SMALL_SPACE, run_process

import export
import fpnas_keras as fpnas

pytestmark = pytest.mark.xdist_group("jobs")  # one search for all


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A short search of a small space of one's own."""
    space = tmp_path_factory.mktemp("space") / "small.json"
    space.write_text(json.dumps(SMALL_SPACE))
    return {
        "space": space,
        "input_size": 16,
        "train_images": 400,
        "cost": "macs",
        "target": 60_000,
        "epochs": 2,
        "steps_per_epoch": 3,
        "batch_size": 16,
        "samples": 2,
        "warmup_steps": 2,
        "ranked_samples": 2,
        "tensorboard": False,
    }


@pytest.fixture(scope="module")
def searched(settings, tmp_path_factory):
    directory = tmp_path_factory.mktemp("searched") / "run"
    return fpnas.search_architecture(**settings, output_dir=directory)


def test_a_search_gives_its_run(searched):
    assert searched.summary["macs"] == searched.architecture.macs() <= 60_000
    assert searched.report.read_text().startswith("<!DOCTYPE html>")
    assert [row["epoch"] for row in searched.epochs] == [1, 2]
    assert len(searched.ranking["architectures"]) > 1


def test_the_result_is_the_finalist_with_the_lowest_loss(searched, settings):
    search, summary = searched.load_search(), searched.summary
    images = fpnas.data.load("digits", "train", 16)
    _, kept = fpnas.data.split(images.y, (400 - 0.5) / len(images.y), seed=0)
    evaluation = fpnas.runs.Evaluation(search, images.part(kept), searched.weights_share)
    assert searched.weights_share == summary["weights_share"] == 0.5
    finalists = search.finalists(100, least_share=0.95)
    assert 1 < len(finalists) <= summary["finalists"] <= len(finalists) + 1
    # 200 images decide: there is one round.
    assert evaluation.images == 200
    architectures = map(search.space.architecture, search.space.entries.to_choices(finalists))
    ranked = fpnas.runs.rank_by_shared_weights(
        evaluation,
        {"derived": searched.architecture, "probable": search.derive(least_share=0.95)}
        | {str(index): each for index, each in enumerate(architectures)},
    )
    best = min(ranked, key=lambda each: each.loss)
    assert best.architecture == searched.architecture
    entries = search.space.entries.from_choices(search.space.choices(searched.architecture))
    assert summary["found_cost"] == searched.architecture.macs()
    assert summary["found_log_prob"] == pytest.approx(
        float(search.distribution.log_prob(entries)), rel=1e-5
    )


def test_without_finalists_the_result_is_the_most_probable_architecture(settings, tmp_path):
    run = fpnas.search_architecture(
        **settings | {"finalists": 0, "ranked_samples": 0}, output_dir=tmp_path / "run"
    )
    assert run.load_search().derive(least_share=0.95) == run.architecture
    assert run.summary["finalists"] == 1


def test_the_learning_rate_rises_and_falls():
    schedule = fpnas.runs.settings.make_schedule(0.4, steps=100, warmup_steps=20)
    rates = [float(schedule(step)) for step in range(101)]
    np.testing.assert_allclose(rates[:21], 0.4 * np.arange(21) / 20, rtol=1e-5)
    cosine = 0.2 * (1 + np.cos(np.pi * np.arange(81) / 80))
    np.testing.assert_allclose(rates[20:], cosine, atol=1e-6)
    assert float(fpnas.runs.settings.make_schedule(0.4, 100, 0)(0)) == pytest.approx(0.4)


def test_python_and_the_command_line_give_the_same(searched, settings, tmp_path):
    """A second search in this process, after others, and one in a process of its own."""
    again = fpnas.search_architecture(**settings, output_dir=tmp_path / "again")
    process = run_process(
        "fpnas_keras.search", f"--flagfile={searched.flag_file}", f"--output_dir={tmp_path}/process"
    )
    assert process.returncode == 0, process.stderr
    for name in ("architecture.json", "search.weights.h5", "ranking.json"):
        content = searched.path(name).read_bytes()
        assert again.path(name).read_bytes() == content
        assert (tmp_path / "process" / name).read_bytes() == content


def test_a_report_made_during_the_search_is_made_again_at_its_end(settings, tmp_path, monkeypatch):
    finish = fpnas.runs.Session.finish

    def report_and_finish(session, **summary):
        fpnas.report.write_report(session.run.directory)
        assert "is not finished" in session.run.report.read_text()
        finish(session, **summary)

    monkeypatch.setattr(fpnas.runs.Session, "finish", report_and_finish)
    run = fpnas.search_architecture(**settings, output_dir=tmp_path / "run")
    assert "is not finished" not in run.report.read_text()
    assert run.ranking is not None


def test_a_finished_search_is_returned_as_it_is(searched, settings):
    before = {path: path.stat().st_mtime_ns for path in searched.directory.iterdir()}
    again = fpnas.search_architecture(**settings, output_dir=searched.directory)
    assert again.architecture == searched.architecture
    assert {path: path.stat().st_mtime_ns for path in searched.directory.iterdir()} == before
    with pytest.raises(fpnas.UserError, match="holds another run; it differs in --epochs, --seed"):
        fpnas.search_architecture(
            **(settings | {"epochs": 3}), seed=1, output_dir=searched.directory
        )


def test_from_a_search_to_a_file_in_one_process(searched, tmp_path):
    policy = keras.config.dtype_policy()
    shared = {"data": "digits", "train_images": 400}
    trained = fpnas.train_architecture(
        architecture=searched.architecture_file,
        output_dir=tmp_path / "trained",
        epochs=1,
        mixed_precision="bfloat16",
        **shared,
    )
    assert keras.config.dtype_policy() == policy
    assert trained.architecture == searched.architecture
    assert 0 < trained.summary["test_accuracy"] <= 1
    ranked = fpnas.rank_architectures(
        search_dir=searched.directory, samples=3, architectures=[trained.architecture_file]
    )
    assert {"derived"} < {each.name for each in ranked}
    assert searched.pareto_file(next(each for each in ranked if each.pareto)).is_file()
    # A second training, from the shared weights, learns from the first.
    distilled = fpnas.train_architecture(
        architecture=searched.architecture_file,
        output_dir=tmp_path / "distilled",
        epochs=1,
        init="supernet",
        teacher=trained.model_file,
        **shared,
    )
    exported = export.export_tflite(model=distilled.model_file, min_agreement=0.5)
    assert exported.path == tmp_path / "distilled" / "model.tflite"
    assert exported.report["keras_accuracy"] == pytest.approx(
        distilled.summary["test_accuracy"], abs=1e-6
    )
    images = fpnas.data.load("digits", "test", 16).x[:2].astype(np.float32)
    runner = export.conversion.Runner(exported.path.read_bytes())
    expected = distilled.model().predict(images, verbose=0)
    np.testing.assert_allclose([runner(image) for image in images], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("job", "settings", "message"),
    [
        (fpnas.search_architecture, {"output_dir": "x", "cost": "macs"}, "--target needs --cost"),
        (fpnas.search_architecture, {"output_dir": "x", "epochs": 0}, "`epochs` must be an"),
        (fpnas.search_architecture, {"output_dir": "x", "seed": 2**32}, "`seed` must be an"),
        (fpnas.search_architecture, {"output_dir": "x", "samples": 1}, "`samples` must be at"),
        (fpnas.search_architecture, {"output_dir": "x", "min_samples": 1}, "`min_samples` must"),
        (fpnas.train_architecture, {"output_dir": "x", "architecture": "y"}, "cannot read y"),
        (fpnas.rank_architectures, {"search_dir": "nonesuch"}, "cannot read nonesuch"),
        (export.export_tflite, {"model": "nonesuch"}, "`model` must be an existing .keras"),
        (export.measure_latency, {"output": "x.json"}, "give --space, or --architecture"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    job, settings, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fpnas.UserError, match=message):
        job(**settings)
    assert not list(tmp_path.iterdir())


def test_a_bug_keeps_its_traceback(tmp_path):
    """A `ValueError` that is not the user's fault is not printed as one line."""
    code = (
        "import sys; from fpnas_keras import search, runs, commands\n"
        "def fail(self): raise ValueError('a bug')\n"
        "runs.Session.finish = fail; runs.Session._take = fail\n"
        f"commands.run_command(search.COMMAND, ['--output_dir={tmp_path}'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "Traceback" in result.stderr and result.stderr.endswith("ValueError: a bug\n")


def test_public_names_are_loaded_when_used():
    for name in fpnas.__all__:
        assert getattr(fpnas, name) is not None
    for name in export.__all__:
        assert getattr(export, name) is not None
    with pytest.raises(AttributeError, match="nonesuch"):
        _ = fpnas.nonesuch
