"""From a folder of photos to the file for the app: settings in, a directory of runs out.

fpnas build --data=folder:photos --target=8M --output_dir=runs/photos
"""

import dataclasses
import math
import resource
import shlex
import time
from typing import Any

import numpy as np
from absl import logging

from export.tflite import run_export
from fpnas_keras import data, progress, report, runs, spaces
from fpnas_keras.building import measuring, planning
from fpnas_keras.building.settings import BuildSettings
from fpnas_keras.building.targets import format_cost
from fpnas_keras.commands import Command, visible_log
from fpnas_keras.errors import Interrupted, UserError
from fpnas_keras.files import summarize_error
from fpnas_keras.published import scale_published
from fpnas_keras.runs.run_directory import RunDirectory
from fpnas_keras.runs.settings import RunSettings
from fpnas_keras.search import SearchSettings, run_search
from fpnas_keras.train import TrainSettings, run_training

# Of the time that is left when the search begins, and for a latency table of all time.
_SEARCH_SHARE, _TABLE_SHARE = 0.3, 0.15
# A shorter search has not decided (benchmarks/versus.jsonl has searches of 30 epochs).
_LEAST_SEARCH_EPOCHS = 6
# More epochs than so many times the usual ones are not used, even if there is time.
_MOST_EPOCHS = 4
# What the exports, timing the files and the report take, about.
_EXPORT_SECONDS, _BASELINE_SECONDS = 60.0, 60.0
# An int8 file that loses more accuracy is fine-tuned.
_MOST_LOST = 0.01
_BASELINE = "MobileNetV3-Small"
# The stem halves larger images.
_LARGE = 40


def build(**settings: Any) -> runs.BuildRun:
    """Finds a network for images, trains it, and writes the file for the app, with a report.

    It searches, trains the result, exports it in float32 and int8, and trains MobileNetV3-Small as
    long, to compare with. If the directory holds an unfinished build with the same settings, it is
    continued. A finished one is not run again.

    It says what it does, as the command, unless absl's verbosity has been changed.

    For a target in milliseconds or bytes, files are made in processes of their own: a script that
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
    session = runs.Session(run, settings, "fpnas_keras.building")
    with session.working():
        if not run.finished:
            with data.remembering():
                _Build(session).run_steps()
        elif not run.report.is_file():
            _write_report(run)
    return run


class _Build:
    """One build: its steps, and the time that they have."""

    def __init__(self, session):
        self.session = session
        self.run = session.run
        self.directory = self.run.directory.absolute()
        self.settings = session.settings
        self.target = self.settings.parsed_target()
        self._earlier = sum(step["seconds"] for step in self.run.steps)
        self._earlier_cpu = sum(step["cpu_seconds"] for step in self.run.steps)
        self._started = time.monotonic()
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
        """Reads the images and chooses what depends on them."""
        settings = self.settings
        size = settings.input_size or int(self.run.chosen.get("input_size", 0))
        if not size:
            shape, num_classes = data.look_at(settings.data, settings.data_dir, settings.download)
            size = measuring.choose_size(settings, shape, num_classes)
        self.images = settings.load_images("train", size)
        self.settings = self.session.fit_settings(self.images)
        self.space = spaces.get(
            self.settings.space, self.images.image_shape, len(self.images.class_names)
        )
        measuring.check_target(self.settings, self.space)
        self.session.begin(latency_table=settings.latency_table)

    def _do(self, name, work):
        """Does one step, and writes down that it is done."""
        number, count = self._names.index(name) + 1, len(self._names)
        line = f"step {number} of {count}: {name}"
        best = self._best()
        logging.info("%s", "; ".join(filter(None, [line, self._describe_time(), best])))
        started, cpu = time.monotonic(), _cpu_seconds()
        self._name, self._notes = name, self.run.planned.get(name, [])

        def describe(left):
            return f"step {number} of {count}{self._describe_whole(left)}"

        try:
            with progress.part_of(describe):
                whole = work() or 0.0
        except Interrupted as error:  # It names the command of the step. Ours is another.
            raise Interrupted(number=error.signal) from None
        seconds = time.monotonic() - started
        # A step that was interrupted knows what it took before.
        self._earlier += max(0.0, whole - seconds)
        for note in self._notes:
            logging.info("%s", note)
        self.run.add_step(name, max(seconds, whole), _cpu_seconds() - cpu, self._notes)

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
        table, seconds = self.settings.latency_table, self.settings.seconds()
        if table is None:
            allowed = None if seconds is None else _TABLE_SHARE * seconds
            table = measuring.find_table(self.settings, self.space, allowed)
        measuring.copy_table(table, self.run.latency_table)

    def _search(self):
        directory = self.directory / "search"
        settings = self._resumed(SearchSettings, self.run.search)
        if settings is None:
            settings = self._plan_search(directory)
        run = run_search(settings)
        if run.is_decided is False:
            self._notes.append(f"{run.decision} It needs more time, or --search.epochs")
        return run.summary["wall_seconds"]

    def _resumed(self, cls: type[RunSettings], run: RunDirectory) -> RunSettings | None:
        """The settings of a step that an earlier process has begun."""
        if not run.flag_file.is_file():
            return None
        ours = {
            name: getattr(self.settings, name)
            for name in cls.may_change() & BuildSettings.may_change()
        }
        known = cls.from_flags([f"--flagfile={run.flag_file}"])
        return dataclasses.replace(known, **ours | {"output_dir": str(run.directory.absolute())})

    def _plan_search(self, directory):
        settings = self.settings.search_settings(
            directory, self.settings.space, self.images.image_shape[0], **self._cost()
        )
        if self._left() == math.inf or settings.epochs is not None:
            return settings
        logging.info("measuring the time of a step of the search")
        probe = planning.probe_search(settings, self.images)
        allowed = _SEARCH_SHARE * self._left()
        epochs = min(probe.epochs, probe.epochs_in(allowed))
        if epochs < _LEAST_SEARCH_EPOCHS:
            least = self._elapsed() + probe.seconds(_LEAST_SEARCH_EPOCHS) / _SEARCH_SHARE
            raise UserError(
                f"`time` must be at least {math.ceil(least / 60)}m, with which the search has "
                f"{_LEAST_SEARCH_EPOCHS * probe.steps_per_epoch} steps. "
                f"Received: time={self.settings.time}"
            )
        if epochs < probe.epochs:
            self._notes.append(
                f"search: {epochs * probe.steps_per_epoch:,} steps instead of "
                f"{probe.epochs * probe.steps_per_epoch:,}, for lack of time"
            )
        self.run.write_planned(self._name, self._notes)
        return dataclasses.replace(settings, epochs=epochs, steps_per_epoch=probe.steps_per_epoch)

    def _cost(self):
        """The settings of the search that state the target."""
        if self.target.kind == "macs":
            return {"cost": "macs", "target": self.target.value}
        if self.target.kind == "latency":
            table = str(self.run.latency_table.absolute())
            return {"cost": "latency", "target": self.target.value, "latency_table": table}
        params = measuring.params_for_bytes(self.settings, self.space, self.target, self.images)
        self._notes.append(f"search: {self.target} are about {params:,.0f} parameters")
        return {"cost": "params", "target": params}

    def _train(self):
        reserved = _EXPORT_SECONDS
        trainings = 1
        if self.settings.baseline:
            reserved += _BASELINE_SECONDS
            trainings = 2
        architecture = self.run.search.architecture_file.absolute()
        allowed = (self._left() - reserved) / trainings
        return self._train_network(self.run.training, architecture, allowed)

    def _train_network(self, run, architecture, allowed):
        """Trains a network in the seconds that are allowed."""
        settings = self._resumed(TrainSettings, run)
        if settings is None:
            settings = self.settings.train_settings(run.directory.absolute(), str(architecture))
            if allowed < math.inf and settings.epochs is None:
                settings = self._plan_training(settings, run.directory.name, allowed)
        return run_training(settings).summary["wall_seconds"]

    def _plan_training(self, settings, name, allowed):
        logging.info("measuring the time of a step of the training")
        started = time.monotonic()
        probe = planning.probe_training(settings, self.images)
        allowed -= time.monotonic() - started
        epochs = min(max(1, probe.epochs_in(allowed)), _MOST_EPOCHS * probe.epochs)
        if probe.epochs_in(allowed) < 1:
            self._notes.append(f"{name}: not even one epoch fits into the time")
        elif epochs < probe.epochs:
            self._notes.append(
                f"{name}: {epochs} epochs instead of {probe.epochs}, for lack of time"
            )
        elif epochs > probe.epochs:
            self._notes.append(
                f"{name}: {epochs} epochs instead of {probe.epochs}, since there is time"
            )
        self.run.write_planned(self._name, self._notes)
        return dataclasses.replace(settings, epochs=epochs)

    def _export(self):
        for quantize in ("none", "int8"):
            try:
                self._export_as(quantize)
            except UserError as error:
                if quantize == "none":
                    raise
                logging.warning("%s", error)
        exported = self.run.export_report("int8")
        if exported is None or _loses_too_much(exported):
            lost = "too much" if exported is None else f"{_lost(exported):.1%} of accuracy"
            self._notes.append(f"export: the int8 file loses {lost}; fine-tuned (qat)")
            try:
                self._export_as("qat")
            except UserError as error:
                self._notes.append(f"export: no qat file: {error}")

    def _export_as(self, quantize, run=None, name="model"):
        if self.run.export_report(quantize, name) is None:
            run_export(
                self.settings.export_settings(
                    model=str((run or self.run.training).model_file),
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
        trained = self.run.training.summary["wall_seconds"]
        allowed = math.inf
        if self._left() < math.inf:
            allowed = min(self._left() - _BASELINE_SECONDS, trained)
        whole = self._train_network(self.run.baseline, file.absolute(), allowed)
        try:
            self._export_as("int8", self.run.baseline, "baseline")
        except UserError as error:
            self._notes.append(f"baseline: no int8 file: {error}")
            self._export_as("none", self.run.baseline, "baseline")
        return whole

    def _scale_baseline(self):
        with measuring.NetworkCosts(self.settings, self.target.kind, self.images) as cost:
            return scale_published(
                _BASELINE,
                self.images.image_shape,
                len(self.images.class_names),
                self.target.value,
                stem_strides=2 if self.images.image_shape[0] > _LARGE else 1,
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
        if over > 1.02:
            notes.append(f"the file costs {over - 1:.0%} more than the target")
        # What earlier processes used.
        self.session.set_earlier_usage(
            {"wall_seconds": self._earlier, "cpu_seconds": self._earlier_cpu, "peak_memory_mb": 0}
        )
        images = self.images
        self.session.finish(
            data=self.settings.data,
            description=images.description,
            class_counts=dict(zip(images.class_names, np.bincount(images.y).tolist())),
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
        _write_report(self.run)

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
        }


# What a target limits, in the summary.
_MEASURED = {"macs": "macs", "latency": "milliseconds", "bytes": "bytes"}


def _lost(exported):
    return exported["keras_accuracy"] - exported["tflite_accuracy"]


def _loses_too_much(exported):
    """More than a point of accuracy, and more than a single image."""
    return _lost(exported) > max(_MOST_LOST, 1.5 / exported["test_images"])


def _cpu_seconds():
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _write_report(run):
    try:
        report.write_report(run.directory)
    except (UserError, OSError) as error:  # The files are there all the same.
        logging.warning("no report: %s", summarize_error(error))


def _build_and_print(settings):
    run = run_build(settings)
    print(_describe_result(run))


def _describe_result(run):
    summary = run.summary
    lines = ["", f"{run.path(summary['file'])}: {_describe_network(summary)}"]
    if summary["baseline"]:
        lines.append(f"{_BASELINE}, trained as long: {_describe_network(summary['baseline'])}")
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
        f"{format_cost('bytes', entry['bytes'])}, {format_cost('macs', entry['macs'])}"
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
