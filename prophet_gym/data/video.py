"""Video files through PyAV: lossless RGB or ordinary H.264, one thread, whole clips at once."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import PictureType


def write_video(path: Path, frames: np.ndarray, fps: float, *, lossless: bool = True) -> None:
    """Write an MP4.

    Args:
        path: File to write.
        frames: (T, H, W, 3) uint8 RGB.
        fps: Frames per second.
        lossless: H.264 in RGB at QP 0, which comes back bit for bit; False: YUV 4:2:0 at CRF 18, playable everywhere.

    Raises:
        ValueError: If the frames have another shape or dtype, or an odd size that YUV 4:2:0 cannot hold.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}; expected uint8 (T, H, W, 3) RGB")
    writer = VideoWriter(path, frames.shape[1:3], fps, lossless=lossless)
    try:
        for frame in frames:
            writer.add(frame)
    finally:
        writer.close()


class VideoWriter:
    """An MP4 that grows frame by frame.

    Attributes:
        path: The file; complete after `close`.
    """

    def __init__(
        self,
        path: Path,
        size: tuple[int, ...],
        fps: float,
        *,
        lossless: bool = True,
        key_frame_every: int | None = None,
    ) -> None:
        """Open the file.

        Args:
            path: File to write.
            size: (height, width) in pixels.
            fps: Frames per second.
            lossless: As for `write_video`.
            key_frame_every: Distance of key frames; the codec's choice by default.

        Raises:
            ValueError: If the size is odd and YUV 4:2:0 cannot hold it.
        """
        height, width = size
        if not lossless and (height % 2 or width % 2):
            raise ValueError(
                f"frames are {width}x{height} pixels; expected even sizes for lossless=False. Use lossless=True"
            )
        self.path = path
        self._container = av.open(str(path), "w")
        rate = Fraction(fps).limit_denominator(1001)
        options = {} if key_frame_every is None else {"g": str(key_frame_every)}
        if lossless:
            options |= {"qp": "0", "preset": "veryfast"}
            self._stream = self._container.add_stream("libx264rgb", rate=rate, options=options)
            self._stream.pix_fmt = "rgb24"
        else:
            self._stream = self._container.add_stream("libx264", rate=rate, options=options | {"crf": "18"})
            self._stream.pix_fmt = "yuv420p"
        self._stream.width, self._stream.height = width, height
        self._stream.thread_count = 1  # small images: a thread costs more than it saves, and recorders run in parallel

    def add(self, frame: np.ndarray, *, key_frame: bool = False) -> None:
        """Append a frame (H, W, 3) uint8 RGB, as a key frame where readers will jump to."""
        image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        if key_frame:
            image.pict_type = PictureType.I
        self._container.mux(self._stream.encode(image))

    def close(self) -> None:
        """Write what the codec still holds, and the index without which no player opens the file."""
        self._container.mux(self._stream.encode())
        self._container.close()


def read_video(path: Path) -> np.ndarray:
    """Decode all frames of a video to (T, H, W, 3) uint8 RGB.

    Raises:
        ValueError: If the file is missing, damaged or empty.
    """
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_count = 1
            # The planes of a lossless video need no colour conversion, whose set-up costs 3 ms a frame.
            frames = [
                frame.to_ndarray() if frame.format.name == "gbrp" else frame.to_ndarray(format="rgb24")
                for frame in container.decode(stream)
            ]
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} cannot be decoded ({error}); restore the file or record the episode again") from error
    if not frames:
        raise ValueError(f"{path} holds no frames; restore the file or record the episode again")
    return np.stack(frames)


def read_video_at(path: Path, timestamps: np.ndarray, fps: float) -> np.ndarray:
    """Decode the frames of a video at given times; it seeks, so that a slice of a long video costs only its own frames.

    Args:
        path: The video.
        timestamps: (T,) seconds of the video's own clock, rising.
        fps: Rate of the timestamps; a frame belongs to one if it is within a quarter of a period.

    Returns:
        (T, H, W, 3) uint8 RGB.

    Raises:
        ValueError: If the file is missing or damaged, or has no frame at one of the times.
    """
    times, frames = [], []
    start, end = timestamps[0] - 0.25 / fps, timestamps[-1] + 0.25 / fps
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_count = 1
            if stream.time_base is None:
                raise ValueError(f"{path} has no time base; encode the video again")
            container.seek(max(0, int(start / stream.time_base)), stream=stream, backward=True)
            for frame in container.decode(stream):
                if frame.time is None or frame.time > end:
                    break
                if frame.time >= start:
                    times.append(frame.time)
                    frames.append(
                        frame.to_ndarray() if frame.format.name == "gbrp" else frame.to_ndarray(format="rgb24")
                    )
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} cannot be decoded ({error}); restore the file or leave this episode out") from error
    if not times or times[-1] < timestamps[-1] - 0.25 / fps:
        last = f"{times[-1]:.3f} s" if times else f"before {timestamps[0]:.3f} s"
        raise ValueError(
            f"{path} ends at {last}, but the episode lasts until {timestamps[-1]:.3f} s; the video is truncated or "
            "of another episode: restore the file or leave this episode out"
        )
    found = np.asarray(times)
    nearest = np.abs(found[None] - np.asarray(timestamps)[:, None]).argmin(axis=1)
    off = np.abs(found[nearest] - timestamps)
    if off.max() > 0.25 / fps or len(set(nearest.tolist())) < len(nearest):
        worst = int(off.argmax())
        raise ValueError(
            f"{path} has no frame at {timestamps[worst]:.3f} s (the nearest is {off[worst]:.3f} s away); expected one "
            f"every {1 / fps:.4f} s. The video has another frame rate than the data: state the true fps, or encode it "
            "again"
        )
    return np.stack([frames[i] for i in nearest])
