"""Recorded episodes as arrays that training can index: frames, commands, poses, drawn actions, latents.

Episodes are decoded once into a cache folder of ``.npy`` files and memory-mapped from there. Every content has a
subfolder of its own, so that runs on different data can share a cache; runs on the same data wait for each other.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from ..action_frames import project, render_action_frames
from ..actions import ActionSpec, integrate_poses, pad_effectors
from ..atomic import atomic_folder
from ..data.cards import Fit, get_card
from ..data.opening import open_dataset
from ..data.sequence import EpisodeRange, EpisodeSequence
from ..data.windows import EpisodeWindows
from ..devices import fast_dtype
from ..world_model.codec import VideoCodec, to_video

logger = logging.getLogger(__name__)

_ALWAYS = ("frames", "actions", "object_px", "effector_px")
_PIXELS = 2**23  # that a codec encodes at once


@dataclass(frozen=True, eq=False)
class ClipArrays:
    """E episodes of T commands each, as memory-mapped arrays.

    Attributes:
        frames: (E, T + 1, H, W, 3) uint8.
        actions: canonical commands (E, T, N, 7) float32.
        drawn: action frames at a reduced size, (E, T + 1, h, w, 3) uint8; None where cameras are missing.
        object_px: centroids (u, v) of the labelled objects in pixels, the instructed one first, (E, T + 1, 2, 2)
            float32; NaN without a label.
        effector_px: commanded end-effector positions in pixels, (E, T + 1, N, 2) float32; NaN without a camera.
        action_spec: conventions the commands came in.
        content: digest of the files the arrays were made from.
    """

    frames: np.ndarray
    actions: np.ndarray
    drawn: np.ndarray | None
    object_px: np.ndarray
    effector_px: np.ndarray
    action_spec: ActionSpec
    content: str

    def __len__(self) -> int:
        return len(self.frames)


@dataclass(frozen=True)
class ClipSource:
    """How a data set becomes clips of one length and size; the default takes equal episodes as they are."""

    card: str | None = None
    """What the numbers mean, for formats that do not say: bridge, droid, libero, ..., or a TOML file"""
    camera: str | None = None
    """Which camera; the card's or the first by default."""
    clip_length: int | None = None
    """Commands of a clip. Longer episodes give overlapping clips, shorter ones are left out; by default all episodes
    have one length."""
    image_size: tuple[int, int] | None = None
    """Height and width that images are brought to, multiples of 16; by default they stay as they are."""
    episodes: tuple[int, int] | None = None
    """First episode of the training data and the one after the last; by default all. Of held-out data all count."""
    fit: Fit = "stretch"
    """How images come to their size: "stretch", or "pad_or_crop" at the right height (paper 4.1.1)."""

    def open(self, root: str | Path) -> EpisodeSequence:
        """Return the clips of a data set of any format, as a lazy sequence of episodes.

        Raises:
            ValueError: the set cannot be opened, or no episode is long enough.
        """
        episodes: EpisodeSequence = open_dataset(root, card=self.card, camera=self.camera)
        if self.episodes is not None:
            episodes = EpisodeRange(episodes, *self.episodes)
        if self.clip_length is None and self.image_size is None:
            return episodes
        length = self.clip_length or min(len(episode) for episode in episodes)
        windows = EpisodeWindows(episodes, length, image_size=self.image_size, fit=self.fit)
        if windows.left_out:
            logger.warning(
                "%s: %d of %d episodes are shorter than %d commands and left out: %s",
                root, len(windows.left_out), len(episodes), length, ", ".join(windows.left_out[:5]),
            )  # fmt: skip
        return windows


def load_clips(
    root: str | Path,
    cache: str | Path,
    *,
    source: ClipSource = ClipSource(),
    num_effectors: int = 1,
    drawn_size: tuple[int, int] | None = None,
    one_robot: bool = True,
) -> ClipArrays:
    """Decode the episodes of ``root`` into a subfolder of ``cache`` (once) and open them.

    Args:
        root: a data set of any format.
        cache: folder of subfolders, one for each content: what was made from the same files in the same way is reused.
        source: how it becomes clips of one length and size.
        num_effectors: N that commands are padded to.
        drawn_size: height and width of the stored action frames in pixels, an area average of the drawn ones; None
            draws none.
        one_robot: expect the action conventions of the first episode of all; a codec has no use for actions.

    Raises:
        ValueError: no episodes, episodes of different lengths, sizes or conventions, or a camera is missing.
    """
    episodes = source.open(root)
    first = episodes[0]
    if drawn_size and first.camera is None:
        raise ValueError(f"{root}: {first.name} has no camera to draw actions with; train with action_frames='none'")
    if drawn_size and first.eef_pose is None:
        raise ValueError(f"{root}: {first.name} has no poses to draw actions at; train with action_frames='none'")
    content = fingerprint(root, source)
    stamp = {"layout": 4, "content": content, "n": num_effectors, "drawn_size": list(drawn_size or ())}
    with _content_folder(cache, stamp) as folder:
        if not folder.exists():
            with atomic_folder(folder) as work:
                _decode(episodes, work, num_effectors, drawn_size, one_robot)
                (work / "clips.json").write_text(json.dumps(stamp))
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ALWAYS}
    drawn = np.load(folder / "drawn.npy", mmap_mode="r") if drawn_size else None
    return ClipArrays(**arrays, drawn=drawn, action_spec=first.action_spec, content=content)


@contextmanager
def _content_folder(cache: str | Path, stamp: dict[str, Any]) -> Iterator[Path]:
    """Yield the subfolder of a cache for what a stamp describes; other processes that want the same wait meanwhile."""
    cache = Path(cache)
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / hashlib.sha256(json.dumps(stamp, sort_keys=True).encode()).hexdigest()[:16]
    lock = FileLock(cache / f".{folder.name}.lock")  # the system releases it when its holder dies
    try:
        lock.acquire(timeout=5)  # more than processes of one run need that open it together
    except Timeout:
        logger.warning("%s: another run is filling it; waiting until it has", folder)
        lock.acquire()
    try:
        yield folder
    finally:
        lock.release()


def fingerprint(root: str | Path, source: ClipSource = ClipSource()) -> str:
    """Digest of source and card, and of place, size and time of every file of a set: changes when one is made anew."""
    root = Path(root).resolve()
    digest = hashlib.sha256(f"{root} {source}".encode())
    if source.card is not None:  # a packaged one may change with the version
        digest.update(str(get_card(source.card)).encode())
    places = (
        [root]
        if root.is_file()
        else [Path(at, name) for at, _, names in os.walk(root, followlinks=True) for name in names]
    )
    for file in sorted(places):
        status = file.stat()
        digest.update(f"{file} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _decode(
    episodes: EpisodeSequence, cache: Path, num_effectors: int, drawn_size: tuple[int, int] | None, one_robot: bool
) -> None:
    first = episodes[0]
    count, (length, height, width, _) = len(episodes), first.frames.shape

    def create(name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        return np.lib.format.open_memmap(cache / f"{name}.npy", mode="w+", dtype=dtype, shape=(count, *shape))

    frames = create("frames", (length, height, width, 3), np.uint8)
    actions = create("actions", (length - 1, num_effectors, 7), np.float32)
    object_px = create("object_px", (length, 2, 2), np.float32)
    effector_px = create("effector_px", (length, num_effectors, 2), np.float32)
    drawn = create("drawn", (length, *drawn_size, 3), np.uint8) if drawn_size else None

    def one(i: int) -> None:
        episode = episodes[i]
        foreign = one_robot and episode.action_spec != first.action_spec
        if foreign or episode.frames.shape != (length, height, width, 3):
            raise ValueError(
                f"episode {episode.name}: frames {episode.frames.shape}, expected {(length, height, width, 3)} and the "
                "action conventions of the first episode; train one data set at a time"
            )
        frames[i] = episode.frames
        commands = episode.action_spec.to_canonical(episode.actions)
        actions[i] = pad_effectors(commands, num_effectors)
        for k, label in enumerate(("block_px", "distractor_px")):
            object_px[i, :, k] = episode.labels.get(label, np.nan)
        effector_px[i] = np.nan
        if episode.camera is not None and episode.eef_pose is not None:
            poses = integrate_poses(episode.eef_pose[0], commands, episode.action_spec)
            path = np.concatenate([episode.eef_pose[:1], poses])
            effector_px[i, :, : path.shape[1]] = project(path[..., :3, 3], episode.camera)
        if drawn is not None:
            if episode.camera is None or episode.eef_pose is None:
                raise ValueError(f"episode {episode.name}: no camera or no poses, but the first episode has both")
            openness = np.concatenate([episode.gripper[:1], commands[..., 6]])
            for t, image in enumerate(render_action_frames(path, openness, episode.camera)):
                drawn[i, t] = cv2.resize(image, drawn_size[::-1], interpolation=cv2.INTER_AREA)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(tqdm(pool.map(one, range(count)), total=count, desc="decoding", mininterval=5.0))


@dataclass(frozen=True, eq=False)
class LatentArrays:
    """Latents of all clips at start times 0, 2, 4, ...; dynamics know no parity, so a stride of two loses nothing.

    Attributes:
        single: latents of one frame repeated, at frame 2 i: (E, T // 2 + 1, z, h, w) float16.
        group: latents of frames s ... s + 3 with s = 2 i - 3, frames before 0 being frame 0: (E, T // 2 + 1, z, h, w).
    """

    single: np.ndarray
    group: np.ndarray


@torch.no_grad()
def encode_clips(vae: Any, clips: ClipArrays, cache: str | Path, batch: int = 16) -> LatentArrays:
    """Encode all clips into a subfolder of ``cache`` (resumes after an interruption) and open the result.

    Args:
        vae: a codec that :class:`VideoCodec` takes. A causal one sees the frame before a group, too, and no others.
        clips: decoded clips.
        cache: folder of subfolders, one for each codec and content.
        batch: clips between two writes.
    """
    codec = VideoCodec(vae)
    count, length, height, width, _ = clips.frames.shape
    grid = list(range(0, length, 2))
    stride = VideoCodec.spatial_stride
    shape = (count, len(grid), codec.latent_channels, height // stride, width // stride)
    weights = hashlib.sha256(json.dumps([vae.config.latents_mean, vae.config.latents_std]).encode())
    for parameter in vae.parameters():
        weights.update(parameter.detach().cpu().float().numpy().tobytes())
    precision = fast_dtype(next(vae.parameters()).device)
    stamp = {"shape": list(shape), "content": clips.content, "vae": weights.hexdigest(), "precision": precision}
    with _content_folder(cache, stamp) as folder:
        _encode_missing(codec, clips.frames, grid, shape, folder, batch)
    return LatentArrays(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("single", "group")))


def _encode_missing(
    codec: VideoCodec, frames: np.ndarray, grid: list[int], shape: tuple[int, ...], folder: Path, batch: int
) -> None:
    """Encode the clips that an earlier call has not reached into ``single.npy`` and ``group.npy``."""
    folder.mkdir(exist_ok=True)
    count, _, height, width, _ = frames.shape
    done_file = folder / "latents_done.json"
    done = json.loads(done_file.read_text())["done"] if done_file.is_file() else 0
    if done == count:
        return
    arrays = {
        name: np.lib.format.open_memmap(
            folder / f"{name}.npy", mode="r+" if done else "w+", dtype=np.float16, shape=shape
        )
        for name in ("single", "group")
    }
    groups = np.maximum(np.asarray(grid)[:, None] + np.arange(-3, 1), 0)
    if codec.folded:
        windows = {"single": np.repeat(np.asarray(grid)[:, None], 4, axis=1), "group": groups}
    else:
        windows = {
            "single": np.asarray(grid)[:, None],
            "group": np.concatenate([np.maximum(groups[:, :1] - 1, 0), groups], axis=1),
        }
    for start in tqdm(range(done, count, batch), desc="encoding", mininterval=5.0):
        block = torch.from_numpy(frames[start : start + batch].copy())
        for name, index in windows.items():
            parts = block[:, index].flatten(0, 1).split(max(1, _PIXELS // (index.shape[1] * height * width)))
            latents = torch.cat([_encode_windows(codec, part) for part in parts]).unflatten(0, (len(block), -1))
            arrays[name][start : start + batch] = latents.numpy()
        if (start // batch) % 20 == 0 or start + batch >= count:
            for array in arrays.values():
                array.flush()
            temporary = done_file.with_suffix(".tmp")
            temporary.write_text(json.dumps({"done": min(start + batch, count)}))
            temporary.replace(done_file)


def _encode_windows(codec: VideoCodec, frames: torch.Tensor) -> torch.Tensor:
    """Newest latent frame (B, z, h, w) float16 of windows (B, 4, H, W, 3) uint8; of 1 or 5 frames if it is causal."""
    # Latents are stored in half precision anyway; where there are any, bf16 convolutions are twice as fast.
    kind = codec.vae.device.type
    with torch.autocast(kind, dtype=torch.bfloat16, enabled=fast_dtype(kind) == "bfloat16"):
        if codec.folded:
            mean, _ = codec.vae.encode_groups(to_video(frames.to(codec.vae.device)))
            latents = codec.vae.normalise(mean.float())
        else:
            latents = codec.encode(frames)[:, :, -1]
    return latents.to(torch.float16).cpu()
