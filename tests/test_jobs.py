"""Searches, trainings, rankings and exports called from Python: any number in one process."""

import json
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers import SMALL_SPACE, run_process

import export
import fpnas_keras as fpnas
from fpnas_keras.search import SearchSettings, distinct_networks
from fpnas_keras.train import TrainSettings


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


def test_a_network_is_kept_once_whichever_of_equal_blocks_is_skipped():
    space = fpnas.spaces.get("nas_bench_macro")
    # 2 skips a block. The third block has stride 2, and a projection where it is skipped.
    rows = ["00012000", "00021000", "00022000", "00012000", "00201000", "00210000"]
    one, same, shorter, again, projected, other = (
        space.architecture(space.entries.to_choices(np.array(list(map(int, row))))) for row in rows
    )
    assert one != same
    networks = distinct_networks([one, same, shorter, again, projected, other])
    assert networks == [one, shorter, projected, other]
    assert [block.skip for block in one.blocks[2:5]] == [False, False, True]
    assert [block.skip for block in projected.blocks[2:5]] == [True, False, False]
    first, second = one.build(), same.build()
    second.set_weights(first.get_weights())
    images = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype(np.float32)
    np.testing.assert_array_equal(first(images), second(images))


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


def test_a_report_that_cannot_be_written_is_a_warning(settings, tmp_path, monkeypatch, caplog):
    def fail(directory):
        raise OSError("the disk is full")

    monkeypatch.setattr(fpnas.report, "write_report", fail)
    with caplog.at_level("WARNING", logger="absl"):
        run = fpnas.search_architecture(**settings, output_dir=tmp_path / "run")
        trained = fpnas.train_architecture(
            architecture=run.architecture_file,
            train_images=400,
            epochs=1,
            tensorboard=False,
            output_dir=tmp_path / "trained",
        )
        ranked = fpnas.rank_architectures(search_dir=run.directory, samples=2)
    assert run.finished and trained.finished and ranked
    assert caplog.messages.count("no report: the disk is full") == 3


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
    exported = export.export_tflite(model=distilled.model_file, scores="logits")
    assert exported.path == tmp_path / "distilled" / "model.tflite"
    assert exported.report["keras_accuracy"] == pytest.approx(
        distilled.summary["test_accuracy"], abs=1e-6
    )
    images = fpnas.data.load("digits", "test", 16).x[:2].astype(np.float32)
    runner = export.conversion.Runner(exported.path.read_bytes())
    expected = distilled.model().predict(images, verbose=0)
    np.testing.assert_allclose(runner(images), expected, atol=1e-4)


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


def rows_of(run):
    return [{name: row[name] for name in row if name != "seconds"} for row in run.epochs]


def test_a_finished_search_goes_on_with_more_epochs(settings, tmp_path):
    directory = tmp_path / "run"
    first = fpnas.search_architecture(**settings, output_dir=directory)
    before = rows_of(first)
    again = fpnas.search_architecture(**settings | {"epochs": 4}, output_dir=directory)
    assert rows_of(again)[:2] == before
    assert [row["step"] for row in again.epochs] == [3, 6, 9, 12]
    assert again.summary["steps"] == 12
    assert again.flags["epochs"] == "4"
    # Nothing is to be done again, and fewer epochs are another run.
    content = again.summary_file.read_bytes()
    fpnas.search_architecture(**settings | {"epochs": 4}, output_dir=directory)
    assert again.summary_file.read_bytes() == content
    with pytest.raises(fpnas.UserError, match="differs in --epochs"):
        fpnas.search_architecture(**settings | {"epochs": 3}, output_dir=directory)
    for file in again.checkpoint_folder.iterdir():
        file.unlink()
    with pytest.raises(fpnas.UserError, match="its last checkpoint is gone or damaged"):
        fpnas.search_architecture(**settings | {"epochs": 5}, output_dir=directory)
    assert again.summary_file.read_bytes() == content


def test_another_target_needs_no_new_search(searched, settings, tmp_path):
    with pytest.raises(fpnas.UserError, match=r"fpnas rank --search_dir=.* --budget=50000.*--init"):
        fpnas.search_architecture(**settings | {"target": 50_000}, output_dir=searched.directory)
    copy = shutil.copytree(searched.directory, tmp_path / "copy")
    ranked = fpnas.rank_architectures(search_dir=copy, samples=4, budget=50_000, batch_size=50)
    assert len(ranked) > 2
    assert all(0.95 * 50_000 <= each.cost <= 50_000 for each in ranked)
    derived = next(each for each in ranked if each.name == "derived")
    assert derived.architecture == searched.load_search().derive(50_000)
    other = fpnas.search_architecture(
        **settings
        | {"target": 50_000, "init": str(copy), "learning_rate": 0.0, "warmup_steps": None},
        output_dir=tmp_path / "other",
    )
    assert {row["phase"] for row in other.epochs} == {"factorized"}  # no warm-up
    one, two = searched.load_search().supernet, other.load_search().supernet
    for a, b in zip(one.variables, two.variables, strict=True):
        np.testing.assert_array_equal(a, b)
    assert other.architecture.macs() <= 50_000


def test_weights_of_another_space_are_refused(searched, settings, tmp_path):
    changes = {"init": str(searched.directory), "space": "mobile_mini", "target": 500_000}
    with pytest.raises(fpnas.UserError, match="`init` must be a search of the same space"):
        fpnas.search_architecture(**settings | changes, output_dir=tmp_path / "run")


def test_a_finished_training_goes_on_with_more_epochs(searched, tmp_path):
    settings = {
        "architecture": searched.architecture_file,
        "train_images": 200,
        "batch_size": 50,
        "output_dir": tmp_path / "trained",
    }
    first = fpnas.train_architecture(**settings, epochs=1)
    accuracy = first.epochs[0]["accuracy"]
    again = fpnas.train_architecture(**settings, epochs=3)
    assert [row["epoch"] for row in again.epochs] == [1, 2, 3]
    assert again.epochs[0]["accuracy"] == accuracy
    assert again.summary["epochs"] == 3


def test_a_search_that_will_end_undecided_says_so_first(settings, tmp_path, caplog):
    with caplog.at_level("WARNING", logger="absl"):
        fpnas.search_architecture(**settings, output_dir=tmp_path / "run")
    first = next(record for record in caplog.records if record.levelname == "WARNING")
    assert "will probably end undecided: its 4 steps after the warm-up are few" in first.message
    assert "until there are about 667" in first.message


@pytest.mark.parametrize(
    ("count", "search", "train"),
    [
        (80, (16, 50, 30, 0.05), (16, 200, 0.2 / 8**0.5, 0.2)),
        (216, (16, 50, 30, 0.05), (16, 200, 0.2 / 8**0.5, 0.2)),
        (800, (32, 50, 30, 0.1 / 2**0.5), (16, 125, 0.2 / 8**0.5, 0.2)),
        (8000, (64, 50, 30, 0.1), (32, 20, 0.1, 0)),
        (80_000, (64, 50, 30, 0.1), (128, 20, 0.2, 0)),
        (400_000, (64, 50, 100, 0.1), (128, 20, 0.2, 0)),
    ],
)
def test_settings_fit_the_number_of_images(count, search, train):
    x = np.zeros((count, 0, 0, 3), np.uint8)  # only its size counts
    images = fpnas.data.Images(x, np.zeros(count, np.int32), ("a",), (64, 64, 3))
    fitted = SearchSettings(output_dir="x").fit_to(images)
    received = (fitted.batch_size, fitted.steps_per_epoch, fitted.epochs, fitted.learning_rate)
    assert received == pytest.approx(search, rel=1e-3)
    fitted = TrainSettings(architecture="x", output_dir="x").fit_to(images)
    received = (fitted.batch_size, fitted.epochs, fitted.learning_rate, fitted.mix_up)
    assert received == pytest.approx(train, rel=1e-3)
    assert fitted.random_crop == 4
    for other in ({"teacher": "a"}, {"cut_mix": 0.5}, {"class_weight": "balanced"}):
        settings = TrainSettings(architecture="x", output_dir="x", **other)
        assert settings.fit_to(images).mix_up == 0


def test_given_settings_stay_and_the_others_follow(caplog):
    images = fpnas.data.Images(
        np.zeros((400, 0, 0, 1), np.uint8), np.zeros(400, np.int32), ("a",), (28, 28, 1)
    )
    given = {"batch_size": 8, "epochs": 7, "random_crop": 0}
    with caplog.at_level("INFO", logger="absl"):
        fitted = SearchSettings(output_dir="x", **given).fit_to(images)
    assert {name: getattr(fitted, name) for name in given} == given
    assert fitted.steps_per_epoch == 25  # one pass over half of the images
    assert fitted.learning_rate == pytest.approx(0.1 / 8**0.5, rel=1e-3)
    assert caplog.records[-1].getMessage() == (
        "chosen for 400 training images: --steps_per_epoch=25 --learning_rate=0.03536"
    )


def test_classes_of_unequal_size(tmp_path, searched, caplog):
    """The weights balance the classes, in a search and in a training."""
    rng = np.random.default_rng(0)
    for label, count in enumerate([40, 8, 8]):
        for index in range(count):
            path = tmp_path / "photos" / f"class {label}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 80, (16, 16, 3)) + 80 * label
            keras.utils.save_img(path, pixels, scale=False)
    with caplog.at_level("WARNING", logger="absl"):
        run = fpnas.train_architecture(
            architecture=searched.architecture_file,
            data=f"folder:{tmp_path}/photos",
            class_weight="balanced",
            epochs=2,
            output_dir=tmp_path / "trained",
        )
    assert "classes of unequal size: 40 images of class 0" not in caplog.text  # of the train part
    assert "32 images of class 0, 6 of class 1" in caplog.text
    summary = run.summary
    assert run.architecture.input_shape == (16, 16, 3)  # the images decide
    assert run.architecture.num_classes == 3
    shares = summary["class_accuracy"]
    assert list(shares) == ["class 0", "class 1", "class 2"]
    assert summary["test_balanced_accuracy"] == pytest.approx(np.mean(list(shares.values())))
    matrix = np.array(summary["confusion_matrix"])
    assert matrix.sum(axis=1).tolist() == [8, 2, 2]
    assert np.trace(matrix) / 12 == pytest.approx(summary["test_accuracy"])
    assert "Accuracy of each class" in run.report.read_text()


def test_balanced_weights():
    images = fpnas.data.Images(
        np.zeros((6, 2, 2, 1), np.uint8),
        np.array([0, 0, 0, 1, 1, 2], np.int32),
        ("a", "b", "c", "d"),
        (2, 2, 1),
    ).balanced()
    np.testing.assert_allclose(images.weights, [2 / 3] * 3 + [1] * 2 + [2])
    assert images.weights.mean() == pytest.approx(1)
    (_, y, weights), *_ = fpnas.data.test_batches(images.part(np.array([5, 0])))
    assert (y.numpy().tolist(), weights.numpy().tolist()) == ([2, 0], [2, pytest.approx(2 / 3)])


def test_a_run_is_not_continued_on_other_images(searched, tmp_path):
    image = np.zeros((16, 16, 3))
    for name in ("a", "b"):
        for index in range(10):
            path = tmp_path / "photos" / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            keras.utils.save_img(path, image, scale=False)
    settings = {
        "architecture": searched.architecture_file,
        "data": f"folder:{tmp_path}/photos",
        "output_dir": tmp_path / "trained",
    }
    run = fpnas.train_architecture(**settings, epochs=1)
    content = {path: path.read_bytes() for path in run.directory.iterdir() if path.is_file()}
    (tmp_path / "photos" / "a" / "0.png").rename(tmp_path / "photos" / "b" / "10.png")
    with pytest.raises(fpnas.UserError, match="16 then, 16 now"):
        fpnas.train_architecture(**settings, epochs=2)
    # Nothing of the finished run is lost.
    assert content == {
        path: path.read_bytes() for path in run.directory.iterdir() if path.is_file()
    }
    assert run.finished


def test_a_run_does_not_go_on_from_a_damaged_checkpoint(searched, tmp_path):
    settings = {
        "architecture": searched.architecture_file,
        "train_images": 200,
        "output_dir": tmp_path / "trained",
    }
    run = fpnas.train_architecture(**settings, epochs=1)
    (checkpoint,) = run.checkpoint_folder.iterdir()
    checkpoint.write_bytes(b"damaged")
    with pytest.raises(fpnas.UserError, match="its last checkpoint is gone or damaged"):
        fpnas.train_architecture(**settings, epochs=2)
    assert run.finished


def test_what_was_chosen_stays_when_a_run_goes_on(settings, tmp_path):
    """With more epochs given, one pass would be an epoch."""
    given = settings | {"steps_per_epoch": None, "epochs": None, "batch_size": None}
    settings = SearchSettings(**given, output_dir=tmp_path / "run")
    images = settings.load_images("train", 16)
    session = fpnas.runs.Session(fpnas.runs.SearchRun(tmp_path / "run"), settings, "module")
    fitted = session.fit_settings(images)
    assert (fitted.steps_per_epoch, fitted.epochs) == (50, 30)
    session.begin()
    session.close()
    more = SearchSettings(**given | {"epochs": 60}, output_dir=tmp_path / "run")
    session = fpnas.runs.Session(fpnas.runs.SearchRun(tmp_path / "run"), more, "module")
    assert session.has_work
    fitted = session.fit_settings(images)
    assert (fitted.steps_per_epoch, fitted.epochs) == (50, 60)


def test_a_directory_with_nothing_but_the_first_files_is_new(settings, tmp_path):
    (tmp_path / "chosen.txt").write_text("--batch_size=16\n")
    (tmp_path / "images.json").write_text("{}")
    given = SearchSettings(**settings, output_dir=tmp_path)
    fpnas.runs.Session(fpnas.runs.SearchRun(tmp_path), given, "module").close()


@pytest.mark.slow
def test_a_taught_training_that_was_killed_before_its_first_checkpoint(searched, tmp_path):
    """The logits are there, so the teacher is not loaded again: the start stays the same."""
    teacher = searched.architecture.build()
    teacher.save(tmp_path / "teacher.keras")
    settings = {
        "architecture": searched.architecture_file,
        "data": "digits",
        "train_images": 40,
        "validation_split": 0.25,
        "epochs": 1,
        "teacher": tmp_path / "teacher.keras",
        "output_dir": tmp_path / "run",
    }
    run = fpnas.train_architecture(**settings)
    expected = run.model().get_weights()
    assert np.load(run.teacher_file).shape == (30, 10)
    for path in [*run.checkpoint_folder.iterdir(), run.model_file, run.summary_file]:
        path.unlink()
    again = fpnas.train_architecture(**settings)
    for ours, theirs in zip(again.model().get_weights(), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_balanced_classes_and_a_teacher_of_the_same_classes(searched, tmp_path):
    teacher = searched.architecture.build()
    teacher.save(tmp_path / "teacher.keras")
    run = fpnas.train_architecture(
        architecture=searched.architecture_file,
        data="digits",
        train_images=40,
        epochs=1,
        teacher=tmp_path / "teacher.keras",
        class_weight="balanced",
        output_dir=tmp_path / "run",
    )
    # It has seen each image once.
    images = run.data_settings().load_images("train", teacher.input_shape[1])
    expected = teacher.predict(images.x.astype("float32"), verbose=0)
    np.testing.assert_allclose(np.load(run.teacher_file), expected, rtol=1e-4, atol=1e-4)
