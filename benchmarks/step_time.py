"""How long a sample takes in the supernet, compared with the same network alone.

python benchmarks/step_time.py

* For 24 random architectures of each space: the weight half of a search step for one sample
  (forward, backward, accumulation) against a step of Keras' own `fit` on the plain network; and the
  forward passes of both.
* For some of them: a step of `fpnas train` against a step of Keras' own `fit`, and by how much the
  losses after 200 steps on the same batch differ. And a step with a teacher against one without:
  the teacher is the same network, or the largest one of the space.
* Whole search steps, with data, against their samples alone. The difference is Python, input,
  sampling, cost and updates.
* Ranking: seconds of a network on 5,000 images in the supernet, against a Keras model that is built
  for it, gets the shared weights, new statistics of its batch norms, and is evaluated; and seconds
  of each of 1,000 finalists, of which the best is chosen.
* Seconds from the command of the quickstart to its first search step, and of the whole command that
  writes an int8 file.

Times that are compared are measured in turn in one process. Finished rows are appended to --output.
A run that was interrupted continues from there.
"""

import dataclasses
import functools
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import harness
import keras
import numpy as np
import tensorflow as tf
from networks import largest_network

import fpnas_keras as fpnas
from fpnas_keras.commands import run_command
from fpnas_keras.cost import SpaceCost
from fpnas_keras.method import Samples
from fpnas_keras.networks import DistillationLoss, TaughtNetwork, build_for_training
from fpnas_keras.settings import setting

# Samples in a timed call: they share its overhead, as in a search step.
COPIES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTimeSettings(harness.SpeedSettings):
    """Settings of this benchmark."""

    SMOKE: ClassVar[Mapping[str, Any]] = {
        **harness.SpeedSettings.SMOKE,
        "architectures": 1,
        "trained_architectures": 1,
        "compared_steps": 3,
        "whole_steps": 1,
        "untimed_steps": 0,
        "ranked_networks": 1,
        "ranked_images": 20,
        "finalists": 2,
        "starts": 1,
        "quickstart_space": str(harness.SMALL_SPACE),
    }

    output: str = harness.output_setting("step_time.jsonl")
    architectures: int = setting("Random architectures of a space.", 24, least=1)
    trained_architectures: int = setting("Those of them that are trained.", 6, least=1)
    compared_steps: int = setting("Steps after which their losses are compared.", 200, least=3)
    whole_steps: int = setting("Timed steps of `fit`.", 40, least=1)
    untimed_steps: int = setting(
        "Steps of `fit` before those, in which most shapes are met.", 20, least=0
    )
    ranked_networks: int = setting("Networks that are ranked.", 16, least=1)
    ranked_images: int = setting("Images that they are ranked on.", 5000, least=2)
    finalists: int = setting("Finalists to choose from.", 1000, least=1)
    starts: int = setting("Runs of each command.", 3, least=1)
    quickstart_space: str = setting("Space of the quickstart.", "mobile_mini", path=True)


def samples(settings: StepTimeSettings, name: str) -> dict[str, list[float]]:
    """Seconds per sample of random architectures of a space, in the supernet and alone."""
    space, batch_size = settings.measured_space(name)
    search = fpnas.ArchitectureSearch(space)
    batch = harness.noise(space, batch_size, 0)
    train = harness.sample_steps(search, batch, COPIES)
    forward = tf.function(lambda choices: search.supernet(batch[0], choices))

    def repeated(run, *arguments):
        for _ in range(COPIES):
            np.asarray(run(*arguments))  # Waits for the end.

    rows = {}
    for entries, architecture in harness.draw_networks(search, settings.architectures):
        choices = tf.constant(space.entries.to_choices(entries.numpy()))
        model = architecture.build()
        keras_train = harness.keras_step(model, batch)
        keras_forward = tf.function(functools.partial(model, batch[0], training=True))
        runs = {
            "supernet": functools.partial(train, entries),
            "keras": functools.partial(repeated, keras_train),
            "supernet_forward": functools.partial(repeated, forward, choices),
            "keras_forward": functools.partial(repeated, keras_forward),
        }
        rows.setdefault("macs", []).append(architecture.macs())
        for key, seconds in harness.in_turn(runs, settings.repeats).items():
            rows.setdefault(key, []).append(seconds / COPIES)
        print(f"{len(rows['macs'])} of {settings.architectures}", file=sys.stderr, end="\r")
        keras.backend.clear_session()
    return rows


def training_steps(settings: StepTimeSettings, name: str) -> dict[str, list[float]]:
    """Seconds per training step of random architectures of a space, ours and Keras' own."""
    space, batch_size = settings.measured_space(name)
    search = fpnas.ArchitectureSearch(space)
    batch = harness.noise(space, batch_size, 0)
    rows = {}
    for _, architecture in harness.draw_networks(search, settings.trained_architectures):
        models = {"keras": architecture.build(), "ours": build_for_training(architecture)}
        models["ours"].set_weights(models["keras"].get_weights())
        steps = {key: harness.keras_step(model, batch) for key, model in models.items()}
        for key, seconds in harness.in_turn(steps, settings.repeats).items():
            rows.setdefault(key, []).append(seconds)
        rows.setdefault("macs", []).append(architecture.macs())
        done = settings.repeats + 1  # and an untimed one
        losses = [
            [float(step()) for _ in range(settings.compared_steps - done)][-1]
            for step in steps.values()
        ]
        rows.setdefault("losses", []).append(losses)
        keras.backend.clear_session()
    return rows


def taught_steps(settings: StepTimeSettings, name: str) -> dict[str, list[float]]:
    """Seconds per training step of random architectures, without and with a teacher."""
    space, batch_size = settings.measured_space(name)
    search = fpnas.ArchitectureSearch(space)
    x, y = harness.noise(space, batch_size, 0)
    batch = x, tf.one_hot(y, space.num_classes)
    plain = keras.losses.CategoricalCrossentropy(from_logits=True)
    loss = DistillationLoss(temperature=3.0, distillation_weight=0.5, label_smoothing=0.0)
    largest = largest_network(space)
    rows = {}
    for _, architecture in harness.draw_networks(search, settings.trained_architectures):
        network = build_for_training(architecture)
        models = {"plain": network}
        for key, teacher in {"by_itself": architecture, "by_largest": largest}.items():
            models[key] = TaughtNetwork(build_for_training(architecture), teacher.build())
        steps = {
            key: harness.keras_step(model, batch, plain if key == "plain" else loss)
            for key, model in models.items()
        }
        for key, seconds in harness.in_turn(steps, settings.repeats).items():
            rows.setdefault(key, []).append(seconds)
        rows.setdefault("macs", []).append(architecture.macs())
        rows.setdefault("largest_macs", []).append(largest.macs())
        keras.backend.clear_session()
    return rows


def ranking(settings: StepTimeSettings) -> dict[str, float]:
    """Seconds per network: ranked in the supernet, ranked as models, as one of many finalists."""
    space, _ = settings.measured_space(settings.spaces[0])
    search = fpnas.ArchitectureSearch(space)
    count = 2 * settings.ranked_images  # Half of them are the architecture part.
    x = np.random.default_rng(0).integers(0, 256, (count, *space.input_shape), np.uint8)
    names = tuple(map(str, range(space.num_classes)))
    y = np.arange(count, dtype=np.int32) % space.num_classes
    images = fpnas.data.Images(x, y, names, space.input_shape)
    evaluation = fpnas.runs.Evaluation(search, images, 0.5, settings.ranked_images)
    networks = harness.draw_networks(search, settings.ranked_networks)
    entries = np.stack([each.numpy() for each, _ in networks])
    evaluation(entries[:1], 0, 1)  # It traces.

    def build_each():
        for _, architecture in networks:
            model = architecture.build()
            search.supernet.give_weights(model)
            fpnas.networks.recalibrate(
                model, (tf.cast(x, tf.float32) for x, _ in evaluation.batches)
            )
            for batch, _ in evaluation.batches:
                model.predict_on_batch(batch)
            keras.backend.clear_session()

    runs = {"supernet": lambda: evaluation(entries), "models": build_each}
    seconds = harness.timed_in_turn(runs, repeats=1, untimed=0)
    row = {key: each / len(networks) for key, (each,) in seconds.items()}
    finalists = search.finalists(settings.finalists, None)
    (row["finalists"],) = harness.timed_in_turn(
        {"": lambda: fpnas.runs.rank_finalists(evaluation, finalists)}, repeats=1, untimed=0
    )[""]
    row["finalists"] /= len(finalists)
    return row


def int8_export(settings: StepTimeSettings) -> dict[str, list[float]]:
    """Seconds of the command that writes an int8 file of a network."""
    space = fpnas.spaces.get(settings.quickstart_space, (28, 28, 1), 10)
    search = fpnas.ArchitectureSearch(space)
    ((_, architecture),) = harness.draw_networks(search, 1)
    seconds = []
    with tempfile.TemporaryDirectory() as directory:
        model = f"{directory}/model.keras"
        architecture.build().save(model)
        architecture.save(f"{directory}/architecture.json")
        command = [*(sys.executable, "-m", "export.tflite", "--quantize=int8", "--data=digits")]
        # It is not trained, so its classes are chance.
        command += [f"--model={model}", "--overwrite", "--min_agreement=0", "--max_accuracy_drop=1"]
        for _ in range(settings.starts):
            begin = time.perf_counter()
            subprocess.run(command, cwd=harness.ROOT, check=True, capture_output=True)
            seconds.append(time.perf_counter() - begin)
    return {"seconds": seconds}


def whole_steps(settings: StepTimeSettings, name: str) -> dict[str, list[float]]:
    """Seconds of steps of `fit` with 8 samples, and of the same samples alone."""
    keras.utils.set_random_seed(0)
    space, batch_size = settings.measured_space(name)
    x = np.random.default_rng(0).integers(0, 256, (2000, *space.input_shape), np.uint8)
    macs = SpaceCost(space, fpnas.MacsCost())
    cost = fpnas.MacsCost((macs.least() + macs.largest()) / 2)
    search = fpnas.ArchitectureSearch(space, samples=8, cost=cost, warmup_steps=0)
    # Without updates both run the same architectures.
    search.compile(keras.optimizers.SGD(0.0, momentum=0.9), keras.optimizers.Adam(0.0))
    batches = fpnas.data.search_batches(x, np.arange(len(x)) % 10, batch_size, steps_per_epoch=1000)
    search.make_train_function()
    iterator = iter(batches)
    data = next(iterator)
    drawn = []

    @tf.function
    def samples_alone(entries, counts):
        drawn = Samples(entries, counts)
        gradients, results = search.weight_gradients(drawn, data[0])
        return [*gradients, results, search.evaluate_samples(drawn, data[1])]

    def alone():
        return samples_alone(*drawn[-1])[-1].numpy()

    def step():
        return search.train_function(iterator)["train_loss"].numpy()

    rows = {"step": [], "samples": []}
    for repeat in range(settings.untimed_steps + settings.whole_steps):
        drawn.append(search.ask())  # The same samples as the step draws.
        seconds = harness.timed_in_turn({"step": step, "samples": alone}, repeats=1, untimed=0)
        if repeat >= settings.untimed_steps:
            for key, (value,) in seconds.items():
                rows[key].append(value)
    return rows


def start(settings: StepTimeSettings) -> dict[str, list[float]]:
    """Seconds from the command of the quickstart to the end of its first step."""
    seconds = []
    for _ in range(settings.starts):
        with tempfile.TemporaryDirectory() as directory:
            begin = time.perf_counter()
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "fpnas_keras.search"),
                    *("--flagfile=configs/quickstart.flags", f"--output_dir={directory}/run"),
                    *(f"--space={settings.quickstart_space}", "--warmup_steps=0"),
                    "--steps_per_epoch=1",  # The line of the first epoch then follows its one step.
                ],
                cwd=harness.ROOT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            seen = b""
            while b"epoch 1 of" not in seen:
                chunk = process.stderr.read1()
                if not chunk:
                    raise RuntimeError(f"the search ended before its first step: {seen.decode()}")
                seen += chunk
            seconds.append(time.perf_counter() - begin)
            process.kill()
            process.wait()
    return {"seconds": seconds}


def report(settings: StepTimeSettings, rows: dict[str, harness.Row]) -> None:
    """Prints the ratios."""
    print("\n| | median | quartiles | range |\n|---|---|---|---|")

    def line(title, values):
        least, low, median, high, most = np.percentile(values, [0, 25, 50, 75, 100])
        spread = f"{low:.3f} to {high:.3f} | {least:.3f} to {most:.3f}"
        print(f"| {title} | {median:.3f} | {spread} |")

    for name in settings.spaces:
        row = rows[f"samples of {name}"]
        line(f"sample / Keras step, `{name}`", np.divide(row["supernet"], row["keras"]))
        ratios = np.divide(row["supernet_forward"], row["keras_forward"])
        line(f"forward / Keras forward, `{name}`", ratios)
        row = rows[f"trainings of {name}"]
        line(f"training step / Keras step, `{name}`", np.divide(row["ours"], row["keras"]))
        ours, theirs = np.transpose(row["losses"])
        line(f"difference of the losses, `{name}`", np.abs(ours - theirs))
        row = rows[f"distillations of {name}"]
        line(
            f"step with itself as teacher / plain, `{name}`",
            np.divide(row["by_itself"], row["plain"]),
        )
        line(
            f"with the largest as teacher / plain, `{name}`",
            np.divide(row["by_largest"], row["plain"]),
        )
        row = rows[f"steps of {name}"]
        line(f"share outside the samples, `{name}`", 1 - np.divide(row["samples"], row["step"]))
    line("seconds to the first step of the quickstart", rows["start"]["seconds"])
    line("seconds of an int8 export", rows["int8 export"]["seconds"])
    kinds = {"supernet": "in the supernet", "models": "as a model", "finalists": "as a finalist"}
    for key, kind in kinds.items():
        line(f"seconds of a network of `{settings.spaces[0]}`, ranked {kind}", rows["ranking"][key])


def run(settings: StepTimeSettings) -> None:
    """Runs the jobs that have no row yet, and reports."""
    jobs = {
        f"{kind} of {name}": functools.partial(function, settings, name)
        for kind, function in (
            ("samples", samples),
            ("trainings", training_steps),
            ("distillations", taught_steps),
            ("steps", whole_steps),
        )
        for name in settings.spaces
    }
    jobs["ranking"] = functools.partial(ranking, settings)
    jobs["start"] = functools.partial(start, settings)
    jobs["int8 export"] = functools.partial(int8_export, settings)
    harness.run_jobs(__file__, settings, jobs, functools.partial(report, settings))


COMMAND = harness.make_command(__file__, __doc__, StepTimeSettings, run)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
