"""Searches of Fashion-MNIST side by side, and how much a search's luck decides.

python benchmarks/fashion_mnist.py --data_dir=DATA

Short protocol: 10,000 training images, networks of at most 1.5M MACs, 1,500 search steps,
20 epochs of training. PARSEC, FP-NAS factorized and FP-NAS coarse-to-fine search with 3 seeds;
the searches of one of them with 5 seeds are trained from scratch, and the first of
their networks is trained with 5 seeds. One job runs on each core. Rows are appended to --output as
jobs finish; a run that was cut goes on from there.
"""

import statistics

import harness

TARGET = 1_500_000
SEARCH = (
    "--space=mobile_mini",
    "--input_size=28",
    "--cost=macs",
    f"--target={TARGET}",
    "--epochs=15",
    "--steps_per_epoch=100",
    "--architecture_learning_rate=0.03",
)
METHODS = {
    "factorized": (),
    "coarse to fine": ("--distribution=coarse_to_fine",),
    "PARSEC": (
        "--distribution=joint",
        "--samples=16",
        "--nocontrol_variate",
        "--nostratified",
        "--nodeduplicate",
    ),
}
SEEDS = 3
RELIABLE, RELIABLE_SEEDS = "factorized", 5


def phases(runs: harness.Runs) -> list[dict[str, list[str]]]:
    """Commands by name; those of a phase need nothing but earlier phases."""

    def search(method, seed):
        arguments = [*harness.FASHION_MNIST, *SEARCH, *METHODS[method], f"--seed={seed}"]
        return {f"search {method} {seed}": ["fpnas_keras.search", *arguments]}

    def train(name, searched, seed):
        architecture = runs.directory(f"search {RELIABLE} {searched}") / "architecture.json"
        arguments = [f"--architecture={architecture}", "--epochs=20", f"--seed={seed}"]
        return {name: ["fpnas_keras.train", *harness.FASHION_MNIST, *arguments]}

    reliable, trained, others = {}, {}, {}
    for seed in range(RELIABLE_SEEDS):
        reliable |= search(RELIABLE, seed)
        trained |= train(f"train result {seed}", seed, 0)
    for seed in range(1, RELIABLE_SEEDS):
        trained |= train(f"train again {seed}", 0, seed)
    for method in METHODS:
        for seed in range(SEEDS):
            others |= search(method, seed)
    return [reliable, trained, others]


def report(rows: dict[str, dict]) -> None:
    """Prints the tables of the jobs that are finished."""
    columns = "samples | evaluated | s | CPU s | loss of the mode | its MACs | MACs | of target"
    print(f"\n| search | {columns} |\n{'|---' * 9}|")
    for name, row in rows.items():
        if name.startswith("search"):
            values = [f"{row[key]:,}" for key in ("total_samples", "total_evaluated")]
            values += [f"{row[key]:.0f}" for key in ("wall_seconds", "cpu_seconds")]
            values += [f"{row['mode_validation_loss']:.3f}"]
            values += [f"{row['mode_macs']:,}", f"{row['macs']:,}", f"{row['macs'] / TARGET:.1%}"]
            print(f"| {name.removeprefix('search ')} | {' | '.join(values)} |")
    results = [rows.get(f"train result {seed}") for seed in range(RELIABLE_SEEDS)]
    again = [results[0]] + [rows.get(f"train again {seed}") for seed in range(1, RELIABLE_SEEDS)]
    print("\n| trained from scratch | accuracies | mean | standard deviation |\n|---|---|---|---|")
    for name, trained in (("results of 5 searches", results), ("one network, 5 seeds", again)):
        accuracies = [100 * row["test_accuracy"] for row in trained if row]
        if len(accuracies) > 1:
            listed = " ".join(f"{value:.2f}" for value in accuracies)
            mean, spread = statistics.mean(accuracies), statistics.stdev(accuracies)
            print(f"| {name} | {listed} | {mean:.2f} | {spread:.2f} |")


if __name__ == "__main__":
    harness.run_phases(__file__, phases, report)
