"""The block tracker: drawn blocks with a known place, and real Tabletop frames with the simulator's labels."""

import cv2
import numpy as np
import pytest

from prophet_gym.metrics.evaluate import MIN_VISIBLE
from prophet_gym.metrics.tracking import find_block, reference_color, track_block

TABLE, RED, GREEN, BLUE = (168, 161, 148), (209, 33, 31), (41, 158, 56), (46, 84, 217)


def scene(u: int = 20, v: int = 40, color=RED) -> np.ndarray:
    """A table with a plate and a 7x7 block centred at pixel (u, v)."""
    frame = np.full((64, 64, 3), TABLE, np.uint8)
    cv2.circle(frame, (45, 20), 8, BLUE, -1)
    frame[v - 3 : v + 4, u - 3 : u + 4] = color
    return frame


@pytest.mark.parametrize("place", [(20, 40), (3, 3), (60, 60), (45, 20)])
def test_centroid_of_a_drawn_block(place):
    frame = scene(*place)
    assert find_block(frame, reference_color(frame, place)) == pytest.approx(place, abs=0.05)


def test_blur_shading_and_another_block_do_not_move_it():
    color = reference_color(scene(), (20, 40))
    crowded = scene()
    crowded[10:17, 10:17] = GREEN
    for frame in (crowded, cv2.GaussianBlur(scene(), (0, 0), 1.5), (scene() * 0.75).astype(np.uint8)):
        assert find_block(frame, color) == pytest.approx((20, 40), abs=0.3)


def test_two_pieces_beside_a_finger_are_one_block():
    frame = scene()
    frame[30:45, 19:22] = (26, 26, 30)
    assert find_block(frame, np.float32(RED)) == pytest.approx((20, 40), abs=0.05)


def test_a_faded_missing_or_drowned_block_is_lost():
    color = reference_color(scene(), (20, 40))
    faded = (0.8 * scene(color=TABLE) + 0.2 * scene()).astype(np.uint8)
    speck = scene(color=TABLE)
    speck[40, 20:22] = RED
    drowned = np.full((64, 64, 3), RED, np.uint8)
    for frame in (faded, speck, scene(color=TABLE), scene(color=GREEN), drowned):
        assert find_block(frame, color) is None
    path = track_block(np.stack([scene(), faded]), color)
    assert path[0] == pytest.approx((20, 40), abs=0.05) and np.isnan(path[1]).all()


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"\(u, v\) = \(70, 3\) lies outside the 64x64 frame"):
        reference_color(scene(), (70, 3))
    with pytest.raises(ValueError, match="cannot be told from the table"):
        reference_color(scene(), (5, 5))
    with pytest.raises(ValueError, match=r"expected \(H, W, 3\) uint8 RGB"):
        find_block(scene() / 255.0, np.float32(RED))


@pytest.mark.render
@pytest.mark.parametrize("look", ["first", "second"])
def test_on_real_frames_against_the_simulator(look):
    from prophet_gym.data.record import record_episode
    from prophet_gym.sims.expert import BEHAVIOURS
    from prophet_gym.sims.tabletop import TabletopSim

    sim, errors, hidden = TabletopSim(look=look), [], []
    for seed, behaviour in enumerate(BEHAVIOURS):
        episode = record_episode(sim, 900_000 + seed, behaviour=behaviour)
        px, shown = episode.labels["block_px"], episode.labels["block_visible"]
        best = int(shown.argmax())
        found = track_block(episode.frames, reference_color(episode.frames[best], px[best]))
        error = np.linalg.norm(found - px, axis=-1)
        errors.append(error[shown >= MIN_VISIBLE])
        hidden.append(found[shown == 0])
    sim.close()
    error = np.concatenate(errors)
    assert np.nanmedian(error) < 1.0
    assert np.isnan(error).mean() < 0.01
    assert np.nanpercentile(error, 99) < 2.5
    assert np.isnan(np.concatenate(hidden)).all()
