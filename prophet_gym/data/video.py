"""Video files through PyAV: lossless RGB or ordinary H.264, one thread, whole clips at once."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


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
    height, width = frames.shape[1:3]
    if not lossless and (height % 2 or width % 2):
        raise ValueError(
            f"frames are {width}x{height} pixels; expected even sizes for lossless=False. Use lossless=True"
        )
    with av.open(str(path), "w") as container:
        rate = Fraction(fps).limit_denominator(1001)
        if lossless:
            stream = container.add_stream("libx264rgb", rate=rate, options={"qp": "0", "preset": "veryfast"})
            stream.pix_fmt = "rgb24"
        else:
            stream = container.add_stream("libx264", rate=rate, options={"crf": "18"})
            stream.pix_fmt = "yuv420p"
        stream.width, stream.height = width, height
        stream.thread_count = 1  # small images: a thread costs more than it saves, and recorders run in parallel
        for image in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


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
