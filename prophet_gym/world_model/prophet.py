"""``ProphetWorldModel``: snapshot and action chunks in, imagined frames out (Algorithm 1 of the paper).

Sits between the environments and the networks: integrates the commanded poses, draws the action frames, encodes the
start frame, samples the chunk and rolls the latent history forward. It never sees a reward.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from ..action_frames import Camera, render_action_frames
from ..actions import PAD_GRIPPER, integrate_poses, pad_chunk, pad_effectors
from ..devices import require_device
from ..snapshot import Snapshot
from .codec import VideoCodec, placement, to_video
from .config import ProphetConfig
from .sampler import flow_schedule, integrate, karras_schedule, slot_noise
from .state import RolloutState
from .still import keep_still
from .text import TextEmbedder, pack_instructions, unpack_instructions
from .transformer import ProphetTransformer
from .video_vae import FoldedVideoVAE


class ProphetWorldModel:
    """History-aware, action-conditioned video world model.

    Args:
        transformer: the denoiser.
        vae: a :class:`FoldedVideoVAE` or a ``diffusers.AutoencoderKLWan``.
        config: everything else.
        checkpoint_info: shown as ``info["checkpoint"]``; default: name and training data of the configuration.
        text: embeds the snapshots' instructions for the denoiser's cross-attention; without it instructions are not
            seen. Weights have to be trained with text for it to help; it is no part of a saved checkpoint.
    """

    def __init__(
        self,
        transformer: ProphetTransformer,
        vae: Any,
        config: ProphetConfig,
        checkpoint_info: dict | None = None,
        *,
        text: TextEmbedder | None = None,
    ) -> None:
        self.transformer, self.codec, self.config, self.text = transformer, VideoCodec(vae), config, text
        self.checkpoint_info = checkpoint_info or {"name": config.name, "trained_on": config.trained_on}
        if self.codec.latent_channels != transformer.config.latent_channels:
            raise ValueError(
                f"latent channels: codec {self.codec.latent_channels}, denoiser {transformer.config.latent_channels}; "
                "expected equal numbers: load both from one checkpoint"
            )
        if config.action_spec.num_effectors > transformer.config.num_effectors:
            raise ValueError(
                f"commands of {config.action_spec.num_effectors} end-effectors, denoiser of "
                f"{transformer.config.num_effectors}; expected at least as many: give num_effectors"
            )
        if text is not None and transformer.config.text_embed_dim is None:
            raise ValueError(
                "text given to a denoiser without cross-attention (text_embed_dim=None); expected one with it, as "
                "from_cosmos makes: leave text out"
            )
        self.chunk_length: int = transformer.config.chunk_length
        self.num_effectors: int = transformer.config.num_effectors
        self.requires_camera: bool = transformer.config.action_frames != "none"
        self.num_inference_steps: int = config.num_inference_steps
        height, width = (side // VideoCodec.spatial_stride for side in config.image_size)
        transformer.memory.check(config.history_frames // VideoCodec.temporal_stride, (height, width))
        self.image_size, self.action_spec = config.image_size, config.action_spec
        # Commands of fewer end-effectors are padded to the model's number before their poses are integrated.
        self._padded_spec = replace(config.action_spec, num_effectors=self.num_effectors)

    @property
    def device(self) -> torch.device:
        """Device of the denoiser."""
        return placement(self.transformer)[0]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ProphetWorldModel:
        """Move both networks; returns self."""
        wanted = {k: v for k, v in (("device", device), ("dtype", dtype)) if v is not None}
        self.transformer.to(**wanted)
        self.codec.vae.to(**wanted)
        return self

    @torch.no_grad()
    def begin(self, snapshots: Sequence[Snapshot], seeds: Sequence[int]) -> RolloutState:
        """Start one rollout slot for each snapshot.

        Args:
            snapshots: start images (H, W, 3), poses and cameras.
            seeds: reset seed of each slot; all randomness of a slot follows from its seed and env step.

        Raises:
            ValueError: wrong image size or number of end-effectors, a camera is missing where action frames are
                required, a different number of seeds or a negative one, or an instruction that the world's text source
                cannot embed.
        """
        if len(snapshots) != len(seeds) or not snapshots:
            raise ValueError(
                f"begin: {len(snapshots)} snapshots and {len(seeds)} seeds; expected as many, at least one"
            )
        if wrong := [seed for seed in map(int, seeds) if not 0 <= seed < 2**63]:
            raise ValueError(f"begin: seed {wrong[0]}; expected integers from 0 to 2**63 - 1: give other seeds")
        for i, snapshot in enumerate(snapshots):
            self._check_snapshot(i, snapshot)
        instructions = None
        if self.text is not None:
            instructions = pack_instructions([snapshot.instruction for snapshot in snapshots])
            self._embedded_text(instructions)  # a text that cannot be embedded is an error here, not in the first chunk
        n, batch = self.num_effectors, len(snapshots)
        poses, gripper = np.tile(np.eye(4), (batch, n, 1, 1)), np.full((batch, n), PAD_GRIPPER)
        intrinsics, extrinsics = np.full((batch, 3, 3), np.nan), np.full((batch, 4, 4), np.nan)
        for i, snapshot in enumerate(snapshots):
            own = len(snapshot.eef_pose)
            poses[i, :own], gripper[i, :own] = snapshot.eef_pose, snapshot.gripper
            if snapshot.camera is not None:
                intrinsics[i], extrinsics[i] = snapshot.camera.K, snapshot.camera.E
        frames = torch.from_numpy(np.stack([s.image for s in snapshots]))
        latent = self.codec.encode(frames[:, None])
        groups = self.config.history_frames // VideoCodec.temporal_stride
        return RolloutState(
            frames=frames,
            history=latent.expand(-1, -1, groups, -1, -1).contiguous(),  # Alg. 1 line 1: [x_0, x_0, ..., x_0]
            tail=frames[:, None].expand(-1, 4, -1, -1, -1).contiguous(),
            tail_count=torch.zeros(batch, dtype=torch.int64),
            poses=torch.from_numpy(poses),
            gripper=torch.from_numpy(gripper),
            intrinsics=torch.from_numpy(intrinsics),
            extrinsics=torch.from_numpy(extrinsics),
            seeds=torch.as_tensor([int(s) for s in seeds], dtype=torch.int64),
            env_step=torch.zeros(batch, dtype=torch.int64),
            instructions=instructions,
        )

    def _embedded_text(self, instructions: Tensor | None) -> Tensor | None:
        """Text embeddings (B, L, D) of a state's instructions; None in a world without text."""
        if (instructions is None) != (self.text is None):
            raise ValueError(
                f"a rollout state {'without' if instructions is None else 'with'} instructions in a world "
                f"{'without' if self.text is None else 'with'} text; expected both or neither: go on in the world that "
                "began it"
            )
        if instructions is None or self.text is None:
            return None
        return self.text.embed(unpack_instructions(instructions), self.transformer.config.text_embed_dim)

    def _check_snapshot(self, index: int, snapshot: Snapshot) -> None:
        if snapshot.image.shape[:2] != tuple(self.image_size):
            raise ValueError(
                f"snapshot {index}: image of {snapshot.image.shape[0]}x{snapshot.image.shape[1]} pixels; this model "
                f"works at {self.image_size[0]}x{self.image_size[1]}: resize the image and its camera (Camera.resized)"
            )
        if len(snapshot.eef_pose) != self.action_spec.num_effectors:
            raise ValueError(
                f"snapshot {index}: {len(snapshot.eef_pose)} end-effectors; expected "
                f"{self.action_spec.num_effectors}, as the action conventions of this checkpoint say"
            )
        if self.requires_camera and snapshot.camera is None:
            raise ValueError(
                f"snapshot {index}: no camera, but this model draws action frames: give Snapshot(camera=...)"
            )

    @torch.no_grad()
    def predict(
        self, state: RolloutState, actions: np.ndarray | Tensor, num_inference_steps: int | None = None
    ) -> tuple[np.ndarray, RolloutState]:
        """Imagine one chunk.

        Args:
            state: B slots, not modified.
            actions: canonical commands (B, C, N, 7): metres, Euler radians, open ratio; C from 1 to ``chunk_length``,
                N that of the action conventions.
            num_inference_steps: denoising steps, default from the configuration.

        Returns:
            Frames (B, C, H, W, 3) uint8, one a command, and the state after them.

        Raises:
            ValueError: wrong shape, NaN, an open ratio outside [0, 1], a chunk longer than the model's, or a state with
                instructions in a world without text, or the other way round.
        """
        commands = self._check_actions(state, actions)
        if num_inference_steps is None:
            num_inference_steps = self.num_inference_steps
        length = commands.shape[1]
        poses = integrate_poses(state.poses.numpy(), commands, self._padded_spec)
        latents = self._sample(state, commands, poses, num_inference_steps)
        frames = self.codec.decode(latents)[:, :length].cpu()
        if self.config.still_below:
            decoded_start = self.codec.decode(self.codec.standing(state.frames, latents[:, :, :1]))[:, 0].cpu()
            frames = keep_still(frames, state.frames.cpu(), decoded_start, self.config.still_below)
        history, tail, count = self._advance_history(state, frames, latents)
        after = replace(
            state,
            frames=frames[:, -1].clone(),
            history=history,
            tail=tail,
            tail_count=count,
            poses=torch.from_numpy(poses[:, -1].copy()),
            gripper=torch.from_numpy(self._openness(state, commands)[:, -1]),
            env_step=state.env_step + 1,
        )
        return frames.numpy(), after

    def _check_actions(self, state: RolloutState, actions: np.ndarray | Tensor) -> np.ndarray:
        commands = np.asarray(actions, dtype=np.float32)
        effectors = self.action_spec.num_effectors
        if commands.ndim != 4 or commands.shape[0] != state.batch_size or commands.shape[2:] != (effectors, 7):
            raise ValueError(f"actions of shape {commands.shape}; expected (B={state.batch_size}, C, N={effectors}, 7)")
        if not 1 <= commands.shape[1] <= self.chunk_length:
            raise ValueError(
                f"chunk of {commands.shape[1]} commands; this model takes 1 to {self.chunk_length}: split it"
            )
        if not np.isfinite(commands).all():
            raise ValueError("actions contain NaN or infinity; expected finite numbers")
        low, high = commands[..., 6].min(), commands[..., 6].max()
        if low < -1e-6 or high > 1 + 1e-6:
            raise ValueError(
                f"open ratios from {low:.3g} to {high:.3g}; expected [0, 1] (1 is open): convert native commands with "
                "ActionSpec.to_canonical"
            )
        return pad_effectors(commands, self.num_effectors)

    def chunk_inputs(
        self, start: Tensor, commands: np.ndarray, poses: np.ndarray, state: RolloutState
    ) -> tuple[Tensor, Tensor | None]:
        """Padded commands and action-frame input of one chunk, on the device of the denoiser.

        The start pose and the commanded poses are drawn: (B, 1 + 4n, H, W, 3), the last one repeated to fill a group.
        """
        padded = torch.from_numpy(pad_chunk(commands, self.chunk_length)).to(start)
        if not self.requires_camera:
            return padded, None
        drawn = self.draw_actions(state, commands, poses)
        if self.transformer.config.action_frames == "pooled":
            return padded, self.codec.encode(drawn).to(start)
        return padded, to_video(drawn.to(start.device), start.dtype)

    def draw_actions(self, state: RolloutState, commands: np.ndarray, poses: np.ndarray) -> Tensor:
        """Action frames (B, 1 + 4n, H, W, 3) uint8 of the start pose and of every command (Eqs 4 to 9)."""
        if not state.has_camera:
            raise ValueError("a slot has no camera, but this model draws action frames: give snapshots a Camera")
        groups = -(-commands.shape[1] // VideoCodec.temporal_stride)
        fill = groups * VideoCodec.temporal_stride - commands.shape[1]
        path = np.concatenate([state.poses.numpy()[:, None], poses], axis=1)
        openness = np.concatenate([state.gripper.numpy()[:, None], self._openness(state, commands)], axis=1)
        height, width = self.image_size
        drawn = []
        for i in range(len(path)):
            camera = Camera(state.intrinsics[i].numpy(), state.extrinsics[i].numpy(), width, height)
            frames = render_action_frames(path[i], openness[i], camera)
            drawn.append(np.concatenate([frames, np.repeat(frames[-1:], fill, axis=0)]))
        return torch.from_numpy(np.stack(drawn))

    @staticmethod
    def _openness(state: RolloutState, commands: np.ndarray) -> np.ndarray:
        """Commanded open ratios (B, C, N) float64; an end-effector that only pads keeps its flag and is not drawn."""
        gripper = state.gripper.numpy()[:, None]
        return np.where(gripper == PAD_GRIPPER, PAD_GRIPPER, commands[..., 6].astype(np.float64))

    def _sample(self, state: RolloutState, commands: np.ndarray, poses: np.ndarray, num_steps: int) -> Tensor:
        device, dtype = placement(self.transformer)
        start = self.codec.encode(state.frames[:, None]).to(device, dtype)
        padded, action_frames = self.chunk_inputs(start, commands, poses, state)
        text = self._embedded_text(state.instructions)
        text = None if text is None else text.to(start)
        condition = self.transformer.condition(padded, action_frames, state.history.to(dtype), text)
        batch, z, _, h, w = start.shape
        groups = -(-commands.shape[1] // VideoCodec.temporal_stride)
        noise = slot_noise(state.seeds, state.env_step, (z, groups, h, w)).to(device)
        mask = start.new_zeros(batch, 1, 1 + groups, h, w)
        mask[:, :, 0] = 1.0

        def velocity(z_t: Tensor, t: float) -> Tensor:
            latents = torch.cat([start, z_t.to(dtype)], dim=2)
            times = start.new_full((batch, 1 + groups), t, dtype=torch.float32)
            times[:, 0] = 0.0
            return self.transformer(latents, mask, times, condition)[:, :, 1:].float()

        if self.config.schedule == "karras":
            times = karras_schedule(num_steps)
        else:
            times = flow_schedule(num_steps, self.config.schedule_shift)
        chunk = integrate(velocity, times[0] * noise, times, self.config.solver)
        return torch.cat([start, chunk.to(dtype)], dim=2)

    def _advance_history(self, state: RolloutState, frames: Tensor, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Append complete groups of returned frames to the history; up to three frames wait for their group to fill.

        Sampled latents are reused where groups align with the chunk; elsewhere the returned frames are encoded.
        """
        stride = VideoCodec.temporal_stride
        history, tail, count = state.history.clone(), state.tail.clone(), state.tail_count.clone()
        for waiting in count.unique().tolist():
            slots = (state.tail_count == waiting).nonzero().flatten()
            anchor = state.tail[slots, :1]
            queue = torch.cat([state.tail[slots, 1 : 1 + waiting], frames[slots]], dim=1)
            groups = queue.shape[1] // stride
            if groups:
                on_device = slots.to(history.device)
                if waiting == 0:
                    new = latents[on_device, :, 1 : 1 + groups]
                else:
                    new = self.codec.encode(torch.cat([anchor, queue[:, : groups * stride]], dim=1))[:, :, 1:]
                kept = torch.cat([history[on_device], new.to(history)], dim=2)
                history[on_device] = kept[:, :, -history.shape[2] :]
                anchor = queue[:, groups * stride - 1 : groups * stride]
            rest = torch.cat([anchor, queue[:, groups * stride :]], dim=1)
            tail[slots, : rest.shape[1]] = rest
            count[slots] = rest.shape[1] - 1
        return history, tail, count

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``transformer/`` and ``vae/`` (safetensors), then ``prophet.json``: a folder that has it is whole.

        Raises:
            ValueError: the denoiser carries an adapter, whose tensors such a folder cannot hold.
        """
        if getattr(self.transformer, "peft_config", None):
            raise ValueError(
                "the denoiser carries an adapter: merge it first (world_model.lora.merge_adapter), or save it alone "
                "(save_adapter)"
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "prophet.json").unlink(missing_ok=True)  # a save that is killed leaves no checkpoint of mixed parts
        for name, network in (("transformer", self.transformer), ("vae", self.codec.vae)):
            network.register_to_config(_name_or_path="")  # diffusers would store where the weights were loaded from
            network.save_pretrained(folder / name)
        temporary = folder / "prophet.json.tmp"
        temporary.write_text(json.dumps(self.config.to_dict(), indent=1) + "\n")
        temporary.replace(folder / "prophet.json")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        text: TextEmbedder | None = None,
    ) -> ProphetWorldModel:
        """Load a checkpoint folder written by :meth:`save_pretrained`; ``text`` as in the constructor.

        Raises:
            ValueError: the folder is not a Prophet checkpoint, is incomplete, corrupt, or of another architecture;
                ``text`` for a denoiser without cross-attention; or no such device.
        """
        folder, device = Path(folder), require_device(device)
        if not (folder / "prophet.json").is_file():
            raise ValueError(
                f"{folder}: no prophet.json, so no Prophet checkpoint; expected a folder of `prophet train`"
            )
        try:
            config = ProphetConfig.from_dict(json.loads((folder / "prophet.json").read_text()))
            vae_class = json.loads((folder / "vae" / "config.json").read_text())["_class_name"]
            codec_class = {"FoldedVideoVAE": FoldedVideoVAE, "AutoencoderKLWan": AutoencoderKLWan}[vae_class]
            vae = load_network(codec_class, folder / "vae", dtype)
            transformer = load_network(ProphetTransformer, folder / "transformer", dtype)
        except Exception as error:
            raise ValueError(
                f"{folder}: cannot be loaded as a Prophet checkpoint ({type(error).__name__}: {error})"
            ) from error
        info = {"name": config.name, "trained_on": config.trained_on, "source": folder.name}
        return cls(transformer.eval(), vae.eval(), config, info, text=text).to(device)


def require_network(folder: Path) -> None:
    """Requires a folder with a saved network: one that is misspelled would be looked for on the hub, for long.

    Raises:
        ValueError: it has no ``config.json``.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json, so no saved network; expected a folder that training has written")


def load_network(network_class: Any, folder: Path, dtype: torch.dtype) -> Any:
    """``from_pretrained`` that refuses missing, unexpected and mismatched keys, and anything but safetensors."""
    require_network(folder)
    network, report = network_class.from_pretrained(
        folder, torch_dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    bad = {k: v for k, v in report.items() if v}
    if bad:
        raise ValueError(f"{folder.name}: keys do not fit {network_class.__name__}: {bad}")
    return network
