"""FoundationVision/Infinity as a rival: its transformer and tokenizer, beside ours with the same random weights.

Without flash-attn its import is met by plain PyTorch, as users do who have none; the public code needs it for attention
to texts alone. It rounds float32 to bfloat16 before that call; here it does not where the call is PyTorch's, so that in
float32 its bits are ours. What it wants of distributed runs and logs is met by functions that do nothing. Its package
stays imported: torch.compile, which its norms are compiled with, looks modules up by name.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import sys
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.cases import relative_error
from benchmarks.rivals import checkout, missing_package
from benchmarks.shapes import ModelShape
from fastvar.integrations import attention
from fastvar.models import (
    BSQTokenizer,
    BSQTokenizerConfig,
    Infinity,
    InfinityConfig,
    TextFeatures,
    load_infinity,
)
from fastvar.schedule import ScaleSchedule

TEXT_CHANNELS, TEXT_LENGTH = 2048, 512  # of flan-t5-xl, and of the public models


def build_infinity(
    shape: ModelShape, device: torch.device, *, training: bool = False, decode: bool = False, plain: bool = False
) -> tuple[Infinity, Any | str]:
    """Our Infinity and the public one of the same random float32 weights, in evaluation mode; or ours alone and why
    there is no other. Neither drops texts or blocks in training.

    Args:
        shape: of the transformer; its grids are one of Infinity's schedules.
        device: where.
        training: whether the public model is built as its trainer does, or, with compiled norms, as its sampler does,
            which is wrong without them.
        decode: whether the tokenizer is as wide as the public one; else it is narrow, as it does not run.
        plain: whether the public model leaves out to compile its norms, which takes longer than all else where little
            is run.

    Raises:
        ValueError: their logits differ.
    """
    package = public_package()
    widths = (128, (1, 2, 4, 4, 4)) if decode else (32, (1, 1, 1, 1, 1))
    if isinstance(package, str):
        common: dict[str, Any] = {"grids": shape.schedule.grids, "bits": shape.channels}
        size = {"depth": shape.depth, "embed_dim": shape.width, "num_heads": shape.heads}
        with device:
            tokenizer = BSQTokenizer(BSQTokenizerConfig(**common, channels=widths[0], channel_multipliers=widths[1]))
            config = InfinityConfig(**common, **size, gate_init=1.0, condition_dropout=0.0)
            return Infinity(config, tokenizer).eval(), package
    upstream = _build(package, shape, device, *widths, compiled=not (training or plain))
    net, _ = load_infinity(upstream.state_dict(), upstream.vae.state_dict(), grids=shape.schedule)
    net.config = replace(net.config, condition_dropout=0.0)
    _check_logits(net, upstream, device)
    return net, upstream


@torch.no_grad()
def _check_logits(net: Infinity, upstream: Any, device: torch.device) -> None:
    """Logits of both models for a text and random bits."""
    texts = texts_of("7", 1, device)
    inputs = net.tokenizer.teacher_forcing(
        torch.randint(2, (1, net.schedule.num_tokens, net.config.bits), device=device)
    )
    theirs = upstream(as_public(texts), inputs, as_public_schedule(net.schedule)).unflatten(2, (-1, 2))
    error = relative_error(net(texts, inputs), theirs[..., 1] - theirs[..., 0])
    if not error <= (1e-3 if device.type == "cpu" else 0.05):  # on a GPU flash-attn may read texts in bfloat16
        raise ValueError(f"Infinity: the public code's logits differ from ours by {error:.2g} of the largest")


@cache
def public_package() -> SimpleNamespace | str:
    """The modules of a checkout, or why there are none."""
    path = checkout("Infinity")
    if isinstance(path, str):
        return path
    for name in ("timm", "einops", "tqdm", "torchvision"):
        if find_spec(name) is None:
            return f"{name} is not installed, which FoundationVision/Infinity needs"
    if not (path / "infinity/utils/dynamic_resolution.py").is_file():
        return "the checkout of FoundationVision/Infinity has no infinity/utils/dynamic_resolution.py"
    dist = _module(
        "infinity.utils.dist",
        get_world_size=lambda: 1,
        get_rank=lambda: 0,
        barrier=lambda: None,
        allreduce=lambda tensor: None,
        for_visualize=lambda function: function,
    )
    met = {
        "infinity.utils.dist": dist,
        "infinity.utils.misc": _module("infinity.utils.misc"),
        "imageio": _module("imageio"),  # to write videos
    }
    without = missing_package("flash_attn", torch.device("cuda")) is not None
    if without:
        met["flash_attn"] = _module(
            "flash_attn",
            flash_attn_func=attention.flash_attn_func,
            flash_attn_varlen_kvpacked_func=attention.flash_attn_varlen_kvpacked_func,
        )
    if find_spec("timm.models.layers") is None:
        met["timm.models.layers"] = importlib.import_module("timm.layers")
    others = {name: sys.modules[name] for name in met if name in sys.modules}
    sys.modules.update(met)
    sys.path.insert(0, str(path))
    try:
        importlib.import_module("infinity.utils").dist = dist  # type: ignore[attr-defined]
        basic = importlib.import_module("infinity.models.basic")
        if without:  # attention to texts has a dtype of its own for float32, which is to be float32 here
            basic.torch = _module("torch", **{**vars(torch), "bfloat16": torch.float32})  # type: ignore[attr-defined]
        return SimpleNamespace(
            infinity=importlib.import_module("infinity.models.infinity"),
            vae=importlib.import_module("infinity.models.bsq_vae.vae"),
            dist=dist,
        )
    except ImportError as error:
        return f"FoundationVision/Infinity does not import: {error}"
    finally:
        sys.path.remove(str(path))
        for name in met:
            if not name.startswith("infinity."):
                del sys.modules[name]
        sys.modules.update(others)


def _module(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(members)
    return module


@torch.no_grad()
def _build(
    package: SimpleNamespace,
    shape: ModelShape,
    device: torch.device,
    channels: int,
    multipliers: tuple[int, ...],
    *,
    compiled: bool,
) -> Any:
    """The public model with its tokenizer as `vae`, with random weights that make every block count."""
    package.dist.get_device = lambda: device
    names = ("fused_ada_layer_norm", "fused_ada_rms_norm")
    norms = {name: getattr(package.infinity, name) for name in names}
    if not compiled:
        norms = {name: inspect.unwrap(norm) for name, norm in norms.items()}
    tokenizer = package.vae.AutoEncoder

    def of_these_channels(args: Any) -> Any:
        args.base_ch = channels
        return tokenizer(args)

    with (
        contextlib.redirect_stdout(io.StringIO()),  # its constructors print
        patch.object(nn.init, "trunc_normal_", lambda tensor, *_, **__: tensor),  # with a generator of the CPU
        patch.multiple(package.infinity, **norms),
        patch.object(package.vae, "AutoEncoder", of_these_channels),
        device,
    ):
        vae = package.vae.vae_model(
            {}, "dynamic", shape.channels, 2**shape.channels, encoder_ch_mult=multipliers, decoder_ch_mult=multipliers
        )
        net = package.infinity.Infinity(
            vae_local=vae,
            text_channels=TEXT_CHANNELS,
            text_maxlen=TEXT_LENGTH,
            shared_aln=True,
            embed_dim=shape.width,
            depth=shape.depth,
            num_heads=shape.heads,
            cond_drop_rate=0.0,
            fused_norm=True,
            block_chunks=8 if shape.depth % 8 == 0 else shape.depth,
            rope2d_each_sa_layer=1,
            rope2d_normalized_by_hw=2,
        )
    for module in [*net.modules(), *vae.modules()]:
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.Linear | nn.Conv2d) and name == "weight":
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            elif parameter.ndim == 1:
                parameter.normal_(std=0.02).add_(float(name == "weight"))  # a norm's
            elif name == "scale_mul_1H11":
                parameter.normal_(1.4, 0.1)
            else:
                parameter.normal_(std=0.5)
    net.__dict__["vae"] = vae  # no submodule
    return net.eval()


def as_its_scripts(upstream: Any) -> Any:
    """With blocks in bfloat16; to be called under autocast."""
    for block in upstream.unregistered_blocks:
        block.bfloat16()
    return upstream


def texts_of(lengths: str | None, batch: int, device: torch.device) -> TextFeatures:
    """Random features of so many texts, of lengths such as "1,64", or else of some twenty to sixty rows each."""
    rows = [20 + 13 * i % 45 for i in range(batch)] if lengths is None else [int(word) for word in lengths.split(",")]
    if len(rows) != batch:
        raise ValueError(f"texts: expected {batch} lengths, got {lengths}")
    return TextFeatures(torch.randn(sum(rows), TEXT_CHANNELS, device=device), tuple(rows))


def as_public(texts: TextFeatures) -> tuple[torch.Tensor, list[int], torch.Tensor, int]:
    """Features of texts as the public code takes them."""
    ends = torch.tensor([0, *texts.lengths]).cumsum(0).int()
    return texts.packed.float(), list(texts.lengths), ends.to(texts.packed.device), max(texts.lengths)


def as_public_schedule(schedule: ScaleSchedule) -> list[tuple[int, int, int]]:
    return [(1, height, width) for height, width in schedule]


def sample(
    upstream: Any,
    texts: TextFeatures,
    schedule: ScaleSchedule,
    *,
    guidance: float,
    temperature: float,
    decode: bool,
    **truncation: Any,
) -> Any:
    """The public sampler, called as its scripts do."""
    return upstream.autoregressive_infer_cfg(
        vae=upstream.vae,
        scale_schedule=as_public_schedule(schedule),
        label_B_or_BLT=as_public(texts),
        B=len(texts.lengths),
        g_seed=0,
        cfg_list=[guidance] * len(schedule),
        tau_list=[temperature] * len(schedule),
        returns_vemb=1,
        cfg_insertion_layer=[0],
        vae_type=upstream.d_vae,
        ret_img=decode,
        inference_mode=True,
        **truncation,
    )


def sampled_bits(upstream: Any, texts: TextFeatures, schedule: ScaleSchedule, **options: Any) -> torch.Tensor:
    """The bits (B, L, d) that it samples: those that its tokenizer makes codes of."""
    found: list[torch.Tensor] = []
    lfq = upstream.vae.quantizer.lfq
    to_codes = lfq.indices_to_codes

    def noted(bits: torch.Tensor, **kwargs: Any) -> Any:
        found.append(bits.flatten(1, -2))  # [B, n, d]
        return to_codes(bits, **kwargs)

    with patch.object(lfq, "indices_to_codes", noted):
        sample(upstream, texts, schedule, **options)
    return torch.cat(found, 1).bool()


def public_loss(
    upstream: Any, texts: TextFeatures, inputs: torch.Tensor, bits: torch.Tensor, schedule: ScaleSchedule
) -> torch.Tensor:
    """The loss of its trainer without weights of scales: cross-entropy over the two logits of each bit, the mean of a
    token's bits times 1 / L, summed over an image."""
    logits = upstream(as_public(texts), inputs, as_public_schedule(schedule))
    each = F.cross_entropy(logits.unflatten(2, (-1, 2)).movedim(3, 1), bits.long(), reduction="none")
    return each.mean(2).mul(1 / bits.shape[1]).sum(1).mean()
