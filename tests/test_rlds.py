"""RLDS sets in TFRecord files are read without TensorFlow: framing, checksums, messages and the TFDS layout."""

from __future__ import annotations

import json
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import cv2
import google_crc32c
import numpy as np
import pytest

from prophet_gym.actions import ACTION_SPECS
from prophet_gym.data import CARDS, DatasetCard, open_dataset
from prophet_gym.data.tfrecord import parse_example, read_record, scan_records
from prophet_gym.errors import MissingExtraError

# Two records that the package tfrecord 1.14.6 (protobuf and crc32c, another CRC implementation than ours) wrote of
# {"steps/action": [0.5, -1.25, 3.0], "steps/n": [1, -2, 3], "steps/text": [b"ab", b""]} and {"n": 7}.
WRITTEN_ELSEWHERE = bytes.fromhex(
    "59000000000000008a1d65b60a570a160a0a73746570732f7465787412080a060a0261620a000a1b0a0773746570732f6e12101a0e0a0c01feff"
    "ffffffffffffff01030a200a0c73746570732f616374696f6e1210120e0a0c0000003f0000a0bf00004040bdcf9c6b0e00000000000000c5e569"
    "3f0a0c0a0a0a016e12051a030a0107beab1b04"
)
LENGTH = 5


def pictures(episode: int, camera: int = 0) -> np.ndarray:
    return np.random.default_rng((episode, camera)).integers(0, 256, (LENGTH, 12, 16, 3), dtype=np.uint8)


def numbers(episode: int) -> tuple[np.ndarray, np.ndarray]:
    """Actions and states (LENGTH, 7) in Bridge conventions."""
    both = np.random.default_rng((episode, 9)).uniform(-0.05, 0.05, (2, LENGTH, 7)).astype(np.float32)
    both[:, :, 6] = np.random.default_rng(episode).uniform(0, 1, (2, LENGTH))
    return both[0], both[1]


# A writer of the wire format, by hand: what TFDS stores


def varint(number: int) -> bytes:
    number &= 2**64 - 1
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def chunk(field: int, data: bytes) -> bytes:
    """A length-delimited field."""
    return varint(field << 3 | 2) + varint(len(data)) + data


def feature(values: Any) -> bytes:
    if isinstance(values, list):
        return chunk(1, b"".join(chunk(1, value) for value in values))
    if values.dtype.kind == "f":
        return chunk(2, chunk(1, values.astype("<f4").tobytes()))
    return chunk(3, chunk(1, b"".join(varint(int(value)) for value in values)))


def example(values: dict[str, Any]) -> bytes:
    entries = (chunk(1, chunk(1, name.encode()) + chunk(2, feature(value))) for name, value in values.items())
    return chunk(1, b"".join(entries))


def framed(record: bytes) -> bytes:
    def masked(data: bytes) -> bytes:
        crc = google_crc32c.value(data)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)

    length = struct.pack("<Q", len(record))
    return length + masked(length) + record + masked(record)


def episode_of(index: int, **changes: Any) -> dict[str, Any]:
    actions, states = numbers(index)

    def encoded(camera: int) -> list[bytes]:
        images = (cv2.cvtColor(image, cv2.COLOR_RGB2BGR) for image in pictures(index, camera))
        return [cv2.imencode(".png", image)[1].tobytes() for image in images]

    return {
        "steps/action": actions.reshape(-1),
        "steps/observation/state": states.reshape(-1),
        "steps/observation/image_0": encoded(0),
        "steps/observation/image_1": encoded(1),
        "steps/language_instruction": [f"task {index}".encode()] * LENGTH,
        "steps/is_first": np.arange(LENGTH) == 0,
        "episode_metadata/file_path": [f"raw/{index}.npy".encode()],
        **changes,
    }


def tensor(*shape: int, dtype: str = "float32") -> dict:
    dimensions = {"dimensions": [str(n) for n in shape]} if shape else {}
    return {
        "pythonClassName": "tensorflow_datasets.core.features.tensor_feature.Tensor",
        "tensor": {"shape": dimensions, "dtype": dtype, "encoding": "none"},
    }


def group(**features: dict) -> dict:
    return {
        "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "featuresDict": {"features": features},
    }


def image() -> dict:
    shape = {"dimensions": ["12", "16", "3"]}
    return {
        "pythonClassName": "tensorflow_datasets.core.features.image_feature.Image",
        "image": {"shape": shape, "dtype": "uint8", "encodingFormat": "png"},
    }


TEXT = {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}}
STEPS = {
    "action": tensor(7),
    "observation": group(state=tensor(7), image_1=image(), image_0=image()),
    "language_instruction": TEXT,
    "is_first": tensor(dtype="bool"),
}


def make_rlds(root: Path, shards: tuple[int, ...] = (2, 1), steps: dict | None = None, **info: Any) -> Path:
    """A TFDS folder whose shards hold so many episodes each; returns the folder of the version."""
    folder = root / "bridge_dataset" / "1.0.0"
    folder.mkdir(parents=True)
    first = 0
    for number, count in enumerate(shards):
        name = f"bridge_dataset-train.tfrecord-{number:05d}-of-{len(shards):05d}"
        records = (framed(example(episode_of(i))) for i in range(first, first + count))
        (folder / name).write_bytes(b"".join(records))
        first += count
    split = {
        "name": "train",
        "shardLengths": [str(n) for n in shards],
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "numBytes": "0",
    }
    described = {"name": "bridge_dataset", "version": "1.0.0", "fileFormat": "tfrecord", "splits": [split], **info}
    (folder / "dataset_info.json").write_text(json.dumps(described))
    dataset = {
        "pythonClassName": "tensorflow_datasets.core.features.dataset_feature.Dataset",
        "sequence": {"feature": group(**(steps or STEPS)), "length": "-1"},
    }
    (folder / "features.json").write_text(json.dumps(group(steps=dataset, episode_metadata=group(file_path=TEXT))))
    return folder


def test_records_written_by_another_library(tmp_path):
    path = tmp_path / "x.tfrecord"
    path.write_bytes(WRITTEN_ELSEWHERE)
    records, fault = scan_records(path)
    assert [record.length for record in records] == [89, 14] and fault == ""
    values = parse_example(read_record(path, records[0]))
    assert values["steps/action"].tolist() == [0.5, -1.25, 3.0] and values["steps/action"].dtype == np.float32
    assert values["steps/n"].tolist() == [1, -2, 3] and values["steps/n"].dtype == np.int64
    assert values["steps/text"] == [b"ab", b""]
    assert parse_example(read_record(path, records[1]))["n"].tolist() == [7]
    # and the writer of this file makes the same bytes
    first = {"steps/text": [b"ab", b""], "steps/n": np.array([1, -2, 3]), "steps/action": np.array([0.5, -1.25, 3])}
    assert framed(example(first)) + framed(example({"n": np.array([7])})) == WRITTEN_ELSEWHERE


def test_unpacked_numbers_are_read_too():
    """Old writers repeat the tag for every number instead of packing them."""
    floats = b"".join(varint(1 << 3 | 5) + struct.pack("<f", value) for value in (1.5, 2.5))
    record = chunk(1, chunk(1, chunk(1, b"a") + chunk(2, chunk(2, floats))))
    assert parse_example(record)["a"].tolist() == [1.5, 2.5]


def test_every_damaged_byte_is_noticed(tmp_path):
    path = tmp_path / "x.tfrecord"
    for position in range(len(WRITTEN_ELSEWHERE)):
        data = bytearray(WRITTEN_ELSEWHERE)
        data[position] ^= 1
        path.write_bytes(data)
        records, fault = scan_records(path)
        if not fault:
            with pytest.raises(ValueError, match="the record fails its checksum; restore the file"):
                [read_record(path, record) for record in records]


def test_episodes_come_with_their_steps(tmp_path):
    folder = make_rlds(tmp_path)
    for root in (folder, folder.parent):  # the version's folder, or the set's
        episodes = open_dataset(root, card="bridge")
        assert episodes.names == ("train_000000", "train_000001", "train_000002")
        for i, episode in enumerate(episodes):
            actions, states = numbers(i)
            assert callable(episode.images)
            np.testing.assert_array_equal(episode.frames, pictures(i))
            np.testing.assert_array_equal(episode.actions, actions[:-1])
            np.testing.assert_allclose(episode.eef_pose[:, 0, :3, 3], states[:, :3])
            np.testing.assert_allclose(episode.gripper[:, 0], states[:, 6])
            assert (episode.instruction, episode.fps) == (f"task {i}", 5.0)
            assert episode.metadata == {"dataset": "bridge", "camera_name": "image_0", "file_path": f"raw/{i}.npy"}
    np.testing.assert_array_equal(open_dataset(folder, card="bridge", camera="image_1")[2].frames, pictures(2, 1))


def test_sets_written_by_tfds_itself(tmp_path):
    """Serialised by tensorflow-datasets 4.9.9: grey level 10 t + 60 episode; see fixtures/README.md."""
    with ZipFile(Path(__file__).parent / "fixtures" / "rlds_tfds_4.9.9.zip") as archive:
        archive.extractall(tmp_path)
    rng = np.random.default_rng(0)
    episodes = open_dataset(tmp_path, card="bridge")
    for i, (episode, length) in enumerate(zip(episodes, (4, 6), strict=True)):
        rows = [(rng.uniform(-0.05, 0.05, 7), rng.uniform(0, 0.9, 7)) for _ in range(length)]
        np.testing.assert_array_equal(episode.actions, np.float32([action for action, _ in rows[:-1]]))
        np.testing.assert_allclose(episode.eef_pose[:, 0, :3, 3], np.float32([state[:3] for _, state in rows]))
        grey = 10 * np.arange(length) + 60 * i
        np.testing.assert_array_equal(episode.frames, np.broadcast_to(grey[:, None, None, None], (length, 12, 16, 3)))
        assert (episode.instruction, episode.metadata["file_path"]) == (f"task {i}", f"raw/{i}.npy")


def test_jpeg_images(tmp_path):
    folder = make_rlds(tmp_path, (1,))
    smooth = np.linspace(0, 255, 16)[None, :, None] * np.ones((12, 16, 3))
    jpeg = cv2.imencode(".jpg", smooth.astype(np.uint8))[1].tobytes()
    record = episode_of(0) | {"steps/observation/image_0": [jpeg] * LENGTH}
    next(folder.glob("*tfrecord*")).write_bytes(framed(example(record)))
    frames = open_dataset(folder, card="bridge")[0].frames
    assert frames.shape == (LENGTH, 12, 16, 3) and np.abs(frames - smooth).mean() < 3


def test_commands_in_several_features(tmp_path):
    """RT-1 style: displacement, rotation and gripper apart."""
    parts = {"world_vector": slice(0, 3), "rotation_delta": slice(3, 6), "gripper_closedness_action": slice(6, 7)}
    steps = STEPS | {"action": group(**{key: tensor(s.stop - s.start) for key, s in parts.items()})}
    folder = make_rlds(tmp_path, (1,), steps=steps)
    actions = numbers(0)[0]
    record = episode_of(0)
    del record["steps/action"]
    record |= {f"steps/action/{key}": actions[:, part].reshape(-1) for key, part in parts.items()}
    next(folder.glob("*tfrecord*")).write_bytes(framed(example(record)))
    spec = replace(ACTION_SPECS["bridge"], gripper="closed_ratio")
    card = DatasetCard("own", action_spec=spec, control_hz=3.0, action_keys=tuple(f"action/{key}" for key in parts))
    episode = open_dataset(folder, card=card)[0]
    np.testing.assert_array_equal(episode.actions, actions[:-1])
    np.testing.assert_allclose(episode.canonical_actions[:, 0, 6], 1 - actions[:-1, 6], atol=1e-6)
    assert episode.fps == 3.0 and episode.eef_pose is None
    with pytest.raises(ValueError, match=r"no 'action/world_vectr' in the steps.*Did you mean 'action/world_vector'"):
        open_dataset(folder, card=replace(card, action_keys=("action/world_vectr",)))[0]


def test_truncated_shards_keep_their_first_episodes(tmp_path):
    folder = make_rlds(tmp_path, (3, 1))
    shard = sorted(folder.glob("*tfrecord*"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    episodes = open_dataset(folder, card="bridge")
    assert len(episodes[1]) == LENGTH - 1
    message = (
        r"00000-of-00002, episode 'train_000002': record 2 is missing; the file ends 100 bytes before record 2 does"
    )
    with pytest.raises(ValueError, match=message):
        episodes[2]
    sound = open_dataset(folder, card="bridge", on_error="skip")
    assert sound.names == ("train_000000", "train_000001", "train_000003")
    assert sound.skipped[0].name == "train_000002" and "truncated" in sound.skipped[0].reason
    shard.unlink()
    with pytest.raises(ValueError, match="cannot be read .*restore the file"):
        open_dataset(folder, card="bridge")[0]


def test_a_shard_that_shrinks_or_goes_after_the_first_look_is_named(tmp_path):
    folder = make_rlds(tmp_path)
    episodes = open_dataset(folder, card="bridge")
    shard = sorted(folder.glob("*tfrecord*"))[0]
    assert len(episodes[0]) == LENGTH - 1
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"episode 'train_000001': .*byte \d+: the record cannot be read .*restore"):
        episodes[1]
    shard.unlink()
    with pytest.raises(ValueError, match="episode 'train_000001': .*the record cannot be read .*No such file"):
        episodes[1]


def test_damaged_numbers_and_images_are_named(tmp_path):
    folder = make_rlds(tmp_path, (1,))
    shard = next(folder.glob("*tfrecord*"))
    data = bytearray(shard.read_bytes())
    data[200] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"episode 'train_000000': .*fails its checksum"):
        open_dataset(folder, card="bridge")[0]
    shard.write_bytes(framed(b"\xff\xff\xff"))
    with pytest.raises(ValueError, match="3 bytes are no tf.train.Example"):
        open_dataset(folder, card="bridge")[0]
    bad = numbers(0)[0].reshape(-1).copy()
    bad[9] = np.nan
    faults = {
        "action row 1, number 2 is nan": {"steps/action": bad},
        "'action' has 34 numbers; expected a multiple of 7": {"steps/action": bad[:34]},
        "1 action rows|holds 1 row": {"steps/action": bad[:7]},
        "5 action rows but 4 state rows": {"steps/observation/state": np.zeros(28, np.float32)},
    }
    for message, changes in faults.items():
        changes = {"steps/action": numbers(0)[0].reshape(-1)} | changes
        shard.write_bytes(framed(example(episode_of(0, **changes))))
        with pytest.raises(ValueError, match=rf"episode 'train_000000': ({message})"):
            open_dataset(folder, card="bridge")[0]
    shard.write_bytes(framed(example(episode_of(0, **{"steps/observation/image_0": [b"no image"] * LENGTH}))))
    with pytest.raises(ValueError, match=r"image 0 \(8 bytes\) cannot be decoded"):
        open_dataset(folder, card="bridge")[0].frames  # noqa: B018
    shard.write_bytes(framed(example(episode_of(0, **{"steps/observation/image_0": []}))))
    with pytest.raises(ValueError, match="holds no images of this camera"):
        open_dataset(folder, card="bridge")[0].frames  # noqa: B018


def test_sets_that_do_not_fit_are_refused(tmp_path):
    folder = make_rlds(tmp_path)
    with pytest.raises(ValueError, match="RLDS data set, which does not say what its numbers mean; give card="):
        open_dataset(folder)
    with pytest.raises(ValueError, match=r"no split 'tran'; expected one of \['train'\]. Did you mean 'train'"):
        open_dataset(folder, card="bridge", split="tran")
    with pytest.raises(ValueError, match=r"no camera 'image_9'; expected one of \['image_1', 'image_0'\]"):
        open_dataset(folder, card="bridge", camera="image_9")
    with pytest.raises(ValueError, match="neither the format nor card 'bridge' states the rate"):
        open_dataset(folder, card=replace(CARDS["bridge"], control_hz=None))[0]
    other = make_rlds(tmp_path / "other", fileFormat="array_record")
    with pytest.raises(ValueError, match="fileFormat 'array_record'; expected 'tfrecord'"):
        open_dataset(other, card="bridge")
    (folder / "features.json").write_text(json.dumps(group(image=image())))
    with pytest.raises(ValueError, match="has no steps: this is no RLDS data set"):
        open_dataset(folder, card="bridge")
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match="dataset_info.json cannot be read"):
        open_dataset(folder, card="bridge")


def test_without_crc32c_the_pip_line_is_shown(tmp_path, monkeypatch):
    folder = make_rlds(tmp_path)
    monkeypatch.setitem(sys.modules, "google_crc32c", None)
    with pytest.raises(MissingExtraError, match=r'pip install "prophet-gym\[data\]"'):
        open_dataset(folder, card="bridge")
