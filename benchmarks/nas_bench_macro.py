"""The search against the truth: NAS-Bench-Macro, 6,561 networks of known accuracy.

python benchmarks/nas_bench_macro.py --table=../shared/data/nas_bench_macro/nas-bench-macro_cifar10.json
"""

import json
import pathlib

import keras
import numpy as np
import tensorflow as tf

import fpnas_keras as fpnas

# A sample's log-likelihood is -SLOPE * (1 - accuracy) + N(0, NOISE).
SLOPE, NOISE = 3.5, 0.02


class Benchmark:
    """The published table, as a likelihood in the graph."""

    def __init__(self, path):
        self.space = fpnas.spaces.get("nas_bench_macro")
        table = json.loads(pathlib.Path(path).read_text())
        codes = [np.base_repr(index, 3).zfill(8) for index in range(3**8)]
        self.accuracy = np.array([table[code]["mean_acc"] for code in codes])
        self.macs = np.array([table[code]["flops"] for code in codes])
        self.params = np.array([table[code]["params"] for code in codes])
        block = self.space.blocks[0]
        self._digits = block.variables["operation"][1]

    def index(self, entries):
        """Row of the table from the number of the entry of each block."""
        digits = tf.gather(tf.constant(self._digits), entries)
        return tf.reduce_sum(digits * 3 ** np.arange(7, -1, -1, dtype=np.int32), axis=-1)

    def best(self, budget):
        return self.accuracy[self.macs <= budget].max()


class Searcher:
    """A search on the table that can be run again with other seeds."""

    def __init__(
        self,
        benchmark,
        target=None,
        learning_rate=0.02,
        optimizer=keras.optimizers.Adam,
        **settings,
    ):
        self.benchmark = benchmark
        self.search = fpnas.ArchitectureSearch(
            benchmark.space, cost=fpnas.MacsCost(target), warmup_steps=0, **settings
        )
        self.search.compile("sgd", optimizer(learning_rate))
        self._variables = [
            v
            for v in self.search.variables + self.search.architecture_optimizer.variables
            if not v.path.startswith("supernet")
        ]
        self._variables = [v for v in self._variables if "supernet" not in v.path]
        self._initial = [v.numpy() for v in self._variables]
        self._run = tf.function(self._steps)

    def _steps(self, max_samples):
        search, done = self.search, tf.constant(False)
        total = tf.constant(0, tf.int64)
        logs_cost = tf.constant(0.0, tf.float64)
        while not done:
            samples = search.ask()
            total += tf.cast(tf.reduce_sum(samples.counts), tf.int64)
            done = total > max_samples
            if not done:
                rows = self.benchmark.index(search.distribution.entries.index(samples.choices))
                key = tf.stack([search.seed.value + 10_000, search.step.value])
                noise = tf.random.stateless_normal(tf.shape(samples.counts), key, stddev=NOISE)
                accuracy = tf.gather(tf.constant(self.benchmark.accuracy / 100, tf.float32), rows)
                logs = search.tell(samples, -SLOPE * (1 - accuracy) + noise)
                logs_cost = logs["expected_cost"]
        return logs_cost

    def __call__(self, seed, max_samples, budget="target"):
        for variable, value in zip(self._variables, self._initial):
            variable.assign(value)
        self.search.seed.assign(seed)
        cost = self._run(tf.constant(max_samples, tf.int64))
        found = self.search.derivation(budget)
        sp = self.benchmark.space
        code = lambda f: int(
            self.benchmark.index(
                self.search.distribution.entries.index(tf.constant(sp.choices(f.architecture)))
            )
        )
        row = code(found)
        mode = code(self.search.derivation(None))
        b = self.benchmark
        return dict(
            acc=b.accuracy[row],
            macs=b.macs[row],
            mode_acc=b.accuracy[mode],
            mode_macs=b.macs[mode],
            expected=float(cost),
            steps=int(self.search.step.numpy()),
            entropy=float(self.search.distribution.entropy()),
            evaluated=int(self.search.total_evaluated.numpy()),
        )
