"""Instructions as T5 embeddings: diffusers' own numbers, the cache, and worlds that see them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.cosmos.pipeline_cosmos2_video2world import Cosmos2VideoToWorldPipeline
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from prophet_gym import ProphetVectorEnv, ProphetWorldModel, Snapshot, SnapshotSet
from prophet_gym.world_model import ProphetTransformer, RolloutState
from prophet_gym.world_model.text import MAX_TOKENS, TextEmbedder, pack_instructions, unpack_instructions

DIM = 12
TEXTS = ["push the red block", "open the door", ""]
WORDS = ["▁", "▁push", "▁open", "▁the", "▁red", "▁block", "▁door"]
COMMANDS = np.full((1, 6, 1, 7), 0.02, np.float32)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random T5 and a tokenizer of a few words, in the layout of diffusers."""
    folder = tmp_path_factory.mktemp("t5")
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -2.0) for word in WORDS)]
    T5TokenizerFast(vocab=scores, extra_ids=0).save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(scores), d_model=DIM, d_kv=6, d_ff=16, num_layers=2, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="module")
def text(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> TextEmbedder:
    return TextEmbedder(encoder, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def without(tiny_checkpoint: Path) -> ProphetWorldModel:
    """The tiny world with random cross-attention, which it does not use."""
    base = ProphetWorldModel.from_pretrained(tiny_checkpoint)
    torch.manual_seed(1)
    options = {name: value for name, value in base.transformer.config.items() if not name.startswith("_")}
    denoiser = ProphetTransformer(**{**options, "text_embed_dim": DIM}).eval()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
        for block in denoiser.transformer_blocks:
            block.attn2.to_v.weight.mul_(200.0)  # attention averages over 512 rows, nearly all of them zero
    return ProphetWorldModel(denoiser, base.codec.vae, base.config)


@pytest.fixture(scope="module")
def world(without: ProphetWorldModel, text: TextEmbedder) -> ProphetWorldModel:
    return ProphetWorldModel(without.transformer, without.codec.vae, without.config, text=text)


@pytest.fixture(scope="module")
def starts(tiny_checkpoint: Path) -> list[Snapshot]:
    """One picture with each of the texts."""
    first = SnapshotSet.load(tiny_checkpoint / "snapshots")[0]
    return [replace(first, instruction=instruction) for instruction in TEXTS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_those_of_the_pipeline(encoder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    stock = Cosmos2VideoToWorldPipeline(
        T5EncoderModel.from_pretrained(encoder / "text_encoder", dtype=dtype).eval(),
        T5TokenizerFast.from_pretrained(encoder / "tokenizer"),
        None, None, None, safety_checker=object,
    )  # fmt: skip
    with torch.no_grad():
        expected = torch.cat([stock._get_t5_prompt_embeds(prompt, device="cpu") for prompt in TEXTS[:2]])
    for _ in ("computed", "from the cache"):
        embedded = TextEmbedder(encoder, tmp_path, dtype=dtype).embed(TEXTS, DIM)
        assert embedded.dtype == dtype and embedded.shape == (3, MAX_TOKENS, DIM)
        assert torch.equal(embedded[:2], expected) and not embedded[2].any()
    assert embedded[0, 4].any() and not embedded[0, 5:].any(), "four words and the end of the sequence"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_cache_needs_no_encoder(encoder: Path, tmp_path: Path) -> None:
    source, cache = shutil.copytree(encoder, tmp_path / "t5"), tmp_path / "cache"
    first = TextEmbedder(source, cache).embed(TEXTS, DIM)
    shutil.rmtree(source)
    assert torch.equal(TextEmbedder(source, cache).embed(TEXTS, DIM), first)
    for other in (TextEmbedder(source, cache, dtype=torch.bfloat16), TextEmbedder(tmp_path / "t5-b", cache)):
        with pytest.raises(ValueError, match="cache lacks a text: .* expected a folder, or a hub id"):
            other.embed(TEXTS, DIM)


def test_a_damaged_or_foreign_file_is_named(encoder: Path, tmp_path: Path) -> None:
    TextEmbedder(encoder, tmp_path).embed(TEXTS[:1], DIM)
    (file,) = tmp_path.iterdir()
    save_file(load_file(file), file, {"text": "another"})
    with pytest.raises(ValueError, match=f"{file.name}: an embedding of {{'text': 'another'}}; expected .* delete it"):
        TextEmbedder(encoder, tmp_path).embed(TEXTS, DIM)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{file.name}: not a whole embedding .* delete it to have it computed again"):
        TextEmbedder(encoder, tmp_path).embed(TEXTS, DIM)
    file.unlink()
    assert TextEmbedder(encoder, tmp_path).embed(TEXTS, DIM)[0].any()


def test_what_cannot_be_embedded_is_refused(encoder: Path, tmp_path: Path) -> None:
    text = TextEmbedder(encoder, tmp_path / "cache")
    with pytest.raises(ValueError, match="of 601 tokens; expected at most 512"):
        text.embed(["red " * 600], DIM)
    with pytest.raises(ValueError, match="width 12, the denoiser takes 16"):
        text.embed(TEXTS, 16)
    with pytest.raises(ValueError, match="of 2049 bytes; expected at most 2048"):
        pack_instructions(["a" * 2049])
    broken = shutil.copytree(encoder, tmp_path / "broken")
    weights = broken / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "shared.weight": tensors["shared.weight"] * torch.nan}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="is not finite"):
        TextEmbedder(broken, tmp_path / "nan").embed(TEXTS, DIM)
    save_file({name: value for name, value in tensors.items() if "block.1" not in name}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="keys do not fit T5EncoderModel: .*block.1"):
        TextEmbedder(broken, tmp_path / "nan").embed(TEXTS, DIM)
    (broken / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer/tokenizer.json"):
        TextEmbedder(broken, tmp_path / "nan").embed(TEXTS, DIM)
    assert not (tmp_path / "nan").exists()


def test_instructions_come_back_from_their_bytes() -> None:
    texts = ["", "push", "Öffne die Tür · 門を開ける"]
    assert unpack_instructions(pack_instructions(texts)) == texts


def test_text_changes_the_frames_slot_by_slot(world, without, starts) -> None:
    together, _ = world.predict(world.begin(starts, [5] * 3), COMMANDS.repeat(3, 0))
    for i, start in enumerate(starts):
        alone, _ = world.predict(world.begin([start], [5]), COMMANDS)
        assert np.abs(alone[0].astype(int) - together[i]).max() <= 1
        for other in range(i):
            assert np.abs(together[i].astype(int) - together[other]).mean() > 2, "same picture, seed and commands"
    blind = without.begin(starts[:1], [5])
    assert "instructions" not in blind.state_dict()
    unseen = without.predict(blind, COMMANDS)[0]
    assert np.array_equal(unseen, world.predict(world.begin(starts[2:], [5]), COMMANDS)[0]), "no text is a zero text"


def test_select_fork_put_and_restore_keep_the_text(world, without, starts) -> None:
    state = world.begin(starts[:2], [5, 6])
    after = world.predict(state, COMMANDS.repeat(2, 0))[1]
    turned = after.select([1, 0]).put([0], after.select([0])).fork(2)
    assert unpack_instructions(turned.instructions) == [TEXTS[0]] * 4
    frames, _ = world.predict(after, COMMANDS.repeat(2, 0))
    saved = after.state_dict()
    assert sum(saved["instructions"].shape) == 2 + 2048
    again, _ = world.predict(RolloutState.from_state_dict(saved), COMMANDS.repeat(2, 0))
    assert np.array_equal(frames, again)
    blind = without.begin(starts[:2], [5, 6])
    with pytest.raises(ValueError, match="with and without instructions"):
        blind.put([0], state.select([0]))
    with pytest.raises(ValueError, match="state without instructions in a world with text"):
        world.predict(RolloutState.from_state_dict(blind.state_dict()), COMMANDS.repeat(2, 0))
    with pytest.raises(ValueError, match="state with instructions in a world without text"):
        without.predict(state, COMMANDS.repeat(2, 0))


def test_environments_fork_and_restore_with_text(world, without, starts) -> None:
    def made(model: ProphetWorldModel) -> ProphetVectorEnv:
        return ProphetVectorEnv(model, 2, horizon=40, snapshots=starts[:2], chunk_length=4, autoreset_mode="Disabled")

    env, action = made(world), np.zeros((2, 4, 7), np.float32)
    env.reset(seed=0, options={"snapshots": starts[:2]})
    env.step(action)
    state, members = env.get_state(), env.fork(2)
    frames = env.step(action)[4]["frames"]
    forked = members.step(action.repeat(2, 0))[4]["frames"]
    assert np.abs(forked.astype(int) - frames.repeat(2, 0)).max() <= 1
    fresh = made(world)
    fresh.set_state(state)
    assert np.array_equal(fresh.step(action)[4]["frames"], frames)
    blind = made(without)
    blind.reset(seed=0)
    with pytest.raises(ValueError, match="its fields are .* expected .*'instructions'"):
        fresh.set_state(blind.get_state())
    with pytest.raises(ValueError, match="its fields are .*'instructions'"):
        blind.set_state(state)


def test_a_checkpoint_is_loaded_with_text(world, text, starts, tiny_checkpoint: Path, tmp_path: Path) -> None:
    world.save_pretrained(tmp_path)
    again = ProphetWorldModel.from_pretrained(tmp_path, text=text)
    expected = world.predict(world.begin(starts[:1], [5]), COMMANDS)[0]
    assert np.array_equal(again.predict(again.begin(starts[:1], [5]), COMMANDS)[0], expected)
    half = ProphetWorldModel.from_pretrained(tmp_path, dtype=torch.bfloat16, text=text)
    assert half.predict(half.begin(starts[:1], [5]), COMMANDS)[0].shape == expected.shape
    with pytest.raises(ValueError, match="text given to a denoiser without cross-attention"):
        ProphetWorldModel.from_pretrained(tiny_checkpoint, text=text)
