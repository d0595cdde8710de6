"""A sampled step against the one-shot code of others: once-for-all and NNI.

python benchmarks/peers.py

The space is that of once-for-all: `mobilenet_v3`, in which the third block of a stage is skipped
only together with the fourth. The same networks are drawn in all supernets. A step is forward,
backward and the update of SGD with momentum, for one network; a forward pass is that of a training.
Each code calls its own functions, on one core and with one thread, and all take turns.

The others run in virtual environments that the script makes in --work_dir, from pinned
requirements. One that cannot be made is left out with a line. Finished rows are appended to
--output. A run that was interrupted continues from there.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import harness
import keras
import numpy as np
import tensorflow as tf

import fpnas_keras as fpnas
from fpnas_keras.commands import run_command
from fpnas_keras.errors import UserError
from fpnas_keras.method import Samples
from fpnas_keras.settings import setting
from fpnas_keras.spaces import VARIABLES, Space

REQUIREMENTS = {
    "once_for_all": (
        "torch==2.13.0",
        "numpy==2.4.6",
        "pillow==12.3.0",
        "ofa==0.1.0.post202307202001",
    ),
    "nni": ("torch==2.13.0", "numpy==2.4.6", "nni==3.0", "pytorch-lightning==2.6.6"),
}
KERNEL_SIZES, EXPANSIONS, DEPTHS = (3, 5, 7), (3, 4, 6), (2, 3, 4)
STAGES, BLOCKS = 5, 4
CLASSES = 10
# The convolution after NNI's pooling has a bias.
_MOST_MORE_PARAMETERS = 1280


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeersSettings(harness.BenchmarkSettings):
    """Settings of this benchmark."""

    SMOKE: ClassVar[Mapping[str, Any]] = {
        "peers": (),
        "networks": 1,
        "input_size": 32,
        "batch_size": 2,
        "repeats": 1,
    }

    output: str = harness.output_setting("peers.jsonl")
    work_dir: str = setting("Folder of the environments.", "runs/benchmark_peers", basic=True)
    peers: tuple[str, ...] = setting(
        f"What to compare with, separated by commas: {', '.join(REQUIREMENTS)}.",
        tuple(REQUIREMENTS),
        basic=True,
    )
    networks: int = setting("Random networks.", 8, least=1)
    input_size: int = setting("Height and width of the images.", 160, least=32)
    batch_size: int = setting("Images in a batch.", 16, least=2)
    repeats: int = setting("Timed calls of each function. The median counts.", 7, least=1)

    def check(self) -> None:
        """Raises `UserError` when a peer is unknown."""
        unknown = set(self.peers) - REQUIREMENTS.keys()
        if unknown:
            raise UserError(
                f"`peers` must be of {', '.join(REQUIREMENTS)}. Received: {', '.join(unknown)}"
            )


class Peer:
    """The process of a peer.

    Args:
        python: Python of its environment.
        name: Name of the peer.
        settings: Settings of the benchmark.
    """

    def __init__(self, python: pathlib.Path, name: str, settings: PeersSettings):
        script = str(pathlib.Path(__file__).with_name("peer_networks.py"))
        sizes = map(str, (settings.input_size, settings.batch_size, CLASSES))
        self.log = pathlib.Path(settings.work_dir, f"{name}.log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(python), script, name, *sizes],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def ask(self, request: Any) -> Any:
        """Sends a line and returns the answer."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"its process ended; see {self.log}")
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def start_peers(settings: PeersSettings) -> Iterator[dict[str, Peer]]:
    """The processes of the peers, by name; those that cannot run here are left out with a line."""
    peers = {}
    with contextlib.ExitStack() as stack:
        for name in settings.peers:
            try:
                folder = pathlib.Path(settings.work_dir, name)
                python = harness.make_environment(folder, REQUIREMENTS[name])
                peer = Peer(python, name, settings)
                stack.callback(peer.close)
                peer.ask(draw_network(np.random.default_rng(0)))
                peers[name] = peer
            except (subprocess.CalledProcessError, OSError, RuntimeError) as error:
                print(f"left out: {name}: {error}", flush=True)
        yield peers


def draw_network(rng: np.random.Generator) -> dict[str, list[int]]:
    """A random network, as `peer_networks.py` describes it."""
    count = STAGES * BLOCKS
    return {
        "kernel_sizes": rng.choice(KERNEL_SIZES, count).tolist(),
        "expansions": rng.choice(EXPANSIONS, count).tolist(),
        "depths": rng.choice(DEPTHS, STAGES).tolist(),
    }


def to_choices(space: Space, network: Mapping[str, list[int]]) -> np.ndarray:
    """The choices of a network in `mobilenet_v3`, whose first block has none."""
    skip, kernel, expansion = map(VARIABLES.index, ("skip", "kernel_size", "expansion"))
    choices = np.zeros(space.cardinalities.shape, int)
    for index in range(STAGES * BLOCKS):
        stage, block = divmod(index, BLOCKS)
        if block >= network["depths"][stage]:
            choices[1 + index, skip] = 1
            continue
        choices[1 + index, kernel] = KERNEL_SIZES.index(network["kernel_sizes"][index])
        choices[1 + index, expansion] = EXPANSIONS.index(network["expansions"][index])
    return choices


class Ours:
    """The supernet of this project, with steps of one sample.

    Args:
        settings: Settings of the benchmark.
    """

    def __init__(self, settings: PeersSettings):
        size = settings.input_size
        self.space = fpnas.spaces.get("mobilenet_v3", (size, size, 3), CLASSES)
        self.search = fpnas.ArchitectureSearch(self.space)
        self.search.compile(keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True))
        self.batch = harness.noise(self.space, settings.batch_size, 0)
        self.entries = None

    def activate(self, network: Mapping[str, list[int]]) -> int:
        """Makes a network the sample. Returns its parameters."""
        choices = to_choices(self.space, network)
        self.entries = tf.constant(self.space.entries.from_choices(choices), tf.int32)
        return self.space.architecture(choices).params()

    def train(self) -> float:
        """Makes one step, and returns the loss."""
        return float(self._train(self.entries))

    @tf.function
    def _train(self, entries):
        gradients, results = self.search.weight_gradients(Samples.each(entries[None]), self.batch)
        supernet = self.search.supernet
        weights = supernet.stem_variables + supernet.body_variables
        self.search.optimizer.apply(gradients, weights)
        return results[0, 0]

    def forward(self) -> float:
        """Makes one forward pass, and returns the loss."""
        return float(self._forward(self.entries))

    @tf.function
    def _forward(self, entries):
        return self.search.evaluate_samples(Samples.each(entries[None]), self.batch)[0, 0]


def measure(
    settings: PeersSettings, ours: Ours, peers: Mapping[str, Peer], network: Mapping[str, list[int]]
) -> harness.Row:
    """Seconds of the steps and of the forward passes of a network.

    Raises:
        RuntimeError: When a peer has another network.
    """
    params = ours.activate(network)
    train, forward = {"ours": ours.train}, {"ours": ours.forward}
    for name, peer in peers.items():
        theirs = peer.ask(network)
        if not params <= theirs <= params + _MOST_MORE_PARAMETERS:
            raise RuntimeError(f"{name} has {theirs} parameters, and ours {params}: {network}")
        train[name] = functools.partial(peer.ask, "train")
        forward[name] = functools.partial(peer.ask, "forward")
    return {
        **network,
        "params": params,
        "train": harness.in_turn(train, settings.repeats),
        "forward": harness.in_turn(forward, settings.repeats),
    }


def report(rows: list[harness.Row]) -> None:
    """Prints the ratios of our times to those of each peer."""
    print("\n| ours / theirs | median | each network |\n|---|---|---|")
    names: dict[str, None] = {name: None for row in rows for name in row["train"]}
    for kind, title in (("train", "step"), ("forward", "forward")):
        for name in names:
            ratios = [row[kind]["ours"] / row[kind][name] for row in rows if name in row[kind]]
            if name != "ours":
                each = " ".join(f"{ratio:.2f}" for ratio in ratios)
                print(f"| {title}, {name} | {np.median(ratios):.2f} | {each} |")


def run(settings: PeersSettings) -> None:
    """Measures the networks that have no row yet, and prints the ratios of all."""
    rows = harness.finished(settings.output, "network")
    rng = np.random.default_rng(1)
    networks = [draw_network(rng) for _ in range(settings.networks)]
    wanted = {"ours", *settings.peers}
    todo = [
        index
        for index in range(settings.networks)
        if index not in rows or not wanted <= rows[index]["train"].keys()
    ]
    if todo:
        if not settings.smoke:  # A smoke run is in a process that has other work.
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
            tf.config.threading.set_intra_op_parallelism_threads(1)
            tf.config.threading.set_inter_op_parallelism_threads(1)
        ours = Ours(settings)
        with start_peers(settings) as peers:
            for index in todo:
                row = {"network": index, **measure(settings, ours, peers, networks[index])}
                harness.append(settings.output, row)
                rows[index] = row
                print(f"{len(rows)} of {settings.networks}", flush=True)
    report(list(rows.values()))


COMMAND = harness.make_command(__file__, __doc__, PeersSettings, run)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
