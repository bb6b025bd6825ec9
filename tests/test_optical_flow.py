"""The optical-flow protocol (Eqs 12-13) against motion that is known."""

import cv2
import numpy as np
import pytest

from prophet_gym.metrics.optical_flow import (
    compare_flows,
    default_threshold,
    farneback_flow,
    flow_metrics,
    flow_per_frame,
    window_size,
)


def sliding(velocity: tuple[float, float], frames: int = 5, size: int = 64) -> np.ndarray:
    """A smooth texture that moves by `velocity` (right, down) pixels a frame."""
    noise = np.random.default_rng(3).normal(size=(size, size)).astype(np.float32)
    field = np.real(np.fft.ifft2(np.fft.fft2(cv2.GaussianBlur(noise, (0, 0), 2.5))))
    spectrum = np.fft.fft2(field / np.abs(field).max())
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None]
    video = []
    for t in range(frames):
        # A phase ramp is a periodic shift, exact at any fraction of a pixel.
        shift = np.exp(-2j * np.pi * (fx * velocity[0] + fy * velocity[1]) * t)
        video.append(np.clip(128 + 110 * np.real(np.fft.ifft2(spectrum * shift)), 0, 255))
    return np.repeat(np.round(video).astype(np.uint8)[..., None], 3, axis=-1)


INNER = slice(8, -8)


@pytest.mark.parametrize("velocity", [(1.0, 0.0), (0.0, -2.0), (1.5, 1.0), (-3.0, 2.0)])
def test_farneback_measures_a_known_translation(velocity):
    flow = farneback_flow(sliding(velocity))
    assert flow.shape == (4, 64, 64, 2)
    assert np.abs(flow[:, INNER, INNER] - velocity).mean() < 0.05


def test_identical_videos():
    video = sliding((1.0, 0.5))
    metrics = flow_metrics(video, video.copy())
    assert metrics["epe_mean"] == metrics["epe_median"] == 0.0
    assert metrics["cos_mean"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["cos_median"] == pytest.approx(1.0, abs=1e-4)


def test_against_a_still_video_epe_is_the_speed_and_cosine_is_undefined():
    video = sliding((3.0, 4.0))
    still = np.repeat(video[:1], len(video), axis=0)
    metrics = flow_metrics(video, still)
    assert metrics["epe_mean"] == pytest.approx(5.0, rel=0.25)  # borders, where content enters, are slower
    assert metrics["epe_mean"] == pytest.approx(np.linalg.norm(farneback_flow(video), axis=-1).mean())
    assert np.isnan(metrics["cos_mean"]) and np.isnan(metrics["cos_median"])
    assert not np.any(farneback_flow(still))


@pytest.mark.parametrize(("other", "cosine"), [((2.0, 0.0), 1.0), ((-2.0, 0.0), -1.0), ((0.0, 2.0), 0.0)])
def test_cosine_of_equal_opposite_and_perpendicular_motion(other, cosine):
    metrics = flow_metrics(sliding((2.0, 0.0)), sliding(other))
    assert metrics["cos_median"] == pytest.approx(cosine, abs=0.08)
    assert metrics["epe_median"] == pytest.approx(np.linalg.norm(np.subtract(other, (2.0, 0.0))), rel=0.15, abs=0.05)


def constant_flow(*vectors) -> np.ndarray:
    return np.stack([np.broadcast_to(np.float32(v), (8, 9, 2)) for v in vectors])


def test_equations_in_closed_form():
    real = constant_flow((3, 4), (1, 0), (0, 0), (0.1, 0))
    imagined = constant_flow((3, 4), (-1, 0), (2, 0), (0.1, 0))
    comparison = compare_flows(real, imagined, threshold=0.25)
    assert comparison.epe == pytest.approx([0, 2, 2, 0])
    np.testing.assert_allclose(comparison.cos, [1, -1, np.nan, np.nan], atol=1e-5)
    assert comparison.real_moves.tolist() == [True, True, False, False]
    assert compare_flows(real, imagined, threshold=0.05).cos[3] == pytest.approx(1, abs=1e-3)


def test_v_t_holds_pixels_where_both_move():
    real, imagined = constant_flow((1, 0)).copy(), constant_flow((1, 0)).copy()
    real[:, :, 3:] = 0  # a third moves in the same way; a third only in the imagined video; a third moves oppositely
    real[:, :, 6:] = (-1, 0)
    assert compare_flows(real, imagined, threshold=0.5).cos == pytest.approx([0.0], abs=1e-5)


def test_static_frames_are_left_out_of_the_aggregate():
    moving = sliding((2.0, 0.0), frames=3)
    video = np.concatenate([np.repeat(moving[:1], 3, axis=0), moving])
    per_frame = flow_per_frame(video, video)
    assert np.isnan(per_frame.cos).tolist() == [True, True, True, False, False]
    assert flow_metrics(video, video)["cos_mean"] == pytest.approx(1.0, abs=1e-4)


def test_nearly_still_frames_have_no_motion_at_the_border():
    video = sliding((0.0, 0.0), frames=2)
    video[1, 32, 32] += 1
    assert np.linalg.norm(farneback_flow(video), axis=-1).max() < 0.05


def test_scaling_with_the_image():
    assert [window_size(h) for h in (64, 128, 256, 480)] == [9, 9, 15, 29]
    assert default_threshold(64) == 0.25 and default_threshold(256) == 1.0


def test_bad_input_is_refused():
    video = sliding((1.0, 0.0))
    with pytest.raises(ValueError, match="expected at least 2"):
        flow_metrics(video[:1], video[:1])
    with pytest.raises(ValueError, match="threshold is -1.0, expected a number of pixels per frame >= 0"):
        flow_metrics(video, video, threshold=-1.0)
    with pytest.raises(ValueError, match="expected two equal"):
        compare_flows(constant_flow((1, 0)), constant_flow((1, 0), (1, 0)), threshold=0.1)
