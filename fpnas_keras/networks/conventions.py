"""What the supernet and the plain networks have in common: data format, precision, initial values.

Both forms of a network import these from here, so that they compute the same function.
"""

from typing import Any

import keras

from fpnas_keras.errors import UserError

BN_EPSILON = 1e-3
# Every layer is given the format: a user's `keras.json` may have another default.
DATA_FORMAT = "channels_last"


def check_floatx(library: Any = keras) -> None:
    """Checks the default float type of Keras, which a user may have changed in `keras.json`.

    Weights, images and logits are float32. A dtype policy for mixed precision
    (`keras.config.set_dtype_policy`) does not change this type and is allowed.

    Args:
        library: `keras` or `tf_keras`.

    Raises:
        UserError: When the type is not float32.
    """
    floatx = library.backend.floatx()
    if floatx != "float32":
        raise UserError(
            "Keras' floatx must be float32; set it in keras.json or with keras.config.set_floatx. "
            f"Received: floatx={floatx}"
        )


def make_rescaling(library: Any = keras) -> keras.layers.Rescaling:
    """The first layer of every network: pixels 0..255 to -1..1.

    Args:
        library: `keras` or `tf_keras`.
    """
    return library.layers.Rescaling(1 / 127.5, -1.0, name="rescaling")


def make_conv_initializer(library: Any = keras) -> keras.initializers.Initializer:
    """A new initializer of convolution kernels with the variance 2 / fan_out, as in MobileNets.

    It also serves depthwise kernels: Keras counts one output channel in their fan_out.

    Args:
        library: `keras` or `tf_keras`.
    """
    return library.initializers.VarianceScaling(2.0, "fan_out")
