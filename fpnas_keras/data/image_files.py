"""Image files: which ones can be read, and their pixels, upright and in 8 bits.

Pillow reads the files. TensorFlow reads neither WebP, TIFF, HEIC and AVIF files nor the orientation
that phones write into photos.
"""

import functools
import os

import numpy as np
import PIL.Image
import PIL.ImageOps
import tensorflow as tf

from fpnas_keras.data.settings import RESIZES
from fpnas_keras.errors import UserError

_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "HEIF", "AVIF", "JPEG2000", "PPM")
_GREY_MODES = ("1", "L", "LA", "La")


@functools.cache
def suffixes() -> frozenset[str]:
    """The endings of image files that can be read, in small letters, such as ".jpg"."""
    import pi_heif

    pi_heif.register_heif_opener()
    # Users trust their own photos, of which 200 million pixels are common.
    PIL.Image.MAX_IMAGE_PIXELS = None
    registered = PIL.Image.registered_extensions()  # Imports all formats.
    return frozenset(suffix for suffix, name in registered.items() if name in _FORMATS)


def is_grey(file: str | bytes) -> bool:
    """Whether an image file has no color. Only its header and its palette are read.

    Raises:
        UserError: When the file cannot be read.
    """
    with _opened(file) as image:
        if image.mode == "P":
            palette = np.array(image.getpalette("RGB")).reshape(-1, 3)
            return bool((palette == palette[:, :1]).all())
        return image.mode in _GREY_MODES or image.mode.startswith("I")


def size_of(file: str | bytes) -> tuple[int, int]:
    """Width and height of an image file, of which only the header is read.

    Raises:
        UserError: When the file cannot be read.
    """
    with _opened(file) as image:
        return image.size


def read_file(file: str | bytes, channels: int, least_size: int = 0) -> np.ndarray:
    """The pixels of an image file.

    A photo is turned upright as its EXIF orientation says. An animation gives its first image.
    Colors with 16 bits are divided by 257. Transparency is dropped.

    Args:
        file: The file.
        channels: 1 (grey) or 3 (RGB).
        least_size: Height and width that are enough. A larger JPEG file is decoded at a half, a
            quarter or an eighth of its size where that is not below it, which is much faster.

    Returns:
        uint8 of shape `(height, width, channels)`.

    Raises:
        UserError: When the file cannot be read.
    """
    with _opened(file) as image:
        if least_size:
            image.draft(None, (least_size, least_size))
        is_16_bits = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")
        upright = _in_eight_bits(PIL.ImageOps.exif_transpose(image), is_16_bits)
        pixels = np.asarray(upright.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


def read_image(
    file: str | os.PathLike, image_shape: tuple[int, int, int], resize: str = "stretch"
) -> np.ndarray:
    """An image file as it is given to a network in a training.

    Args:
        file: The file.
        image_shape: `(height, width, channels)`, as of `Images`.
        resize: How an image that is not square becomes square: "stretch", "crop" or "pad".

    Returns:
        Pixels 0..255, uint8 of shape `image_shape`.

    Raises:
        UserError: When the file cannot be read, or `resize` is unknown.

    Example:

    ```python
    x = fpnas.data.read_image("photo.jpg", model.input_shape[1:])
    model.predict(x[None])
    ```
    """
    check_resize(resize)
    return decode_file(tf.constant(os.fsencode(file)), image_shape, resize).numpy()


def check_resize(resize: str) -> None:
    """Raises `UserError` unless `resize` is one of `RESIZES`."""
    if resize not in RESIZES:
        raise UserError(f"`resize` must be {', '.join(RESIZES)}. Received: resize={resize!r}")


def decode_file(file: tf.Tensor, image_shape: tuple[int, int, int], resize: str) -> tf.Tensor:
    """Like `read_image`, in a graph: the file is a string of TensorFlow."""
    size, _, channels = image_shape

    def read(name):
        # TensorFlow gives an array of one string.
        return read_file(np.asarray(name).item(), channels, 2 * size)

    pixels = tf.numpy_function(read, [file], tf.uint8, stateful=False)
    return resize_image(tf.ensure_shape(pixels, (None, None, channels)), size, resize)


def decode(encoded: tf.Tensor, image_shape: tuple[int, int, int], resize: str) -> tf.Tensor:
    """An encoded image of a TFRecord as uint8 pixels of `image_shape`."""
    image = tf.io.decode_image(encoded, channels=image_shape[-1], expand_animations=False)
    return resize_image(image, image_shape[0], resize)


def resize_image(image: tf.Tensor, size: int, resize: str) -> tf.Tensor:
    """Resizes an image or a batch of images to a square, with anti-aliasing.

    Args:
        image: uint8 of shape `(..., height, width, channels)`.
        size: Height and width to resize to.
        resize: "stretch" to the square; "crop" to the largest square in the middle; "pad" with
            black.

    Returns:
        uint8 of shape `(..., size, size, channels)`.
    """
    if image.shape[-3:-1] != (size, size):
        if resize == "pad":
            image = tf.image.resize_with_pad(image, size, size, antialias=True)
        else:
            image = _central_square(image) if resize == "crop" else image
            image = tf.image.resize(image, (size, size), antialias=True)
        image = tf.clip_by_value(tf.round(image), 0, 255)
    return tf.cast(image, tf.uint8)


def _central_square(image):
    height, width = tf.unstack(tf.shape(image)[-3:-1])
    side = tf.minimum(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[..., top : top + side, left : left + side, :]


class _opened:
    """Opens an image file; what Pillow raises inside becomes a `UserError` that names the file."""

    def __init__(self, file):
        self._file = os.fsdecode(file)

    def __enter__(self):
        suffixes()  # registers the formats
        self._image = None
        try:
            self._image = PIL.Image.open(self._file, formats=_FORMATS)
        except Exception as error:
            raise self._error(error) from None
        return self._image

    def __exit__(self, kind, error, traceback):
        self._image.close()
        # Pillow's readers raise errors of many classes for what a damaged file may hold.
        if isinstance(error, Exception) and not isinstance(error, UserError):
            raise self._error(error) from None

    def _error(self, error):
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, PIL.UnidentifiedImageError):
            reason = "it is no image, or a damaged one"
        return UserError(f"the image {self._file} cannot be read: {reason}")


def _in_eight_bits(image, is_16_bits):
    """The image with 8 bits a channel; palettes with transparency as RGBA."""
    if is_16_bits:
        pixels = np.asarray(image).astype(np.uint32)
        return PIL.Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits; 8 and 16 can be read")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")
    return image
