"""Multiply-adds and trainable parameters, layer by layer.

What FLOPS means in the papers: multiply-adds of convolutions and dense layers,
one image; batch norms, activations, pooling and the gates of attention are free.
"""

from typing import NamedTuple

from fpnas_keras.architecture import (
    Architecture,
    Block,
    Part,
    Stem,
    attention_filters,
    expanded_filters,
    output_size,
)


class Count(NamedTuple):
    """MACs and parameters of a part of a network."""

    macs: int = 0
    params: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(self.macs + other.macs, self.params + other.params)


def architecture(architecture: Architecture) -> Count:
    """Counts a whole network."""
    return sum(map(part, architecture.parts()), Count())


def part(part: Part) -> Count:
    """Counts a part of a network."""
    if isinstance(part.layers, Stem):
        return _stem(part.layers, part.size, part.channels)
    if isinstance(part.layers, Block):
        return _block(part.layers, part.size, part.channels)
    return _head(part.layers, part.size, part.channels, part.num_classes)


def _stem(stem, size, channels):
    return _conv_bn(output_size(size, stem.strides), stem.kernel_size, channels, stem.filters)


def _block(block, size, filters_in):
    size_out = output_size(size, block.strides)
    if block.skip:
        is_identity = block.strides == 1 and filters_in == block.filters
        return Count() if is_identity else _conv_bn(size_out, 1, filters_in, block.filters)
    expanded = expanded_filters(filters_in, block.expansion)
    total = Count() if block.expansion == 1 else _conv_bn(size, 1, filters_in, expanded)
    for _ in range(max(1, block.splits)):
        # Depthwise: each channel sees one channel.
        total += _conv_bn(size_out, block.kernel_size, 1, expanded)
    if block.splits:
        bottleneck = attention_filters(expanded)
        total += _dense(expanded, bottleneck)
    for _ in range(block.splits):
        total += _dense(bottleneck, expanded)
    return total + _conv_bn(size_out, 1, expanded, block.filters)


def _head(head, size, filters_in, num_classes):
    total = _conv_bn(size, 1, filters_in, head.filters)
    features = head.filters
    if head.dense_units:
        total += _dense(features, head.dense_units, use_bias=False)
        features = head.dense_units
    return total + _dense(features, num_classes)


def _conv_bn(size_out, kernel_size, filters_in, filters_out):
    weights = kernel_size**2 * filters_in * filters_out
    return Count(size_out[0] * size_out[1] * weights, weights + 2 * filters_out)


def _dense(units_in, units_out, use_bias=True):
    return Count(units_in * units_out, units_in * units_out + use_bias * units_out)
