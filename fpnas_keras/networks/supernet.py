"""The shared weights of a whole space, called with images and choices."""

import functools

import keras
import numpy as np
import tensorflow as tf

from fpnas_keras.architecture import attention_filters, expanded_filters
from fpnas_keras.networks.conventions import make_rescaling
from fpnas_keras.networks.sliced_layers import (
    SlicedBatchNorm,
    SlicedConv,
    SlicedDepthwiseConv,
    activate,
    switch,
)
from fpnas_keras.spaces import VARIABLES, SearchBlock, Space


class Supernet(keras.layers.Layer):
    """Runs any architecture of a space with shared weights, in one graph.

    A call computes what that architecture alone would compute, with batch
    statistics in every batch normalization; nothing is retraced for another one.

    Args:
        space: The space.
        recompute: Whether the backward pass computes the activations inside each
            block anew instead of keeping them: less memory, more time.
    """

    def __init__(self, space: Space, recompute: bool = False, **kwargs):
        kwargs.setdefault("name", "supernet")
        super().__init__(**kwargs)
        self.recompute = recompute
        stem, head = space.stem, space.head
        self.rescaling = make_rescaling()
        self.stem = SlicedConv(
            space.input_shape[2], stem.filters, stem.kernel_size, stem.strides, name="stem"
        )
        self.stem_bn = SlicedBatchNorm(stem.filters, name="stem_bn")
        self.stem_activation = keras.activations.get(stem.activation)
        # The blocks of the networks, and the row of the choices that each follows.
        self.blocks, self.rows, filters_in = [], [], (stem.filters,)
        for row, search_block in enumerate(space.blocks):
            for block in search_block.positions:
                name = f"block_{len(self.blocks)}"
                self.blocks.append(SupernetBlock(block, filters_in, name=name))
                self.rows.append(row)
                filters_in = filters_in if block.keeps_filters else block.filters
        self.head = SlicedConv(max(filters_in), head.filters, name="head")
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
        return self.logits(self.features(images), choices)

    @property
    def stem_variables(self) -> list[keras.Variable]:
        """The weights that `features` uses."""
        return self.stem.trainable_variables + self.stem_bn.trainable_variables

    def features(self, images: tf.Tensor) -> tf.Tensor:
        """What the stem makes of images, the same for every architecture."""
        return self.stem_activation(self.stem_bn(self.stem(self.rescaling(images))))

    def logits(self, features: tf.Tensor, choices: tf.Tensor) -> tf.Tensor:
        """Logits of one architecture from the features of the stem; see `call`."""
        x, filters_in = features, tf.constant(0)
        rows = tf.unstack(choices, num=self.rows[-1] + 1)
        for block, row in zip(self.blocks, self.rows):
            run = functools.partial(block, choices=rows[row], filters_in=filters_in)
            x = tf.recompute_grad(run)(x) if self.recompute else run(x)
            if not block.block.keeps_filters:
                filters_in = rows[row][VARIABLES.index("filters")]
        x = self.head_activation(self.head_bn(self.head(x)))
        x = tf.reduce_mean(x, axis=[1, 2])
        if self.head_dense is not None:
            x = self.head_dense(x)
        return self.classes(x)

    def give_weights(self, model: keras.Model) -> None:
        """Gives the network of an architecture of the space its slice of the shared weights.

        Its batch norms' moving statistics stay what they are: `network.recalibrate`.

        Args:
            model: What `Architecture.build` made.
        """
        shared = {variable.path: variable.numpy() for variable in self.trainable_variables}
        for variable in model.trainable_variables:
            value = shared[variable.path]
            if value.ndim == 4:  # the middle of the kernel, the leading channels
                first = (value.shape[0] - variable.shape[0]) // 2
                value = value[first:, first:]
            variable.assign(value[tuple(slice(n) for n in variable.shape)])


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
        names = [f"{self.name}_depthwise_{split}" for split in range(max(1, *block.splits))]
        kernel_size = max(block.kernel_size)
        self.depthwise = [
            SlicedDepthwiseConv(widest, kernel_size, block.strides, name=name) for name in names
        ]
        self.depthwise_bn = [SlicedBatchNorm(widest, name=f"{name}_bn") for name in names]
        self._make_attention(widest)
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

    def _make_attention(self, widest):
        bottleneck, splits = int(self.bottleneck.max()), self.block.splits

        def conv(filters_in, filters, name):
            name = f"{self.name}_attention_{name}"
            return SlicedConv(filters_in, filters, use_bias=True, name=name)

        if max(splits) > 0:
            self.attention_reduce = conv(widest, bottleneck, "reduce")
        if 1 in splits:
            self.attention_expand = conv(bottleneck, widest, "expand")
        if max(splits) > 1:
            self.attention_splits = [
                conv(bottleneck, widest, f"split_{split}") for split in range(max(splits))
            ]

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
        x = self._expand(inputs, choice, expanded)
        kernel_size = tf.gather(tf.constant(self.block.kernel_size), choice["kernel_size"])
        widths = tf.constant(self.bottleneck)[row, column], expanded

        def depthwise(split):
            parts = self.depthwise[split](x, kernel_size)
            return self._activate(self.depthwise_bn[split](parts), choice)

        first = depthwise(0)  # whatever the splits are

        def attend(splits):
            if splits == 0:
                return first
            if splits == 1:
                return first * self._gate(first, *widths)
            parts = [first] + [depthwise(split) for split in range(1, splits)]
            gates = self._split_gates(parts, *widths)
            return tf.add_n([part * gate for part, gate in zip(parts, gates)])

        branches = [functools.partial(attend, splits) for splits in self.block.splits]
        x = switch(choice["splits"], branches)
        x = self.project_bn(self.project(x, filters))
        return self._where_shapes_agree(inputs, filters, lambda: x + inputs, lambda: x)

    def _skipped(self, x, filters):
        return self._where_shapes_agree(
            x, filters, lambda: x, lambda: self.skip_bn(self.skip(x, filters))
        )

    def _expand(self, x, choice, expanded):
        """Widths are tensors; only expansion 1, which has no convolution, is another branch."""
        if set(self.block.expansion) == {1}:
            return x
        is_one = np.equal(self.block.expansion, 1)
        branches = [
            lambda: self._activate(self.expand_bn(self.expand(x, expanded)), choice),
            lambda: x,
        ]
        index = tf.gather(is_one.astype(np.int32), choice["expansion"])
        return switch(index, branches[: 1 + is_one.any()])

    def _activate(self, x, choice):
        return activate(x, choice["activation"], self.block.activation)

    def _gate(self, x, bottleneck, expanded):
        features = self._attention_bottleneck([x], bottleneck)
        return keras.activations.hard_sigmoid(self.attention_expand(features, expanded))

    def _split_gates(self, parts, bottleneck, expanded):
        features = self._attention_bottleneck(parts, bottleneck)
        layers = self.attention_splits[: len(parts)]
        logits = tf.stack([layer(features, expanded) for layer in layers])
        return tf.unstack(tf.nn.softmax(logits, axis=0))

    def _attention_bottleneck(self, parts, bottleneck):
        pooled = tf.add_n([tf.reduce_mean(part, axis=[1, 2], keepdims=True) for part in parts])
        return tf.nn.relu(self.attention_reduce(pooled, bottleneck))

    def _where_shapes_agree(self, x, filters, agree, differ):
        if not self.may_agree:
            return differ()
        if self.must_agree:
            return agree()
        return tf.cond(tf.equal(tf.shape(x)[-1], filters), agree, differ)
