"""From a folder of photos to the file for the app: settings in, a directory of runs out.

fpnas build --data=folder:photos --target=8M --output_dir=runs/photos
"""

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import shlex
import time
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from export.tflite import run_export
from fpnas_keras import data, progress, report, runs, spaces
from fpnas_keras.building import finalists, measuring, planning
from fpnas_keras.building.settings import BuildSettings
from fpnas_keras.building.targets import format_with_unit
from fpnas_keras.commands import Command, visible_log
from fpnas_keras.cost import published_tables
from fpnas_keras.errors import Interrupted, UserError
from fpnas_keras.files import summarize_error
from fpnas_keras.published import scale_published
from fpnas_keras.runs.run_directory import RunDirectory
from fpnas_keras.runs.settings import RunSettings
from fpnas_keras.search import SearchSettings, run_search
from fpnas_keras.train import TrainSettings, run_training

# Of the time that is left when the search begins, and for a latency table of all time. More time
# helps a training more surely than a search (docs/benchmarks.md, "What the time buys").
_SEARCH_SHARE, _TABLE_SHARE = 0.15, 0.15
# A shorter search has not decided (benchmarks/versus.jsonl has searches of 30 epochs). It may take
# a larger share.
_LEAST_SEARCH_EPOCHS, _LARGEST_SEARCH_SHARE = 6, 0.3
# Networks that a shortened search judges at its end: in three jobs the choice among more finalists
# was no better than a draw.
_JUDGED = {"finalists": 20, "ranked_samples": 8}
# Writing and timing a file takes about as long as so many times the start of a training, which
# builds, traces, saves and tests a network; and two passes over the test images.
_FILE_STARTS, _TEST_PASSES = 1.3, 2
# Fine-tuning takes about as long as writing the int8 file again and, for each of its epochs, so
# many epochs of the training. It is left out if it would exceed the time by more than this share.
_TUNING_EPOCHS, _MOST_OVER = 5, 0.1
# An int8 file that loses more accuracy is fine-tuned.
_MOST_LOST = 0.01
_BASELINE = "MobileNetV3-Small"
# Strides of the baseline's stem and first block together, by the largest size of the images in
# pixels, as in the spaces.
_STRIDES = ((40, 1), (160, 2), (math.inf, 4))


def build(**settings: Any) -> runs.BuildRun:
    """Finds a network for images, trains it, and writes the file for the app, with a report.

    It searches, trains the result or the best of the finalists, exports it in float32 and int8,
    and, if there is time, trains MobileNetV3-Small as long, to compare with. If the directory holds
    an unfinished build with the same settings, it is continued. A finished one is not run again.

    For a target in milliseconds, files are made in processes of their own: a script that
    calls this then needs `if __name__ == "__main__":`.

    Args:
        **settings: The fields of `BuildSettings`, which are the flags of `fpnas build`. Settings of
            a step are a dict, as `train={"epochs": 50}`.

    Returns:
        The directory, with `summary`, `report`, `search`, `training` and `baseline`.

    Raises:
        UserError: When a setting is wrong, or the directory holds something else.

    Example:

    ```python
    run = fpnas.build(data="folder:photos", target="8M", time="1h", output_dir="runs/photos")
    run.summary["file"], run.summary["accuracy"]
    ```
    """
    with visible_log():
        return run_build(BuildSettings(**settings))


def run_build(settings: BuildSettings) -> runs.BuildRun:
    """Like `build`, but takes a `BuildSettings`."""
    run = runs.BuildRun(settings.output_dir)
    session = runs.Session(
        run,
        settings,
        "fpnas_keras.building",
        may_change=functools.partial(settings.may_still_change, run),
    )
    with session.working():
        if not run.finished:
            if run.is_build and not run.search.flag_file.is_file() and _differs(run, settings):
                run.forget_beginning()
            with data.remembering():
                _Build(session).run_steps()
        elif not run.report.is_file():
            with report.failure_as_warning():
                report.write_report(run.directory)
    return run


class _Measured(NamedTuple):
    """What a training takes.

    Attributes:
        probe: Its steps.
        file_seconds: Seconds for a file of its network.
        probing_seconds: Seconds that the probe has taken.
    """

    probe: planning.Probe
    file_seconds: float
    probing_seconds: float


class _Build:
    """One build: its steps, and the time that they have."""

    def __init__(self, session):
        self.session = session
        self.run = session.run
        self.settings = session.settings
        self.target = self.settings.parsed_target()
        self._earlier = sum(step["seconds"] for step in self.run.steps)
        self._earlier_cpu = sum(step["cpu_seconds"] for step in self.run.steps)
        self._started = time.monotonic()
        self._table_notes = []
        # What trainings take, by the content of their architecture files.
        self._measured = {}
        # Of the step that is done now: its name, and what is decided in it.
        self._name, self._notes = "", []

    def run_steps(self):
        """Does the steps that are not done yet."""
        self._begin()
        steps = {"latency table": self._measure_table} if self.target.kind == "latency" else {}
        steps |= {"search": self._search, "training": self._train, "export": self._export}
        if self.settings.baseline:
            steps["baseline"] = self._train_baseline
        self._names = list(steps)
        done = {step["name"] for step in self.run.steps}
        for name, work in steps.items():
            if name not in done:
                self._do(name, work)
        self._finish()

    def _begin(self):
        """Reads the images, chooses what depends on them, and checks before anything is written."""
        given = self.settings
        if given.device == "adb":
            measuring.describe_device(given)  # It may not be there.
        self.images = given.load_images("train", self._choose_size())
        self.settings = self.session.fit_settings(self.images)
        self.space = spaces.get(
            self.settings.space, self.images.image_shape, len(self.images.class_names)
        )
        measuring.check_target(self.settings, self.space)
        if given.latency_table is not None:
            self._table_notes = measuring.check_table(given, given.latency_table, self.space)
        self.session.begin(latency_table=given.latency_table)
        if self.run.flag_lines() != given.to_flags():  # Some may change.
            _write_flags(self.run, given)

    def _choose_size(self):
        """Height and width of the images: given, chosen before, or to be chosen."""
        settings = self.settings
        size = settings.input_size or int(self.run.chosen.get("input_size", 0))
        if not size and settings.latency_table:
            table = published_tables.read_own(settings.latency_table)
            size = int(table["input_shape"][0]) if table else 0
        if not size:
            shape, num_classes = data.look_at(settings.data, settings.data_dir, settings.download)
            size = measuring.choose_size(settings, shape, num_classes)
        return size

    def _do(self, name, work):
        """Does one step, and writes down that it is done."""
        number, count = self._names.index(name) + 1, len(self._names)
        before = self._seconds_before(name)
        self._earlier += before
        line = f"step {number} of {count}: {name}"
        best = self._best()
        logging.info("%s", "; ".join(filter(None, [line, self._describe_time(), best])))
        started, cpu = time.monotonic(), _cpu_seconds()
        self._name, self._notes = name, []

        def describe(left):
            return f"step {number} of {count}{self._describe_whole(left)}"

        try:
            with progress.part_of(describe):
                whole = work() or 0.0
        except Interrupted as error:  # It names the command of the step. Ours is another.
            raise Interrupted(number=error.signal) from None
        seconds = time.monotonic() - started
        # A step that was interrupted knows at its end what it took before.
        self._earlier += max(0.0, whole - seconds - before)
        for note in self._notes:
            logging.info("%s", note)
        self.run.add_step(name, max(before + seconds, whole), _cpu_seconds() - cpu, self._notes)

    def _seconds_before(self, name):
        """What earlier processes took for the epochs of a step that they did not finish.

        What they took for a table or for files is not known.
        """
        own = {
            "search": self.run.search,
            "training": self.run.training,
            "baseline": self.run.baseline,
        }
        begun = [own[name]] if name in own else []
        if name == "training":
            begun += self.run.trained_finalists
        seconds = 0.0
        for run in begun:
            # No epoch has ended; or the file is damaged, of which the step speaks.
            with contextlib.suppress(UserError):
                if run.finished:
                    seconds += run.summary["wall_seconds"]
                elif run.metrics_file.is_file():
                    seconds += run.epochs[-1]["seconds"]
        return seconds

    def _elapsed(self):
        return self._earlier + time.monotonic() - self._started

    def _left(self):
        """Seconds that are left; infinite without a limit."""
        seconds = self.settings.seconds()
        return math.inf if seconds is None else seconds - self._elapsed()

    def _describe_time(self):
        left = self._left()
        if left == math.inf:
            return ""
        return f"{progress.format_seconds(max(0, left))} left of {self.settings.time}"

    def _describe_whole(self, left):
        """The time that is left of the whole, if it is known."""
        whole = self._left()
        if whole == math.inf:
            return ""
        return f", {progress.format_seconds(max(left, whole))} left of {self.settings.time}"

    def _best(self):
        """The best accuracy so far, as text."""
        if self.run.training.finished:
            return f"test accuracy so far {self.run.training.summary['test_accuracy']:.2%}"
        if self.run.search.finished:
            shared = self.run.search.summary.get("shared_accuracy")
            return f"accuracy with the shared weights {shared:.2%}" if shared is not None else ""
        return ""

    def _measure_table(self):
        if self.settings.latency_table is not None:
            self._notes += self._table_notes
            return
        seconds = self.settings.seconds()
        allowed = None if seconds is None else _TABLE_SHARE * seconds
        self._notes += measuring.measure_table(
            self.settings, self.space, self.run.measured_table, allowed
        )

    def _search(self):
        files = {}
        if self.target.kind == "latency":
            files["latency_table"] = self.run.latency_table
        settings = self._resumed(SearchSettings, self.run.search, **files)
        if settings is None:
            settings = self._plan_search(**files)
            self.run.write_planned(self._name, self._notes)
        else:
            self._notes += self.run.planned.get(self._name, [])
        run = run_search(settings)
        if run.is_decided is False:
            self._notes.append(f"{run.decision} It needs more time, or --search.epochs")
        return run.summary["wall_seconds"]

    def _resumed(
        self, cls: type[RunSettings], run: RunDirectory, **files: pathlib.Path
    ) -> RunSettings | None:
        """The settings of a step that an earlier process has begun.

        Args:
            cls: Class of the settings.
            run: The directory of the step.
            **files: Files of this build that the step takes, by the name of the setting. They may
                have been moved with the directory.
        """
        if not run.flag_file.is_file():
            return None
        known = cls.from_flags([f"--flagfile={run.flag_file}"])
        names = cls.may_change() & BuildSettings.may_change()
        ours = {name: getattr(self.settings, name) for name in names}
        ours["output_dir"] = str(run.directory.absolute())
        settings = dataclasses.replace(
            known, **ours | {name: str(file.absolute()) for name, file in files.items()}
        )
        if settings != known:
            _write_flags(run, settings)
        return settings

    def _plan_search(self, **files):
        make = functools.partial(
            self.settings.search_settings,
            self.run.search.directory.absolute(),
            self.settings.space,
            self.images.image_shape[0],
            cost=self.target.kind,
            target=self.target.aim,
            **{name: str(file.absolute()) for name, file in files.items()},
        )
        settings, shortened = make(), make(**_JUDGED)
        if self._left() == math.inf:
            return settings
        if settings.epochs is not None:
            self._notes.append(f"search: {settings.epochs} epochs, whatever time they take")
            return settings
        logging.info("measuring the time of a step of the search")
        probe = planning.probe_search(shortened, self.images)
        least = min(_LEAST_SEARCH_EPOCHS, probe.epochs)
        if probe.epochs_in(_LARGEST_SEARCH_SHARE * self._left()) < least:
            needed = self._elapsed() + probe.seconds(least) / _LARGEST_SEARCH_SHARE
            raise UserError(
                f"`time` must be at least {math.ceil(needed / 60)}m, with which the search has "
                f"{least * probe.steps_per_epoch} steps. Received: time={self.settings.time}"
            )
        epochs = max(least, probe.epochs_in(_SEARCH_SHARE * self._left()))
        epochs = min(epochs, probe.epochs)
        if epochs < probe.epochs:
            settings = shortened
            self._notes.append(
                f"search: {epochs * probe.steps_per_epoch:,} steps instead of "
                f"{probe.epochs * probe.steps_per_epoch:,}, and {settings.finalists} finalists, "
                "for lack of time"
            )
        return dataclasses.replace(settings, epochs=epochs, steps_per_epoch=probe.steps_per_epoch)

    def _train(self):
        run = self.run
        if not run.training.flag_file.is_file():
            self._train_finalists()
        trained = [each.summary for each in run.trained_finalists if each.finished]
        before = sum(summary["wall_seconds"] for summary in trained)
        return before + self._train_network(run.training, run.network_file)

    def _train_finalists(self):
        """Chooses among finalists by trainings of them, where there is time for these."""
        run = self.run
        if any(each.flag_file.is_file() for each in run.trained_finalists):
            self._notes += run.planned.get("finalists", [])
        elif count := self._count_finalists():
            self._notes.append(f"training: {count} finalists of the search are trained first")
            run.write_planned("finalists", self._notes)
            run.plan_trained_finalists(count)
        else:
            run.trained_finalists_file.unlink(missing_ok=True)
            return

        def settings_of(training, file):
            resumed = self._resumed(TrainSettings, training, architecture=file)
            if resumed is not None:
                return resumed
            return finalists.shorten(self._train_settings(training, file), self.images)

        self._notes.append(finalists.train_and_choose(run, settings_of))

    def _count_finalists(self):
        """How many finalists are trained: as the user says, or as many as fit into spare time.

        It is never a single one: there would be nothing to choose.
        """
        run, given = self.run, self.settings.trained_finalists
        kept = len(run.search.finalist_files)
        if given is not None:
            count = min(given, kept) if kept > 1 else 0
            if given > kept:
                self._notes.append(
                    f"training: the search has kept {kept} of its finalists, not {given}"
                )
            return count
        if kept < 2 or self._left() == math.inf or len(self.images.y) < finalists.LEAST_IMAGES:
            return 0
        settings = self._train_settings(run.training, run.search.architecture_file)
        measured = self._measure_training(settings)
        probe = measured.probe
        whole = probe.seconds(settings.epochs or probe.most_epochs)
        spare = self._time_to_train(measured) - whole
        if self.settings.baseline:
            spare *= 2
        spare -= measured.probing_seconds  # Another one than the first may be the best.
        return min(finalists.count_that_fit(probe, spare), kept)

    def _train_settings(self, run, architecture):
        return self.settings.train_settings(run.directory.absolute(), str(architecture.absolute()))

    def _train_network(self, run, architecture, most=math.inf):
        """Trains a network in the time that is left, or in no more than some seconds.

        Returns:
            The seconds that it has taken; `None` if it was left out.
        """
        settings = self._resumed(TrainSettings, run, architecture=architecture)
        if settings is None:
            settings = self._train_settings(run, architecture)
            name = run.directory.name
            if self._left() < math.inf and settings.epochs is not None:
                self._notes.append(f"{name}: {settings.epochs} epochs, whatever time they take")
            elif self._left() < math.inf:
                settings = self._plan_training(settings, name, most)
                if settings is None:
                    return None
            self.run.write_planned(self._name, self._notes)
        else:
            self._notes += self.run.planned.get(self._name, [])
        return run_training(settings).summary["wall_seconds"]

    def _plan_training(self, settings, name, most=math.inf):
        """The settings with the epochs that fit; `None` for a baseline that has time for none."""
        measured = self._measure_training(settings)
        probe = measured.probe
        is_baseline = name == self.run.baseline.directory.name
        left = (
            self._left() - measured.file_seconds if is_baseline else self._time_to_train(measured)
        )
        allowed = min(left, most)
        epochs = probe.epochs_to_train(allowed)
        if is_baseline and probe.epochs_in(left) < 1:
            self._notes.append(f"{_BASELINE} is left out: not even one epoch fits into the time")
            return None
        if probe.epochs_in(allowed) < 1:
            self._notes.append(f"{name}: 1 epoch, though it does not fit into the time")
        elif epochs != probe.epochs:
            reason = "for lack of time" if epochs < probe.epochs else "since there is time"
            self._notes.append(f"{name}: {epochs} epochs instead of {probe.epochs}, {reason}")
        return dataclasses.replace(settings, epochs=epochs)

    def _measure_training(self, settings):
        """What a training takes; that of the same architecture is not measured again."""
        architecture = pathlib.Path(settings.architecture).read_text(encoding="utf-8")
        if architecture not in self._measured:
            logging.info("measuring the time of a step of the training")
            started = time.monotonic()
            probe = planning.probe_training(settings, self.images)
            tests = self.settings.load_images("test", self.images.image_shape[0], again=True)
            test = _TEST_PASSES * len(tests.y) * probe.step / probe.batch_size / 3
            self._measured[architecture] = _Measured(
                probe, _FILE_STARTS * probe.start + test, time.monotonic() - started
            )
        return self._measured[architecture]

    def _time_to_train(self, measured):
        """Seconds that are left for the training of the network for the app."""
        if self.settings.baseline:  # It trains for as long, and one file is written of it.
            return (self._left() - measured.probing_seconds - 3 * measured.file_seconds) / 2
        return self._left() - 2 * measured.file_seconds

    def _export(self):
        self._export_as("none", self.run.training, "model")
        self._export_rounded(self.run.training, "model")

    def _export_rounded(self, run, name):
        """Writes the int8 file, and a fine-tuned one if that loses too much and there is time."""
        started = time.monotonic()
        try:
            self._export_as("int8", run, name)
        except UserError as error:
            self._notes.append(f"export: no int8 file: {summarize_error(error)}")
        seconds = time.monotonic() - started
        exported = self.run.export_report("int8", name)
        if exported is not None and not _loses_too_much(exported):
            return
        if exported is not None:
            self._notes.append(
                f"export: {name}_int8.tflite loses {_lost(exported):.1%} of accuracy"
            )
        is_tuned = self.run.export_report("qat", name) is not None
        if not is_tuned and self._left() < self._tuning_seconds(run, seconds):
            self._notes.append(f"export: {name} is not fine-tuned, for lack of time")
            return
        try:
            self._export_as("qat", run, name)
        except UserError as error:
            self._notes.append(f"export: no qat file: {summarize_error(error)}")

    def _tuning_seconds(self, run, int8_seconds):
        """Seconds that must be left for a fine-tuned file; some may be above the limit."""
        if self.settings.seconds() is None:
            return 0.0
        rows = run.epochs
        # The first epoch traces.
        first, last = rows[0]["seconds"] if len(rows) > 1 else 0.0, rows[-1]["seconds"]
        epoch = (last - first) / max(1, len(rows) - 1)
        epochs = self.settings.export_settings(model=str(run.model_file), quantize="qat").qat_epochs
        over = _MOST_OVER * self.settings.seconds()
        return int8_seconds + epochs * _TUNING_EPOCHS * epoch - over

    def _export_as(self, quantize, run, name):
        if self.run.export_report(quantize, name) is None:
            run_export(
                self.settings.export_settings(
                    model=str(run.model_file),
                    quantize=quantize,
                    output=str(self.run.tflite_file(quantize, name)),
                    overwrite=True,  # A kill may have left a part of it.
                )
            )

    def _train_baseline(self):
        file = self.run.baseline_architecture_file
        if not file.is_file():
            try:
                self._scale_baseline().save(file)
            except UserError as error:
                self._notes.append(f"no baseline: {error}")
                return 0.0
        # As long as the network that was found, if there is time.
        whole = self._train_network(
            self.run.baseline, file, self.run.training.summary["wall_seconds"]
        )
        if whole is None:
            return 0.0
        self._export_rounded(self.run.baseline, "baseline")
        if not any(self.run.export_report(each, "baseline") for each in ("int8", "qat")):
            self._export_as("none", self.run.baseline, "baseline")
        return whole

    def _scale_baseline(self):
        with measuring.NetworkCosts(self.settings, self.target.kind) as cost:
            return scale_published(
                _BASELINE,
                self.images.image_shape,
                len(self.images.class_names),
                self.target.value,
                stem_strides=next(
                    strides for size, strides in _STRIDES if self.images.image_shape[0] <= size
                ),
                cost=lambda network: cost([network])[0],
            )

    def _finish(self):
        """Times the files on the device, writes the summary and the report."""
        found = self._describe(self.run.training)
        baseline = self._describe(self.run.baseline, "baseline")
        entries = [each for each in (found, baseline) if each]
        files = [self.run.path(each["file"]) for each in entries]
        for entry, milliseconds in zip(entries, measuring.time_files(self.settings, files)):
            entry["milliseconds"] = milliseconds
        notes = [note for step in self.run.steps for note in step["notes"]]
        over = found[_MEASURED[self.target.kind]] / self.target.value
        if over > (1.0 if self.target.kind == "bytes" else 1.02):
            notes.append(f"the file costs {over - 1:.0%} more than the target")
        # What other processes used: earlier ones, and those that this one has waited for.
        times = os.times()
        cpu = self._earlier_cpu + times.children_user + times.children_system
        self.session.set_earlier_usage(
            {"wall_seconds": self._earlier, "cpu_seconds": cpu, "peak_memory_mb": 0}
        )
        images = self.images
        counts = np.bincount(images.y, minlength=len(images.class_names))
        self.session.finish(
            data=self.settings.data,
            description=images.description,
            class_counts=dict(zip(images.class_names, counts.tolist())),
            seed=self.settings.seed,
            space=self.space.name,
            input_size=images.image_shape[0],
            target=self.settings.target,
            target_kind=self.target.kind,
            device=self.settings.device,
            time=self.settings.time,
            **found,
            baseline=baseline,
            notes=notes,
            next=f"fpnas predict --model={shlex.quote(str(self.run.path(found['file'])))} PHOTO",
        )
        with report.failure_as_warning():
            report.write_report(self.run.directory)

    def _describe(self, training, name="model"):
        """A network and its file for the app, for the summary; `None` if there is no file."""
        exports = [self.run.export_report(each, name) for each in ("int8", "qat", "none")]
        if not training.finished or not any(exports):
            return None
        # The more accurate one of int8 and qat; float32 if there is neither.
        rounded = [each for each in exports[:2] if each] or exports[2:]
        exported = max(rounded, key=lambda each: each["tflite_accuracy"])
        summary = training.summary
        return {
            "file": self.run.tflite_file(exported["quantize"], name).name,
            "accuracy": exported["tflite_accuracy"],
            "keras_accuracy": exported["keras_accuracy"],
            "bytes": exported["bytes"],
            "macs": summary["macs"],
            "params": summary["params"],
            "epochs": summary["epochs"],
            "training_seconds": summary["wall_seconds"],
        }


# What a target limits, in the summary.
_MEASURED = {"macs": "macs", "latency": "milliseconds", "bytes": "bytes"}


def _lost(exported):
    return exported["keras_accuracy"] - exported["tflite_accuracy"]


def _loses_too_much(exported):
    """More than a point of accuracy, and more than a single image."""
    return _lost(exported) > max(_MOST_LOST, 1.5 / exported["test_images"])


def _cpu_seconds():
    """CPU time of this process and of those that it has waited for."""
    return sum(os.times()[:4])  # The fifth is the time of the clock.


def _differs(run, settings):
    """Whether a build has begun with other flags, wherever its directory is now."""
    return any(
        not flag.startswith("--output_dir=")
        for flag in set(run.flag_lines()) ^ set(settings.to_flags())
    )


def _write_flags(run, settings):
    """Writes other flags of a run; what it has chosen for its images stays."""
    chosen = [f"--{name}={value}" for name, value in run.chosen.items()]
    run.write_flags(settings.to_flags(), chosen)


def _build_and_print(settings):
    run = run_build(settings)
    print(_describe_result(run))


def _describe_result(run):
    summary = run.summary
    lines = ["", f"{run.path(summary['file'])}: {_describe_network(summary)}"]
    if summary["baseline"]:
        lines.append(f"{_BASELINE}: {_describe_network(summary['baseline'])}")
    lines += summary["notes"]
    lines.append(
        f"target {summary['target']}, {progress.format_seconds(summary['wall_seconds'])}"
        + (f" of {summary['time']}" if summary["time"] else "")
    )
    lines.append(f"labels: {run.path('labels.txt')}")
    if run.report.is_file():
        lines.append(f"report: {run.report}")
    return "\n".join([*lines, f"next, classify a photo:\n  {summary['next']}"])


def _describe_network(entry):
    return (
        f"{entry['accuracy']:.2%} of the test images, {entry['milliseconds']:.3g} ms, "
        f"{format_with_unit('bytes', entry['bytes'])}, {format_with_unit('macs', entry['macs'])}; "
        f"{entry['epochs']} epochs in {progress.format_seconds(entry['training_seconds'])}"
    )


COMMAND = Command(
    name="fpnas build",
    summary="From a folder of photos to the file for the app, in the time you give it.",
    examples=(
        (
            "Your own photos, one folder of images for each class, in an hour",
            "fpnas build --data=folder:photos --target=8M --time=1h --output_dir=runs/photos",
        ),
    ),
    settings=BuildSettings,
    run=_build_and_print,
)
