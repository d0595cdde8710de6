"""Three searches on the same space, data, batches, steps and target: PARSEC, DMaskingNAS, ours.

python benchmarks/baselines.py --data_dir=DATA

Short protocol: 10,000 training images of Fashion-MNIST, `mobile_mini`, 1,000 search steps with a
target of 1.5M MACs, 3 seeds; each result trained from scratch for 20 epochs with the same recipe.
One job runs on each core. Rows are appended to --output as jobs finish; a run that was cut goes on
from there.
"""

import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time

import harness
import keras
from absl import app, flags
from dmasking import DMaskingNAS

import fpnas_keras as fpnas
from fpnas_keras import cli

FLAGS = flags.FLAGS
flags.DEFINE_string("work_dir", "runs/benchmark_baselines", "Folder of the run directories.")
flags.DEFINE_string("output", "benchmarks/baselines.jsonl", "File of the finished rows.")
flags.DEFINE_enum("method", None, ["PARSEC", "DMaskingNAS", "ours"], "Search with this alone.")
flags.DEFINE_integer("seed", 0, "Seed of that search.")
flags.DEFINE_integer("steps", 1000, "Steps of a search.")

TARGET, BATCH, EPOCHS, SEEDS = 1_500_000, 64, 20, 3
METHODS = ("ours", "DMaskingNAS", "PARSEC")


def make(method: str, space: fpnas.spaces.Space, seed: int) -> fpnas.ArchitectureSearch:
    """The search of a method; cost, target, controller and warm-up are the same for all."""
    warmup = FLAGS.steps // 5
    settings = {
        "cost": fpnas.MacsCost(TARGET),
        "cost_coefficient": fpnas.CostController(anneal_steps=(FLAGS.steps - warmup) // 3),
        "warmup_steps": warmup,
        "seed": seed,
    }
    if method == "DMaskingNAS":
        return DMaskingNAS(space, FLAGS.steps, **settings)
    if method == "PARSEC":
        settings |= {"samples": 16, "distribution": "joint", "control_variate": False}
        settings |= {"stratified": False, "deduplicate": False}
    return fpnas.ArchitectureSearch(space, **settings)


def search(method: str, seed: int) -> dict[str, float]:
    """Searches, and saves what was found."""
    keras.utils.set_random_seed(seed)
    images = cli.load_data("train", 28)
    space = fpnas.spaces.get("mobile_mini", images.image_shape, len(images.class_names))
    batches = fpnas.data.search_batches(images.x, images.y, BATCH, seed, FLAGS.steps // EPOCHS)
    search = make(method, space, seed)
    search.compile(
        keras.optimizers.SGD(
            keras.optimizers.schedules.CosineDecay(0.1, FLAGS.steps), momentum=0.9, nesterov=True
        ),
        keras.optimizers.Adam(0.03),
    )
    start, cpu_start = time.perf_counter(), time.process_time()
    history = search.fit(batches, epochs=EPOCHS, verbose=2).history
    seconds = time.perf_counter() - start
    found = search.derivation(least_share=0.95).architecture
    found.save(directory(f"search {method} {seed}").with_suffix(".json"))
    return {
        "seconds": seconds,
        "samples": int(search.total_samples.numpy()),
        "evaluated": int(search.total_evaluated.numpy()),
        "cpu_seconds": time.process_time() - cpu_start,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "entropy": float(search.distribution.entropy()),
        "expected_cost": history["expected_cost"][-1],
        "macs": found.macs(),
    }


def directory(name: str) -> pathlib.Path:
    """Run directory of a job."""
    return pathlib.Path(FLAGS.work_dir).absolute() / name.replace(" ", "_")


def jobs() -> list[dict[str, list[str]]]:
    """Commands by name; those of a phase need nothing but earlier phases."""
    data_dir = f"--data_dir={pathlib.Path(FLAGS.data_dir).absolute()}"
    searches, trainings = {}, {}
    for seed in range(SEEDS):
        for method in METHODS:
            searches[f"search {method} {seed}"] = [
                *(__file__, *harness.FASHION_MNIST, data_dir, f"--work_dir={FLAGS.work_dir}"),
                *(f"--method={method}", f"--seed={seed}", f"--steps={FLAGS.steps}"),
            ]
            architecture = directory(f"search {method} {seed}").with_suffix(".json")
            trainings[f"train {method} {seed}"] = [
                *("-m", "fpnas_keras.train", *harness.FASHION_MNIST, data_dir),
                f"--architecture={architecture}",
                *(f"--epochs={EPOCHS}", f"--output_dir={directory(f'train {method} {seed}')}"),
            ]
    for seed in range(1, SEEDS):  # the noise of one training
        command = trainings[f"train ours {seed}"]
        architecture = directory("search ours 0").with_suffix(".json")
        output = directory(f"train again {seed}")
        trainings[f"train again {seed}"] = [
            *command[:-3],
            *(f"--architecture={architecture}", f"--epochs={EPOCHS}"),
            *(f"--seed={seed}", f"--output_dir={output}"),
        ]
    return [searches, trainings]


def run(name: str, command: list[str], core: int) -> dict:
    """Runs one job on one core; its row."""
    log = directory(name).with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=file, text=True
        )
        os.sched_setaffinity(process.pid, {core})
        out, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed; see {log}")
    if name.startswith("search"):
        return json.loads(out.splitlines()[-1])
    return json.loads((directory(name) / "summary.json").read_text())


def report(rows: dict[str, dict]) -> None:
    """Prints the table of the jobs that are finished."""
    columns = "seconds | CPU seconds | to ours | peak MB | samples | MACs | accuracy, % | mean"
    print(f"\n| | {columns} |\n{'|---' * 9}|")
    median = {}
    for method in METHODS:
        names = [f"search {method} {seed}" for seed in range(SEEDS)]
        done = [rows[name] for name in names if name in rows]
        if not done:
            continue
        median[method] = statistics.median(row["cpu_seconds"] for row in done)
        trained = [rows.get(name.replace("search", "train")) for name in names]
        accuracies = [100 * row["test_accuracy"] for row in trained if row]
        cells = [" ".join(f"{row[key]:.0f}" for row in done) for key in ("seconds", "cpu_seconds")]
        cells += [f"{median[method] / median['ours']:.2f}"]
        for key in ("peak_memory_mb", "samples"):
            cells += [" ".join(f"{row[key]:,}" for row in done)]
        cells += [" ".join(f"{row['macs'] / 1e6:.2f}M" for row in done)]
        cells += [" ".join(f"{value:.2f}" for value in accuracies)]
        cells += [f"{statistics.mean(accuracies):.2f}" if accuracies else ""]
        print(f"| {method} | {' | '.join(cells)} |")
    again = [rows.get("train ours 0")] + [rows.get(f"train again {i}") for i in range(1, SEEDS)]
    listed = " ".join(f"{100 * row['test_accuracy']:.2f}" for row in again if row)
    print(f"\none network (ours, seed 0) trained with {SEEDS} seeds: {listed}")


def main(_: list[str]) -> None:
    """Runs what is not yet in the output, one job a core."""
    if FLAGS.method:
        print(json.dumps(search(FLAGS.method, FLAGS.seed)))
        return
    pathlib.Path(FLAGS.work_dir).mkdir(parents=True, exist_ok=True)
    report(harness.on_cores(jobs(), run, FLAGS.output))


if __name__ == "__main__":
    app.run(main)
