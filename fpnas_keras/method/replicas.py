"""Several replicas, on one machine or several: the samples of a step are shared out.

Every replica sees the whole batch, so that batch norms stay what they are in one process, and
evaluates its share of the drawn architectures. At the end of a step the replicas exchange the
likelihoods, from which each knows all importance weights, and then one vector with the sum of the
gradients.
"""

import json
import os
import signal

import tensorflow as tf

from fpnas_keras.errors import UserError

STRATEGIES = ("none", "mirrored", "multiworker")


def make_strategy(name: str) -> tf.distribute.Strategy | None:
    """The strategy of a flag; `None` for one replica.

    For "multiworker" TensorFlow reads the environment variable `TF_CONFIG`, and waits until all
    workers are there. It must come before anything else that TensorFlow does.
    """
    if name == "mirrored":
        strategy = tf.distribute.MirroredStrategy()
        return strategy if strategy.num_replicas_in_sync > 1 else None
    if name == "multiworker":
        # It waits in C++, where no handler of Python's is called.
        handlers = {
            number: signal.signal(number, signal.SIG_DFL)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            return tf.distribute.MultiWorkerMirroredStrategy()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return None


def is_chief(name: str) -> bool:
    """Whether this process, under the strategy of a flag, is the one that writes.

    Raises:
        UserError: When `TF_CONFIG` does not describe the workers.
    """
    if name != "multiworker":
        return True
    _check_tf_config()
    config = json.loads(os.environ["TF_CONFIG"])
    if "chief" in config["cluster"]:
        return config["task"]["type"] == "chief"
    return config["task"]["index"] == 0


def check_same_step(strategy: tf.distribute.Strategy | None, step: int) -> None:
    """Raises `UserError` when the workers begin with different steps."""
    if strategy is None:
        return

    def gather():
        return tf.distribute.get_replica_context().all_gather(tf.constant([step]), 0)

    steps = set(local(tf.function(lambda: strategy.run(gather))(), strategy).numpy().tolist())
    if len(steps) > 1:
        raise UserError(
            "`output_dir` must be on a file system that all workers share. Received: checkpoints "
            f"of the steps {', '.join(map(str, sorted(steps)))}"
        )


def own_share(costs: tf.Tensor, replica: tf.Tensor | int, replicas: int) -> tf.Tensor:
    """Indices of the samples that a replica evaluates; each sample is one replica's.

    They are dealt by their cost to and fro (0 1 1 0 0 1 ...), so that all replicas have about
    the same work.

    Args:
        costs: Cost of each sample, of shape `(evaluated,)`.
        replica: Number of the replica.
        replicas: Number of replicas.

    Returns:
        int32 of shape `(share,)`.
    """
    order = tf.argsort(costs, direction="DESCENDING", stable=True)
    turn = tf.range(tf.size(order)) % (2 * replicas)
    owner = tf.minimum(turn, 2 * replicas - 1 - turn)
    return tf.boolean_mask(order, owner == replica)


def sum_over_replicas(tensors: list[tf.Tensor]) -> list[tf.Tensor]:
    """The sum of float32 tensors over all replicas, in one exchange; inside `strategy.run`."""
    flat = tf.concat([tf.reshape(each, [-1]) for each in tensors], axis=0)
    total = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, flat)
    parts = tf.split(total, [tf.size(each) for each in tensors], num=len(tensors))
    return [tf.reshape(part, tf.shape(each)) for part, each in zip(parts, tensors)]


def _check_tf_config():
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


def local(value: tf.Tensor, strategy: tf.distribute.Strategy) -> tf.Tensor:
    """What `strategy.run` returned, which is the same on all replicas, as one tensor."""
    return strategy.experimental_local_results(value)[0]
