"""TFRecord files and tf.train.Example messages without TensorFlow.

A record is its length (uint64), a masked CRC32C of the length, the bytes, and a masked CRC32C of the bytes, all little
endian. An Example maps names to lists of bytes, floats or integers. The messages are declared below for the protobuf
library, with the field numbers of tensorflow/core/example/{example,feature}.proto.
"""

from __future__ import annotations

import struct
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prophet_gym.data.sequence import need_extra

_HEAD, _TAIL = struct.Struct("<QI"), struct.Struct("<I")
_MASK = 0xA282EAD8


class Record(NamedTuple):
    """Place of a record's bytes in its file."""

    offset: int
    length: int


def masked_crc(data: bytes) -> int:
    """CRC32C of ``data``, rotated and shifted as TFRecord stores it."""
    crc = need_extra("google_crc32c", "reading TFRecord files").value(data)
    return (((crc >> 15) | (crc << 17)) + _MASK) & 0xFFFFFFFF


def scan_records(path: Path) -> tuple[list[Record], str]:
    """Find the records of a file by their length fields, without reading them.

    Returns:
        The complete records, and what is wrong after them; empty where nothing is.

    Raises:
        ValueError: If the file is missing.
    """
    records: list[Record] = []
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            offset = 0
            while offset < size:
                file.seek(offset)
                head = file.read(_HEAD.size)
                if len(head) < _HEAD.size:
                    return records, f"ends {len(head)} bytes into the head of record {len(records)}: it is truncated"
                length, crc = _HEAD.unpack(head)
                if masked_crc(head[:8]) != crc:
                    return (
                        records,
                        f"record {len(records)} has a length that fails its checksum: damaged, or no TFRecord",
                    )
                start = offset + _HEAD.size
                offset = start + length + _TAIL.size
                if offset > size:
                    return records, f"ends {offset - size} bytes before record {len(records)} does: it is truncated"
                records.append(Record(start, length))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}); restore the file") from error
    return records, ""


def read_record(path: Path, record: Record) -> bytes:
    """Read one record and check it.

    Raises:
        ValueError: If its checksum is wrong, or the file is gone or shorter than it was.
    """
    try:
        with path.open("rb") as file:
            file.seek(record.offset)
            data = file.read(record.length)
            (crc,) = _TAIL.unpack(file.read(_TAIL.size))
    except (OSError, struct.error) as error:
        raise ValueError(
            f"{path}, byte {record.offset}: the record cannot be read ({error}); restore the file"
        ) from error
    if masked_crc(data) != crc:
        raise ValueError(f"{path}, byte {record.offset}: the record fails its checksum; restore the file")
    return data


def parse_example(data: bytes) -> dict[str, np.ndarray | list[bytes]]:
    """Parse a serialised tf.train.Example: float32 or int64 arrays (L,), or lists of bytes, by feature name.

    Raises:
        ValueError: If the bytes are no such message.
    """
    message = _example_class()()
    try:
        message.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError differs between its two implementations
        raise ValueError(f"{len(data)} bytes are no tf.train.Example ({error})") from error
    values: dict[str, np.ndarray | list[bytes]] = {}
    for name, feature in message.features.feature.items():
        kind = feature.WhichOneof("kind")
        if kind == "bytes_list":
            values[name] = list(feature.bytes_list.value)
        elif kind == "float_list":
            values[name] = np.array(feature.float_list.value, np.float32)
        else:
            values[name] = np.array(feature.int64_list.value, np.int64)
    return values


@cache
def _example_class() -> Any:
    """The message class tf.train.Example, in a descriptor pool of its own: TensorFlow may be loaded beside it."""
    descriptor_pb2 = need_extra("google.protobuf.descriptor_pb2", "reading TFRecord files")
    pool = need_extra("google.protobuf.descriptor_pool", "reading TFRecord files").DescriptorPool()
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tensorflow", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, int, str, bool], parent: Any = None) -> Any:
        made = (parent.nested_type if parent is not None else file.message_type).add(name=name)
        for field_name, number, kind, type_name, repeated in fields:
            label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            made.field.add(name=field_name, number=number, type=kind, type_name=type_name or None, label=label)
        return made

    nested = field.TYPE_MESSAGE
    message("BytesList", ("value", 1, field.TYPE_BYTES, "", True))
    message("FloatList", ("value", 1, field.TYPE_FLOAT, "", True))
    message("Int64List", ("value", 1, field.TYPE_INT64, "", True))
    feature = message(
        "Feature",
        ("bytes_list", 1, nested, ".tensorflow.BytesList", False),
        ("float_list", 2, nested, ".tensorflow.FloatList", False),
        ("int64_list", 3, nested, ".tensorflow.Int64List", False),
    )
    feature.oneof_decl.add(name="kind")
    for choice in feature.field:
        choice.oneof_index = 0
    features = message("Features", ("feature", 1, nested, ".tensorflow.Features.FeatureEntry", True))
    entry = message(
        "FeatureEntry",
        ("key", 1, field.TYPE_STRING, "", False),
        ("value", 2, nested, ".tensorflow.Feature", False),
        parent=features,
    )
    entry.options.map_entry = True
    message("Example", ("features", 1, nested, ".tensorflow.Features", False))
    pool.Add(file)
    factory = need_extra("google.protobuf.message_factory", "reading TFRecord files")
    return factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))
