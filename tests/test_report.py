"""The report of a search, of run directories that are written here by hand."""

import csv
import html
import json
import re
import shlex
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from helpers import ROOT, make_tiny_space, write_latency_table
from matplotlib.figure import Figure

from fpnas_keras.cost import LatencyCost, MacsCost, format_cost
from fpnas_keras.report import write_report, writer
from fpnas_keras.runs import SearchRun, TrainingRun

SPACE = make_tiny_space()
ARCHITECTURE = SPACE.architecture(np.array([block.entries[-1] for block in SPACE.blocks]))
PLOTS = {"entropy", "cost", "loss", "probabilities", "pareto"}
FLAGS = {"space": "tiny", "data": "digits", "cost": "macs", "target": "2e6", "epochs": "3"}
METRICS = {
    "phase": "factorized",
    "samples": 4.5,
    "train_loss": 2.25,
    "train_accuracy": 0.5,
    "validation_loss": 2.5,
    "validation_accuracy": 0.4,
    "entropy": 12.5,
    "evaluated": 4.0,
    "expected_cost": 2_345_678.9,
    "cost_coefficient": -0.1,
    "seconds": 75.5,
}
SUMMARY = {
    "space": "tiny",
    "num_architectures": 2 * 10**65,
    "input_shape": [8, 8, 1],
    "seed": 0,
    "steps": 1_234,
    "total_samples": 5_678,
    "total_evaluated": 4_321,
    "cost": "macs",
    "target": 2e6,
    "found_cost": 1_912_345.0,
    "macs": 1_912_345,
    "params": 76_543,
    "wall_seconds": 3_725.0,
    "cpu_seconds": 90.2,
    "peak_memory_mb": 1_650,
    "versions": {"keras": "3.15.1"},
}
OPERATION = "kernel_size=3, expansion=6"
BLOCKS = [
    {"filters": {"12": 0.25, "16": 0.75}, "activation": {"relu": 0.5, "hard_silu": 0.5}},
    {},
    {"operation": {"skip=True": 0.1, OPERATION: 0.9}},
]


def network(name, rank, **changes):
    one = {"name": name, "rank": rank, "accuracy": 0.9125, "loss": 0.31, "cost": 1.48e6}
    one |= {"macs": 1_480_001, "params": 60_001, "log_prob": -12.25, "pareto": rank < 3}
    return one | {"architecture": ARCHITECTURE.to_dict()} | changes


RANKING = {
    "format": 1,
    "images": 5_000,
    "cost_unit": "MACs",
    "architectures": [
        network("derived", 2),
        network("sample 3", 1, accuracy=0.93, cost=1.9e6),
        network("configs/other.json", 3, log_prob=None),
    ],
}


def write_flags(directory, **changes):
    lines = [f"--{name}={value}" for name, value in (FLAGS | changes).items() if value is not None]
    (directory / "flags.txt").write_text(
        "\n".join([*lines, "--nostratified", "--two_sided"]) + "\n"
    )


def write_metrics(directory, epochs=3, **changes):
    phases = ["warm_up", "factorized", "joint"]
    with (directory / "metrics.csv").open("w", newline="") as file:
        columns = ("step", "epoch", "total_samples", *METRICS)
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for epoch in range(epochs):
            row = METRICS | {"step": 100 * epoch + 100, "epoch": epoch + 1, "total_samples": 987}
            row["phase"] = phases[min(epoch, 2)]
            writer.writerow(row | changes)


def write_probabilities(directory, epochs=3, blocks=BLOCKS):
    rows = [{"step": 100 * n + 100, "epoch": n + 1, "blocks": blocks} for n in range(epochs)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "probabilities.jsonl").write_text(text)


def write_run(directory):
    """A finished run that has everything."""
    write_flags(directory)
    write_metrics(directory)
    write_probabilities(directory)
    ARCHITECTURE.save(directory / "architecture.json")
    (directory / "summary.json").write_text(json.dumps(SUMMARY))
    (directory / "ranking.json").write_text(json.dumps(RANKING))
    return directory


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path)


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A run with its report, not to be changed."""
    directory = write_run(tmp_path_factory.mktemp("reported"))
    return directory, page(directory)


@pytest.fixture
def undrawn(monkeypatch):
    """Empty plots, where a test is about the text of the page: drawing takes a second."""
    plots = writer.available_plots

    def blank(search, theme):
        return Figure((1, 1))

    monkeypatch.setattr(
        writer, "available_plots", lambda search: dict.fromkeys(plots(search), blank)
    )


@pytest.fixture
def unfinished(tmp_path):
    """A run whose first epoch has ended, without a target."""
    write_flags(tmp_path, cost="none", target=None)
    write_metrics(tmp_path, epochs=1)
    return tmp_path


def page(directory):
    path = write_report(directory)
    assert path == directory / "report.html"
    return path.read_text(encoding="utf-8")


def words(page):
    """What a reader sees, without the pictures."""
    seen = html.unescape(re.sub(r"<[^>]*>", " ", page)).replace("\u00d7", "x")
    return re.sub(r"\s+", " ", seen)


def pictures(directory):
    return {path.stem for path in (directory / "report").iterdir() if path.suffix == ".png"}


def test_everything_is_in_the_page(reported):
    seen = words(reported[1])
    for total in ("1,912,345 MACs", "95.6% of the target 2,000,000", "5,678", "4,321 evaluated"):
        assert total in seen
    for total in ("1,234", "3 of 3 epochs", "1 h 2 min", "1 min 30 s", "1.6 GB", "76,543"):
        assert total in seen
    assert "2.0e65" in seen and "8 x 8 x 1" in seen and "keras 3.15.1" in seen
    assert "warm-up to step 100, factorized to step 200, joint to step 300." in seen
    for word in ("The warm-up trains", "In the factorized phase", "In the joint phase"):
        assert word in seen
    for word in ("Its unit is the nat", "Beta is the weight", "K is the number"):
        assert seen.count(word) == 1
    for choice in ("16: 75.0%, 12: 25.0%", "relu: 50.0%", "hard_silu: 50.0%"):
        assert choice in seen
    assert f"block 2 operation {OPERATION}: 90.0%, skip=True: 10.0%" in seen
    assert "3 networks" in seen and "5,000 images" in seen
    assert "1 sample 3 93.00% 0.3100 1,900,000 1,480,001 60,001 -12.25 yes" in seen
    assert "3 configs/other.json 91.25%" in seen
    assert "stratified false" in seen and "two_sided true" in seen
    assert "Not on this page" not in seen and "not finished" not in seen


def test_network_from_image_to_classes(reported):
    seen = words(reported[1])
    costs = [MacsCost()(part) for part in ARCHITECTURE.parts()]
    assert f"costs {format_cost(sum(costs))} MACs in total" in seen
    places = [
        seen.index(f"{format_cost(cost)} MACs {cost / sum(costs):.1%}") for cost in costs if cost
    ]
    assert places == sorted(places)
    drawn = seen[seen.index("MACs in total") :]
    for index, block in enumerate(ARCHITECTURE.blocks):
        first = re.search(rf"block {index} (\w+)", drawn)[1]
        assert first == ("skipped" if block.skip else f"{block.kernel_size}x{block.kernel_size}")
    assert "8 x 8 x 1 stem 3x3 convolution, hard_silu" in drawn
    assert "average pooling, dense layer of 8 units" in seen and "3 classes" in seen


def test_pictures(reported):
    run, _ = reported
    assert pictures(run) == PLOTS
    for name in PLOTS:
        content = (run / "report" / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 5_000
    assert {path.name for path in (run / "report").iterdir()} == {f"{name}.png" for name in PLOTS}


def test_page_needs_nothing_else(reported):
    source = reported[1]
    references = re.findall(r"""(?:src|href|srcset)=["']?([^"' >]*)|url\(([^)]*)\)""", source)
    assert len(references) > 2 * len(PLOTS)
    for reference in ("".join(each) for each in references):
        assert reference.startswith(("data:", "#"))
    assert "http:" not in source and "https:" not in source and "<script" not in source
    # Each picture once for light and once for dark pages, with what it shows in words.
    assert (
        source.count("<picture>") == source.count("(prefers-color-scheme: dark)") - 1 == len(PLOTS)
    )
    assert len(re.findall(r'<img [^>]*alt="[^"]{20,}"', source)) == len(PLOTS)
    assert source.count("<th ") == len(re.findall(r'<th scope="(?:col|row)">', source))


def test_what_files_hold_is_text(run):
    evil = '<script>alert("$x$")</script>&'
    write_flags(run, space=f"{evil}.json", data=evil, comment=evil)
    write_probabilities(run, blocks=[{evil: {evil: 0.5, "b": 0.5}}])
    (run / "summary.json").write_text(json.dumps(SUMMARY | {"space": evil, evil: evil}))
    (run / "ranking.json").write_text(json.dumps(RANKING | {"architectures": [network(evil, 1)]}))
    source = page(run)
    assert "<script" not in source
    assert words(source).count(evil) >= 8


def test_unfinished_run_of_one_epoch(unfinished, undrawn):
    seen = words(page(unfinished))
    assert "search is not finished" in seen and "accuracy against cost (no ranking.json)" in seen
    assert (
        "1 of 3 epochs" in seen
        and "2,345,679 MACs" in seen
        and "no target" in seen
        and "Beta" not in seen
    )
    assert "1 min 16 s" in seen
    assert pictures(unfinished) == {"entropy", "cost", "loss"}


def test_one_epoch_of_everything(run):
    write_metrics(run, epochs=1)
    write_probabilities(run, epochs=1)
    (run / "ranking.json").write_text(
        json.dumps(RANKING | {"architectures": [network("derived", 1)]})
    )
    page(run)
    assert pictures(run) == PLOTS


@pytest.mark.parametrize("missing", ["ranking.json", "probabilities.jsonl", "architecture.json"])
def test_missing_file_is_left_out(run, missing, undrawn):
    (run / missing).unlink()
    assert f"(no {missing})." in words(page(run))


def test_nothing_to_choose_and_nothing_ranked(run):
    write_probabilities(run, blocks=[{}, {}])
    (run / "ranking.json").write_text(json.dumps(RANKING | {"architectures": []}))
    page(run)
    assert pictures(run) == {"entropy", "cost", "loss"}


def test_half_a_character(run):
    write_probabilities(run, blocks=[{"filters": {"\ud800": 1.0}}])
    assert "?: 100.0%" in words(page(run))


def test_diverged_search(run):
    write_metrics(run, entropy=float("nan"), train_loss=float("inf"))
    write_probabilities(run, blocks=[{"filters": {"12": float("nan"), "16": float("nan")}}])
    assert "nan" in words(page(run))


def test_latency_run(run, undrawn):
    table = write_latency_table(run / "latency_table.json", SPACE, lambda part: 0.125)
    write_flags(run, cost="latency", target="1.5", latency_table="somewhere/phone.json")
    summary = SUMMARY | {"cost": "latency", "found_cost": 1.25}
    (run / "summary.json").write_text(json.dumps(summary))
    seen = words(page(run))
    total = sum(map(LatencyCost(table), ARCHITECTURE.parts()))
    assert "1.25 ms 83.3% of the target 1.5" in seen
    assert f"{format_cost(total)} ms in total" in seen and "0.125 ms" in seen
    table.unlink()
    seen = words(page(run))
    assert f"{ARCHITECTURE.macs():,} MACs in total" in seen
    assert "with its MACs: the run's latency_table.json is gone" in seen


def test_the_command_that_trains_mirrors_images_with_color(run):
    command = "python -m fpnas_keras.train --architecture=a.json --data=x"
    assert SearchRun(run).train_command("a.json", "--data=x", "b c").startswith(command)
    for shape, flip, expected in (
        ((8, 8, 3), None, 1),
        ((8, 8, 3), "true", 1),
        ((8, 8, 1), None, 0),
    ):
        ARCHITECTURE.fit_to(shape, 3).save(run / "architecture.json")
        write_flags(run, random_flip=flip, batch_size=8)
        arguments = shlex.split(SearchRun(run).train_command("a.json", "--data=x", "b c"))
        assert arguments.count("--random_flip") == expected
        assert {"--batch_size=8", "--output_dir=b c"} <= set(arguments)
        assert SearchRun(run).may_be_mirrored == (expected == 1 and flip is None)


def test_latency_table_of_another_space(run, undrawn):
    other = make_tiny_space(input_shape=(16, 16, 1))
    write_latency_table(run / "latency_table.json", other, lambda part: 0.125)
    write_flags(run, cost="latency", target="1.5", latency_table="phone.json")
    with pytest.raises(ValueError, match=r"architecture.json .* latency table lacks"):
        write_report(run)


def test_parameters_run(run, undrawn):
    write_flags(run, cost="params")
    assert f"{ARCHITECTURE.params():,} parameters in total" in words(page(run))


def test_same_files_same_bytes(reported, run):
    settings = dict(matplotlib.rcParams)
    assert page(run).replace(run.name, "") == reported[1].replace(reported[0].name, "")
    for name in (f"report/{plot}.png" for plot in PLOTS):
        assert (run / name).read_bytes() == (reported[0] / name).read_bytes()
    assert dict(matplotlib.rcParams) == settings


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("flags.txt", b"--space=tiny\n", "lacks --data"),
        ("flags.txt", b"\xff\xfe", "UTF-8"),
        ("flags.txt", b"--space=a\n--data=b\n--cost=c\n--epochs=3\n", "--cost"),
        ("flags.txt", b"--space=a\n--data=b\n--cost=none\n--epochs=x\n", "--epochs=x"),
        (
            "flags.txt",
            b"--space=a\n--data=b\n--cost=macs\n--epochs=3\n--target=-1\n",
            "--target=-1",
        ),
        ("metrics.csv", b"", "no epoch has ended"),
        ("metrics.csv", b"epoch,loss\n1,2\n", "lacks the columns step"),
        ("metrics.csv", b"\xff\xfe", "UTF-8|utf-8"),
        ("probabilities.jsonl", b"{\n", "line 1"),
        ("probabilities.jsonl", b"[" * 100_000, "line 1"),
        ("probabilities.jsonl", b'{"step": 1, "blocks": []}\n', "lacks the key `epoch`"),
        ("probabilities.jsonl", b'{"step": 1, "epoch": 1, "blocks": [1]}\n', "Received: 1"),
        (
            "probabilities.jsonl",
            b'{"step": 1, "epoch": 1, "blocks": [{"skip": {"true": 2}}]}\n',
            "from 0 to 1. Received: 2",
        ),
        (
            "probabilities.jsonl",
            b'{"step": 1, "epoch": 1, "blocks": []}\n{"step": 1, "epoch": 2, "blocks": []}\n',
            "line 2: `step` must rise",
        ),
        (
            "probabilities.jsonl",
            b'{"step": 1, "epoch": 1, "blocks": []}\n{"step": 2, "epoch": 2, "blocks": [{}]}\n',
            "line 2: it must have the blocks",
        ),
        ("architecture.json", b"{}", "lacks the key `format`"),
        ("summary.json", b"[]", "must be an object"),
        ("summary.json", json.dumps(SUMMARY | {"steps": 1.5}).encode(), "`steps`.* an integer"),
        ("summary.json", json.dumps(SUMMARY | {"found_cost": True}).encode(), "`found_cost`"),
        (
            "summary.json",
            json.dumps(SUMMARY | {"wall_seconds": 10**400}).encode(),
            "`wall_seconds`",
        ),
        ("ranking.json", json.dumps(RANKING | {"format": 2}).encode(), "`format` must be 1"),
        ("ranking.json", json.dumps(RANKING | {"cost_unit": "s"}).encode(), "one of MACs, param"),
        ("ranking.json", json.dumps(RANKING | {"architectures": [3]}).encode(), r"\[0\]"),
        (
            "ranking.json",
            json.dumps(RANKING | {"architectures": [network("a", 1, log_prob="x")]}).encode(),
            "`log_prob`",
        ),
    ],
)
def test_bad_file_is_refused_by_name(run, name, content, message):
    (run / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        write_report(run)
    assert str(run / name) in str(caught.value) and "\n" not in str(caught.value)
    assert not (run / "report.html").exists() and not (run / "report").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "1.5"}, "line 2: `step` must be an integer. Received: '1.5'"),
        ({"step": "7"}, "line 3: `step` must rise"),
        ({"phase": "x"}, "line 2: `phase` must be one of warm_up"),
        ({"entropy": ""}, "line 2: `entropy` must be a number"),
    ],
)
def test_bad_metrics_are_refused_by_column(run, change, message):
    write_metrics(run, **change)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        write_report(run)
    assert str(run / "metrics.csv") in str(caught.value)


def test_directory_that_holds_no_search(tmp_path):
    with pytest.raises(ValueError, match=r"must be a run directory.* lacks flags.txt"):
        write_report(tmp_path)


def test_command_line(unfinished):
    """One run that is a search and one that is none, side by side."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "fpnas_keras.report", f"--run_dir={directory}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for directory in (unfinished, unfinished / "missing")
    ]
    (stdout, stderr), (other_stdout, other_stderr) = (each.communicate() for each in processes)
    assert [each.returncode for each in processes] == [0, 1], stderr
    assert stdout == f"{unfinished / 'report.html'}\n"
    assert "Traceback" not in other_stderr and other_stdout == ""
    assert other_stderr.strip().splitlines()[-1].startswith("error: ")


def test_import_loads_neither_keras_nor_matplotlib():
    code = (
        "import sys; from fpnas_keras import report; print(sorted(report.__all__)); "
        "print([name for name in ('tensorflow', 'keras', 'matplotlib') if name in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert process.stdout == "['failure_as_warning', 'write_report']\n[]\n", process.stderr


def write_training(directory, finished=True, classes=3, **changes):
    """The run directory of a training, written by hand."""
    directory.mkdir(parents=True)
    flags = {"architecture": "runs/mine/architecture.json", "data": "folder:photos", "epochs": "2"}
    lines = "".join(f"--{name}={value}\n" for name, value in flags.items())
    (directory / "flags.txt").write_text(lines)
    (directory / "chosen.txt").write_text("--batch_size=16\n")
    rows = "step,epoch,accuracy,loss,val_accuracy,val_loss,seconds\n"
    rows += "10,1,0.5,1.25,0.4,1.5,2.5\n20,2,0.75,0.5,0.6,1.0,5.0\n"
    (directory / "metrics.csv").write_text(rows)
    ARCHITECTURE.save(directory / "architecture.json")
    names = [f"class <{index}>" for index in range(classes)]
    matrix = np.diag([9] * classes)
    matrix[0, 1] = 3
    image = "data:image/png;base64,iVBORw0KGgo="
    mistake = {"true": names[0], "given": names[1], "probability": 0.875, "image": image}
    (directory / "mistakes.json").write_text(json.dumps([mistake] if finished else []))
    summary = {
        "test_accuracy": 0.9,
        "test_balanced_accuracy": 0.8125,
        "macs": 1_234_567,
        "params": 7_654,
        "wall_seconds": 61.0,
        "class_accuracy": dict.fromkeys(names, 0.75),
        "confusion_matrix": matrix.tolist(),
        "next": "python -m export.tflite --model=x",
    }
    if finished:
        (directory / "summary.json").write_text(json.dumps(summary | changes))
        export = {"quantize": "int8", "bytes": 12_345, "tflite_accuracy": 0.89}
        export |= {"agreement": 0.97, "host_milliseconds": 1.5}
        export["class_changes"] = {names[0]: -0.05, names[1]: 0.01}
        (directory / "model_int8_report.json").write_text(json.dumps(export))
    return directory


def test_a_training_has_a_report(tmp_path):
    text = words(page(write_training(tmp_path / "run")))
    for shown in (
        "Training of mine/architecture.json",
        "test accuracy 90.00%",
        "mean over the classes 81.25%",
        "MACs 1,234,567",
        "time 1 min 1 s",
        "Next: python -m export.tflite --model=x",
        "class <0> 75.0%",
        "class <0> 9 3 0",
        "class <0> taken for class <1> (88%)",
        "model_int8.tflite int8 12,345 89.00% 97.00% 1.5 class <0> -5.0%",
        "batch_size 16 (chosen for the images)",
    ):
        assert shown in text, shown
    assert sorted(path.name for path in (tmp_path / "run" / "report").iterdir()) == [
        "accuracy.png",
        "loss.png",
    ]


def test_what_a_kill_left_of_an_export_is_not_shown(tmp_path):
    directory = write_training(tmp_path / "run")
    (directory / ".77.model_report.json").write_text("{")
    assert list(TrainingRun(directory).exports) == ["model_int8.tflite"]


def test_a_training_without_an_epoch_has_no_metrics(tmp_path):
    directory = write_training(tmp_path / "run", finished=False)
    (directory / "metrics.csv").unlink()
    with pytest.raises(ValueError, match=r"metrics.csv is missing: no epoch has ended yet"):
        _ = TrainingRun(directory).epochs


def test_many_classes_are_shown_as_their_confusions(tmp_path):
    text = words(page(write_training(tmp_path / "run", classes=40)))
    assert "The most frequent confusions of 40 classes." in text
    assert "class <0> class <1> 3" in text


def test_a_training_that_is_not_finished_has_a_report(tmp_path):
    text = words(page(write_training(tmp_path / "run", finished=False)))
    assert "The training is not finished." in text
    assert "epochs 2 of 2" in text
    assert "Test images" not in text


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.csv", "step,epoch,loss\n1,1,2\n", "is not the metrics of a training"),
        ("metrics.csv", "step,epoch,loss,accuracy\n", "no epoch has ended yet"),
        ("metrics.csv", "step,epoch,loss,accuracy\n1,1,x,2\n", "is not the metrics of a training"),
        ("mistakes.json", '[{"true": 1}]', "mistakes.json is not a list of mistakes"),
        ("model_int8_report.json", "{}", "is not a report of an export"),
        ("summary.json", "[]", "summary.json"),
    ],
)
def test_damaged_files_of_a_training_are_refused_by_name(tmp_path, file, content, message):
    directory = write_training(tmp_path / "run")
    (directory / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        write_report(directory)


def test_the_verdict_and_the_next_command_are_on_the_page_of_a_search(tmp_path):
    directory = write_run(tmp_path)
    for entropy, verdict in (
        (15.0, "is undecided: 15.0 of 25.0"),
        (5.0, "is decided: 5.0 of 25.0"),
    ):
        summary = SUMMARY | {"entropy": entropy, "initial_entropy": 25.0, "next": "python -m x"}
        (directory / "summary.json").write_text(json.dumps(summary))
        text = words(page(directory))
        assert f"The search {verdict} nats of entropy are left" in text
        assert "Next: python -m x" in text
