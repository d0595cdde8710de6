"""The distribution strategies by name, and the cluster of workers in `TF_CONFIG`.

Nothing here needs TensorFlow, so that flags can be checked before it loads.
"""

import json
import os
import signal

from fpnas_keras.errors import UserError

STRATEGIES = ("none", "mirrored", "multiworker")


class WorkerLostError(UserError):
    """Another worker of the cluster has died or cannot be reached.

    All workers have to be started again. They resume from the last checkpoint.
    """

    # Kubernetes' TFJob restarts a worker that exits with this code.
    exit_code = 128 + signal.SIGUSR1


def is_chief(name: str) -> bool:
    """Whether this process is the one that writes files.

    Args:
        name: One of `STRATEGIES`.

    Raises:
        UserError: If the strategy is "multiworker" and `TF_CONFIG` does not describe the workers.
    """
    if name != "multiworker":
        return True
    config = _read_tf_config()
    if "chief" in config["cluster"]:
        return config["task"]["type"] == "chief"
    return config["task"]["index"] == 0


def _read_tf_config():
    expected = (
        "--strategy=multiworker needs the environment variable TF_CONFIG on each machine, "
        '{"cluster": {"worker": ["host1:port", "host2:port"]}, "task": {"type": "worker", '
        '"index": 0}}. '
    )
    text = os.environ.get("TF_CONFIG")
    if not text:
        raise UserError(f"{expected}Received: none")
    try:
        config = json.loads(text)
        workers = config["cluster"].get("worker", [])
        kind, index = config["task"]["type"], config["task"]["index"]
        addresses = config["cluster"][kind]
        if not all(isinstance(each, str) and ":" in each for each in [*workers, *addresses]):
            raise UserError("an address is not host:port")
        if kind not in ("worker", "chief"):
            raise UserError(f"the task type is {kind!r}")
        if not 0 <= index < len(addresses):
            raise UserError(f"the task index is {index!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{expected}Received: {text[:200]} ({error})") from None
    return config
