"""Draws the course of a search as the README shows it.

python benchmarks/plot_search.py --run=runs/fashion_mnist --output=docs/fashion_mnist.png
"""

import csv
import json
import pathlib

import matplotlib.pyplot as plt
from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_string("run", None, "Run directory of a finished search.", required=True)
flags.DEFINE_string("output", None, "Picture to write (.png).", required=True)


def main(_: list[str]) -> None:
    """Reads `metrics.csv` and `summary.json` and writes the picture."""
    run = pathlib.Path(FLAGS.run)
    summary = json.loads((run / "summary.json").read_text())
    with (run / "metrics.csv").open() as file:
        rows = [{k: v for k, v in row.items() if k != "phase"} for row in csv.DictReader(file)]
    metrics = {name: [float(row[name]) for row in rows] for name in rows[0]}
    steps = metrics["step"]

    _, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    left.plot(steps, metrics["entropy"], color="tab:blue")
    left.set(title="entropy and samples", xlabel="step", ylabel="entropy (nats)", ylim=(0, None))
    left.yaxis.label.set_color("tab:blue")
    samples = left.twinx()
    samples.plot(steps, metrics["samples"], color="tab:orange")
    samples.set(ylabel="samples a step (K)", ylim=(0, None))
    samples.yaxis.label.set_color("tab:orange")

    cost, unit = ("params", "parameters") if summary["cost"] == "params" else ("macs", "MACs")
    middle.plot(steps, [value / 1e6 for value in metrics["expected_cost"]], label="expected")
    middle.axhline(summary[cost] / 1e6, color="tab:green", ls=":", label="derived network")
    if summary["target"] is not None:
        middle.axhline(summary["target"] / 1e6, color="tab:red", ls="--", label="target")
    middle.set(title="cost", xlabel="step", ylabel=f"million {unit}", ylim=(0, None))
    middle.legend()

    right.plot(steps, metrics["train_loss"], label="weights part")
    right.plot(steps, metrics["validation_loss"], label="architecture part")
    right.set(title="loss, mean of the samples", xlabel="step", ylim=(0, None))
    right.legend()
    plt.savefig(FLAGS.output, dpi=100)


if __name__ == "__main__":
    app.run(main)
