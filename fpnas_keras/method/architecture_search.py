"""The search: a Keras model whose training step updates the weights and the architecture."""

import contextlib
import math
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from fpnas_keras.architecture import Architecture
from fpnas_keras.cost import Cost, MacsCost, SpaceCost, format_cost
from fpnas_keras.data import Augmentation, Images, search_batches, to_images
from fpnas_keras.errors import UserError
from fpnas_keras.method import configs, estimator, replicas
from fpnas_keras.method.choices import COST_PENALTIES, DISTRIBUTIONS, STARTS
from fpnas_keras.method.derivation import Derivation, most_probable
from fpnas_keras.method.distributions import BlockLogits, FactorizedLogits, JointLogits
from fpnas_keras.method.estimator import AdaptiveSamples, CostController, Samples, StreamingSum
from fpnas_keras.networks import Supernet, check_floatx
from fpnas_keras.spaces import VARIABLES, Space

# The distributions of a search, in their order, for each of `DISTRIBUTIONS`.
_LOGITS = dict(
    zip(DISTRIBUTIONS, [(FactorizedLogits,), (JointLogits,), (FactorizedLogits, JointLogits)])
)
# Draws for each sample near the target. In a wide space few architectures are near it.
_DRAWS_PER_SAMPLE = 64
# Whether each metric of an epoch gets better as it rises or falls, for callbacks.
_METRICS = {
    "train_loss": "min",
    "train_accuracy": "max",
    "validation_loss": "min",
    "validation_accuracy": "max",
    "entropy": "min",
    "samples": "min",
    "evaluated": "min",
    "expected_cost": "min",
    "cost_coefficient": "min",
}
# Of `evaluate`. `fit` puts "val_" before them.
_TEST_METRICS = {"loss": "min", "accuracy": "max"}
_PLAIN_ARGUMENTS = (
    *("space", "samples", "cost", "cost_window", "cost_coefficient", "cost_penalty"),
    *("warmup_steps", "warmup_samples", "likelihood_scale", "control_variate", "stratified"),
    "deduplicate",
)


@keras.saving.register_keras_serializable("fpnas_keras")
class ArchitectureSearch(keras.Model):
    """Learns a distribution over the architectures of a space, and shared weights.

    Every step draws K architectures. Both updates of the step use them. The weights are updated by
    the importance-weighted gradient on a batch of the weights part of the training set. The
    architecture logits are updated from the likelihoods on a batch of the architecture part, which
    needs the forward pass only, and from the cost. The memory holds the activations of one
    architecture at a time, for any K.

    When the search is called on images, it returns the logits of its most probable architecture.
    Batch normalization then uses the statistics of the batch.

    Args:
        space: The space to search.
        samples: Number of architectures per step: an `AdaptiveSamples`, or a fixed number.
        cost: The cost that `expected_cost` reports, with the target of the search. `None` is
            `MacsCost()`, without a target.
        distribution: "factorized", "joint", or "coarse_to_fine". The last starts factorized and
            becomes joint by `refine`.
        start: The distribution at the start: "target" is the uniform distribution, moved until the
            expected cost is the target, so that no step is spent on networks of another cost;
            "uniform" is uniform in each variable, as in the paper.
        cost_window: Only architectures that cost the target, more or less by this share of it, are
            drawn. Their likelihoods then differ by what they are, and not by what they cost. It
            needs the control variate. 0 draws all architectures, as the paper does.
        cost_coefficient: Weight of the cost in the gradient of the logits (the paper's beta):
            a `CostController`, or a fixed number.
        cost_penalty: What the coefficient weighs: "expected" is E[cost] / target, with an exact
            gradient; "hinge" is the paper's mean of max(0, cost / target - 1) over the samples;
            "log" is its logarithm.
        warmup_steps: Number of steps at the start that train only the weights. Small networks learn
            faster, so that the likelihoods under untrained weights favor them. A few hundred steps
            are enough to change that.
        warmup_samples: Number of architectures per step in the warm-up.
        likelihood_scale: tau in the importance weights softmax_k(tau * l_k), where l_k is the mean
            log-likelihood per example.
        control_variate: Whether 1/K is subtracted from the importance weights in the gradient of
            the logits. The expectation does not change, and the variance is much lower. The paper
            has no control variate.
        stratified: Whether the draws of a step are stratified, so that a choice of probability p
            is drawn floor(K * p) or ceil(K * p) times. Otherwise the draws are independent.
        deduplicate: Whether equal samples of a step are evaluated once.
        recompute: Whether the backward pass computes the activations inside each block again
            instead of keeping them. It needs less memory and more time.
        seed: Seed of the draws.
        strategy: A `MirroredStrategy` or `MultiWorkerMirroredStrategy` whose replicas evaluate the
            samples of a step in parallel. Each replica sees the whole batch. Call `fit` outside the
            scope of the strategy.

    Raises:
        UserError: If the target is outside the costs of the space, if an argument is out of its
            range, if K can be 1 with the control variate, which makes every gradient zero, or if
            Keras' floatx is not float32.

    Example:

    ```python
    space = fpnas.spaces.get("mobile_mini", input_shape=(32, 32, 3))
    search = fpnas.ArchitectureSearch(space, cost=fpnas.MacsCost(target=5e6))
    search.compile(optimizer="sgd", architecture_optimizer="adam")
    search.fit(fpnas.data.search_batches(x, y, batch_size=64), epochs=30)
    model = search.derive().build()
    ```

    Reference: Yan et al., "FP-NAS: Fast Probabilistic Neural Architecture Search", CVPR 2021,
    arXiv:2011.10949.
    """

    def __init__(
        self,
        space: Space,
        samples: AdaptiveSamples | int = AdaptiveSamples(),
        cost: Cost | None = None,
        distribution: str = "factorized",
        start: str = "target",
        cost_window: float = 0.2,
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
        check_floatx()
        # Keras would number the searches of a process, and weight files hold the name.
        super().__init__(**{"name": "architecture_search"} | kwargs)
        _check_numbers(samples, control_variate, warmup_steps, warmup_samples, cost_coefficient)
        if not cost_window >= 0 or (cost_window and not control_variate and cost and cost.target):
            raise UserError(
                "`cost_window` must be at least 0, and 0 without the control variate: the gradient "
                "of the logits would be wrong. "
                f"Received: cost_window={cost_window}, control_variate={control_variate}"
            )
        _check_choice("cost_penalty", cost_penalty, COST_PENALTIES)
        _check_choice("distribution", distribution, DISTRIBUTIONS)
        _check_choice("start", start, STARTS)
        self.space = space
        self.samples = samples
        self._cost = cost or MacsCost()
        # For `get_config`.
        self._names = (distribution, start)
        self.cost_coefficient = cost_coefficient
        self.cost_penalty = cost_penalty
        self.cost_window = cost_window
        self.warmup_steps = warmup_steps
        self.warmup_samples = warmup_samples
        self.likelihood_scale = likelihood_scale
        self.control_variate = control_variate
        self.stratified = stratified
        self.deduplicate = deduplicate
        self.space_cost = SpaceCost(space, self.cost)
        _check_target(self.cost, self.space_cost)
        # Keras does not know the strategy: it would distribute the images, not the samples.
        self.strategy = strategy
        self._work = None if strategy is None else SpaceCost(space, replicas.WorkCost())
        with self._scope():
            self.distributions = [kind(space) for kind in _LOGITS[distribution]]
            self.supernet = Supernet(space, recompute)
        self._start_cost = self._assign_start(start)
        self._add_state(seed)
        self.architecture_optimizer = None
        self.built = True

    @property
    def cost(self) -> Cost:
        """The cost, with the target of the search. It cannot be replaced."""
        return self._cost

    @cost.setter
    def cost(self, value):
        raise UserError(
            "the `cost` of a search cannot be replaced: its tables and traces are made for it. "
            "Make a new `ArchitectureSearch` with the cost and give it the weights of this one. "
            f"Received: cost={value}"
        )

    def get_config(self) -> dict[str, Any]:
        """The arguments of the search, for `save`. A loaded search has no strategy."""
        distribution, start = self._names
        arguments = {name: getattr(self, name) for name in _PLAIN_ARGUMENTS}
        return configs.to_config(
            arguments
            | {"name": self.name, "distribution": distribution, "start": start}
            | {"recompute": self.supernet.recompute, "seed": int(self.seed.numpy())}
        )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ArchitectureSearch":
        """Makes a search from `get_config`."""
        return cls(**configs.from_config(config))

    def get_compile_config(self) -> dict[str, Any]:
        """The arguments of `compile`, for `save`."""
        if self.architecture_optimizer is None:
            return {}
        arguments = {
            "optimizer": self.optimizer,
            "architecture_optimizer": self.architecture_optimizer,
            "clip_norm": self.clip_norm,
        }
        serialize = keras.saving.serialize_keras_object
        return {name: serialize(each) for name, each in arguments.items()}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles the search from `get_compile_config`."""
        deserialize = keras.saving.deserialize_keras_object
        self.compile(**{name: deserialize(each) for name, each in config.items()})

    def _assign_start(self, name):
        """Assigns the distribution at the start of the search. Returns its expected cost."""
        start = FactorizedLogits(self.space)  # uniform in each variable
        if name == "target" and self.cost.target is not None:
            start.move_to(self.space_cost, self.cost.target)
        if isinstance(self.distributions[0], JointLogits):
            self.distributions[0].assign(start)
        else:
            self.distributions[0].logits.assign(start.logits)
        return float(self.space_cost.expected(start.entry_probabilities()))

    def _add_state(self, seed):
        """Adds the counters, the state of the controller and the metrics."""

        def counter(name, value=0):
            start = keras.initializers.Constant(value)
            return self.add_weight(
                name=name, shape=(), dtype="int64", initializer=start, trainable=False
            )

        self.step = counter("step")
        self.total_samples = counter("total_samples")
        self.total_evaluated = counter("total_evaluated")
        # Index of the current distribution.
        self.phase = counter("phase")
        self.seed = counter("seed", seed)
        self.cost_integral = self.add_weight(
            name="cost_integral", shape=(), initializer="zeros", trainable=False, autocast=False
        )
        self._trackers = {name: keras.metrics.Mean(name=name) for name in _METRICS | _TEST_METRICS}

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        return list(self._trackers.values())

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer = "sgd",
        architecture_optimizer: str | keras.optimizers.Optimizer = "adam",
        clip_norm: float | None = None,
        **kwargs: Any,
    ) -> None:
        """Configures the search.

        Args:
            optimizer: Updates the shared weights and nothing else.
            architecture_optimizer: Updates the logits and nothing else.
            clip_norm: Largest norm of the gradient of all shared weights together. A longer one is
                scaled down to it. `global_clipnorm` of an optimizer does the same, but the
                first step of a large space then takes minutes longer.
            **kwargs: Arguments of `keras.Model.compile`. `loss`, `metrics` and `jit_compile` must
                not be given: the method sets the first two, and shapes are dynamic.

        Raises:
            UserError: When `clip_norm` is not above 0.
        """
        if clip_norm is not None and not clip_norm > 0:
            raise UserError(
                f"`clip_norm` must be above 0, or None. Received: clip_norm={clip_norm}"
            )
        super().compile(optimizer=self._place_optimizer(optimizer), jit_compile=False, **kwargs)
        self.architecture_optimizer = self._place_optimizer(architecture_optimizer)
        self.clip_norm = clip_norm
        with self._scope():
            self.optimizer.build(self._weights())
            self.architecture_optimizer.build([layer.logits for layer in self.distributions])

    def _place_optimizer(self, optimizer):
        """The optimizer, or with a strategy a copy that is created in its scope."""
        optimizer = keras.optimizers.get(optimizer)
        if self.strategy is None:
            return optimizer
        with self._scope():
            return type(optimizer).from_config(optimizer.get_config())

    def _weights(self):
        return self.supernet.stem_variables + self.supernet.body_variables

    def _scope(self):
        return self.strategy.scope() if self.strategy else contextlib.nullcontext()

    def call(self, images: tf.Tensor) -> tf.Tensor:
        """Logits of the most probable architecture.

        Args:
            images: Pixels 0..255, shape `(batch,) + input_shape`.

        Returns:
            float32 of shape `(batch, num_classes)`.
        """
        return self.supernet(images, self._choices(self.distribution.mode()))

    def _choices(self, entries):
        """The choices that the supernet takes: `(..., blocks)` to `(..., blocks, variables)`."""
        choices = tf.constant(self.space.entries.choices.reshape(-1, len(VARIABLES)))
        return tf.gather(choices, entries + self.space.entries.offsets)

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: str | int = "auto",
        callbacks: Sequence[keras.callbacks.Callback] | None = None,
        *,
        class_weight: dict[int, float] | None = None,
        sample_weight: Any = None,
        steps_per_epoch: int | None = None,
        weights_share: float | None = None,
        augmentation: Augmentation | None = None,
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """Searches, as `keras.Model.fit` trains.

        Images are split into the weights part and the architecture part as `data.search_batches`
        does. For callbacks with `mode="auto"` the metrics of a search have directions: losses,
        entropy and cost should fall, accuracies should rise.

        Args:
            x: One of

                * batches of `data.search_batches`: `((x_t, y_t), (x_v, y_v))`
                * pixels 0..255, an array of shape `(n,) + input_shape`
                * `data.Images`
                * a `tf.data.Dataset` or `keras.utils.PyDataset` of images, labels and maybe
                  weights, which is read into memory.
            y: Index of the class of each image, or one-hot rows, if `x` is an array.
            batch_size: Images of each part in a batch. Default: 64.
            epochs: Epochs.
            verbose: As in Keras.
            callbacks: As in Keras.
            class_weight: Weight of each class in the loss.
            sample_weight: Weight of each image in the loss.
            steps_per_epoch: Steps in an epoch. Default: one pass over the weights part.
            weights_share: As for `data.search_batches`.
            augmentation: As for `data.search_batches`.
            **kwargs: Further arguments of `keras.Model.fit`. `validation_data` is evaluated with
                the most probable architecture and the shared weights.

        Returns:
            The history, with the metrics of each epoch.

        Raises:
            UserError: When the images or labels do not fit the space.

        Example:

        ```python
        search.compile("sgd", "adam")
        history = search.fit(x, y, batch_size=64, epochs=30)
        ```
        """
        for callback in callbacks or ():
            _set_direction(callback)
        given = {"y": y, "batch_size": batch_size, "class_weight": class_weight}
        given |= {"sample_weight": sample_weight, "weights_share": weights_share}
        given |= {"augmentation": augmentation}
        if not _is_search_batches(x):
            _refuse(kwargs, "validation_split", "validation_data=(x, y) takes images apart")
            x = self._make_batches(x, steps_per_epoch=steps_per_epoch, **given)
            steps_per_epoch = None
        else:
            for name, value in given.items():
                if value is not None:
                    raise UserError(
                        f"`{name}` must not be given: the batches `x` of `search_batches` have it"
                    )
        return super().fit(
            x,
            epochs=epochs,
            verbose=verbose,
            callbacks=callbacks,
            steps_per_epoch=steps_per_epoch,
            **{"shuffle": False} | kwargs,  # The batches have their order.
        )

    def _make_batches(self, x, y, class_weight, sample_weight, batch_size, **kwargs):
        shape, classes = self.space.input_shape, self.space.num_classes
        if not isinstance(x, Images):
            x = to_images(x, y, sample_weight, class_weight, shape, classes)
        elif not (y is class_weight is sample_weight is None):
            raise UserError(
                "`y`, `class_weight` and `sample_weight` must not be given: the images `x` have "
                "labels and may have weights"
            )
        elif (x.image_shape, len(x.class_names)) != (shape, classes):
            raise UserError(
                f"`x` must have images of {shape} and {classes} classes. "
                f"Received: images of {x.image_shape} and {len(x.class_names)} classes"
            )
        return search_batches(
            x,
            batch_size=batch_size or 64,
            seed=int(self.seed.numpy()),
            # Another `fit` goes on in the order of the images.
            first_step=int(self.step.numpy()),
            whole_epochs=True,
            **kwargs,
        )

    def train_step(
        self, data: tuple[tuple[tf.Tensor, ...], tuple[tf.Tensor, ...]]
    ) -> dict[str, tf.Tensor]:
        """Updates the weights on the first batch and the logits on the second.

        Args:
            data: Images and labels of the weights part, and images and labels of the architecture
                part. Each may be followed by weights of the images.

        Returns:
            The means of all metrics so far in this epoch.
        """
        train_batch, validation_batch = data
        samples = self.ask()
        # Both updates use the weights and the logits from the start of the step.
        if self.strategy is None:
            gradients, train = self.weight_gradients(samples, train_batch)
            validation = self._evaluate_for_logits(samples, validation_batch)
        else:
            gradients, train, validation = self._evaluate_on_replicas(
                samples, train_batch, validation_batch
            )
        if self.clip_norm is not None:
            gradients = _clip(gradients, self.clip_norm)
        self.optimizer.apply(gradients, self._weights())
        for part, results in (("train", train), ("validation", validation)):
            loss, accuracy = tf.unstack(results, axis=1)
            self._track(samples.counts, **{f"{part}_loss": loss, f"{part}_accuracy": accuracy})
        self._track(**self.tell(samples, -validation[:, 0]))
        return {name: self._trackers[name].result() for name in _METRICS}

    def _evaluate_on_replicas(self, samples, train_batch, validation_batch):
        """Computes `weight_gradients` and `evaluate_samples` on all replicas together.

        Returns:
            Gradients, results on the training batch and results on the validation batch. All
            replicas have the same ones.
        """
        work = self._work(samples.entries)
        results = self.strategy.run(
            self._evaluate_on_replica, args=(samples, work, train_batch, validation_batch)
        )
        return tf.nest.map_structure(
            lambda value: replicas.first_replica_value(value, self.strategy), results
        )

    def _evaluate_on_replica(self, samples, work, train_batch, validation_batch):
        """Evaluates this replica's share of the samples, and exchanges the results.

        A replica's gradient is weighted by importance within its share S of the samples:
        G_S = sum_S r_k g_k / sum_S r_k. The gradient of all samples is the sum over the replicas of
        (sum_S r_k) * G_S.
        """
        replica = tf.distribute.get_replica_context()
        share = replicas.own_share(
            work, replica.replica_id_in_sync_group, replica.num_replicas_in_sync
        )
        own_samples = Samples(*(tf.gather(values, share) for values in samples))
        gradients, train = self.weight_gradients(own_samples, train_batch)
        validation = self._evaluate_for_logits(own_samples, validation_batch)
        # The four columns: loss and accuracy on the training batch and on the validation batch.
        own_results = tf.concat([train, validation], axis=1)
        results = tf.scatter_nd(share[:, None], own_results, (tf.size(samples.counts), 4))
        (results,) = replicas.sum_over_replicas([results])
        train, validation = tf.split(results, 2, axis=1)
        train_loss = train[:, 0]
        log_weights = estimator.log_importance_weights(
            -train_loss, samples.counts, self.likelihood_scale
        )
        share_weight = tf.reduce_sum(tf.gather(tf.nn.softmax(log_weights), share))
        gradients = [share_weight * tf.cast(gradient, tf.float32) for gradient in gradients]
        return replicas.sum_over_replicas(gradients), train, validation

    def ask(self) -> Samples:
        """Draws the architectures of a step.

        `ask` and `tell` make a search with any evaluation of architectures. `fit` calls `ask`,
        evaluates the samples with the shared weights, and calls `tell`.

        Example:

        ```python
        samples = search.ask()
        log_likelihoods = [my_evaluation(each) for each in search.architectures(samples)]
        search.tell(samples, tf.constant(log_likelihoods))
        ```
        """
        count = self.samples
        if callable(count):
            count = count(self.distribution.entropy())
        count = tf.where(self._is_warming_up(), self.warmup_samples, count)
        if self.cost.target is None or not self.cost_window:
            drawn = self.distribution.sample(count, self.seed, self.step, self.stratified)
        else:
            drawn = self._draw_near_target(count)
        return Samples.unique(drawn) if self.deduplicate else Samples.each(drawn)

    def cost_of_steps(self, first: int, end: int) -> float:
        """About what steps cost, in forward passes of one batch: the warm-up draws less.

        The forward and backward pass of a sample cost as much as three forward passes.

        Args:
            first: Index of the first step.
            end: One past the index of the last. Steps after the warm-up cost what they cost now.
        """
        count = self.samples
        if callable(count):
            count = int(count(self.distribution.entropy()))
        warming_up = max(0, min(end, self.warmup_steps) - first)
        return warming_up * (3 * self.warmup_samples + 1) + (end - first - warming_up) * 4 * count

    def _draw_near_target(self, count):
        """Draws from p(A | cost(A) is within the window), by rejection.

        The gradient of log p(A | window) is that of log p(A) minus a term that is the same for all
        samples. The coefficients of the samples sum to 0 with the control variate, so that the term
        has no effect.
        """
        drawn = self.distribution.sample(
            count * _DRAWS_PER_SAMPLE, self.seed, self.step, self.stratified
        )
        off = tf.abs(self.space_cost(drawn) / self.cost.target - 1)
        # If too few are within the window, those nearest to it follow.
        order = tf.argsort(tf.maximum(off, self.cost_window), stable=True)
        return tf.gather(drawn, order[:count])

    def architectures(self, samples: Samples) -> list[Architecture]:
        """The architectures of samples. It needs eager tensors.

        Args:
            samples: The result of `ask`.

        Returns:
            One architecture for each element of `samples.counts`.
        """
        choices = self.space.entries.to_choices(samples.entries.numpy())
        return [self.space.architecture(each) for each in choices]

    def tell(self, samples: Samples, log_likelihoods: tf.Tensor) -> dict[str, tf.Tensor]:
        """Updates the logits and the cost coefficient, and counts the step.

        Args:
            samples: The result of `ask`.
            log_likelihoods: Mean log-likelihood per example of each architecture, float32 of shape
                `(evaluated,)`.

        Returns:
            Scalars: `entropy` (nats), `samples` (number of draws), `evaluated` (number of evaluated
            architectures), `expected_cost`, `cost_coefficient`.
        """
        entropy = self.distribution.entropy()
        expected_cost, cost_slope = self.space_cost.expected_and_slope(
            self.distribution.entry_probabilities()
        )
        coefficients = estimator.likelihood_coefficients(
            log_likelihoods, samples.counts, self.likelihood_scale, self.control_variate
        )
        gradient = self.distribution.gradient(samples.entries, coefficients)
        coefficient = tf.constant(0.0)
        if self.cost.target is not None:
            coefficient = self._cost_coefficient(expected_cost)
            gradient += coefficient * self._cost_gradient(samples, cost_slope)
        # In the warm-up the optimizer must not run at all: it would count a step even for a
        # gradient of zero.
        tf.cond(self._is_warming_up(), lambda: None, lambda: self._update_logits(gradient))
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

    def _is_warming_up(self):
        return self.step < self.warmup_steps

    def _update_logits(self, gradient):
        self.architecture_optimizer.apply([gradient], [self.distribution.logits])

    def _cost_coefficient(self, expected_cost):
        controller = self.cost_coefficient
        if not isinstance(controller, CostController):
            return tf.constant(controller, tf.float32)
        # The warm-up does not change the logits, so the controller must not accumulate excess.
        steps = tf.maximum(self.step - self.warmup_steps, 0)
        goal = controller.goal(self._start_cost, self.cost.target, steps)
        excess = tf.cast(expected_cost / goal - 1, tf.float32)
        excess = tf.where(self._is_warming_up(), 0.0, excess)
        coefficient, integral = controller(self.cost_integral.value, excess)
        self.cost_integral.assign(integral)
        return coefficient

    def _cost_gradient(self, samples, cost_slope):
        """The gradient of the penalty with respect to the logits."""
        target = self.cost.target
        if self.cost_penalty == "expected":
            return self.distribution.entry_gradient(cost_slope / target)
        coefficients = estimator.penalty_coefficients(
            self.space_cost(samples.entries), samples.counts, target, self.cost_penalty == "log"
        )
        return self.distribution.gradient(samples.entries, coefficients)

    def refine(self) -> None:
        """Converts the factorized logits into joint logits with the same p(A).

        For `distribution="coarse_to_fine"`. The callback `CoarseToFine` calls it at an epoch.

        The architecture optimizer starts again: with empty slots and at the beginning of its
        learning rate schedule. `fit` traces the next step again. If you have wrapped `ask` or
        `tell` in a `tf.function`, create a new one.

        Raises:
            UserError: If the search has no joint logits, if it has been refined already, or if it
                is not compiled.
        """
        if self.architecture_optimizer is None:
            raise UserError("`refine` needs a search that is compiled: call `compile` first.")
        if self.distribution is self.distributions[-1]:
            raise UserError(
                "only a search with distribution='coarse_to_fine' can be refined, and only once. "
                f"Received: distribution={type(self.distribution).__name__}"
            )
        self.distributions[1].assign(self.distribution)
        self.phase.assign_add(1)
        # `compile` has given the joint logits their own slots, which are still empty.
        self.architecture_optimizer.iterations.assign(0)
        self._forget_traces()

    def load_weights(self, *args: Any, **kwargs: Any) -> None:
        """Loads weights as `keras.Model.load_weights` does, with the phase of the search."""
        super().load_weights(*args, **kwargs)
        self._forget_traces()

    def _forget_traces(self):
        """Makes Keras trace its functions again: tracing fixes the phase."""
        for name in ("train", "test", "predict"):
            if getattr(self, f"{name}_function") is not None:
                getattr(self, f"make_{name}_function")(force=True)

    @property
    def distribution(self) -> BlockLogits:
        """The current distribution: `FactorizedLogits` or `JointLogits`."""
        with tf.init_scope():  # Reads the value even while a step is traced.
            return self.distributions[int(self.phase.numpy())]

    def test_step(self, data: tuple[tf.Tensor, ...]) -> dict[str, tf.Tensor]:
        """Loss and accuracy of the most probable architecture under the shared weights."""
        images, labels, *weights = data
        if labels.shape.rank == 2 and labels.shape[1] == self.space.num_classes:  # one-hot
            labels = tf.argmax(labels, axis=1)
        loss, accuracy = tf.unstack(_loss_and_accuracy([labels, *weights], self(images)))
        # The last batch can be smaller.
        count = tf.shape(images)[0]
        self._track(count, loss=loss, accuracy=accuracy)
        return {name: self._trackers[name].result() for name in _TEST_METRICS}

    def derive(
        self,
        budget: float | Sequence[float] | str | None = "target",
        seconds: float = 60.0,
        least_share: float = 0.95,
    ) -> Architecture | list[Architecture]:
        """The most probable architecture, or the most probable one within a budget.

        Args:
            budget: Largest cost of the architecture. "target" is the target of the search's cost,
                if it has one. `None` is no budget. A list of budgets gives a list of architectures.
            seconds: Time limit for the proof that no architecture within the budget is more
                probable. After it, the best architecture so far is returned, with a warning.
            least_share: Smallest share of the budget to use, 0 to 1. With 0, much of the budget can
                stay unused if the search is still undecided about large blocks.

        Returns:
            The architecture, or one architecture for each budget.

        Raises:
            UserError: If no architecture is within the budget, or if the search has made no steps
                after its warm-up.
        """
        if np.ndim(budget) > 0:
            return [self.derive(each, seconds, least_share) for each in budget]
        derivation = self.derivation(budget, seconds, least_share)
        if derivation.gap > 0:
            warnings.warn(
                f"not proven in {seconds:g} s: another architecture that costs from "
                f"{format_cost(derivation.least)} to the budget may be up to "
                f"{math.exp(derivation.gap):.3g} times as probable",
                stacklevel=2,
            )
        return derivation.architecture

    def derivation(
        self,
        budget: float | str | None = "target",
        seconds: float = 60.0,
        least_share: float = 0.95,
    ) -> Derivation:
        """Derives an architecture as `derive` does, and reports what has been proven.

        Args:
            budget: As for `derive`, but only one.
            seconds: As for `derive`.
            least_share: As for `derive`.

        Returns:
            The architecture with its cost, its probability and the gap of the proof.

        Raises:
            UserError: As `derive`.
        """
        if self.warmup_steps > 0 and self.step <= self.warmup_steps:
            raise UserError(
                f"the search has made {int(self.step.numpy())} steps, all of them in its warm-up. "
                "Use a lower `warmup_steps` or a longer search. "
                f"Received: warmup_steps={self.warmup_steps}"
            )
        limit, least = self._limits(budget, least_share)
        log_p = self.distribution.log_probabilities().numpy()
        return most_probable(log_p, self.space_cost, limit, seconds, least)

    def _limits(self, budget, least_share):
        """The largest and the smallest cost of the result."""
        limit = self.cost.target if isinstance(budget, str) and budget == "target" else budget
        limit = math.inf if limit is None else limit
        if isinstance(limit, str) or not limit > 0 or not 0 <= least_share <= 1:
            raise UserError(
                "`budget` must be a cost above 0, 'target' or None and `least_share` from 0 to 1. "
                f"Received: budget={budget!r}, least_share={least_share}"
            )
        least = 0.0 if limit == math.inf else least_share * min(limit, self.space_cost.largest())
        return limit, least

    def finalists(
        self,
        count: int,
        budget: float | str | None = "target",
        least_share: float = 0.95,
        seed: int | None = None,
    ) -> np.ndarray:
        """Architectures to choose the result from: likely ones within the budget.

        Args:
            count: Number of architectures.
            budget: As for `derive`, but only one.
            least_share: As for `derive`.
            seed: Seed of the draws. Default: that of the search.

        Returns:
            Entries, int32 of shape `(n, blocks)`, drawn from the distribution, all different. If
            few architectures are within the budget, `n` is below `count`.
        """
        limit, least = self._limits(budget, least_share)
        seed = int(self.seed.numpy()) if seed is None else seed
        return self.distribution.draw_within(self.space_cost, least, limit, count, seed)

    def weight_gradients(
        self, samples: Samples, batch: tuple[tf.Tensor, ...]
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        """The gradient of the weights: a forward and a backward pass for each sample.

        Args:
            samples: The result of `ask`.
            batch: Images and labels, and maybe weights.

        Returns:
            The gradients of `supernet.stem_variables` and `supernet.body_variables`, one after the
            other: sums over the samples, weighted by importance. And loss and accuracy of each
            sample, float32 of shape `(evaluated, 2)`.
        """
        images, *targets = batch
        # The stem runs once for all samples. The loop sums the gradients of its features.
        with tf.GradientTape() as tape:
            features = self.supernet.features(images)
        sums, results = self._sum_gradients(samples, features, targets)
        feature_gradient, *body_gradients = sums
        feature_gradient = tf.cast(feature_gradient, features.dtype)
        stem = [variable.value for variable in self.supernet.stem_variables]
        stem_gradients = tape.gradient(features, stem, feature_gradient)
        return stem_gradients + body_gradients, results

    def _sum_gradients(self, samples, features, targets):
        """Sums gradients over the samples, weighted by importance, one sample at a time.

        Returns:
            The gradients of `features` and of each of `supernet.body_variables`, and loss and
            accuracy of each sample.
        """
        inputs = [features, *(variable.value for variable in self.supernet.body_variables)]
        choices, count = self._choices(samples.entries), tf.size(samples.counts)

        def body(index, sums, results):
            with tf.GradientTape() as tape:
                tape.watch(features)
                logits = self.supernet.logits(features, choices[index])
                loss_and_accuracy = _loss_and_accuracy(targets, logits)
                loss = loss_and_accuracy[0]
            score = estimator.log_importance_weights(
                -loss, samples.counts[index], self.likelihood_scale
            )
            sums, factor = sums.add_score(score)
            # The factor scales the loss, which is cheaper than to scale the gradients.
            gradients = tape.gradient(loss, inputs, factor, unconnected_gradients="zero")
            for gradient, each in zip(gradients, inputs):
                gradient.set_shape(each.shape)  # The blocks run functions for any size.
            results = results.write(index, loss_and_accuracy)
            return index + 1, sums.add_scaled(gradients), results

        # One iteration at a time, which bounds the memory. Also, with TensorFlow 2.21's default of
        # 10 parallel iterations, the oneDNN kernels corrupt the heap within a minute.
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
        return sums.result(), results.stack()

    def evaluate_samples(self, samples: Samples, batch: tuple[tf.Tensor, ...]) -> tf.Tensor:
        """Evaluates samples with the shared weights: a forward pass for each.

        Args:
            samples: The result of `ask`.
            batch: Images and labels, and maybe weights.

        Returns:
            Loss and accuracy of each sample, float32 of shape `(evaluated, 2)`.
        """
        images, *targets = batch
        features = self.supernet.features(images)
        return tf.map_fn(
            lambda choices: _loss_and_accuracy(targets, self.supernet.logits(features, choices)),
            self._choices(samples.entries),
            fn_output_signature=tf.TensorSpec((2,)),
            parallel_iterations=1,  # See `_sum_gradients`.
        )

    def _evaluate_for_logits(self, samples, batch):
        """As `evaluate_samples`, but in the warm-up every sample has the results of the first.

        The logits do not change in the warm-up. The results are for the metrics alone.
        """
        count = tf.size(samples.counts)
        evaluated = tf.where(self._is_warming_up(), tf.minimum(count, 1), count)
        results = self.evaluate_samples(Samples(*(each[:evaluated] for each in samples)), batch)
        return tf.gather(results, tf.minimum(tf.range(count), evaluated - 1))

    def _track(self, sample_weight=None, **values):
        for name, value in values.items():
            self._trackers[name].update_state(value, sample_weight)


def _check_numbers(samples, control_variate, warmup_steps, warmup_samples, cost_coefficient):
    least = 1 + control_variate
    if isinstance(samples, AdaptiveSamples):
        argument, received = "`minimum` of `samples`", f"minimum={samples.minimum}"
        is_enough = samples.minimum >= least
    else:
        argument, received, is_enough = "`samples`", f"samples={samples}", samples >= least
    if not is_enough:
        reason = ": for 1 sample the control variate makes every gradient of the logits zero"
        raise UserError(
            f"{argument} must be at least {least}{reason if control_variate else ''}. "
            f"Received: {received}, control_variate={control_variate}"
        )
    if warmup_samples < 1 or warmup_steps < 0:
        raise UserError(
            "`warmup_samples` must be at least 1 and `warmup_steps` at least 0. "
            f"Received: warmup_samples={warmup_samples}, warmup_steps={warmup_steps}"
        )
    is_controller = isinstance(cost_coefficient, CostController)
    if not is_controller and not 0 <= cost_coefficient < math.inf:
        raise UserError(
            "`cost_coefficient` must be a `CostController` or a number of at least 0. "
            f"Received: cost_coefficient={cost_coefficient}"
        )


def _clip(gradients, clip_norm):
    """Scales gradients down to a global norm.

    For hundreds of gradients `tf.clip_by_global_norm`, which stacks their norms, makes a graph that
    takes minutes to start. A norm that is not finite makes all gradients NaN, as there.
    """
    norm = tf.sqrt(2 * tf.add_n([tf.nn.l2_loss(each) for each in gradients]))
    scale = tf.minimum(1.0, clip_norm / norm) + (norm - norm)
    return [scale * each for each in gradients]


def _set_direction(callback):
    """Sets the mode of a callback that monitors a metric of a search: Keras does not know it."""
    name = getattr(callback, "monitor", None)
    mode = (_METRICS | {f"val_{each}": value for each, value in _TEST_METRICS.items()}).get(name)
    if mode is not None and getattr(callback, "mode", None) == "auto":
        callback.mode = mode


def _is_search_batches(x):
    spec = getattr(x, "element_spec", None)
    return isinstance(spec, tuple) and all(isinstance(each, tuple) for each in spec)


def _refuse(arguments, name, way):
    if arguments.get(name):
        raise UserError(f"`{name}` cannot be given: {way}. Received: {name}={arguments[name]}")


def _check_target(cost, space_cost):
    least, largest = space_cost.least(), space_cost.largest()
    if cost.target is not None and not least <= cost.target <= largest:
        raise UserError(
            f"`target` must be from {format_cost(least)} to {format_cost(largest)} {cost.unit}, "
            f"the least and the largest cost in the space `{space_cost.space.name}`. "
            f"Received: target={format_cost(cost.target)}"
        )


def _check_choice(name, value, legal):
    if value not in legal:
        raise UserError(f"`{name}` must be one of {', '.join(legal)}. Received: {name}={value!r}")


def _loss_and_accuracy(targets, logits):
    """Mean cross-entropy, which is minus the mean log-likelihood, and accuracy: shape `(2,)`.

    As in Keras, weights multiply the losses before their mean, and accuracy is a weighted mean.
    """
    labels, *weights = targets
    logits = tf.cast(logits, tf.float32)
    loss = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    accuracy = keras.metrics.sparse_categorical_accuracy(labels, logits)
    if not weights:
        return tf.stack([tf.reduce_mean(loss), tf.reduce_mean(accuracy)])
    weights = tf.cast(weights[0], tf.float32)
    accuracy = tf.math.divide_no_nan(tf.reduce_sum(accuracy * weights), tf.reduce_sum(weights))
    return tf.stack([tf.reduce_mean(loss * weights), accuracy])
