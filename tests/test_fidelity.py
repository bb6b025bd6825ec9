"""PSNR, SSIM and tSSIM against closed forms."""

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from prophet_gym.metrics.fidelity import PSNR_CAP, fidelity_metrics, psnr_per_frame, ssim_per_frame, tssim_per_step


@pytest.fixture
def video() -> np.ndarray:
    return np.random.default_rng(0).integers(60, 190, (6, 32, 40, 3), dtype=np.uint8)


def test_identical_videos_are_perfect(video):
    assert fidelity_metrics(video, video.copy()) == {"psnr": PSNR_CAP, "ssim": 1.0, "tssim": 1.0}


def test_psnr_of_a_known_error(video):
    offset = video + np.uint8(10)
    assert psnr_per_frame(video, offset) == pytest.approx(20 * np.log10(255 / 10))
    signs = np.random.default_rng(1).choice([-5, 5], video.shape)
    noisy = (video.astype(int) + signs).astype(np.uint8)
    assert fidelity_metrics(video, noisy)["psnr"] == pytest.approx(20 * np.log10(255 / 5))
    assert psnr_per_frame(video, noisy)[2] == pytest.approx(peak_signal_noise_ratio(video[2], noisy[2], data_range=255))


def test_the_mean_is_over_decibels_of_frames(video):
    half = video.copy()
    half[:3] += 10
    assert fidelity_metrics(video, half)["psnr"] == pytest.approx((PSNR_CAP + 20 * np.log10(25.5)) / 2)


def test_one_grey_level_stays_below_the_cap():
    frames = np.zeros((1, 64, 64, 3), np.uint8)
    other = frames.copy()
    other[0, 0, 0, 0] = 1
    assert 89 < psnr_per_frame(frames, other)[0] < PSNR_CAP


def test_ssim_is_that_of_scikit_image(video):
    other = np.roll(video, 1, axis=2)
    expected = [structural_similarity(a, b, channel_axis=-1, data_range=255) for a, b in zip(video, other, strict=True)]
    assert ssim_per_frame(video, other) == pytest.approx(expected)


def test_tssim_sees_change_and_not_appearance(video):
    texture = np.random.default_rng(2).integers(-40, 40, video.shape[1:])
    repainted = (video.astype(int) + texture).astype(np.uint8)
    assert tssim_per_step(video, repainted) == pytest.approx(1.0)
    assert fidelity_metrics(video, repainted)["ssim"] < 0.95
    frozen = np.repeat(video[:1], len(video), axis=0)
    assert np.all(tssim_per_step(video, frozen) < 0.1)
    assert tssim_per_step(frozen, frozen) == pytest.approx(1.0)


def test_a_single_frame_has_no_temporal_difference(video):
    assert np.isnan(fidelity_metrics(video[:1], video[:1])["tssim"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v[0], r"real has shape \(32, 40, 3\), expected \(T, H, W, 3\)"),
        (lambda v: v[..., :1], r"expected \(T, H, W, 3\) RGB"),
        (lambda v: v / 255.0, "dtype float64, expected uint8"),
        (lambda v: v[:3], "differ, expected the same"),
        (lambda v: v[:0], "differ, expected the same"),
    ],
)
def test_bad_videos_are_refused(video, change, message):
    with pytest.raises(ValueError, match=message):
        fidelity_metrics(change(video), video)


def test_tiny_frames_are_refused(video):
    with pytest.raises(ValueError, match="at least 7x7"):
        fidelity_metrics(video[:, :5, :5], video[:, :5, :5])
