"""The shared weights of a whole space, called with images and choices."""

import keras
import numpy as np
import tensorflow as tf

from fpnas_keras.architecture import attention_filters, expanded_filters
from fpnas_keras.layers import (
    SlicedBatchNorm,
    SlicedConv,
    SlicedDepthwiseConv,
    rescaling,
    switch,
)
from fpnas_keras.spaces import VARIABLES, SearchBlock, Space


class Supernet(keras.layers.Layer):
    """Runs any architecture of a space with shared weights, in one graph.

    A call computes what that architecture alone would compute, with batch
    statistics in every batch normalization; nothing is retraced for another one.

    Args:
        space: The space.
    """

    def __init__(self, space: Space, **kwargs):
        kwargs.setdefault("name", "supernet")
        super().__init__(**kwargs)
        stem, head = space.stem, space.head
        self.rescaling = rescaling()
        self.stem = SlicedConv(
            space.input_shape[2], stem.filters, stem.kernel_size, stem.strides, name="stem"
        )
        self.stem_bn = SlicedBatchNorm(stem.filters, name="stem_bn")
        self.stem_activation = keras.activations.get(stem.activation)
        self.blocks = [
            SupernetBlock(block, space.filters_in(index), name=f"block_{index}")
            for index, block in enumerate(space.blocks)
        ]
        self.head = SlicedConv(max(space.filters_in(len(space.blocks))), head.filters, name="head")
        self.head_bn = SlicedBatchNorm(head.filters, name="head_bn")
        self.head_activation = keras.activations.get(head.activation)
        features = head.filters
        self.head_dense = None
        if head.dense_units:
            self.head_dense = keras.layers.Dense(
                head.dense_units, self.head_activation, use_bias=False, name="head_dense"
            )
            self.head_dense.build((None, features))
            features = head.dense_units
        # Logits stay float32 under any policy.
        self.classes = keras.layers.Dense(space.num_classes, dtype="float32", name="classes")
        self.classes.build((None, features))
        self.built = True

    def call(self, images: tf.Tensor, choices: tf.Tensor) -> tf.Tensor:
        """Logits of one architecture.

        Args:
            images: Pixels 0..255, shape `(batch,) + input_shape`.
            choices: Index of the choice of each variable of each block, integers
                of shape `(blocks, variables)`.

        Returns:
            Logits of shape `(batch, num_classes)`.
        """
        x = self.rescaling(images)
        x = self.stem_activation(self.stem_bn(self.stem(x)))
        filters_in = tf.constant(0)
        for block, own in zip(self.blocks, tf.unstack(choices, num=len(self.blocks))):
            x = block(x, own, filters_in)
            if not block.block.keeps_filters:
                filters_in = own[VARIABLES.index("filters")]
        x = self.head_activation(self.head_bn(self.head(x)))
        x = tf.reduce_mean(x, axis=[1, 2])
        if self.head_dense is not None:
            x = self.head_dense(x)
        return self.classes(x)


class SupernetBlock(keras.layers.Layer):
    """An MBConv block whose variables are tensors.

    What it computes is what `network.py` builds for the same choices: 1x1 expand,
    depthwise, attention, 1x1 project, and the input added where shapes agree.

    Args:
        block: The choices.
        filters_in: The numbers of channels that may come in.
    """

    def __init__(self, block: SearchBlock, filters_in: tuple[int, ...], **kwargs):
        super().__init__(**kwargs)
        self.block = block
        self.filters_in = filters_in
        # Widths by (choice of filters in, choice of expansion).
        expanded = [[expanded_filters(n, e) for e in block.expansion] for n in filters_in]
        self.expanded = np.array(expanded, np.int32)
        self.bottleneck = np.vectorize(attention_filters)(self.expanded).astype(np.int32)
        filters_out = filters_in if block.keeps_filters else block.filters
        widest, filters = int(self.expanded.max()), max(filters_out)
        if set(block.expansion) != {1}:
            self.expand = SlicedConv(max(filters_in), widest, name=f"{self.name}_expand")
            self.expand_bn = SlicedBatchNorm(widest, name=f"{self.name}_expand_bn")
        self.depthwise = SlicedDepthwiseConv(
            widest, max(block.kernel_size), block.strides, name=f"{self.name}_depthwise"
        )
        self.depthwise_bn = SlicedBatchNorm(widest, name=f"{self.name}_depthwise_bn")
        if max(block.splits) > 0:
            bottleneck = int(self.bottleneck.max())
            self.attention_reduce = SlicedConv(
                widest, bottleneck, use_bias=True, name=f"{self.name}_attention_reduce"
            )
            self.attention_expand = SlicedConv(
                bottleneck, widest, use_bias=True, name=f"{self.name}_attention_expand"
            )
        self.project = SlicedConv(widest, filters, name=f"{self.name}_project")
        self.project_bn = SlicedBatchNorm(filters, name=f"{self.name}_project_bn")
        # Whether input and output can, and whether they always do, have one shape.
        self.may_agree = block.strides == 1 and bool(set(filters_in) & set(filters_out))
        self.must_agree = block.strides == 1 and (
            block.keeps_filters or len({*filters_in, *filters_out}) == 1
        )
        if True in block.skip and not self.must_agree:
            self.skip = SlicedConv(
                max(filters_in), filters, strides=block.strides, name=f"{self.name}_skip"
            )
            self.skip_bn = SlicedBatchNorm(filters, name=f"{self.name}_skip_bn")
        self.built = True

    def call(self, x: tf.Tensor, choices: tf.Tensor, filters_in: tf.Tensor) -> tf.Tensor:
        """Runs the block.

        Args:
            x: Features with as many channels as `filters_in` says.
            choices: Index of the choice of each variable, shape `(variables,)`.
            filters_in: Index of the channels of `x` among the block's `filters_in`.
        """
        choice = dict(zip(VARIABLES, tf.unstack(choices, num=len(VARIABLES))))
        if self.block.keeps_filters:
            filters = tf.shape(x)[-1]
        else:
            filters = tf.gather(tf.constant(self.block.filters), choice["filters"])
        branches = {
            False: lambda: self._mbconv(x, choice, filters_in, filters),
            True: lambda: self._skipped(x, filters),
        }
        return switch(choice["skip"], [branches[value] for value in self.block.skip])

    def _mbconv(self, inputs, choice, filters_in, filters):
        row, column = filters_in, choice["expansion"]
        expanded = tf.constant(self.expanded)[row, column]
        x = switch(
            column, [self._expand_branch(inputs, e, choice, expanded) for e in self.block.expansion]
        )
        kernel_size = tf.gather(tf.constant(self.block.kernel_size), choice["kernel_size"])
        x = self._activate(self.depthwise_bn(self.depthwise(x, kernel_size)), choice)
        bottleneck = tf.constant(self.bottleneck)[row, column]
        attention = {0: lambda: x, 1: lambda: x * self._gate(x, bottleneck, expanded)}
        x = switch(choice["splits"], [attention[splits] for splits in self.block.splits])
        x = self.project_bn(self.project(x, filters))
        return self._where_shapes_agree(inputs, filters, lambda: x + inputs, lambda: x)

    def _skipped(self, x, filters):
        return self._where_shapes_agree(
            x, filters, lambda: x, lambda: self.skip_bn(self.skip(x, filters))
        )

    def _expand_branch(self, x, expansion, choice, expanded):
        if expansion == 1:
            return lambda: x
        return lambda: self._activate(self.expand_bn(self.expand(x, expanded)), choice)

    def _activate(self, x, choice):
        functions = [keras.activations.get(name) for name in self.block.activation]
        return switch(choice["activation"], [lambda f=f: f(x) for f in functions])

    def _gate(self, x, bottleneck, expanded):
        pooled = tf.reduce_mean(x, axis=[1, 2], keepdims=True)
        pooled = tf.nn.relu(self.attention_reduce(pooled, bottleneck))
        return keras.activations.hard_sigmoid(self.attention_expand(pooled, expanded))

    def _where_shapes_agree(self, x, filters, agree, differ):
        if not self.may_agree:
            return differ()
        if self.must_agree:
            return agree()
        return tf.cond(tf.equal(tf.shape(x)[-1], filters), agree, differ)
