"""TFLite metadata: what phone libraries read in a `.tflite` file to use it without further code.

MediaPipe, ML Kit and Android Studio read from it how pixels become the input, and what the scores
are called. The schema is that of TensorFlow Lite:
https://github.com/google-ai-edge/mediapipe/blob/master/mediapipe/tasks/metadata/metadata_schema.fbs
"""

import io
import itertools
import json
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import flatbuffers
from tensorflow.lite.python import schema_py_generated as schema
from tensorflow.lite.tools import flatbuffer_utils

from fpnas_keras.errors import UserError

LABEL_FILE = "labels.txt"
_INFO_FILE = "fpnas.json"
_ENTRY = b"TFLITE_METADATA"
_IDENTIFIER = b"M001"
# Numbers of the schema: of fields by table, and of the values of enumerations.
_RGB, _GRAYSCALE = 1, 2
_AXIS_LABELS = 2
_IMAGE_PROPERTIES, _NORMALIZATION = 2, 1
# The oldest parser that knows all these fields.
_PARSER_VERSION = "1.0.0"


class Metadata(NamedTuple):
    """What a file says about itself.

    Attributes:
        name: Name of the model.
        description: What it does.
        version: Version of the model.
        author: Who made it.
        license: The licence of the model.
        labels: Names of the classes, in the order of the scores.
        scores: "probabilities" or "logits".
        resize: How images that are not square become square, as `--resize` of the training.
    """

    name: str
    description: str
    version: str
    author: str
    license: str
    labels: Sequence[str]
    scores: str
    resize: str


def add(content: bytes, metadata: Metadata) -> bytes:
    """Adds metadata to a flat buffer of one image in and one row of scores out.

    Inner tensors get short names. The converter's long ones are up to a tenth of a file.

    Args:
        content: The flat buffer, from pixels 0..255 to scores.
        metadata: What to add.

    Returns:
        The flat buffer, with a zip archive of the labels behind it.
    """
    model = flatbuffer_utils.convert_bytearray_to_object(content)
    (graph,) = model.subgraphs
    image = graph.tensors[graph.inputs[0]]
    _shorten_names(graph)
    buffer = schema.BufferT()
    buffer.data = list(_build(metadata, channels=int(image.shape[3])))
    model.buffers.append(buffer)
    entry = schema.MetadataT()
    entry.name, entry.buffer = _ENTRY, len(model.buffers) - 1
    model.metadata = [*(model.metadata or []), entry]
    model.description = metadata.description
    archive = io.BytesIO(flatbuffer_utils.convert_object_to_bytearray(model))
    info = {"scores": metadata.scores, "resize": metadata.resize}
    with zipfile.ZipFile(archive, "a") as file:
        # A fixed date: the same model gives the same file.
        file.writestr(zipfile.ZipInfo(LABEL_FILE), "".join(f"{x}\n" for x in metadata.labels))
        file.writestr(zipfile.ZipInfo(_INFO_FILE), json.dumps(info))
    return archive.getvalue()


def read(content: bytes) -> dict[str, Any] | None:
    """What `add` has put into a file: `labels`, and of this project's files `scores` and `resize`.

    Args:
        content: The flat buffer.

    Returns:
        `None` when there are no labels in the file.

    Raises:
        UserError: When they are damaged.
    """
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return None
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            if LABEL_FILE not in file.namelist():
                return None
            labels = file.read(LABEL_FILE).decode("utf-8").splitlines()
            info = json.loads(file.read(_INFO_FILE)) if _INFO_FILE in file.namelist() else {}
    except (zipfile.BadZipFile, ValueError) as error:
        raise UserError(f"the metadata in the file are damaged: {error}") from None
    return {**info, "labels": labels}


def _shorten_names(graph):
    """Keeps of each inner name the first operation, without the path that all share."""
    ends = {*graph.inputs, *graph.outputs}
    taken = {graph.tensors[index].name for index in ends}
    inner = [each for index, each in enumerate(graph.tensors) if index not in ends and each.name]
    paths = [each.name.split(b";")[0].split(b"/") for each in inner]
    # The converter's own constants have no path.
    columns = zip(*[path[:-1] for path in paths if len(path) > 1])
    common = len(list(itertools.takewhile(lambda column: len({*column}) == 1, columns)))
    for each, path in zip(inner, paths):
        name = each.name = b"/".join(path[common:] if len(path) > 1 else path)
        # A layer's kernel and its output have the same first operation.
        numbers = itertools.count(1)
        while each.name in taken:
            each.name = b"%s_%d" % (name, next(numbers))
        taken.add(each.name)


def _build(metadata, channels):
    """The table `ModelMetadata` as a flat buffer."""
    builder = flatbuffers.Builder()
    image = _table(
        builder,
        {
            0: builder.CreateString("image"),
            1: builder.CreateString("Pixels, 0 to 255."),
            3: _table(
                builder,
                {0: ("Int8", _IMAGE_PROPERTIES), 1: _color_space(builder, channels)},
            ),
            4: _vector(builder, [_normalization(builder)]),
        },
    )
    labels = _table(
        builder,
        {
            0: builder.CreateString(LABEL_FILE),
            1: builder.CreateString("Names of the classes."),
            2: ("Int8", _AXIS_LABELS),
        },
    )
    scores = _table(
        builder,
        {
            0: builder.CreateString(metadata.scores),
            1: builder.CreateString("One score for each class."),
            6: _vector(builder, [labels]),
        },
    )
    graph = _table(builder, {2: _vector(builder, [image]), 3: _vector(builder, [scores])})
    texts = {
        number: builder.CreateString(text)
        for number, text in (
            (0, metadata.name),
            (1, metadata.description),
            (2, metadata.version),
            (4, metadata.author),
            (5, metadata.license),
            (7, _PARSER_VERSION),
        )
        if text
    }
    builder.Finish(_table(builder, texts | {3: _vector(builder, [graph])}), _IDENTIFIER)
    return bytes(builder.Output())


def _color_space(builder, channels):
    return _table(builder, {0: ("Int8", _RGB if channels == 3 else _GRAYSCALE)})


def _normalization(builder):
    """(pixel - 0) / 1: the files take pixels as they are."""
    options = _table(builder, {0: _floats(builder, [0.0]), 1: _floats(builder, [1.0])})
    return _table(builder, {0: ("Int8", _NORMALIZATION), 1: options})


def _table(builder, fields):
    """Adds a table of offsets, and of numbers as `(type, value)`, by the number of the field."""
    builder.StartObject(max(fields) + 1)
    for number, value in fields.items():
        if isinstance(value, tuple):
            kind, value = value
            getattr(builder, f"Prepend{kind}Slot")(number, value, 0)
        else:
            builder.PrependUOffsetTRelativeSlot(number, value, 0)
    return builder.EndObject()


def _vector(builder, offsets):
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return builder.EndVector()


def _floats(builder, values):
    builder.StartVector(4, len(values), 4)
    for value in reversed(values):
        builder.PrependFloat32(value)
    return builder.EndVector()
