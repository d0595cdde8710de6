"""The search: a Keras model whose training step updates weights and architecture."""

import contextlib
import math
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from fpnas_keras import estimator, replicas
from fpnas_keras.architecture import Architecture
from fpnas_keras.cost import CostTable, MacsCost, format_cost
from fpnas_keras.errors import UserError
from fpnas_keras.method.derivation import Derivation, most_probable
from fpnas_keras.method.distributions import BlockLogits, FactorizedLogits, JointLogits
from fpnas_keras.method.estimator import AdaptiveSamples, CostController, Samples, StreamingSum
from fpnas_keras.networks.supernet import Supernet
from fpnas_keras.spaces import Space

_DISTRIBUTIONS = {
    "factorized": (FactorizedLogits,),
    "joint": (JointLogits,),
    "coarse_to_fine": (FactorizedLogits, JointLogits),
}


class ArchitectureSearch(keras.Model):
    """Learns a distribution over the architectures of a space, and shared weights.

    Every step draws K architectures once. The weights follow the importance
    weighted gradient of a batch of the weights part; the architecture logits
    follow, forward only, the likelihoods on a batch of the architecture part
    and the cost. One sample's activations are in memory at a time, whatever K is.

    Called on images, the search gives the logits of its most probable
    architecture under the shared weights, with the batch's own statistics.

    Args:
        space: The space to search.
        samples: Architectures a step: an `AdaptiveSamples`, or a fixed number.
        cost: `MacsCost`, `ParamsCost`; what `expected_cost` reports and what the
            target, if it has one, is held against.
        distribution: "factorized"; "joint"; or "coarse_to_fine", which starts
            factorized and becomes joint by `refine`. All start uniform in each variable.
        cost_coefficient: Weight of the cost in the gradient of the logits (the
            paper's beta): a `CostController`, or a fixed number.
        cost_penalty: What that weighs: "expected", E[cost] / target, whose gradient
            is exact; "hinge", the paper's mean of max(0, cost / target - 1) over the
            samples; or "log", its logarithm.
        warmup_steps: Steps at the start that train the weights alone, on uniformly
            drawn architectures. Untrained weights favour the smallest networks, which
            learn first; a few hundred steps are enough to turn that round.
        warmup_samples: Architectures a step in the warm-up.
        likelihood_scale: tau of the importance weights softmax(tau * l_k), l_k the
            mean log-likelihood of an example.
        control_variate: Whether 1/K is subtracted from the importance weights in
            the gradient of the logits; the expectation is the same, the variance
            much lower. The paper has none.
        stratified: Whether a choice of probability p is drawn as near to K * p times
            as can be, instead of K independent draws.
        deduplicate: Whether equal samples of a step are evaluated once.
        recompute: Whether the backward pass computes the activations inside each
            block anew instead of keeping them: less memory, more time.
        seed: Seed of the drawn architectures.
        strategy: Shares the samples of a step out among the replicas of a
            `MirroredStrategy` or `MultiWorkerMirroredStrategy`; each sees the whole batch.
            `fit` is called outside its scope.

    Raises:
        UserError: When the target lies outside the costs of the space, when the
            control variate meets K = 1, where it makes every gradient zero, or when an
            argument is out of its range.

    Example:

    ```python
    space = fpnas.spaces.get("mobile_mini", input_shape=(32, 32, 3))
    search = fpnas.ArchitectureSearch(space, cost=fpnas.MacsCost(target=5e6))
    search.compile(optimizer="sgd", architecture_optimizer="adam")
    search.fit(fpnas.data.search_batches(x, y, batch_size=64), epochs=30)
    model = search.derive().build()
    ```

    Reference: Yan et al., "FP-NAS: Fast Probabilistic Neural Architecture
    Search", CVPR 2021, arXiv:2011.10949.
    """

    def __init__(
        self,
        space: Space,
        samples: AdaptiveSamples | int = AdaptiveSamples(),
        cost: MacsCost | None = None,
        distribution: str = "factorized",
        cost_coefficient: CostController | float = CostController(),
        cost_penalty: str = "expected",
        warmup_steps: int = 300,
        warmup_samples: int = 2,
        likelihood_scale: float = 1.0,
        control_variate: bool = True,
        stratified: bool = True,
        deduplicate: bool = True,
        recompute: bool = False,
        seed: int = 0,
        strategy: tf.distribute.Strategy | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        _check_numbers(samples, control_variate, warmup_steps, warmup_samples, cost_coefficient)
        self.space = space
        self.samples = samples
        self.cost = cost or MacsCost()
        self.cost_coefficient = cost_coefficient
        self.cost_penalty = _checked("cost_penalty", cost_penalty, ("expected", "hinge", "log"))
        self.warmup_steps = warmup_steps
        self.warmup_samples = warmup_samples
        self.likelihood_scale = likelihood_scale
        self.control_variate = control_variate
        self.stratified = stratified
        self.deduplicate = deduplicate
        self.cost_table = CostTable(space, self.cost)
        _check_target(space, self.cost, self.cost_table)
        _checked("distribution", distribution, tuple(_DISTRIBUTIONS))
        # Keras knows nothing of the strategy: it would share out the images, not the samples.
        self.strategy = strategy
        with self._scope():
            self.distributions = [kind(space.blocks) for kind in _DISTRIBUTIONS[distribution]]
            self.supernet = Supernet(space, recompute)
        if distribution == "joint":
            # All distributions start from the same p(A), uniform in each variable.
            self.distributions[0].assign(FactorizedLogits(space.blocks))
        start = self.distributions[0].entry_probabilities()
        self._start_cost = float(self.cost_table.expected(start))
        self.step = self._counter("step")
        self.total_samples = self._counter("total_samples")
        self.total_evaluated = self._counter("total_evaluated")
        # Which of the distributions the search is at.
        self.phase = self._counter("phase")
        self.seed = self._counter("seed", seed)
        self.cost_integral = self.add_weight(
            name="cost_integral", shape=(), initializer="zeros", trainable=False, autocast=False
        )
        self._trackers = {
            name: keras.metrics.Mean(name=name)
            for name in (
                "train_loss",
                "train_accuracy",
                "validation_loss",
                "validation_accuracy",
                "entropy",
                "samples",
                "evaluated",
                "expected_cost",
                "cost_coefficient",
            )
        }
        self.architecture_optimizer = None
        self.built = True

    def _counter(self, name, value=0):
        start = keras.initializers.Constant(value)
        return self.add_weight(
            name=name, shape=(), dtype="int64", initializer=start, trainable=False
        )

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        return list(self._trackers.values())

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer = "sgd",
        architecture_optimizer: str | keras.optimizers.Optimizer = "adam",
        **kwargs: Any,
    ) -> None:
        """Configures the search.

        Args:
            optimizer: Updates the shared weights, and nothing else.
            architecture_optimizer: Updates the logits, and nothing else.
            **kwargs: As in `keras.Model.compile`, but for loss and metrics, which
                the method sets, and `jit_compile`: shapes are dynamic.
        """
        super().compile(optimizer=self._made_here(optimizer), jit_compile=False, **kwargs)
        self.architecture_optimizer = self._made_here(architecture_optimizer)
        with self._scope():
            self.optimizer.build(self.supernet.trainable_variables)
            self.architecture_optimizer.build([each.logits for each in self.distributions])

    def _made_here(self, optimizer):
        """The optimizer, or one like it: it belongs to the strategy that it is made under."""
        optimizer = keras.optimizers.get(optimizer)
        if self.strategy is None:
            return optimizer
        with self._scope():
            return type(optimizer).from_config(optimizer.get_config())

    def _scope(self):
        return self.strategy.scope() if self.strategy else contextlib.nullcontext()

    def call(self, images: tf.Tensor) -> tf.Tensor:
        return self.supernet(images, self.distribution.mode())

    def train_step(self, data) -> dict[str, tf.Tensor]:
        """One update of the weights on the first batch and of the logits on the second."""
        train_batch, validation_batch = data
        samples = self.ask()
        # Both halves use the weights and the logits from the step's start.
        if self.strategy is None:
            gradients, train = self.weight_gradients(samples, train_batch)
            validation = self.evaluate_samples(samples, validation_batch)
        else:
            gradients, train, validation = self._shared_out(samples, train_batch, validation_batch)
        self.optimizer.apply(gradients, self.supernet.trainable_variables)
        for part, results in (("train", train), ("validation", validation)):
            loss, accuracy = tf.unstack(results, axis=1)
            self._track(samples.counts, **{f"{part}_loss": loss, f"{part}_accuracy": accuracy})
        self._track(**self.tell(samples, -validation[:, 0]))
        return {name: tracker.result() for name, tracker in self._trackers.items()}

    def _shared_out(self, samples, train_batch, validation_batch):
        """`weight_gradients` and `evaluate_samples` by all replicas; the same on each of them."""
        costs = self.cost_table(samples.choices)

        def run(samples, train_batch, validation_batch):
            replica = tf.distribute.get_replica_context()
            own = replicas.own_share(
                costs, replica.replica_id_in_sync_group, replica.num_replicas_in_sync
            )
            share = Samples(*(tf.gather(each, own) for each in samples))
            gradients, train = self.weight_gradients(share, train_batch)
            validation = self.evaluate_samples(share, validation_batch)
            results = tf.concat([train, validation], axis=1)
            results = tf.scatter_nd(own[:, None], results, (tf.size(samples.counts), 4))
            (results,) = replicas.sum_over_replicas([results])
            train, validation = tf.split(results, 2, axis=1)
            # The sum of the importance weights of this replica's samples.
            scores = estimator.scores(-train[:, 0], samples.counts, self.likelihood_scale)
            weight = tf.reduce_sum(tf.gather(tf.nn.softmax(scores), own))
            gradients = [weight * tf.cast(each, tf.float32) for each in gradients]
            return replicas.sum_over_replicas(gradients), train, validation

        results = self.strategy.run(run, args=(samples, train_batch, validation_batch))
        return tf.nest.map_structure(lambda each: replicas.local(each, self.strategy), results)

    def ask(self) -> Samples:
        """Draws the architectures of a step.

        With `tell` it makes a search of any evaluation: `fit` asks, evaluates with the
        shared weights, and tells.

        Example:

        ```python
        samples = search.ask()
        log_likelihoods = [my_evaluation(space.architecture(c)) for c in samples.choices.numpy()]
        search.tell(samples, tf.constant(log_likelihoods))
        ```
        """
        count = self.samples
        if callable(count):
            count = count(self.distribution.entropy())
        count = tf.where(self.step < self.warmup_steps, self.warmup_samples, count)
        drawn = self.distribution.sample(count, self.seed, self.step, self.stratified)
        return Samples.unique(drawn) if self.deduplicate else Samples.each(drawn)

    def tell(self, samples: Samples, log_likelihoods: tf.Tensor) -> dict[str, tf.Tensor]:
        """Updates the logits and the cost coefficient; counts the step.

        Args:
            samples: What `ask` drew.
            log_likelihoods: Mean log-likelihood of each, float32 of shape `(evaluated,)`.

        Returns:
            What is known of the step: `entropy` (nats), `samples` (draws), `evaluated`
            (networks), `expected_cost`, `cost_coefficient`.
        """
        warming_up = self.step < self.warmup_steps
        entropy = self.distribution.entropy()
        expected_cost, cost_slope = self.cost_table.expected_and_slope(
            self.distribution.entry_probabilities()
        )
        coefficients = estimator.likelihood_coefficients(
            log_likelihoods, samples.counts, self.likelihood_scale, self.control_variate
        )
        gradient = self.distribution.gradient(samples.choices, coefficients)
        coefficient = tf.constant(0.0)
        if self.cost.target is not None:
            coefficient = self._cost_coefficient(expected_cost)
            gradient += coefficient * self._cost_gradient(samples, cost_slope)
        # A zero gradient would not do: the optimizer would count the step.
        tf.cond(warming_up, lambda: None, lambda: self._update_logits(gradient))
        draws = tf.reduce_sum(samples.counts)
        self.step.assign_add(1)
        self.total_samples.assign_add(tf.cast(draws, tf.int64))
        self.total_evaluated.assign_add(tf.size(samples.counts, tf.int64))
        return {
            "entropy": entropy,
            "samples": draws,
            "evaluated": tf.size(samples.counts),
            "expected_cost": expected_cost,
            "cost_coefficient": coefficient,
        }

    def _update_logits(self, gradient):
        self.architecture_optimizer.apply([gradient], [self.distribution.logits])

    def _cost_coefficient(self, expected_cost):
        controller = self.cost_coefficient
        if not isinstance(controller, CostController):
            return tf.constant(controller, tf.float32)
        # In the warm-up the logits stand still, and so does the controller.
        steps = tf.maximum(self.step - self.warmup_steps, 0)
        goal = controller.goal(self._start_cost, self.cost.target, steps)
        excess = tf.cast(expected_cost / goal - 1, tf.float32)
        excess = tf.where(self.step < self.warmup_steps, 0.0, excess)
        coefficient, integral = controller(self.cost_integral.value, excess)
        self.cost_integral.assign(integral)
        return coefficient

    def _cost_gradient(self, samples, cost_slope):
        """Gradient of the penalty in the logits."""
        target = self.cost.target
        if self.cost_penalty == "expected":
            return self.distribution.entry_gradient(cost_slope / target)
        coefficients = estimator.penalty_coefficients(
            self.cost_table(samples.choices), samples.counts, target, self.cost_penalty == "log"
        )
        return self.distribution.gradient(samples.choices, coefficients)

    def refine(self) -> None:
        """From factorized to joint logits: the same p(A), and fresh optimizer slots.

        For `distribution="coarse_to_fine"`; the callback `CoarseToFine` does it at an
        epoch. `fit` traces the next step anew, and a learning rate schedule of the
        architecture optimizer starts again. A `tf.function` of your own around `ask` or
        `tell` must be made anew.

        Raises:
            UserError: When the search has no joint logits to go to, or is not compiled.
        """
        if self.architecture_optimizer is None:
            raise UserError("`refine` needs a search that is compiled.")
        if self.distribution is self.distributions[-1]:
            raise UserError(
                "only a search with distribution='coarse_to_fine' can be refined, and once. "
                f"Received: distribution={type(self.distribution).__name__}"
            )
        self.distributions[1].assign(self.distribution)
        self.phase.assign_add(1)
        # The joint logits have slots of their own, still empty.
        self.architecture_optimizer.iterations.assign(0)
        self._forget_traces()

    def load_weights(self, *args: Any, **kwargs: Any) -> None:
        """As `keras.Model.load_weights`; the search goes on in the phase of the file."""
        super().load_weights(*args, **kwargs)
        self._forget_traces()

    def _forget_traces(self):
        """The phase is fixed when a step is traced."""
        for name in ("train", "test", "predict"):
            if getattr(self, f"{name}_function") is not None:
                getattr(self, f"make_{name}_function")(force=True)

    @property
    def distribution(self) -> BlockLogits:
        """The distribution that the search is at: `FactorizedLogits` or `JointLogits`."""
        with tf.init_scope():  # While a step is traced too.
            return self.distributions[int(self.phase.numpy())]

    def test_step(self, data) -> dict[str, tf.Tensor]:
        """Loss and accuracy of the most probable architecture under the shared weights."""
        images, labels = data
        loss, accuracy = tf.unstack(_loss_and_accuracy(labels, self(images)))
        # The last batch may be smaller.
        count = tf.shape(images)[0]
        self._track(count, validation_loss=loss, validation_accuracy=accuracy)
        names = ("validation_loss", "validation_accuracy")
        return {name: self._trackers[name].result() for name in names}

    def derive(
        self,
        budget: float | Sequence[float] | str | None = "target",
        seconds: float = 60.0,
        least_share: float = 0.0,
    ) -> Architecture | list[Architecture]:
        """The most probable architecture, or the most probable one within a budget.

        Args:
            budget: Most that it may cost; several, for a list of architectures;
                "target" for the target of the search's cost, if it has one; `None` for
                no budget.
            seconds: Time to prove that nothing more probable is within the budget;
                after that the best so far is returned, with a warning.
            least_share: Least share of the budget that it should cost, 0 to 1. A search
                may leave much of a budget unused where its last doubts are about large
                blocks; the command line asks for 0.95.

        Raises:
            UserError: When no architecture is within the budget, or when the search
                has not left its warm-up, and knows nothing.
        """
        if np.ndim(budget) > 0:
            return [self.derive(each, seconds, least_share) for each in budget]
        found = self.derivation(budget, seconds, least_share)
        if found.gap > 0:
            warnings.warn(
                f"not proven in {seconds:g} s: another architecture that costs from "
                f"{format_cost(found.least)} to the budget may be up to {math.exp(found.gap):.3g} times "
                "as probable",
                stacklevel=2,
            )
        return found.architecture

    def derivation(
        self,
        budget: float | str | None = "target",
        seconds: float = 60.0,
        least_share: float = 0.0,
    ) -> Derivation:
        """As `derive` for one budget, with what is proven of the result."""
        if self.warmup_steps > 0 and self.step <= self.warmup_steps:
            raise UserError(
                f"the search has made {int(self.step.numpy())} steps, all of them in its warm-up: "
                f"`warmup_steps` must be lower, or the search longer. "
                f"Received: warmup_steps={self.warmup_steps}"
            )
        limit = self.cost.target if isinstance(budget, str) and budget == "target" else budget
        limit = math.inf if limit is None else limit
        if isinstance(limit, str) or not limit > 0 or not 0 <= least_share <= 1:
            raise UserError(
                "`budget` must be a cost above 0, 'target' or None and `least_share` from 0 to 1. "
                f"Received: budget={budget!r}, least_share={least_share}"
            )
        least = 0.0 if limit == math.inf else least_share * min(limit, self.cost_table.largest())
        log_p = self.distribution.log_probabilities().numpy()
        return most_probable(self.space, log_p, self.cost_table, limit, seconds, least)

    def weight_gradients(
        self, samples: Samples, batch: tuple[tf.Tensor, tf.Tensor]
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        """The weight half of a step: forward and backward, one sample at a time.

        Args:
            samples: What `ask` drew.
            batch: Images and labels.

        Returns:
            The gradient of each weight of the supernet, the sum of the samples' weighted by
            their importance, and loss and accuracy of each sample, shape `(evaluated, 2)`.
        """
        images, labels = batch
        # The stem runs once: what is summed over the samples is the gradient of its features.
        with tf.GradientTape() as tape:
            features = self.supernet.features(images)
        stem = self.supernet.stem_variables
        rest = self.supernet.trainable_variables[len(stem) :]
        inputs = [features, *(variable.value for variable in rest)]
        count = tf.size(samples.counts)

        def body(index, sums, results):
            with tf.GradientTape() as tape:
                tape.watch(features)
                result = self._evaluate(features, labels, samples.choices[index])
                loss = result[0]
            score = estimator.scores(-loss, samples.counts[index], self.likelihood_scale)
            sums, factor = sums.admit(score)
            # Scaled where it is one number, before the backward pass.
            gradients = tape.gradient(loss, inputs, factor, unconnected_gradients="zero")
            return index + 1, sums.add(gradients), results.write(index, result)

        # One at a time: it bounds the memory, and with TensorFlow 2.21's default of 10
        # the oneDNN kernels corrupt the heap within a minute.
        _, sums, results = tf.while_loop(
            lambda index, *_: index < count,
            body,
            (
                tf.constant(0),
                StreamingSum.zero(inputs),
                tf.TensorArray(tf.float32, count, element_shape=(2,)),
            ),
            parallel_iterations=1,
        )
        feature_gradient, *gradients = sums.result()
        feature_gradient = tf.cast(feature_gradient, features.dtype)
        weights = [variable.value for variable in stem]
        return tape.gradient(features, weights, feature_gradient) + gradients, results.stack()

    def evaluate_samples(self, samples: Samples, batch: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        """Loss and accuracy of each sample on images and labels, shape `(evaluated, 2)`."""
        images, labels = batch
        features = self.supernet.features(images)
        return tf.map_fn(
            lambda choices: self._evaluate(features, labels, choices),
            samples.choices,
            fn_output_signature=tf.TensorSpec((2,)),
            parallel_iterations=1,  # as above
        )

    def _evaluate(self, features, labels, choices):
        return _loss_and_accuracy(labels, self.supernet.logits(features, choices))

    def _track(self, sample_weight=None, **values):
        for name, value in values.items():
            self._trackers[name].update_state(value, sample_weight)


def _check_numbers(samples, control_variate, warmup_steps, warmup_samples, cost_coefficient):
    fewest = samples.minimum if isinstance(samples, AdaptiveSamples) else samples
    if fewest < 1 + control_variate:
        raise UserError(
            f"`samples` must be at least {1 + control_variate} a step"
            f"{' with the control variate' if control_variate else ''}. "
            f"Received: samples={samples}"
        )
    if warmup_samples < 1 or warmup_steps < 0:
        raise UserError(
            "`warmup_samples` must be at least 1 and `warmup_steps` at least 0. "
            f"Received: warmup_samples={warmup_samples}, warmup_steps={warmup_steps}"
        )
    is_controller = isinstance(cost_coefficient, CostController)
    if not is_controller and not 0 <= cost_coefficient < math.inf:
        raise UserError(
            "`cost_coefficient` must be a `CostController` or a number from 0. "
            f"Received: cost_coefficient={cost_coefficient}"
        )


def _check_target(space, cost, table):
    least, largest = table.least(), table.largest()
    if cost.target is not None and not least <= cost.target <= largest:
        raise UserError(
            f"`target` must be from {format_cost(least)} to {format_cost(largest)} {cost.unit}, the least and "
            f"the largest cost in the space `{space.name}`. Received: target={format_cost(cost.target)}"
        )


def _checked(name, value, legal):
    if value not in legal:
        raise UserError(f"`{name}` must be one of {', '.join(legal)}. Received: {name}={value!r}")
    return value


def _loss_and_accuracy(labels, logits):
    """Mean cross-entropy (minus the mean log-likelihood) and accuracy, shape `(2,)`."""
    logits = tf.cast(logits, tf.float32)
    loss = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    accuracy = keras.metrics.sparse_categorical_accuracy(labels, logits)
    return tf.stack([tf.reduce_mean(loss), tf.reduce_mean(accuracy)])
