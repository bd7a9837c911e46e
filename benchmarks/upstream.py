"""The public code as a rival: modules and models of checkouts of FoundationVision/VAR and Infinity.

Their modules have names that others use too ("models", "dist"): they are imported for a moment only, and sys.path and
sys.modules are afterwards as before. What was built from them goes on working, except that torch.compile cannot trace
it: it looks modules up by name.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks import rivals
from fastvar.models import VQTokenizer
from fastvar.ops import ResidualConv
from fastvar.schedule import VAR_256, ScaleSchedule


@contextlib.contextmanager
def upstream_modules(checkout: Path, device: torch.device | str = "cpu") -> Iterator[tuple[ModuleType, ModuleType]]:
    """A VAR checkout's `models.var` and `models.vqvae`, whose models have their generator on a device."""
    with _imports_from(checkout, ("models", "dist")):
        importlib.import_module("dist").get_device = lambda: device  # type: ignore[attr-defined]
        yield importlib.import_module("models.var"), importlib.import_module("models.vqvae")


@contextlib.contextmanager
def infinity_modules(checkout: Path) -> Iterator[tuple[ModuleType, ModuleType]]:
    """An Infinity checkout's `bsq_vae.multiscale_bsq` and `bitwise_self_correction`; they need einops.

    The package around them is left out, as it needs flash-attn and timm.
    """
    with _imports_from(checkout / "infinity" / "models", ("bsq_vae", "bitwise_self_correction")):
        yield (
            importlib.import_module("bsq_vae.multiscale_bsq"),
            importlib.import_module("bitwise_self_correction"),
        )


@torch.no_grad()
def build_upstream(
    checkout: Path,
    depth: int,
    *,
    schedule: ScaleSchedule = VAR_256,
    shared_adaln: bool = False,
    device: torch.device | str = "cpu",
    decode: bool = False,
) -> Any:
    """Upstream's VAR of a depth with random weights, in evaluation mode; it answers feature maps, or images if it is to
    decode.

    Embeddings have variance 1 and weights 1 / fan-in, so that every block counts and logits differ clearly: upstream's
    own initialisation all but switches the blocks off. The tokenizer's encoder and decoder are narrow where they do not
    run. The state dicts of the model and of `vae_proxy[0]` are what `fastvar.models.load_var` takes.
    """
    sides = tuple(height for height, _ in schedule)
    silent = contextlib.redirect_stdout(io.StringIO())  # its constructor prints
    with upstream_modules(checkout, device) as (var, vqvae), silent, torch.device(device):
        tokenizer = vqvae.VQVAE(ch=160 if decode else 32, v_patch_nums=sides)
        model = var.VAR(
            tokenizer,
            depth=depth,
            embed_dim=64 * depth,
            num_heads=depth,
            attn_l2_norm=True,
            shared_aln=shared_adaln,
            patch_nums=sides,
        )
    for module in [*model.modules(), *tokenizer.modules()]:
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.normal_(std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, nn.Embedding):
            module.weight.normal_()
    model.pos_start.normal_()
    model.pos_1LC.normal_()
    if not decode:
        tokenizer.fhat_to_img = lambda feature_map: feature_map
    return model.eval()


@torch.no_grad()
def upstream_tokenizer(tokenizer: VQTokenizer) -> Any | str:
    """Upstream's VQVAE with the weights of a tokenizer of ours, on its device, or why there is none."""
    config, phi = tokenizer.config, tokenizer.phi
    path = _var_checkout(config.schedule)
    if isinstance(path, str):
        return path
    assert phi is not None
    with upstream_modules(path) as (_, vqvae):
        built = vqvae.VQVAE(
            vocab_size=config.vocab_size,
            z_channels=config.code_channels,
            ch=config.channels,
            quant_resi=phi.ratio,
            share_quant_resi=len(phi.weight),
            v_patch_nums=tuple(height for height, _ in config.schedule),
        )
    # all other names are upstream's
    state = {k: v for k, v in tokenizer.state_dict().items() if k not in ("codebook", "phi_weight", "phi_bias")}
    state |= {f"quantize.{name}": tensor for name, tensor in _quantizer_state(tokenizer.codebook, phi).items()}
    built.load_state_dict({**state, "quantize.ema_vocab_hit_SV": built.quantize.ema_vocab_hit_SV})
    return built.to(tokenizer.codebook.device).eval()


@torch.no_grad()
def upstream_quantizer(codebook: torch.Tensor, phi: ResidualConv, schedule: ScaleSchedule) -> Any | str:
    """Upstream's VectorQuantizer2 with this codebook (V, C) and phi, on their device, or why there is none."""
    path = _var_checkout(schedule)
    if isinstance(path, str):
        return path
    vocab_size, channels = codebook.shape
    with upstream_modules(path) as (_, vqvae):
        built = vqvae.VectorQuantizer2(
            vocab_size=vocab_size,
            Cvae=channels,
            using_znorm=False,
            quant_resi=phi.ratio,
            share_quant_resi=len(phi.weight),
            v_patch_nums=tuple(height for height, _ in schedule),
        )
    built.load_state_dict({**_quantizer_state(codebook, phi), "ema_vocab_hit_SV": built.ema_vocab_hit_SV})
    return built.to(codebook.device).eval().requires_grad_(False)


def infinity_quantizer(
    bits: int, device: torch.device, *, flip_scales: int = 0, flip_strength: float = 0.0
) -> tuple[Any, Any] | str:
    """Infinity's MultiScaleBSQ for tokens of so many bits and its BitwiseSelfCorrection, or why there is none.

    Args:
        bits: d.
        device: where.
        flip_scales: how many scales the self-correction flips bits of.
        flip_strength: the largest probability of a flip that it draws.
    """
    path = rivals.checkout("Infinity")
    if isinstance(path, str):
        return path
    if find_spec("einops") is None:
        return "einops is not installed, which FoundationVision/Infinity needs"
    with infinity_modules(path) as (multiscale_bsq, bitwise_self_correction):
        quantizer = multiscale_bsq.MultiScaleBSQ(dim=bits, codebook_size=2**bits, new_quant=True)
        quantizer = quantizer.to(device).eval()
        options = SimpleNamespace(
            noise_apply_layers=flip_scales,
            noise_apply_requant=True,
            noise_apply_strength=flip_strength,
            apply_spatial_patchify=False,
            debug_bsc=False,
        )
        tokenizer = SimpleNamespace(quantizer=quantizer, codebook_dim=bits)
        return quantizer, bitwise_self_correction.BitwiseSelfCorrection(tokenizer, options)


def _var_checkout(schedule: ScaleSchedule) -> Path | str:
    """The path of a checkout of VAR, or why there is none for a schedule."""
    if any(height != width for height, width in schedule):
        return "FoundationVision/VAR has square grids only"
    return rivals.checkout("VAR")


def _quantizer_state(codebook: torch.Tensor, phi: ResidualConv) -> dict[str, torch.Tensor]:
    """Codebook and convolutions, more than one, under upstream's names."""
    state = {"embedding.weight": codebook}
    for i, (weight, bias) in enumerate(zip(phi.weight, phi.bias, strict=True)):
        state |= {f"quant_resi.qresi_ls.{i}.weight": weight, f"quant_resi.qresi_ls.{i}.bias": bias}
    return state


@contextlib.contextmanager
def _imports_from(folder: Path, names: tuple[str, ...]) -> Iterator[None]:
    """Imports look into a folder first, and modules under these names are new; afterwards all is as before."""

    def loaded() -> dict[str, ModuleType]:
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in names}

    others = loaded()
    for name in others:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in loaded():
            del sys.modules[name]
        sys.modules.update(others)
