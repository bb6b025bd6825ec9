"""What a machine lacks is skipped with the reason: rendering, recorded trajectories, a CUDA device."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

RECORDINGS = Path(os.environ.get("PROPHET_DATA", Path(__file__).parents[2] / "shared" / "data"))


def pytest_configure() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


def missing(marker: str) -> str | None:
    """Why tests with this marker cannot run here; None when they can."""
    if marker == "gpu":
        return None if torch.cuda.is_available() else "no CUDA device"
    if marker == "data":
        return None if RECORDINGS.is_dir() else "no recorded trajectories: set PROPHET_DATA to their folder"
    from prophet_gym.sims.rendering import RenderingUnavailableError, select_backend

    try:
        select_backend()
    except RenderingUnavailableError as error:
        return str(error)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for marker in ("gpu", "data", "render"):
        marked = [item for item in items if item.get_closest_marker(marker)]
        reason = missing(marker) if marked else None
        for item in marked if reason else []:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def recordings() -> Path:
    """Folder of the recorded robot trajectories; for tests marked `data`."""
    return RECORDINGS


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest whole Prophet: random but fixed weights, 48x48 images, chunks of up to 20, four snapshots.

    Its frames follow history, actions and noise by tens of grey levels (test_env.py holds it to that), so that a test
    with a tolerance of one level notices when slots swap them.
    """
    from prophet_gym.action_frames import Camera
    from prophet_gym.actions import ACTION_SPECS
    from prophet_gym.snapshot import Snapshot, SnapshotSet
    from prophet_gym.world_model.prophet import ProphetConfig, ProphetWorldModel
    from prophet_gym.world_model.transformer import ProphetTransformer
    from prophet_gym.world_model.video_vae import FoldedVideoVAE

    torch.manual_seed(0)
    transformer = ProphetTransformer(
        latent_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=1,
        text_embed_dim=None,
        adaln_lora_dim=16,
        max_size=(6, 8, 8),
        rope_scale=(1.0, 1.0, 1.0),
        concat_padding_mask=False,
        timestep_scale=1000.0,
        num_effectors=1,
        scalar_hidden_dim=32,
        action_frames="spatial",
        memory_levels=((0, 2, 1, 2, 2), (0, 2, 1, 3, 3)),
        memory_gate=1.0,
    )
    vae = FoldedVideoVAE(latent_channels=4, channels=16, encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    with torch.no_grad():
        for parameter in [*transformer.parameters(), *vae.parameters()]:
            if parameter.ndim > 1:  # variance-preserving, also where layers start at zero: all inputs reach the frames
                parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
        transformer.memory.to_v.weight.mul_(4.0)  # attention averages over the memory's tokens
        vae.encoder[-1].weight.mul_(4.0)  # noise images average out: brings latents to unit variance
        vae.decoder[-2].weight.mul_(0.4)  # grey levels: standard deviation 37, 0.6 % reach 0 or 255
    config = ProphetConfig(
        name="tiny-test",
        trained_on="nothing: random weights for tests",
        image_size=(48, 48),
        history_frames=8,
        num_inference_steps=1,
        action_spec=ACTION_SPECS["tabletop"],
    )
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    ProphetWorldModel(transformer, vae, config).save_pretrained(folder)
    rng = np.random.default_rng(0)
    view = np.array([[1.0, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 0.8], [0, 0, 0, 1]])  # 0.8 m above, looking down
    camera = Camera(np.array([[60.0, 0, 23.5], [0, 60, 23.5], [0, 0, 1]]), view, 48, 48)
    snapshots = []
    for i in range(4):
        pose = np.eye(4)
        pose[:3, 3] = *rng.uniform(-0.1, 0.1, 2), 0.12
        image = rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)
        snapshots.append(
            Snapshot(image, f"put block {i} on the plate", pose[None], np.ones(1), camera, name=f"start {i}")
        )
    SnapshotSet(snapshots).save(folder / "snapshots")
    return folder
