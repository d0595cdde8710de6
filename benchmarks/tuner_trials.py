"""Keras Tuner on a space whose accuracies are known: which networks it would train, in order.

python tuner_trials.py TUNER TABLE.npz MACS TRIALS SEED

It runs in an environment of its own, without this project. `multi_trial.py` makes the environment
and the table (`accuracy`, `macs`: one number for each network, row-major), and counts the trials.
It prints the accuracies of the networks as JSON.
"""

import contextlib
import json
import logging
import sys
import tempfile

import keras_tuner as kt
import numpy as np

# Proposals for each network that is trained. Those over the budget are not trained.
_PROPOSALS = 100


class EnoughError(BaseException):
    """All trials are done. A tuner catches every `Exception`, but not this."""


def run_tuner(
    name: str, accuracy: np.ndarray, macs: np.ndarray, budget: float, trials: int, seed: int
) -> list[float]:
    """The accuracies of the networks that a tuner would train, in their order.

    A proposal over the budget is not trained. The tuner hears an accuracy that is below all others
    and falls with the cost. A network that is proposed again is trained again, as the tuner does.

    Args:
        name: Name of the tuner, as in `keras_tuner`.
        accuracy: Accuracy of each network in percent, of shape `(choices, choices, ...)`.
        macs: What each network costs, of the same shape.
        budget: What a network may cost.
        trials: Number of networks to train.
        seed: Seed of the tuner.
    """
    trained = []

    class OnTable(getattr(kt, name)):
        """The tuner, whose trials look up what a training would give."""

        def run_trial(self, trial, *args, **kwargs):
            entries = tuple(
                trial.hyperparameters.Int(f"block_{block}", 0, count - 1)
                for block, count in enumerate(accuracy.shape)
            )
            if macs[entries] > budget:
                return float(accuracy.min() - macs[entries] / budget)
            trained.append(float(accuracy[entries]))
            if len(trained) == trials:
                raise EnoughError
            return trained[-1]

    space = kt.HyperParameters()
    for block, count in enumerate(accuracy.shape):
        space.Int(f"block_{block}", 0, count - 1)
    with tempfile.TemporaryDirectory() as folder:
        tuner = OnTable(
            objective=kt.Objective("default_objective", "max"),
            hyperparameters=space,
            max_trials=_PROPOSALS * trials,
            seed=seed + 1,  # It takes 0 for none.
            directory=folder,
        )
        with contextlib.suppress(EnoughError):
            tuner.search(verbose=0)
    if len(trained) < trials:
        raise RuntimeError(f"{name} must train {trials} networks. Received: {len(trained)}")
    return trained


def main() -> None:
    """Runs a tuner on a table."""
    name, table, budget, trials, seed = sys.argv[1:]
    logging.disable()
    with np.load(table) as arrays:
        accuracy, macs = arrays["accuracy"], arrays["macs"]
    print(json.dumps(run_tuner(name, accuracy, macs, float(budget), int(trials), int(seed))))


if __name__ == "__main__":
    main()
