"""The search: a Keras model whose training step updates weights and architecture."""

from typing import Any

import keras
import tensorflow as tf

from fpnas_keras import estimator
from fpnas_keras.architecture import Architecture
from fpnas_keras.cost import CostTable, MacsCost
from fpnas_keras.distributions import FactorizedLogits
from fpnas_keras.estimator import AdaptiveSamples, StreamingSum
from fpnas_keras.spaces import Space
from fpnas_keras.supernet import Supernet


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
        cost_coefficient: Weight of the cost in the gradient of the logits (the
            paper's beta).
        warmup_steps: Steps at the start that train the weights alone, on uniformly
            drawn architectures. Untrained weights favour the smallest networks, which
            learn first; a few hundred steps are enough to turn that round.
        warmup_samples: Architectures a step in the warm-up.
        likelihood_scale: tau of the importance weights softmax(tau * l_k), l_k the
            mean log-likelihood of an example.
        control_variate: Whether 1/K is subtracted from the importance weights in
            the gradient of the logits; the expectation is the same, the variance
            much lower. The paper has none.
        seed: Seed of the drawn architectures.

    Raises:
        ValueError: When the target lies below the cheapest architecture, or when
            the control variate meets K = 1, where it makes every gradient zero.

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
        cost_coefficient: float = 0.3,
        warmup_steps: int = 300,
        warmup_samples: int = 2,
        likelihood_scale: float = 1.0,
        control_variate: bool = True,
        seed: int = 0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        fewest = samples.minimum if isinstance(samples, AdaptiveSamples) else samples
        if fewest < 1 + control_variate:
            raise ValueError(
                f"`samples` must be at least {1 + control_variate} a step"
                f"{' with the control variate' if control_variate else ''}. "
                f"Received: samples={samples}"
            )
        self.space = space
        self.samples = samples
        self.cost = cost or MacsCost()
        self.cost_coefficient = cost_coefficient
        self.warmup_steps = warmup_steps
        self.warmup_samples = warmup_samples
        self.likelihood_scale = likelihood_scale
        self.control_variate = control_variate
        self.seed = seed
        self.cost_table = CostTable(space, self.cost)
        if self.cost.target is not None and self.cost.target < self.cost_table.least():
            raise ValueError(
                f"`target` must be at least {self.cost_table.least():,.0f} {self.cost.unit}, the "
                f"least cost in the space `{space.name}`. Received: target={self.cost.target:,.0f}"
            )
        self.distribution = FactorizedLogits(space.blocks)
        self.supernet = Supernet(space)
        self.step = self._counter("step")
        self.total_samples = self._counter("total_samples")
        self._trackers = {
            name: keras.metrics.Mean(name=name)
            for name in (
                "train_loss",
                "train_accuracy",
                "validation_loss",
                "validation_accuracy",
                "entropy",
                "samples",
                "expected_cost",
            )
        }
        self.built = True

    def _counter(self, name):
        return self.add_weight(
            name=name, shape=(), dtype="int64", initializer="zeros", trainable=False
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
        super().compile(optimizer=optimizer, jit_compile=False, **kwargs)
        self.optimizer.build(self.supernet.trainable_variables)
        self.architecture_optimizer = keras.optimizers.get(architecture_optimizer)
        self.architecture_optimizer.build(self.distribution.trainable_variables)

    def call(self, images: tf.Tensor) -> tf.Tensor:
        return self.supernet(images, self.distribution.mode())

    def train_step(self, data) -> dict[str, tf.Tensor]:
        """One update of the weights on the first batch and of the logits on the second."""
        train_batch, validation_batch = data
        warming_up = self.step < self.warmup_steps
        entropy = self.distribution.entropy()
        count = self.samples(entropy) if callable(self.samples) else tf.constant(self.samples)
        count = tf.where(warming_up, self.warmup_samples, count)
        choices = self.distribution.sample(count, self.seed, self.step)
        # Both halves use the weights and the logits from the step's start.
        gradients, train, validation = self._run_samples(choices, train_batch, validation_batch)
        expected_cost = self.cost_table.expected(self.distribution.entry_probabilities())
        coefficients = estimator.sample_coefficients(
            -validation[:, 0],
            self._penalties(choices),
            self.likelihood_scale,
            self.cost_coefficient,
            self.control_variate,
        )
        logits_gradient = self.distribution.gradient(choices, coefficients)
        self.optimizer.apply(gradients, self.supernet.trainable_variables)
        # A zero gradient would not do: the optimizer would count the step.
        tf.cond(warming_up, lambda: None, lambda: self._update_logits(logits_gradient))
        self.step.assign_add(1)
        self.total_samples.assign_add(tf.cast(count, tf.int64))
        return self._track(
            entropy=entropy,
            samples=count,
            expected_cost=expected_cost,
            train_loss=train[:, 0],
            train_accuracy=train[:, 1],
            validation_loss=validation[:, 0],
            validation_accuracy=validation[:, 1],
        )

    def test_step(self, data) -> dict[str, tf.Tensor]:
        """Loss and accuracy of the most probable architecture under the shared weights."""
        images, labels = data
        loss, accuracy = tf.unstack(_loss_and_accuracy(labels, self(images)))
        # The last batch may be smaller.
        count = tf.shape(images)[0]
        return self._track(count, validation_loss=loss, validation_accuracy=accuracy)

    def derive(self) -> Architecture:
        """The most probable architecture.

        Raises:
            ValueError: When the search has not left its warm-up, and knows nothing.
        """
        if self.step < self.warmup_steps:
            raise ValueError(
                f"the search has made {int(self.step.numpy())} steps, all of them in its warm-up: "
                f"`warmup_steps` must be lower, or the search longer. "
                f"Received: warmup_steps={self.warmup_steps}"
            )
        return self.space.architecture(self.distribution.mode().numpy())

    def _update_logits(self, gradient):
        self.architecture_optimizer.apply([gradient], self.distribution.trainable_variables)

    def _penalties(self, choices):
        costs = self.cost_table(choices)
        if self.cost.target is None:
            return tf.zeros_like(costs)
        return estimator.hinge(costs, self.cost.target)

    def _run_samples(self, choices, train_batch, validation_batch):
        """Runs every sample on both batches, one at a time.

        Returns:
            The gradient of each weight, and loss and accuracy of each sample on
            the training and on the validation batch, shape `(K, 2)`.
        """
        weights = [variable.value for variable in self.supernet.trainable_variables]
        count = tf.shape(choices)[0]

        def body(index, sums, train, validation):
            with tf.GradientTape() as tape:
                result = self._evaluate(train_batch, choices[index])
                loss = result[0]
            gradients = tape.gradient(loss, weights, unconnected_gradients="zero")
            sums = sums.add(-self.likelihood_scale * loss, gradients)
            validation = validation.write(index, self._evaluate(validation_batch, choices[index]))
            return index + 1, sums, train.write(index, result), validation

        results = [tf.TensorArray(tf.float32, count, element_shape=(2,)) for _ in range(2)]
        # One at a time: it bounds the memory, and with TensorFlow 2.21's default of 10
        # the oneDNN kernels corrupt the heap within a minute.
        _, sums, train, validation = tf.while_loop(
            lambda index, *_: index < count,
            body,
            (tf.constant(0), StreamingSum.zero(weights), *results),
            parallel_iterations=1,
        )
        return sums.result(), train.stack(), validation.stack()

    def _evaluate(self, batch, choices):
        images, labels = batch
        return _loss_and_accuracy(labels, self.supernet(images, choices))

    def _track(self, sample_weight=None, **values):
        for name, value in values.items():
            self._trackers[name].update_state(value, sample_weight)
        return {name: self._trackers[name].result() for name in values}


def _loss_and_accuracy(labels, logits):
    """Mean cross-entropy (minus the mean log-likelihood) and accuracy, shape `(2,)`."""
    logits = tf.cast(logits, tf.float32)
    loss = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    accuracy = keras.metrics.sparse_categorical_accuracy(labels, logits)
    return tf.stack([tf.reduce_mean(loss), tf.reduce_mean(accuracy)])
