"""Interrupted runs go on bit for bit; damage is found; one process works in a directory."""

import os
import signal

import keras
import numpy as np
import pytest
from helpers import make_tiny_space

import fpnas_keras as fpnas
from fpnas_keras.errors import Interrupted
from fpnas_keras.networks import DistillationLoss, TaughtNetwork
from fpnas_keras.runs import Checkpoints, MetricsFile, RunDirectory, RunSettings, Session

EPOCHS, STEPS = 4, 3


class Broken(Exception):
    """What stands for a kill."""


class BreakAfter(keras.callbacks.Callback):
    def __init__(self, steps, what=Broken):
        super().__init__()
        self.left, self.what = steps, what

    def on_train_batch_end(self, batch, logs=None):
        if logs:  # a step that was made
            self.left -= 1
            if self.left == 0:
                if self.what is Broken:
                    raise Broken
                self.what(self.model)


@pytest.fixture
def begin(tmp_path):
    """Starts a session in a directory, or continues the run that is there."""

    def begin(name="run", every="1", **kwargs):
        settings = RunSettings(output_dir=tmp_path / name, checkpoint_every=every)
        session = Session(RunDirectory(tmp_path / name), settings, "module", **kwargs)
        session.begin()
        return session

    return begin


def images():
    rng = np.random.default_rng(0)
    return rng.uniform(0, 255, (60, 8, 8, 1)).astype(np.float32), np.arange(60) % 3


def search_part(session, *callbacks):
    """A search, from where its run stopped to its end."""
    checkpoints = Checkpoints(session)
    batches = fpnas.data.search_batches(
        *images(), batch_size=8, steps_per_epoch=STEPS, first_step=checkpoints.step
    )
    space = make_tiny_space(blocks=1)
    search = fpnas.ArchitectureSearch(
        space,
        samples=3,
        cost=fpnas.MacsCost(target=20_000),
        distribution="coarse_to_fine",
        warmup_steps=2,
    )
    optimizer = keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 12), momentum=0.9)
    search.compile(optimizer, keras.optimizers.Adam(0.1))
    fit(checkpoints, search, batches, session, [fpnas.CoarseToFine(2), *callbacks])
    return search


def train_part(session, *callbacks):
    checkpoints = Checkpoints(session)
    x, y = images()
    pictures = fpnas.data.Images(x.astype(np.uint8), y.astype(np.int32), ("a", "b", "c"), (8, 8, 1))
    augmentation = fpnas.data.Augmentation(1, random_flip=True, mix_up=0.2)
    batches = fpnas.data.train_batches(
        pictures, 20, augmentation=augmentation, first_step=checkpoints.step
    )
    space = make_tiny_space(blocks=1)
    smallest = np.zeros(space.cardinalities.shape, int)
    student, teacher = (
        space.architecture(choices).build() for choices in (smallest, space.cardinalities - 1)
    )
    rng = np.random.default_rng(0)  # the same in each part of the run, as a file would be
    teacher.set_weights([rng.uniform(0.1, 0.2, each.shape) for each in teacher.get_weights()])
    model = TaughtNetwork(student, teacher)
    optimizer = keras.optimizers.AdamW(0.01, use_ema=True, ema_momentum=0.5)
    loss = DistillationLoss(2.0, 0.5, 0.0)
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=False)
    optimizer.build(model.trainable_variables)
    model.compute_metrics(None, np.zeros((1, 3)), np.zeros((1, 3)))
    fit(checkpoints, model, batches, session, callbacks)
    return model


def fit(checkpoints, model, batches, session, callbacks):
    path = session.run.metrics_file
    metrics_file = MetricsFile(path, lambda epoch, logs: {"epoch": epoch} | logs)
    checkpoints.fit(
        model,
        batches,
        epochs=EPOCHS,
        files=[metrics_file],
        callbacks=list(callbacks),
    )


def state(model, session):
    rows = session.run.metrics_file.read_text().splitlines()
    optimizers = [model.optimizer, getattr(model, "architecture_optimizer", None)]
    variables = model.variables + [v for each in optimizers if each for v in each.variables]
    return [np.array(v) for v in variables], [row.rsplit(",", 1)[0] for row in rows]


@pytest.mark.parametrize(
    ("part", "every", "breaks"),
    # A kill loses the step that it comes in; with a checkpoint every second step another one.
    [(search_part, "2", (6, 2, 6)), (train_part, "1", (3, 5, 2, 1))],
)
def test_broken_off_again_and_again_it_ends_bit_for_bit(begin, part, every, breaks):
    """Inside epochs, at their ends, at the switch to joint logits, and after the last step."""
    whole = begin("whole")
    expected = state(part(whole), whole)
    for index, steps in enumerate(breaks):
        keras.utils.set_random_seed(index)  # the checkpoint brings what it was
        session = begin("broken", every)
        with pytest.raises(Broken):
            part(session, BreakAfter(steps))
        session.close()
    session = begin("broken", every)
    for _ in range(2):  # to the end, and once more after it
        variables, rows = state(part(session), session)
        assert rows == expected[1]
        assert len(variables) == len(expected[0])
        assert all(map(np.array_equal, variables, expected[0]))


def test_a_signal_saves_and_ends(begin):
    session = begin(every="999s")
    kill = BreakAfter(5, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Interrupted, match="interrupted after step 5, which is saved") as caught:
        train_part(session, kill)
    # In a notebook the next Ctrl-C must work.
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert caught.value.signal == signal.SIGTERM
    assert Checkpoints(session).step == 5
    with pytest.raises(Interrupted, match=r"saved; to continue:\n  python -m module --flagfile="):  # noqa: SIM117
        with session.working():
            raise caught.value


def saved(begin, break_after=6):
    session = begin()
    with pytest.raises(Broken):  # before that step is saved
        train_part(session, BreakAfter(break_after))
    folder = session.run.checkpoint_folder
    return session, [folder / f"step_{break_after - back}.ckpt" for back in (2, 1)]


def test_only_the_last_two_are_kept_and_a_damaged_one_is_passed_over(begin, caplog):
    session, (older, newer) = saved(begin)
    assert sorted(session.run.path("checkpoints").iterdir()) == [older, newer]
    content = newer.read_bytes()
    assert Checkpoints(session).step == 5
    rng = np.random.default_rng(0)
    damages = [content[:-1], content[: len(content) // 2], b"", content + b"0"]
    for position in rng.choice(len(content), 50, replace=False):
        flipped = bytearray(content)
        flipped[position] ^= 1 << rng.integers(8)
        damages.append(bytes(flipped))
    for damaged in damages:
        newer.write_bytes(damaged)
        assert Checkpoints(session).step == 4
    assert f"{newer} is damaged" in caplog.text
    # The damaged one is not counted among those that are kept.
    with pytest.raises(Broken):
        train_part(session, BreakAfter(3))
    assert Checkpoints(session).step == 6
    newer.write_bytes(b"")
    session.run.path("checkpoints/step_6.ckpt").write_bytes(b"")
    assert Checkpoints(session).step == 0
    assert "no checkpoint is whole" in caplog.text


def test_a_checkpoint_of_another_model_is_refused(begin):
    session, _ = saved(begin)
    with pytest.raises(ValueError, match="is of another version of the program or of other data"):
        search_part(session)


def test_weights_that_are_not_finite_are_not_saved(begin):
    def spoil(model):
        weight = model.trainable_variables[3]
        weight.assign(np.full(weight.shape, np.nan))

    session = begin()
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match=r"not finite at step 4; .*last good .*step_3\.ckpt"):
        # It comes before `Checkpoints` in the list of callbacks.
        train_part(session, BreakAfter(4, spoil))
    assert signal.getsignal(signal.SIGINT) is handler
    assert Checkpoints(session).step == 3


def test_a_full_disk_leaves_the_last_checkpoint(begin, monkeypatch):
    def full(self, content):
        with self.open("wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device")

    def fill(_):
        monkeypatch.setattr(type(session.run.directory), "write_bytes", full)

    session = begin()
    with pytest.raises(OSError, match="No space left"):
        train_part(session, BreakAfter(4, fill))
    assert sorted(path.name for path in session.run.path("checkpoints").iterdir()) == [
        "step_2.ckpt",
        "step_3.ckpt",
    ]


def test_a_finished_run_keeps_its_last_checkpoint(begin):
    session, (older, newer) = saved(begin)
    content = older.read_bytes()
    session.finish()
    assert list(session.run.checkpoint_folder.iterdir()) == [newer]
    older.write_bytes(content)  # as when a kill comes in between
    session.close()
    assert Session(session.run, session.settings, "module").run.finished
    assert list(session.run.checkpoint_folder.iterdir()) == [newer]


def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_damaged(begin):
    session, (_, newer) = saved(begin)
    newer.unlink()
    newer.mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        Checkpoints(session)


def test_one_process_at_a_time(begin, tmp_path):
    session = begin()
    with pytest.raises(ValueError, match=f"another process is at work in `output_dir` {tmp_path}"):
        begin()
    begin(writes=False)  # the other workers of a cluster
    session.close()
    begin()


def test_a_run_that_ends_while_another_starts_is_not_begun_anew(begin, tmp_path):
    settings = RunSettings(output_dir=tmp_path / "new", checkpoint_every="1")
    late = Session(RunDirectory(tmp_path / "new"), settings, "module")
    first = begin("new")
    first.finish()
    first.close()
    with pytest.raises(ValueError, match="another process has just finished"):
        late.begin()


def test_what_a_kill_left_is_removed(begin):
    session = begin()
    session.run.path(".123.metrics.csv").write_text("half")
    session.close()
    assert not begin().run.path(".123.metrics.csv").exists()


def test_a_file_of_the_user_must_stay_what_it_was(begin, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text("{}")
    session = begin()
    session.begin(space=str(file), latency_table=None)
    assert session.run.path("space.json").read_text() == "{}"
    file.write_text('{"more": 1}')
    with pytest.raises(ValueError, match=r"`space` .*mine.json has changed since the run .* began"):
        session.begin(space=str(file))


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "60m", "s", "", "1e3"])
def test_how_often_must_be_steps_or_seconds(tmp_path, value):
    with pytest.raises(fpnas.UserError, match="`checkpoint_every` must be a number of seconds"):
        RunSettings(output_dir=tmp_path, checkpoint_every=value)
