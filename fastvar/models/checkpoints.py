"""Loading of FoundationVision/VAR checkpoints: the shape is read off the state dict, every key must find its place."""

from __future__ import annotations

import re
from math import isqrt

import torch

from fastvar.models.pretrained import load_strictly
from fastvar.models.public_state import PublicState, State, StateOrPath, count, public_name, read_state, renamed
from fastvar.models.var import VAR
from fastvar.models.var_config import VARConfig
from fastvar.models.vq_tokenizer import VQTokenizer, VQTokenizerConfig
from fastvar.schedule import ScaleSchedule

# Public name -> ours; `{i}` stands for a block's number.
_TRANSFORMER_NAMES = {
    "pos_start": "start_embed",
    "pos_1LC": "position_embed",
    "word_embed.weight": "code_embed.weight",
    "word_embed.bias": "code_embed.bias",
    "class_emb.weight": "class_embed.weight",
    "lvl_embed.weight": "scale_embed.weight",
    "shared_ada_lin.1.weight": "shared_modulation.weight",
    "shared_ada_lin.1.bias": "shared_modulation.bias",
    "head_nm.ada_lin.1.weight": "head_modulation.weight",
    "head_nm.ada_lin.1.bias": "head_modulation.bias",
    "head.weight": "head.weight",
    "head.bias": "head.bias",
    "blocks.{i}.attn.scale_mul_1H11": "blocks.{i}.log_scale",
    "blocks.{i}.attn.q_bias": "blocks.{i}.q_bias",
    "blocks.{i}.attn.v_bias": "blocks.{i}.v_bias",
    "blocks.{i}.attn.mat_qkv.weight": "blocks.{i}.qkv.weight",
    "blocks.{i}.attn.proj.weight": "blocks.{i}.proj.weight",
    "blocks.{i}.attn.proj.bias": "blocks.{i}.proj.bias",
    "blocks.{i}.ffn.fc1.weight": "blocks.{i}.mlp_in.weight",
    "blocks.{i}.ffn.fc1.bias": "blocks.{i}.mlp_in.bias",
    "blocks.{i}.ffn.fc2.weight": "blocks.{i}.mlp_out.weight",
    "blocks.{i}.ffn.fc2.bias": "blocks.{i}.mlp_out.bias",
    "blocks.{i}.ada_lin.1.weight": "blocks.{i}.modulation.weight",
    "blocks.{i}.ada_lin.1.bias": "blocks.{i}.modulation.bias",
    "blocks.{i}.ada_gss": "blocks.{i}.modulation_table",
}
# Buffers that follow from the schedule or are zero: checked to be known, then left out.
_TRANSFORMER_BUFFERS = ("lvl_1L", "attn_bias_for_masking", "blocks.{i}.attn.zero_k_bias")


def load_var(
    transformer: StateOrPath,
    tokenizer: StateOrPath,
    *,
    num_heads: int | None = None,
    znorm: bool = False,
    norm_groups: int = 32,
) -> tuple[VAR, VQTokenizer]:
    """A `VAR` and its `VQTokenizer` from public FoundationVision/VAR state dicts.

    Depth, width, classes, grids, kind of AdaLN, attention and residual convolutions are read off the keys and shapes;
    the residual ratio of these is taken as 0.5, which all public tokenizers have.

    Args:
        transformer: the state dict of `var_d16.pth` and its like, or a path to it (no code of it is run); a trainer's
            checkpoint that nests it as `trainer.var_wo_ddp` works too, and names of a model that was wrapped when it
            was saved ("module.", "_orig_mod.").
        tokenizer: the state dict of `vae_ch160v4096z32.pth` or a path; or nested as `trainer.vae_local`.
        num_heads: needed only where it cannot be read off, in models without L2-normalised queries and keys; the
            default there is embed_dim / 64.
        znorm: whether the tokenizer finds the nearest code by cosine; it leaves no trace in the weights.
        norm_groups: groups of the tokenizer's group norms; they leave no trace either.

    Returns:
        both in evaluation mode, on the CPU, the tokenizer attached to the model.

    Raises:
        ValueError: names every missing and unexpected key and every wrong shape, as the file names them; where keys are
            missing that the model's own shape is read off, these, and some of those that are there.
    """
    transformer_state = read_state(transformer, "load_var: transformer", "trainer", "var_wo_ddp")
    tokenizer_state = read_state(tokenizer, "load_var: tokenizer", "trainer", "vae_local")
    config = _transformer_config(transformer_state, num_heads)
    vq = VQTokenizer(_tokenizer_config(tokenizer_state, ScaleSchedule(config.grids), znorm, norm_groups))
    var = VAR(config, vq)
    state = tokenizer_state
    load_strictly(vq, _tokenizer_weights(state), state.source, _public_tokenizer_name, prefix=state.prefix)
    state = transformer_state
    load_strictly(var, _transformer_weights(state), state.source, _public_transformer_name, prefix=state.prefix)
    return var.eval(), vq.eval()


def _transformer_config(state: PublicState, num_heads: int | None) -> VARConfig:
    state.need(
        {"word_embed.weight": 2, "lvl_1L": 2, "blocks.0.ffn.fc1.weight": 2, "head.weight": 2, "class_emb.weight": 2}
    )
    embed_dim, code_channels = state["word_embed.weight"].shape
    levels = state["lvl_1L"].flatten().long().bincount().tolist()
    if any(isqrt(n) ** 2 != n for n in levels):
        raise ValueError(f"load_var: transformer: lvl_1L: expected square grids, got scales of {levels} tokens")
    log_scale = state.get("blocks.0.attn.scale_mul_1H11")
    if log_scale is not None:
        if num_heads not in (None, log_scale.numel()):
            raise ValueError(f"load_var: num_heads: the state dict has {log_scale.numel()}, got {num_heads}")
        num_heads = log_scale.numel()
    return VARConfig(
        grids=ScaleSchedule([isqrt(n) for n in levels]).grids,
        depth=count(state, r"blocks\.(\d+)\."),
        embed_dim=embed_dim,
        num_heads=num_heads or embed_dim // 64,
        mlp_ratio=state["blocks.0.ffn.fc1.weight"].shape[0] / embed_dim,
        vocab_size=state["head.weight"].shape[0],
        code_channels=code_channels,
        num_classes=state["class_emb.weight"].shape[0] - 1,
        shared_adaln="shared_ada_lin.1.weight" in state,
        qk_l2_norm=log_scale is not None,
    )


def _transformer_weights(state: State) -> dict[str, torch.Tensor]:
    weights = renamed(state, _TRANSFORMER_NAMES, _TRANSFORMER_BUFFERS)
    for name, tensor in weights.items():
        if name in ("start_embed", "position_embed"):  # (1, n, C)
            weights[name] = tensor.flatten(0, -2)
        elif name.endswith(".log_scale"):  # saved as (1, H, 1, 1) or (1, 1, H, 1)
            weights[name] = tensor.flatten()
        elif name.endswith(".modulation_table"):  # (1, 1, 6, C)
            weights[name] = tensor.flatten(0, -2)
    return weights


def _public_transformer_name(ours: str) -> str:
    return public_name(ours, _TRANSFORMER_NAMES)


def _public_tokenizer_name(ours: str) -> str:
    names = {"codebook": "quantize.embedding.weight", "phi_weight": "quantize.quant_resi.*.weight"}
    return {**names, "phi_bias": "quantize.quant_resi.*.bias"}.get(ours, ours)


def _phi_names(state: State) -> list[str]:
    """The public names of the residual convolutions: one that all scales share, several partly shared, or one each."""
    shared = "quantize.quant_resi.qresi"
    if f"{shared}.weight" in state:
        return [shared]
    for several in ("quantize.quant_resi.qresi_ls", "quantize.quant_resi"):
        convs = count(state, re.escape(several) + r"\.(\d+)\.")
        if convs:
            return [f"{several}.{i}" for i in range(convs)]
    return []


def _tokenizer_config(state: PublicState, schedule: ScaleSchedule, znorm: bool, norm_groups: int) -> VQTokenizerConfig:
    levels = count(state, r"encoder\.down\.(\d+)\.")
    first_convs = [f"encoder.down.{i}.block.0.conv1.weight" for i in range(max(levels, 1))]
    state.need({"quantize.embedding.weight": 2, "encoder.conv_in.weight": 4} | dict.fromkeys(first_convs, 4))
    vocab_size, code_channels = state["quantize.embedding.weight"].shape
    channels = state["encoder.conv_in.weight"].shape[0]
    widths = [state[name].shape[0] for name in first_convs]
    return VQTokenizerConfig(
        grids=schedule.grids,
        vocab_size=vocab_size,
        code_channels=code_channels,
        channels=channels,
        channel_multipliers=tuple(width // channels for width in widths),
        blocks_per_level=count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        norm_groups=norm_groups,
        attention="encoder.mid.attn_1.qkv.weight" in state,
        residual_convs=max(len(_phi_names(state)), 1),
        residual_ratio=0.5 if _phi_names(state) else 0.0,
        cosine=znorm,
    )


def _tokenizer_weights(state: State) -> dict[str, torch.Tensor]:
    weights = {
        n: t for n, t in state.items() if n != "quantize.ema_vocab_hit_SV"
    }  # usage statistics, any number of rows
    weights["codebook"] = weights.pop("quantize.embedding.weight")
    names = _phi_names(state)
    if names:
        weights["phi_weight"] = torch.stack([weights.pop(f"{name}.weight") for name in names])
        weights["phi_bias"] = torch.stack([weights.pop(f"{name}.bias") for name in names])
    return weights
