"""Loading of FoundationVision/Infinity checkpoints: shapes are read off the tensors, every key must find its place."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch

from fastvar.models.bsq_tokenizer import BSQTokenizer, BSQTokenizerConfig
from fastvar.models.infinity import Infinity
from fastvar.models.infinity_config import InfinityConfig
from fastvar.models.pretrained import load_strictly
from fastvar.models.public_state import PublicState, State, StateOrPath, count, public_name, read_state, renamed
from fastvar.models.text import TextEncoder
from fastvar.schedule import ScaleSchedule, infinity_schedule

# Public name -> ours; `{i}` stands for a block's number, counted over all chunks.
_NAMES = {
    "cfg_uncond": "null_text",
    "pos_start": "start_embed",
    "text_norm.weight": "text_norm.weight",
    "text_proj_for_sos.ca.mat_q": "text_pool.query",
    "text_proj_for_sos.ca.mat_kv.weight": "text_pool.kv.weight",
    "text_proj_for_sos.ca.v_bias": "text_pool.v_bias",
    "text_proj_for_sos.ca.proj.weight": "text_pool.proj.weight",
    "text_proj_for_sos.ca.proj.bias": "text_pool.proj.bias",
    "text_proj_for_ca.0.weight": "text_in.weight",
    "text_proj_for_ca.0.bias": "text_in.bias",
    "text_proj_for_ca.2.weight": "text_out.weight",
    "text_proj_for_ca.2.bias": "text_out.bias",
    "lvl_embed.weight": "scale_embed.weight",
    "word_embed.weight": "code_embed.weight",
    "word_embed.bias": "code_embed.bias",
    "shared_ada_lin.1.weight": "shared_modulation.weight",
    "shared_ada_lin.1.bias": "shared_modulation.bias",
    "head_nm.ada_lin.1.weight": "head_modulation.weight",
    "head_nm.ada_lin.1.bias": "head_modulation.bias",
    "head.weight": "head.weight",
    "head.bias": "head.bias",
    "blocks.{i}.ada_gss": "blocks.{i}.modulation_table",
    "blocks.{i}.sa.scale_mul_1H11": "blocks.{i}.log_scale",
    "blocks.{i}.sa.q_bias": "blocks.{i}.q_bias",
    "blocks.{i}.sa.v_bias": "blocks.{i}.v_bias",
    "blocks.{i}.sa.mat_qkv.weight": "blocks.{i}.qkv.weight",
    "blocks.{i}.sa.proj.weight": "blocks.{i}.proj.weight",
    "blocks.{i}.sa.proj.bias": "blocks.{i}.proj.bias",
    "blocks.{i}.ca_norm.weight": "blocks.{i}.text_norm.weight",
    "blocks.{i}.ca_norm.bias": "blocks.{i}.text_norm.bias",
    "blocks.{i}.ca.mat_q.weight": "blocks.{i}.text_attention.query.weight",
    "blocks.{i}.ca.mat_q.bias": "blocks.{i}.text_attention.query.bias",
    "blocks.{i}.ca.mat_kv.weight": "blocks.{i}.text_attention.kv.weight",
    "blocks.{i}.ca.v_bias": "blocks.{i}.text_attention.v_bias",
    "blocks.{i}.ca.proj.weight": "blocks.{i}.text_attention.proj.weight",
    "blocks.{i}.ca.proj.bias": "blocks.{i}.text_attention.proj.bias",
    "blocks.{i}.ffn.fc1.weight": "blocks.{i}.mlp_in.weight",
    "blocks.{i}.ffn.fc1.bias": "blocks.{i}.mlp_in.bias",
    "blocks.{i}.ffn.fc2.weight": "blocks.{i}.mlp_out.weight",
    "blocks.{i}.ffn.fc2.bias": "blocks.{i}.mlp_out.bias",
}
# Buffers that are zero or follow from a schedule: checked to be known, then left out.
_BUFFERS = (
    *("lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "Infinity_invisible_qlen"),
    *("text_proj_for_sos.ca.zero_k_bias", "blocks.{i}.sa.zero_k_bias", "blocks.{i}.ca.zero_k_bias"),
)
_TOKENIZER_BUFFERS = ("quantizer.lfq.mask", "quantize.lfq.mask")
_CHUNKED = re.compile(r"^block_chunks\.(\d+)\.(?:module\.)+(\d+)\.")


def load_infinity(
    transformer: StateOrPath,
    tokenizer: StateOrPath,
    *,
    grids: ScaleSchedule | Iterable[int | Sequence[int]] | None = None,
    text_encoder: TextEncoder | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Infinity, BSQTokenizer]:
    """An `Infinity` and its `BSQTokenizer` from public FoundationVision/Infinity weights.

    Depth, width, heads, bits, chunks of blocks and whether tokens are patches of 2 x 2 cells are read off the keys and
    shapes. Of the head only the differences of the logits of 1 and 0 are kept, which is all that its output depends on.

    Args:
        transformer: the state dict of `infinity_2b_reg.pth` and its like, or a path to it (no code of it is run), or to
            a folder of shards, as the 8B comes; a trainer's checkpoint that nests it as `trainer.gpt_fsdp` works too.
        tokenizer: the state dict of `infinity_vae_d32reg.pth` and its like, bare or under the key `vae`, or a path.
        grids: token grids, coarse to fine, a choice of the user and not of the weights; those of 1024 x 1024 pixels by
            default. See `fastvar.schedule.infinity_schedule`.
        text_encoder: what makes features of texts, see `fastvar.models.T5TextEncoder`.
        dtype: of the transformer's weights; by default that of most of them. From files they are taken as they are,
            without a copy in another dtype; the tokenizer's become float32.

    Returns:
        both in evaluation mode, on the CPU, the tokenizer attached to the model.

    Raises:
        ValueError: names every missing and unexpected key and every wrong shape, as the file names them; where keys are
            missing that the shape is read off, these, and some of those that are there.
    """
    transformer_state = read_state(transformer, "load_infinity: transformer", "trainer", "gpt_fsdp")
    tokenizer_state = read_state(tokenizer, "load_infinity: tokenizer", "vae")
    schedule = infinity_schedule("1M") if grids is None else ScaleSchedule(grids)
    blocks, per_chunk = _with_blocks_in_one_list(transformer_state)
    config = _transformer_config(blocks, schedule)
    bsq = _tokenizer(tokenizer_state, config)

    def describe(ours: str) -> str:
        return _in_chunks(public_name(ours, _NAMES), per_chunk)

    transformer_state.clear()
    shared = isinstance(transformer, Mapping)  # the caller's tensors stay the caller's
    weights = _transformer_weights(blocks, dtype or _most_common_dtype(blocks), copy=shared)
    with torch.device("meta"):
        net = Infinity(config, text_encoder=text_encoder)
    load_strictly(net, weights, blocks.source, describe, prefix=blocks.prefix, assign=True)
    net.tokenizer = bsq
    return net.eval(), bsq


def public_infinity_config(transformer: State, source: str) -> InfinityConfig:
    """The shape of a public transformer's weights, as `load_infinity` reads it off them, with grids of 1024 x 1024
    pixels.

    Args:
        transformer: the state dict.
        source: what messages call it.

    Raises:
        ValueError: keys are missing that the shape is read off.
    """
    blocks, _ = _with_blocks_in_one_list(PublicState(transformer, source, source))
    return _transformer_config(blocks, infinity_schedule("1M"))


def _with_blocks_in_one_list(state: PublicState) -> tuple[PublicState, int]:
    """The state with names blocks.{i} whether it has chunks of blocks or none, and the blocks of a chunk (0: none)."""
    per_chunk = count(state, _CHUNKED.pattern.replace(r"(\d+)", r"\d+", 1))

    def name_of(name: str) -> str:
        return _CHUNKED.sub(lambda found: f"blocks.{int(found[1]) * per_chunk + int(found[2])}.", name)

    blocks = PublicState({name_of(name): tensor for name, tensor in state.items()}, state.owner, state.source)
    blocks.prefix = state.prefix
    return blocks, per_chunk


def _in_chunks(name: str, per_chunk: int) -> str:
    """The inverse for a name of the state."""
    if not per_chunk:
        return name
    return re.sub(
        r"^blocks\.(\d+)\.",
        lambda found: f"block_chunks.{int(found[1]) // per_chunk}.module.{int(found[1]) % per_chunk}.",
        name,
    )


def _transformer_config(state: PublicState, schedule: ScaleSchedule) -> InfinityConfig:
    state.need(
        {
            "word_embed.weight": 2,
            "cfg_uncond": 2,
            "lvl_embed.weight": 2,
            "text_proj_for_sos.ca.mat_q": 3,
            "blocks.0.sa.scale_mul_1H11": 4,
            "blocks.0.ffn.fc1.weight": 2,
            "head.weight": 2,
        }
    )
    embed_dim, bits = state["word_embed.weight"].shape
    text_length, text_channels = state["cfg_uncond"].shape
    return InfinityConfig(
        grids=schedule.grids,
        depth=count(state, r"blocks\.(\d+)\."),
        embed_dim=embed_dim,
        num_heads=state["blocks.0.sa.scale_mul_1H11"].numel(),  # saved as (1, H, 1, 1) or (1, 1, H, 1)
        mlp_ratio=state["blocks.0.ffn.fc1.weight"].shape[0] / embed_dim,
        bits=bits,
        max_scales=state["lvl_embed.weight"].shape[0],
        text_channels=text_channels,
        text_length=text_length,
        pool_heads=state["text_proj_for_sos.ca.mat_q"].shape[1],
    )


def _most_common_dtype(state: State) -> torch.dtype:
    sizes: Counter[torch.dtype] = Counter()
    for tensor in state.values():
        sizes[tensor.dtype] += tensor.numel()
    return sizes.most_common(1)[0][0]


def _transformer_weights(state: PublicState, dtype: torch.dtype, *, copy: bool) -> dict[str, torch.Tensor]:
    """Tensors by our names, in one dtype; the state is emptied on the way, so that nothing is held twice."""
    weights = renamed(state, _NAMES, _BUFFERS)
    state.clear()
    for name, tensor in weights.items():
        if name in ("start_embed", "text_pool.query") or name.endswith(".modulation_table"):  # (1, ...), (1, 1, 6, C)
            tensor = tensor.flatten(0, -2)
        elif name.endswith(".log_scale"):
            tensor = tensor.flatten()
        elif name in ("head.weight", "head.bias") and len(tensor) % 2 == 0:  # the logits of 0 and 1 of each bit
            tensor = tensor[1::2].float() - tensor[::2].float()
        weights[name] = tensor.to(dtype, copy=copy)
    return weights


def _tokenizer(state: PublicState, model: InfinityConfig) -> BSQTokenizer:
    names = {  # convolutions and norms are wrapped in a module
        re.sub(r"\.(?:conv|norm)(?=\.(?:weight|bias)$)", "", name): name
        for name in state
        if name not in _TOKENIZER_BUFFERS
    }
    levels = count(state, r"encoder\.down\.(\d+)\.")
    first_convs = [f"encoder.down.{i}.block.0.conv1.conv.weight" for i in range(max(levels, 1))]
    ends = ("encoder.conv_in.conv.weight", "encoder.conv_out.conv.weight")
    state.need(dict.fromkeys([*ends, *first_convs], 4))
    channels, features = (state[name].shape[0] for name in ends)
    if model.bits not in (features, 4 * features):
        raise ValueError(
            f"{state.owner}: expected one of {model.bits} channels, as the transformer has {model.bits} bits, or, for "
            f"patches, of a quarter of them, got {features}"
        )
    config = BSQTokenizerConfig(
        grids=model.grids,
        bits=model.bits,
        patchify=model.bits != features,
        channels=channels,
        channel_multipliers=tuple(state[name].shape[0] // channels for name in first_convs),
        blocks_per_level=count(state, r"encoder\.down\.0\.block\.(\d+)\."),
    )
    bsq = BSQTokenizer(config)
    own = _public_tokenizer_names(bsq)
    load_strictly(
        bsq,
        {ours: state[name] for ours, name in names.items()},
        state.source,
        lambda ours: names.get(ours) or own.get(ours, ours),
        prefix=state.prefix,
    )
    return bsq.eval()


def _public_tokenizer_names(bsq: BSQTokenizer) -> dict[str, str]:
    """Our name to the public one."""
    names = {}
    for ours in bsq.state_dict():
        module, kind = ours.rsplit(".", 1)
        wrapped = "norm" if isinstance(bsq.get_submodule(module), torch.nn.GroupNorm) else "conv"
        names[ours] = f"{module}.{wrapped}.{kind}"
    return names
