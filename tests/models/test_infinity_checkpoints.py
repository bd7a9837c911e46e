"""Loading of public Infinity files: the layouts they come in, what is wrong with them, and what loading costs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from fastvar import models
from fastvar.models import (
    BSQTokenizer,
    BSQTokenizerConfig,
    Infinity,
    InfinityConfig,
    load_infinity,
    public_state,
)
from fastvar.models.infinity_checkpoints import _NAMES, _in_chunks, _public_tokenizer_names
from fastvar.models.public_state import public_name
from tests.helpers.tiny import SQUARES, some_texts, tiny_infinity

State = dict[str, torch.Tensor]


def public_transformer(net: Infinity, per_chunk: int = 1) -> State:
    """A model's weights as the public code saves them, in chunks of so many blocks or, with 0, without chunks."""
    state: State = {}
    for ours, tensor in net.state_dict().items():
        name = _in_chunks(public_name(ours, _NAMES), per_chunk)
        if ours.startswith("head."):
            zero = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor.dtype)
            tensor = torch.stack([zero, zero + tensor], 1).flatten(0, 1)
        elif name.endswith(("pos_start", "ca.mat_q")):
            tensor = tensor.unflatten(0, (1, -1)) if ours == "text_pool.query" else tensor[None]
        elif name.endswith("scale_mul_1H11"):
            tensor = tensor[None, :, None, None]
        elif name.endswith("ada_gss"):
            tensor = tensor[None, None]
        state[name] = tensor.clone()
    for name in [name for name in state if name.endswith("a.v_bias")]:
        state[name.replace("v_bias", "zero_k_bias")] = torch.zeros(32)
    return state


def public_tokenizer(net: Infinity) -> State:
    names = _public_tokenizer_names(net.tokenizer)
    state = {names[ours]: tensor.clone() for ours, tensor in net.tokenizer.state_dict().items()}
    return {**state, "quantizer.lfq.mask": torch.ones(8), "quantize.lfq.mask": torch.ones(8)}


@pytest.fixture(scope="module")
def net() -> Infinity:
    """Its tokenizer has norms of 32 groups, as all public ones."""
    made = tiny_infinity()
    tokenizer = type(made.tokenizer)(
        type(made.tokenizer.config)(**{**vars(made.tokenizer.config), "channels": 32, "norm_groups": 32})
    )
    for parameter in tokenizer.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    made.tokenizer = tokenizer.eval()
    return made


@pytest.fixture
def states(net: Infinity) -> tuple[State, State]:
    return public_transformer(net), public_tokenizer(net)


def check(found: Infinity, net: Infinity) -> None:
    """The same config, the same weights but for roundings of the head's difference, the same images."""
    assert found.config == net.config and found.tokenizer.config == net.tokenizer.config and not found.training
    for own, other in ((found, net), (found.tokenizer, net.tokenizer)):
        for name, tensor in other.state_dict().items():
            torch.testing.assert_close(own.state_dict()[name], tensor, msg=name)
    expected, got = (model.generate(some_texts(), top_k=1) for model in (net, found))
    assert torch.equal(got.tokens, expected.tokens)
    torch.testing.assert_close(got.images, expected.images)


@pytest.mark.parametrize("per_chunk", [0, 1, 3])
def test_chunks_of_blocks(net: Infinity, per_chunk: int) -> None:
    state = public_transformer(net, per_chunk)
    assert any(name.startswith("block_chunks.0.module.0.") for name in state) == (per_chunk > 0)
    check(load_infinity(state, public_tokenizer(net), grids=SQUARES)[0], net)


VARIANTS: dict[str, Any] = {
    "scale_mul as (1, 1, H, 1)": lambda t, v: (
        {name: x.transpose(1, 2) if "scale_mul" in name else x for name, x in t.items()},
        v,
    ),
    "tokenizer under vae": lambda t, v: (t, {"vae": v, "step": 3}),
    "a wrapped model": lambda t, v: ({f"module.{name}": x for name, x in t.items()}, v),
    "blocks wrapped by FSDP": lambda t, v: (
        {name.replace("0.module.", "0.module.module.", 1): x for name, x in t.items()},
        v,
    ),
    "a trainer's checkpoint": lambda t, v: ({"trainer": {"gpt_fsdp": t}, "epoch": 1}, v),
    "buffers of older files": lambda t, v: (
        {**t, "lvl_1L": torch.zeros(1, 14)},
        v,
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_public_files(net: Infinity, states: tuple[State, State], variant: str) -> None:
    check(load_infinity(*VARIANTS[variant](*states), grids=SQUARES)[0], net)


@pytest.mark.parametrize("kind", ["pth", "safetensors", "shards of safetensors", "shards of torch", "folder"])
def test_files(net: Infinity, states: tuple[State, State], tmp_path: Path, kind: str) -> None:
    transformer, tokenizer = states
    torch.save({"vae": tokenizer}, tmp_path / "vae.pth")
    folder = tmp_path / "shards"
    folder.mkdir()
    path = folder
    if kind == "pth":
        torch.save(transformer, path := tmp_path / "infinity.pth")
    elif kind == "safetensors":
        save_file({n: t.contiguous() for n, t in transformer.items()}, path := tmp_path / "infinity.safetensors")
    elif kind == "folder":
        save_file(transformer, folder / "model.safetensors")
    else:
        ending = "safetensors" if "safetensors" in kind else "bin"
        save = save_file if ending == "safetensors" else torch.save
        weight_map = {}
        for i in range(3):
            part = dict(list(transformer.items())[i::3])
            save(part, folder / f"model-{i}.{ending}")
            weight_map.update(dict.fromkeys(part, f"model-{i}.{ending}"))
        (folder / f"model.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    check(load_infinity(path, str(tmp_path / "vae.pth"), grids=[1, 2, (3, 3)])[0], net)


def test_half_precision(net: Infinity, states: tuple[State, State], tmp_path: Path, monkeypatch: Any) -> None:
    """They are taken as they are: from a file the very tensors that were read, from a state dict copies of them."""
    transformer = {name: tensor.bfloat16() for name, tensor in states[0].items()}
    found, bsq = load_infinity(transformer, states[1], grids=SQUARES)
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in bsq.parameters()} == {torch.float32}
    torch.testing.assert_close(found.head.weight.float(), net.head.weight, rtol=0, atol=0.05)
    own = found.state_dict()["blocks.0.qkv.weight"]
    assert own.data_ptr() != transformer["block_chunks.0.module.0.sa.mat_qkv.weight"].data_ptr()
    assert torch.equal(own, transformer["block_chunks.0.module.0.sa.mat_qkv.weight"])
    read: list[State] = []
    original = public_state.read_weights

    def reading(path: Any, owner: str, **options: Any) -> Any:
        read.append(original(path, owner))
        return read[-1]

    monkeypatch.setattr(public_state, "read_weights", reading)
    torch.save(transformer, tmp_path / "infinity.pth")
    found, _ = load_infinity(tmp_path / "infinity.pth", states[1], grids=SQUARES)
    shared = {tensor.data_ptr() for tensor in read[0].values()}
    for name, tensor in found.state_dict().items():
        assert tensor.data_ptr() in shared or name.startswith("head."), name
    # most are of one dtype: the others follow
    transformer["lvl_embed.weight"] = transformer["lvl_embed.weight"].float()
    assert load_infinity(transformer, states[1], grids=SQUARES)[0].scale_embed.weight.dtype == torch.bfloat16
    asked, _ = load_infinity(transformer, states[1], grids=SQUARES, dtype=torch.float32)
    assert {p.dtype for p in asked.parameters()} == {torch.float32}


def test_training_leaves_the_given_tensors_alone(states: tuple[State, State]) -> None:
    before = {name: tensor.clone() for name, tensor in states[0].items()}
    found, _ = load_infinity(*states, grids=SQUARES)
    assert all(parameter.requires_grad for parameter in found.parameters())
    with torch.no_grad():
        for parameter in found.parameters():
            parameter += 1
    assert list(states[0]) == list(before) and all(torch.equal(states[0][name], before[name]) for name in before)


# What the public code saves of infinity_layer12 with chunks of four blocks: C = 768, 8 heads, 2048 channels of text.
LAYER12 = {
    "cfg_uncond": (512, 2048),
    "pos_start": (1, 1, 768),
    "text_norm.weight": (2048,),
    "text_proj_for_sos.ca.mat_q": (1, 16, 48),
    "text_proj_for_sos.ca.v_bias": (768,),
    "text_proj_for_sos.ca.zero_k_bias": (768,),
    "text_proj_for_sos.ca.mat_kv.weight": (1536, 2048),
    "text_proj_for_sos.ca.proj.weight": (768, 768),
    "text_proj_for_sos.ca.proj.bias": (768,),
    "text_proj_for_ca.0.weight": (768, 2048),
    "text_proj_for_ca.0.bias": (768,),
    "text_proj_for_ca.2.weight": (768, 768),
    "text_proj_for_ca.2.bias": (768,),
    "lvl_embed.weight": (15, 768),
    "word_embed.weight": (768, 32),
    "word_embed.bias": (768,),
    "shared_ada_lin.1.weight": (4608, 768),
    "shared_ada_lin.1.bias": (4608,),
    "head_nm.ada_lin.1.weight": (1536, 768),
    "head_nm.ada_lin.1.bias": (1536,),
    "head.weight": (64, 768),
    "head.bias": (64,),
}
BLOCK_OF_LAYER12 = {
    "ada_gss": (1, 1, 6, 768),
    "sa.scale_mul_1H11": (1, 8, 1, 1),
    "sa.q_bias": (768,),
    "sa.v_bias": (768,),
    "sa.zero_k_bias": (768,),
    "sa.mat_qkv.weight": (2304, 768),
    "sa.proj.weight": (768, 768),
    "sa.proj.bias": (768,),
    "ca.v_bias": (768,),
    "ca.zero_k_bias": (768,),
    "ca.mat_q.weight": (768, 768),
    "ca.mat_q.bias": (768,),
    "ca.mat_kv.weight": (1536, 768),
    "ca.proj.weight": (768, 768),
    "ca.proj.bias": (768,),
    "ffn.fc1.weight": (3072, 768),
    "ffn.fc1.bias": (3072,),
    "ffn.fc2.weight": (768, 3072),
    "ffn.fc2.bias": (768,),
    "ca_norm.weight": (768,),
    "ca_norm.bias": (768,),
}


def test_the_size_of_layer12() -> None:
    """All keys of the public code at this size, and no others, without memory for the weights."""
    blocks = {
        f"block_chunks.{i}.module.{j}.{name}": shape
        for i in range(3)
        for j in range(4)
        for name, shape in BLOCK_OF_LAYER12.items()
    }
    state = {name: torch.empty(shape, device="meta") for name, shape in {**LAYER12, **blocks}.items()}
    assert sum(tensor.numel() for name, tensor in state.items() if "zero_k_bias" not in name) == 125_185_696
    net = tiny_infinity(bits=32)
    shape: dict[str, Any] = {"channels": 32, "channel_multipliers": (1, 2), "blocks_per_level": 1}
    net.tokenizer = BSQTokenizer(BSQTokenizerConfig(SQUARES, **shape))
    found, _ = load_infinity(state, public_tokenizer(net), grids=SQUARES)
    changes = {"grids": SQUARES, "drop_path": found.config.drop_path}  # which no weight tells of
    assert found.config == InfinityConfig.named("layer12", **changes)
    differences = 32 * 768 + 32  # of the logits of 0 and 1
    assert sum(parameter.numel() for parameter in found.parameters()) == 125_185_696 - differences
    del state["block_chunks.2.module.3.ca.mat_kv.weight"]
    with pytest.raises(ValueError, match=r"missing key block_chunks\.2\.module\.3\.ca\.mat_kv\.weight"):
        load_infinity(state, public_tokenizer(net), grids=SQUARES)


def test_patches_are_read_off(states: tuple[State, State]) -> None:
    """A transformer of four times as many bits as the tokenizer has channels."""
    net = tiny_infinity(bits=32)
    found, bsq = load_infinity(public_transformer(net), states[1], grids=SQUARES)
    assert (
        bsq.config.patchify and bsq.config.feature_channels == 8 and found.generate(some_texts()).images.shape[2] == 12
    )
    with pytest.raises(ValueError, match=r"load_infinity: tokenizer: expected one of 16 channels, .*, got 8"):
        load_infinity(public_transformer(tiny_infinity(bits=16)), states[1], grids=SQUARES)


def test_what_the_documentation_shows(
    net: Infinity, states: tuple[State, State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code runs, here with small files of those names and an encoder that answers anything."""
    page = (Path(__file__).parents[2] / "docs" / "infinity.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    torch.save(states[0], "infinity_2b_reg.pth")
    torch.save({"vae": states[1]}, "infinity_vae_d32reg.pth")
    monkeypatch.setattr(models, "T5TextEncoder", lambda *_, **__: lambda texts: some_texts((3,) * len(texts)))
    scope: dict[str, Any] = {}
    exec(compile(code, "docs/infinity.md", "exec"), scope)
    assert scope["out"].tokens.shape == (1, 2521, 8)
    assert scope["out"].images.shape == (1, 3, 64, 64) and Image.open("lighthouse.png").format == "PNG"


def test_default_grids_and_text_encoder(states: tuple[State, State]) -> None:
    found, bsq = load_infinity(*states, text_encoder=lambda texts: some_texts((3,) * len(texts)))
    assert found.schedule.num_tokens == bsq.schedule.num_tokens == 10521
    assert found.features(["a", "b"]).lengths == (3, 3)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_wrong_keys_are_named(states: tuple[State, State], prefix: str) -> None:
    """All of them, as the file names them."""
    transformer = {prefix + name: tensor for name, tensor in states[0].items()}
    transformer[f"{prefix}block_chunks.1.module.0.ca.mat_wrong"] = transformer.pop(
        f"{prefix}block_chunks.1.module.0.ca.mat_q.weight"
    )
    del transformer[f"{prefix}text_proj_for_ca.2.bias"]
    transformer[f"{prefix}block_chunks.2.module.0.sa.q_bias"] = torch.zeros(31)
    with pytest.raises(ValueError, match="Infinity: cannot load a state dict:") as raised:
        load_infinity(transformer, states[1], grids=SQUARES)
    for line in (
        f"missing key {prefix}block_chunks.1.module.0.ca.mat_q.weight",
        f"missing key {prefix}text_proj_for_ca.2.bias",
        f"{prefix}block_chunks.2.module.0.sa.q_bias: expected shape (32,), got (31,)",
        f"unexpected key {prefix}block_chunks.1.module.0.ca.mat_wrong",
    ):
        assert f"\n  {line}" in str(raised.value)
    assert len(str(raised.value).splitlines()) == 5
    tokenizer = dict(states[1], **{"decoder.extra.weight": torch.zeros(1)})
    del tokenizer["decoder.mid.block_1.norm1.norm.bias"]
    with pytest.raises(ValueError, match="BSQTokenizer: cannot load") as raised:
        load_infinity(states[0], tokenizer, grids=SQUARES)
    assert str(raised.value).splitlines()[1:] == [
        "  missing key decoder.mid.block_1.norm1.norm.bias",
        "  unexpected key decoder.extra.weight",
    ]


def test_something_else_than_an_infinity(states: tuple[State, State], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"transformer: missing key word_embed\.weight; .* keys are there"):
        load_infinity(states[1], states[0])
    with pytest.raises(ValueError, match=r"load_infinity: tokenizer: missing key encoder\.conv_in\.conv\.weight"):
        load_infinity(states[0], states[0], grids=SQUARES)
    path = tmp_path / "infinity.pth"
    torch.save({**states[0], "optimizer": Path("x")}, path)
    with pytest.raises(ValueError, match=r"transformer: expected a file .* whose code would have to be run"):
        load_infinity(path, states[1])
    folder = tmp_path / "shards"
    folder.mkdir()

    def refused(expected: str) -> None:
        with pytest.raises(ValueError, match=f"load_infinity: transformer: .*{expected}"):
            load_infinity(folder, states[1])

    refused("expected one index or one file of weights, got none")
    save_file({"a": torch.zeros(1)}, folder / "a.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../a.safetensors"}}))
    refused("expected files of this folder, got others")
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": "a.safetensors"}}))
    refused(r"its files lack \['b'\]")
    index.write_text(json.dumps({"weights": {}}))
    refused("expected a weight_map from tensors to files")
    index.write_text("{")
    refused("damaged file")
    index.write_text(json.dumps({"weight_map": {"a": "c.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"load_infinity: transformer: .*c\.safetensors"):
        load_infinity(folder, states[1])
