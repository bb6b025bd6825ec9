"""``from_cosmos``: the base at initialisation, strict on its tensors, one copy of them in memory."""

from __future__ import annotations

import ctypes
import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from diffusers import CosmosTransformer3DModel
from diffusers.models.transformers import transformer_cosmos
from safetensors.torch import load_file, save_file
from small_cosmos import OPTIONS, SMALL, WEIGHTS, inputs, run, small_transformer, write_checkpoints

from prophet_gym.actions import ACTION_SPECS
from prophet_gym.world_model import ProphetTransformer, from_cosmos, world_from_cosmos
from prophet_gym.world_model.lora import new_parameters
from prophet_gym.world_model.transformer import is_backbone

SECOND_SHARD = "diffusion_pytorch_model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def stock() -> Iterator[CosmosTransformer3DModel]:
    """diffusers' own network, with a padding mask that does not need torchvision."""
    functional = SimpleNamespace(resize=lambda x, size, interpolation: F.interpolate(x, size))
    fake = SimpleNamespace(functional=functional, InterpolationMode=SimpleNamespace(NEAREST="nearest"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer_cosmos, "transforms", fake, raising=False)
        yield small_transformer()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoints(tmp_path_factory.mktemp("cosmos"))


@pytest.fixture
def broken(checkpoints: Path, tmp_path: Path) -> Path:
    """A sharded copy to damage: the folder of the transformer."""
    shutil.copytree(checkpoints / "sharded", tmp_path / "broken")
    return tmp_path / "broken" / "transformer"


@pytest.mark.parametrize("layout", ["sharded", "single"])
@pytest.mark.parametrize("action_frames", ["none", "pooled", "spatial"])
def test_untrained_prophet_is_its_base_whatever_the_conditions(stock, checkpoints, layout, action_frames) -> None:
    ours = ProphetTransformer.from_cosmos(checkpoints / layout, action_frames=action_frames, **OPTIONS)
    data = inputs(action_frames)
    with torch.no_grad():
        theirs = stock(
            data["latents"],
            data["times"][:, None, :, None, None],
            data["text"],
            condition_mask=data["mask"],
            padding_mask=torch.zeros(1, 1, 32, 32),
            return_dict=False,
        )[0]
    torch.testing.assert_close(run(ours, data), theirs, atol=1e-5, rtol=1e-5)
    opened = from_cosmos(checkpoints / layout, action_frames=action_frames, memory_gate=1.0, **OPTIONS)
    assert (run(opened, data) - theirs).abs().max() > 1e-3, "the history is connected"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_parameter_is_finite_in_place_and_of_the_dtype(stock, checkpoints, dtype: torch.dtype) -> None:
    ours = from_cosmos(checkpoints / "sharded", dtype=dtype, action_frames="pooled", **OPTIONS)
    state = ours.state_dict()
    assert set(state) == set(dict(ours.named_parameters())) and not ours.training
    for name, value in state.items():
        assert value.dtype == dtype and value.device.type == "cpu" and value.isfinite().all(), name
    assert {name for name in state if is_backbone(name)} == set(stock.state_dict())
    assert all(torch.equal(state[name], value.to(dtype)) for name, value in stock.state_dict().items())
    assert run(ours, inputs("pooled", dtype)).isfinite().all()
    assert all(parameter.requires_grad for parameter in ours.parameters())


def test_new_parameters_follow_the_seed_alone(checkpoints: Path) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, again, other = (new_parameters(from_cosmos(checkpoints / "single", seed=s, **OPTIONS)) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_weights_do_not_lean_on_their_files(checkpoints: Path, tmp_path: Path) -> None:
    """A parameter that maps its file would change with it."""
    shutil.copytree(checkpoints / "single", tmp_path / "copy")
    ours = from_cosmos(tmp_path / "copy", **OPTIONS)
    before = ours.proj_out.weight.clone()
    file = tmp_path / "copy" / WEIGHTS
    with file.open("r+b") as opened:
        opened.write(b"\xff" * file.stat().st_size)
    assert torch.equal(ours.proj_out.weight, before)


def resident(line: str) -> int:
    """A line of this process's memory status, in bytes."""
    status = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status[line].split()[0])


def test_loading_never_holds_a_second_copy(tmp_path: Path) -> None:
    """Of 73 MB in three files; pages of mapped files count. ``benchmarks/loading.py`` measures larger ones."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        pytest.skip("no /proc/self/clear_refs: peak memory cannot be reset")
    large = {**SMALL, "num_attention_heads": 4, "attention_head_dim": 128, "num_layers": 9}
    CosmosTransformer3DModel(**large).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="30MB")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # free memory that the process still holds would hide what loading takes
    before = resident("VmRSS")
    reset.write_text("5")
    ours = from_cosmos(tmp_path, dtype=torch.bfloat16, **OPTIONS)
    size = sum(p.nbytes for p in ours.parameters())
    assert size > 70e6
    peak = resident("VmHWM") - before
    assert 0.9 * size < peak < 1.2 * size


def edit_shard(folder: Path, change: str) -> None:
    """Remove, add or reshape a tensor of the second shard, index and file in step."""
    tensors, index = load_file(folder / SECOND_SHARD), json.loads((folder / f"{WEIGHTS}.index.json").read_text())
    first = sorted(tensors)[0]
    if change == "missing":
        del tensors[first], index["weight_map"][first]
    elif change == "unexpected":
        tensors["learnable_pos_embed.pos_emb_t"] = torch.zeros(3)
        index["weight_map"]["learnable_pos_embed.pos_emb_t"] = SECOND_SHARD
    elif change == "shape":
        tensors[first] = tensors[first].flatten()[:-1].clone()
    elif change == "integers":
        tensors[first] = tensors[first].to(torch.int8)
    else:
        del tensors[first]  # the index still names it
    save_file(tensors, folder / SECOND_SHARD, metadata={"format": "pt"})
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "change, message",
    [
        ("missing", r"broken.transformer: .*1 missing: transformer_blocks"),
        ("unexpected", rf"1 unexpected: learnable_pos_embed.pos_emb_t in {SECOND_SHARD}"),
        ("shape", rf"1 of another shape: transformer_blocks\S+ \(\d+,\) in {SECOND_SHARD}, expected \("),
        ("integers", rf"1 not in floating point: \S+ I8 in {SECOND_SHARD}"),
        ("index", r"index.json: it contradicts its shards on transformer_blocks"),
    ],
)
def test_backbone_tensors_are_strict(broken: Path, change: str, message: str) -> None:
    edit_shard(broken, change)
    with pytest.raises(ValueError, match=message):
        from_cosmos(broken, **OPTIONS)


def test_damaged_and_foreign_files_are_named(broken: Path) -> None:
    shard, index = broken / SECOND_SHARD, broken / f"{WEIGHTS}.index.json"
    whole, listed = shard.read_bytes(), index.read_text()

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            from_cosmos(broken, **OPTIONS)

    for damaged in (whole[:-100], whole[:50], b"", b"version https://git-lfs.github.com/spec/v1\n"):
        shard.write_bytes(damaged)
        refused(f"{SECOND_SHARD}: not a whole safetensors file")
    shard.unlink()
    refused(f"shards missing beside it: {SECOND_SHARD}")
    shard.write_bytes(whole)
    for text in ("{", "[]", "{}", '{"weight_map": {}}', listed.replace(SECOND_SHARD, f"../{SECOND_SHARD}")):
        index.write_text(text)
        refused('index.json: expected JSON with "weight_map"')
    index.write_text(listed)
    (broken / WEIGHTS).write_bytes(whole)
    refused("expected one of them")
    for path in broken.glob("diffusion*"):
        path.unlink()
    refused("no weights; expected diffusion_pytorch_model.safetensors")
    torch.save({}, broken / "diffusion_pytorch_model.bin")
    refused(r"only pickled weights \(diffusion_pytorch_model.bin\)")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"_class_name": "WanTransformer3DModel"}, "a WanTransformer3DModel; expected a CosmosTransformer3DModel"),
        ({"extra_pos_embed_type": "learnable"}, "extra_pos_embed_type.*expected Cosmos-Predict2"),
        ({"use_crossattn_projection": True}, "use_crossattn_projection"),
        ({"camera_dim": 3}, "camera_dim"),
        ({"in_channels": 4}, "Video2World checkpoint, not Text2Image"),
        ({"patch_size": [2, 2, 2]}, r"expected \(1, p, p\)"),
        ({"num_layers": 3}, r"missing: transformer_blocks\.2\."),
        ({"num_attention_heads": 3}, "of another shape"),
    ],
)
def test_other_architectures_are_refused(broken: Path, change: dict, message: str) -> None:
    file = broken / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message) as error:
        from_cosmos(broken, **OPTIONS)
    assert "broken/transformer" in str(error.value)


def test_an_older_configuration_means_what_diffusers_takes_it_for(broken: Path) -> None:
    file = broken / "config.json"
    values = json.loads(file.read_text())
    for name in ("use_crossattn_projection", "controlnet_block_every_n", "img_context_dim_in", "patch_size"):
        values.pop(name)
    file.write_text(json.dumps(values))
    from_cosmos(broken, **OPTIONS)
    values.pop("extra_pos_embed_type")  # diffusers' default are learned position embeddings
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="extra_pos_embed_type"):
        from_cosmos(broken, **OPTIONS)


def test_sources_and_options_are_checked(checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ValueError, match="neither transformer/config.json nor config.json"):
        from_cosmos(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not a configuration"):
        from_cosmos(tmp_path)
    with pytest.raises(ValueError, match="expected a folder, or a hub id"):
        from_cosmos(tmp_path / "absent")
    with pytest.raises(ValueError, match="no such folder, and the hub does not give it.*hf auth login"):
        from_cosmos("nvidia/Cosmos-Predict2-2B-Video2World")
    with pytest.raises(ValueError, match="folders have none"):
        from_cosmos(checkpoints / "single", revision="main")
    with pytest.raises(ValueError, match="Did you mean 'num_effectors'"):
        from_cosmos(checkpoints / "single", num_efectors=1)
    with pytest.raises(ValueError, match="option 'num_layers'.*config.json"):
        from_cosmos(checkpoints / "single", num_layers=1)


def test_a_hub_id_fetches_json_and_safetensors_of_its_parts_alone(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's client runs offline on a cache as it leaves one after a download; its filter sees what we ask for."""
    commit = "0" * 40
    cached = tmp_path / "hub" / "models--nvidia--Cosmos-Small"
    shutil.copytree(checkpoints / "sharded", cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "v1").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    asked = []

    def download(repository: str, **options: object) -> str:
        asked.append(options["allow_patterns"])
        return snapshot_download(repository, **options)

    snapshot_download = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    ours = from_cosmos("nvidia/Cosmos-Small", revision="v1", **OPTIONS)
    expected = from_cosmos(checkpoints / "single", **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), expected.parameters(), strict=True))
    world = world_from_cosmos("nvidia/Cosmos-Small", ACTION_SPECS["bridge"], revision="v1", **OPTIONS)
    assert "Cosmos-Small" in world.checkpoint_info["trained_on"]
    with pytest.raises(ValueError, match="the hub does not give it"):
        from_cosmos("nvidia/Cosmos-Small", revision="v2", **OPTIONS)
    shards = [f"transformer/{WEIGHTS}", f"transformer/{WEIGHTS}.index.json", "transformer/config.json"]
    others = ["model.pt", "text_encoder/model.safetensors", "transformer/weights.bin", "vae/config.json"]
    kept = [list(huggingface_hub.utils.filter_repo_objects(shards + others, allow_patterns=p)) for p in asked[:2]]
    assert kept == [shards, [*shards, "vae/config.json"]]
