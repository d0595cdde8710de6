"""The supernet: the shared weights of a space, which run any architecture of it."""

import functools
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from fpnas_keras.architecture import attention_filters, expanded_filters, output_size
from fpnas_keras.errors import UserError
from fpnas_keras.networks.conventions import check_floatx, make_rescaling
from fpnas_keras.networks.sliced_layers import (
    SlicedBatchNorm,
    SlicedConv,
    SlicedDepthwiseConv,
    activate,
    copy_slices,
    switch,
)
from fpnas_keras.spaces import VARIABLES, SearchBlock, Space


class Supernet(keras.layers.Layer):
    """Runs any architecture of a space with shared weights, in one graph.

    A call computes what the plain network of that architecture computes, with the statistics of
    the batch in every batch normalization. The choices are tensors: another architecture needs no
    retracing.

    Several architectures in one `tf.function` must run one after the other, as in a
    `tf.while_loop` with `parallel_iterations=1`. At the same time they corrupt memory on a CPU:
    TensorFlow's kernels of batch normalization, which they share, keep the number of channels.

    Args:
        space: The space.
        recompute: Whether the backward pass recomputes the activations inside each block instead
            of keeping them. This needs less memory and more time.

    Raises:
        UserError: When Keras' floatx is not float32.
    """

    def __init__(self, space: Space, recompute: bool = False, **kwargs):
        check_floatx()
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
        filters = self._make_blocks(space)
        self.head = SlicedConv(max(filters), head.filters, name="head")
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
        # Logits stay float32 under any dtype policy.
        self.classes = keras.layers.Dense(space.num_classes, dtype="float32", name="classes")
        self.classes.build((None, features))
        self.built = True

    def _make_blocks(self, space):
        """Makes the blocks. Returns the choices of the number of channels after the last one."""
        # The blocks of the networks: `repeats` blocks for each search block of the space.
        self.blocks = []
        # For each of them, the index of its search block, whose choices it has.
        self.search_block_indices = []
        # One block of each structure. Only their graphs are traced, optimized and kept in memory.
        representatives = {}
        filters = (space.stem.filters,)
        size = output_size(space.input_shape[:2], space.stem.strides)
        for index, repeated_block in enumerate(space.blocks):
            for search_block in repeated_block.unrolled:
                name = f"block_{len(self.blocks)}"
                block = SupernetBlock(search_block, filters, size, name=name)
                block.share_function(representatives.setdefault(block.structure, block))
                self.blocks.append(block)
                self.search_block_indices.append(index)
                size = output_size(size, search_block.strides)
                filters = filters if search_block.keeps_filters else search_block.filters
        return filters

    def call(self, images: tf.Tensor, choices: tf.Tensor) -> tf.Tensor:
        """Computes the logits of one architecture.

        Args:
            images: Pixels 0..255, float32 of shape `(batch,) + input_shape`.
            choices: Index of the choice of each variable of each search block, integers of shape
                `(search blocks, variables)`.

        Returns:
            Logits, float32 of shape `(batch, num_classes)`.
        """
        return self.logits(self.features(images), choices)

    @property
    def stem_variables(self) -> list[keras.Variable]:
        """The trainable variables of the stem, which `features` uses."""
        return self.stem.trainable_variables + self.stem_bn.trainable_variables

    @property
    def body_variables(self) -> list[keras.Variable]:
        """The trainable variables of blocks and head, which `logits` uses."""
        stem = {id(variable) for variable in self.stem_variables}
        return [variable for variable in self.trainable_variables if id(variable) not in stem]

    def features(self, images: tf.Tensor) -> tf.Tensor:
        """Runs the stem, which is the same for every architecture.

        Args:
            images: Pixels 0..255, float32 of shape `(batch,) + input_shape`.

        Returns:
            Features, `(batch, height, width, channels)`, in the compute dtype.
        """
        return self.stem_activation(self.stem_bn(self.stem(self.rescaling(images))))

    def logits(self, features: tf.Tensor, choices: tf.Tensor) -> tf.Tensor:
        """Runs the blocks and the head of one architecture.

        Args:
            features: Output of `features`.
            choices: As in `call`.

        Returns:
            Logits, float32 of shape `(batch, num_classes)`.
        """
        x = features
        # Index of the number of channels of `x` among the block's `filters_in`.
        filters_in_index = tf.constant(0)
        choices_by_search_block = tf.unstack(choices, num=self.search_block_indices[-1] + 1)
        for block, index in zip(self.blocks, self.search_block_indices):
            block_choices = choices_by_search_block[index]
            run = functools.partial(block, choices=block_choices, filters_in_index=filters_in_index)
            x = tf.recompute_grad(run)(x) if self.recompute else run(x)
            if not block.search_block.keeps_filters:
                filters_in_index = block_choices[VARIABLES.index("filters")]
        x = self.head_activation(self.head_bn(self.head(x)))
        x = tf.reduce_mean(x, axis=[1, 2])
        if self.head_dense is not None:
            x = self.head_dense(x)
        return self.classes(x)

    # A method and not a property: Keras saves layers under the first attribute that has them.
    def layers_by_plain_name(self) -> dict[str, keras.layers.Layer]:
        """The layers that hold weights, by the name of the plain network's layer they stand for."""
        layers = {
            "stem": self.stem,
            "stem_bn": self.stem_bn,
            "head": self.head,
            "head_bn": self.head_bn,
            "classes": self.classes,
        }
        if self.head_dense is not None:
            layers["head_dense"] = self.head_dense
        for index, block in enumerate(self.blocks):
            for suffix, layer in block.layers_by_suffix().items():
                layers[f"block_{index}_{suffix}"] = layer
        return layers

    def give_weights(self, model: keras.Model) -> None:
        """Copies slices of the shared weights into the plain network of an architecture.

        The moving statistics of its batch normalizations do not change: see `recalibrate`.

        Args:
            model: The network, from `Architecture.build`.

        Raises:
            UserError: When a layer with weights is not in the supernet, or does not fit.
        """
        shared = self.layers_by_plain_name()
        for layer in model.layers:
            if not layer.weights:
                continue
            if layer.name not in shared:
                raise UserError(
                    "`model` must be the network of an architecture of the supernet's space; the "
                    f"supernet has no weights for one of its layers. Received: layer={layer.name}"
                )
            copy_slices(shared[layer.name], layer)


class _Sizes(NamedTuple):
    """Sizes of a sampled block, int32 scalars.

    Attributes:
        filters: Channels out.
        kernel_size: Side of the depthwise kernel.
        expanded: Channels between the expand and the project convolution.
        bottleneck: Channels of the bottleneck of the attention.
    """

    filters: tf.Tensor
    kernel_size: tf.Tensor
    expanded: tf.Tensor
    bottleneck: tf.Tensor


class SupernetBlock(keras.layers.Layer):
    """An MBConv block whose choices are tensors.

    It computes what `NetworkBuilder.block` builds for the same choices: 1x1 expand, depthwise,
    attention, 1x1 project, and a residual connection where the shapes of input and output agree.

    Args:
        search_block: The choices of one block (no repeats).
        filters_in: The choices of the number of input channels.
        image_size: `(height, width)` of the features that come in.

    Attributes:
        structure: All that decides what the graph of the block looks like. It leaves out how large
            its weights and features are, and the values of the choices of `filters` and
            `expansion`.
        expanded: Expanded channels for each choice of the input channels and each choice of
            `expansion`, int32 of shape `(len(filters_in), len(search_block.expansion))`.
        bottleneck: Channels of the bottleneck of the attention, of the same shape.
    """

    def __init__(
        self,
        search_block: SearchBlock,
        filters_in: tuple[int, ...],
        image_size: tuple[int, int],
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.search_block = search_block
        self.filters_in = filters_in
        self.image_size = image_size
        expanded = [[expanded_filters(n, e) for e in search_block.expansion] for n in filters_in]
        bottleneck = [[attention_filters(n) for n in row] for row in expanded]
        self.expanded = np.array(expanded, np.int32)
        self.bottleneck = np.array(bottleneck, np.int32)
        filters_out = filters_in if search_block.keeps_filters else search_block.filters
        self._compare_shapes(filters_out)
        self._make_convolutions(max(filters_out))
        self.built = True
        self.structure = (
            search_block.strides,
            # What "same" padding depends on.
            tuple(size % search_block.strides for size in image_size),
            max(search_block.kernel_size),
            tuple(expansion == 1 for expansion in search_block.expansion),
            search_block.activation,
            search_block.splits,
            search_block.skip,
            self.shapes_can_match,
            self.shapes_always_match,
        )
        self._shared_function = _SharedFunction(self._run)

    def _compare_shapes(self, filters_out):
        """Finds whether input and output can have the same shape, and whether they always do."""
        has_stride_1 = self.search_block.strides == 1
        self.shapes_can_match = has_stride_1 and not set(self.filters_in).isdisjoint(filters_out)
        self.shapes_always_match = has_stride_1 and (
            self.search_block.keeps_filters or len({*self.filters_in, *filters_out}) == 1
        )

    def _make_convolutions(self, filters):
        """Makes the layers at their largest sizes, in the order of the variables in old files."""
        block, name = self.search_block, self.name
        filters_in, expanded = max(self.filters_in), int(self.expanded.max())
        self.expand = self.expand_bn = None
        if set(block.expansion) != {1}:
            self.expand = SlicedConv(filters_in, expanded, name=f"{name}_expand")
            self.expand_bn = SlicedBatchNorm(expanded, name=f"{name}_expand_bn")
        splits = range(max(1, *block.splits))
        self.depthwise = [
            SlicedDepthwiseConv(
                expanded,
                max(block.kernel_size),
                block.strides,
                self.image_size,
                name=f"{name}_depthwise_{split}",
            )
            for split in splits
        ]
        self.depthwise_bn = [
            SlicedBatchNorm(expanded, name=f"{name}_depthwise_{split}_bn") for split in splits
        ]
        self._make_attention(expanded)
        self.project = SlicedConv(expanded, filters, name=f"{name}_project")
        # A block that adds its input starts as the identity, so that networks with and without it
        # start equal, and deep ones do not diverge (Goyal et al., arXiv:1706.02677, section 5.1).
        gamma = "zeros" if self.shapes_always_match else "ones"
        self.project_bn = SlicedBatchNorm(filters, gamma, name=f"{name}_project_bn")
        self.skip = self.skip_bn = None
        if True in block.skip and not self.shapes_always_match:
            self.skip = SlicedConv(filters_in, filters, strides=block.strides, name=f"{name}_skip")
            self.skip_bn = SlicedBatchNorm(filters, name=f"{name}_skip_bn")

    def _make_attention(self, expanded):
        bottleneck, splits = int(self.bottleneck.max()), self.search_block.splits

        def conv(filters_in, filters, suffix):
            name = f"{self.name}_attention_{suffix}"
            return SlicedConv(filters_in, filters, use_bias=True, name=name)

        self.attention_reduce = self.attention_expand = None
        self.attention_splits = []
        if max(splits) > 0:
            self.attention_reduce = conv(expanded, bottleneck, "reduce")
        if 1 in splits:
            self.attention_expand = conv(bottleneck, expanded, "expand")
        if max(splits) > 1:
            self.attention_splits = [
                conv(bottleneck, expanded, f"split_{split}") for split in range(max(splits))
            ]

    def layers_by_suffix(self) -> dict[str, keras.layers.Layer]:
        """The layers that hold weights, by the plain layer's name without the block's name."""
        layers = {
            "expand": self.expand,
            "expand_bn": self.expand_bn,
            "attention_reduce": self.attention_reduce,
            "attention_expand": self.attention_expand,
            "project": self.project,
            "project_bn": self.project_bn,
            "skip": self.skip,
            "skip_bn": self.skip_bn,
        }
        for split, (conv, norm) in enumerate(zip(self.depthwise, self.depthwise_bn)):
            layers |= {f"depthwise_{split}": conv, f"depthwise_{split}_bn": norm}
        for split, conv in enumerate(self.attention_splits):
            layers[f"attention_split_{split}"] = conv
        return {suffix: layer for suffix, layer in layers.items() if layer is not None}

    def call(self, x: tf.Tensor, choices: tf.Tensor, filters_in_index: tf.Tensor) -> tf.Tensor:
        """Runs the block.

        Args:
            x: Features, `(batch, height, width, channels)`.
            choices: Index of the choice of each variable, integers of shape `(variables,)`.
            filters_in_index: Index of the number of channels of `x` in `filters_in`, an integer
                scalar.

        Returns:
            Features, `(batch, height, width, channels)`.
        """
        choice = dict(zip(VARIABLES, tf.unstack(choices, num=len(VARIABLES))))
        sizes = self._look_up_sizes(x, choice, filters_in_index)
        weights = [tf.convert_to_tensor(each) for each in self.trainable_variables]
        y = self._shared_function(x, choice, sizes, weights)
        y.set_shape((None, *output_size(self.image_size, self.search_block.strides), None))
        return y

    def share_function(self, other: "SupernetBlock") -> None:
        """Makes `call` run the graph of another block of the same structure."""
        self._shared_function = other._shared_function

    def _run(self, x, choice, sizes, weights):
        """Runs the block with the weights of any block of its structure."""
        branches = [
            functools.partial(self._skipped if skip else self._mbconv, x, choice, sizes)
            for skip in self.search_block.skip
        ]
        scope = keras.StatelessScope()
        for variable, weight in zip(self.trainable_variables, weights):
            # Not as an argument of the scope, which refuses weights of another size.
            scope.add_update((variable, weight))
        with scope:
            return switch(choice["skip"], branches)

    def _look_up_sizes(self, x, choice, filters_in_index):
        block = self.search_block
        if block.keeps_filters:
            filters = tf.shape(x)[-1]
        else:
            filters = tf.gather(tf.constant(block.filters), choice["filters"])
        return _Sizes(
            filters=filters,
            kernel_size=tf.gather(tf.constant(block.kernel_size), choice["kernel_size"]),
            expanded=tf.constant(self.expanded)[filters_in_index, choice["expansion"]],
            bottleneck=tf.constant(self.bottleneck)[filters_in_index, choice["expansion"]],
        )

    def _skipped(self, x, choice, sizes):
        """The identity, or a projection where the shapes of input and output differ."""
        return self._where_shapes_match(
            x, sizes, lambda: x, lambda: self.skip_bn(self.skip(x, sizes.filters))
        )

    def _mbconv(self, inputs, choice, sizes):
        x = self._expand(inputs, choice, sizes)
        # Every choice of `splits` has this convolution.
        first = self._depthwise(0, x, choice, sizes)
        branches = [
            functools.partial(self._attend, splits, x, first, choice, sizes)
            for splits in self.search_block.splits
        ]
        x = switch(choice["splits"], branches)
        x = self.project_bn(self.project(x, sizes.filters))
        return self._where_shapes_match(inputs, sizes, lambda: x + inputs, lambda: x)

    def _expand(self, x, choice, sizes):
        """The 1x1 convolution, for an expansion other than 1; the identity for 1."""
        is_one = [int(expansion == 1) for expansion in self.search_block.expansion]

        def expand():
            return self._activate(self.expand_bn(self.expand(x, sizes.expanded)), choice)

        if all(is_one):
            return x
        if not any(is_one):
            return expand()
        # The expanded channels are a tensor: all other expansions share one branch.
        branch = tf.gather(tf.constant(is_one, tf.int32), choice["expansion"])
        return switch(branch, [expand, lambda: x])

    def _depthwise(self, split, x, choice, sizes):
        x = self.depthwise_bn[split](self.depthwise[split](x, sizes.kernel_size))
        return self._activate(x, choice)

    def _attend(self, splits, x, first, choice, sizes):
        """Applies the attention to `first`, the first of `splits` depthwise convolutions of `x`."""
        if splits == 0:
            return first
        if splits == 1:
            return self._squeeze_excite(first, sizes)
        others = [self._depthwise(split, x, choice, sizes) for split in range(1, splits)]
        return self._split_attention([first, *others], sizes)

    def _activate(self, x, choice):
        return activate(x, choice["activation"], self.search_block.activation)

    def _squeeze_excite(self, x, sizes):
        gate = self.attention_expand(self._attention_bottleneck([x], sizes), sizes.expanded)
        return x * keras.activations.hard_sigmoid(gate)

    def _split_attention(self, parts, sizes):
        """The sum of the splits, weighted by a softmax over the splits for every channel."""
        features = self._attention_bottleneck(parts, sizes)
        layers = self.attention_splits[: len(parts)]
        logits = tf.stack([layer(features, sizes.expanded) for layer in layers])
        gates = tf.unstack(tf.nn.softmax(logits, axis=0))
        return tf.add_n([part * gate for part, gate in zip(parts, gates)])

    def _attention_bottleneck(self, parts, sizes):
        pooled = tf.add_n([tf.reduce_mean(part, axis=[1, 2], keepdims=True) for part in parts])
        return tf.nn.relu(self.attention_reduce(pooled, sizes.bottleneck))

    def _where_shapes_match(self, x, sizes, match, differ):
        """Runs `match` if the block's output has the shape of its input `x`, else `differ`."""
        if not self.shapes_can_match:
            return differ()
        if self.shapes_always_match:
            return match()
        return tf.cond(tf.equal(tf.shape(x)[-1], sizes.filters), match, differ)


class _SharedFunction:
    """A `tf.function` that takes tensors of any size, and is not inlined where it is called.

    Inlined, each call would be one more copy in the graph.
    """

    def __init__(self, function):
        self._python_function, self._function = function, None

    def __call__(self, *arguments):
        if self._function is None:
            self._function = tf.function(
                self._python_function,
                input_signature=tf.nest.map_structure(_any_size, arguments),
                autograph=False,
                experimental_attributes={"_noinline": True},
            )
        return self._function(*arguments)


def _any_size(tensor):
    return tf.TensorSpec([None] * tensor.shape.rank, tensor.dtype)
