"""Several replicas, on one machine or on several: each evaluates some of the samples of a step.

Every replica sees the whole batch, so that batch normalization computes what it computes in one
process. Each replica evaluates its share of the samples. At the end of a step the replicas exchange
the log-likelihoods, from which each one computes all importance weights. Then they sum their
gradients in one all-reduce.
"""

import contextlib
import signal
from collections.abc import Iterator

import tensorflow as tf

from fpnas_keras.architecture import Part, kernels_of
from fpnas_keras.cost import Cost
from fpnas_keras.errors import UserError
from fpnas_keras.files import summarize_error
from fpnas_keras.method.strategies import WorkerLostError

# What collective operations raise when a worker has died.
_LOST_WORKER_ERRORS = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.InternalError,
    tf.errors.DeadlineExceededError,
    tf.errors.CancelledError,
)


def make_strategy(name: str) -> tf.distribute.Strategy | None:
    """Makes a strategy.

    Call it before anything else that uses TensorFlow. For "multiworker", TensorFlow reads the
    environment variable `TF_CONFIG` and waits until all workers have started.

    Args:
        name: One of `fpnas_keras.method.strategies.STRATEGIES`.

    Returns:
        The strategy. `None` for "none", and for "mirrored" on a machine with one device.

    Raises:
        UserError: If TensorFlow was used before a "multiworker" strategy was made.
    """
    if name == "mirrored":
        strategy = tf.distribute.MirroredStrategy()
        return strategy if strategy.num_replicas_in_sync > 1 else None
    if name == "multiworker":
        # TensorFlow waits in C++, where Python's signal handlers do not run.
        handlers = {
            number: signal.signal(number, signal.SIG_DFL)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            return tf.distribute.MultiWorkerMirroredStrategy()
        except RuntimeError as error:
            raise UserError(
                "`strategy` multiworker must be the first that a process does with TensorFlow: "
                f"start a new process. ({summarize_error(error)})"
            ) from None
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return None


@contextlib.contextmanager
def worker_failures(strategy: tf.distribute.Strategy | None) -> Iterator[None]:
    """Raises `WorkerLostError` for the errors that TensorFlow raises when a worker has died.

    It changes nothing unless the strategy has several workers.

    Args:
        strategy: The strategy, or `None`.

    Example:

    ```python
    with worker_failures(strategy):
        search.fit(batches)
    ```
    """
    try:
        yield
    except _LOST_WORKER_ERRORS as error:
        if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
            raise
        raise WorkerLostError(
            "another worker cannot be reached any more. Start all workers again with the same "
            f"command. They resume from the last checkpoint. ({summarize_error(error)})"
        ) from error


def check_same_step(strategy: tf.distribute.Strategy | None, step: int) -> None:
    """Checks that all workers begin with the same step.

    Args:
        strategy: The strategy, or `None`.
        step: The step of this worker's checkpoint.

    Raises:
        UserError: If the steps differ.
    """
    if strategy is None:
        return

    def gather():
        return tf.distribute.get_replica_context().all_gather(tf.constant([step]), 0)

    gathered = first_replica_value(tf.function(lambda: strategy.run(gather))(), strategy)
    steps = sorted(set(gathered.numpy().tolist()))
    if len(steps) > 1:
        raise UserError(
            "`output_dir` must be on a file system that all workers share. Received: checkpoints "
            f"of the steps {', '.join(map(str, steps))}"
        )


class WorkCost(Cost):
    """Stands for the time of a sample: how many numbers its kernels give.

    It predicts that time to 12% (`mobile_mini` at 32 pixels) and 8% (`fbnetv2_f` at 128).
    Multiply-adds predict it to 17% and 21%.
    """

    unit = "numbers"

    def __call__(self, part: Part) -> float:
        return sum(each.positions * each.outputs for each in kernels_of(part))


def own_share(work: tf.Tensor, replica: tf.Tensor | int, replicas: int) -> tf.Tensor:
    """Indices of the samples that a replica evaluates. Each sample belongs to one replica.

    The largest sample comes first. Each one goes to the replica that has the least work so far.

    Args:
        work: Work of each sample, above 0, of shape `(evaluated,)`.
        replica: Index of the replica.
        replicas: Number of replicas.

    Returns:
        int32 of shape `(share,)`.
    """
    order = tf.argsort(work, direction="DESCENDING", stable=True)
    indices = tf.range(replicas)

    def give(state, own):
        loads, _ = state
        owner = tf.argmin(loads, output_type=tf.int32)
        return loads + own * tf.cast(indices == owner, work.dtype), owner

    nothing = tf.zeros([replicas], work.dtype), tf.constant(0)
    _, owners = tf.scan(give, tf.gather(work, order), nothing)
    return tf.boolean_mask(order, owners == replica)


def sum_over_replicas(tensors: list[tf.Tensor]) -> list[tf.Tensor]:
    """Sums tensors over all replicas in one all-reduce. Call it inside `strategy.run`.

    Args:
        tensors: float32 tensors of any shapes.

    Returns:
        The sums, float32 of the same shapes.
    """
    flat = tf.concat([tf.reshape(each, [-1]) for each in tensors], axis=0)
    total = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, flat)
    parts = tf.split(total, [tf.size(each) for each in tensors], num=len(tensors))
    return [tf.reshape(part, tf.shape(each)) for part, each in zip(parts, tensors)]


def first_replica_value(value: tf.Tensor, strategy: tf.distribute.Strategy) -> tf.Tensor:
    """The value of this process's first replica.

    Use it for a result of `strategy.run` that is the same on all replicas.
    """
    return strategy.experimental_local_results(value)[0]
