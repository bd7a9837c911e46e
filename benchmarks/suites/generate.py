"""Sampling of whole images: `VAR.generate` against FoundationVision/VAR's `autoregressive_infer_cfg`.

Both have the same random weights, sample with guidance and truncation as in VAR's evaluation, and stop short of
decoding unless a setting says so (tokenizer_decode checks images). They draw other random numbers, so it is greedy
samples (top_k=1) that are checked before anything is timed: the error is the share of tokens that are not the likeliest
after those before them, by teacher forcing in float32. Two contenders without error have the same tokens. A setting's
dtype is that of our weights. The backend of a row says whether a CUDA graph answered our last call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.cases import OURS, Contender, Problem, Setting, Suite
from benchmarks.memory import Replayed
from benchmarks.rivals import checkout
from benchmarks.shapes import MODELS, ModelShape
from benchmarks.suites.tokenizer_decode import decoder_flops
from benchmarks.upstream import build_upstream
from fastvar.models import VAR, VARConfig, VQTokenizer, VQTokenizerConfig, load_var
from fastvar.models.var import guidance_per_scale

GUIDANCE = 1.5
TRUNCATION = {"top_k": 900, "top_p": 0.96}
CLASSES = 1000
CHECKED = 2  # images of the greedy check: one more would show nothing else, and costs time
EAGER = "fastvar without graphs"
FLOAT32 = "upstream float32"
AUTOCAST = {"upstream bfloat16 autocast": torch.bfloat16, "upstream float16 autocast": torch.float16}


def shape_of(setting: Setting) -> ModelShape:
    """The model by its name; without one a VAR of the setting's grids, depth and width, with heads as VAR has them."""
    if "model" in setting:
        return MODELS[setting["model"]]
    width = setting["width"]
    return ModelShape(setting["grids"], setting["depth"], width, width // 64, 4096, 32)


def build_models(shape: ModelShape, device: torch.device, decode: bool = False) -> tuple[VAR, Any | str]:
    """Our VAR and FoundationVision/VAR's of the same random float32 weights, in evaluation mode; or ours alone and why
    there is no other. No condition is dropped in training, so that both always have the same one."""
    schedule = shape.schedule
    path = checkout("VAR")
    like_theirs = ModelShape(shape.grids, shape.depth, 64 * shape.depth, shape.depth, 4096, 32)
    if isinstance(path, Path) and (shape != like_theirs or any(height != width for height, width in schedule)):
        path = "FoundationVision/VAR has no model of this shape"
    common = {"grids": schedule.grids, "vocab_size": shape.vocab_size, "code_channels": shape.channels}
    with device:  # weights are drawn where they are used, which for large models is much faster
        if isinstance(path, str):
            narrow = {} if decode else {"channels": 8, "norm_groups": 8, "blocks_per_level": 1}
            sizes = {"depth": shape.depth, "embed_dim": shape.width, "num_heads": shape.heads}
            config = VARConfig(**common, **sizes, num_classes=CLASSES, gate_init=1.0, condition_dropout=0.0)
            return VAR(config, VQTokenizer(VQTokenizerConfig(**common, **narrow))).eval(), path
        upstream = build_upstream(path, shape.depth, schedule=schedule, device=device, decode=decode)
        var, _ = load_var(upstream.state_dict(), upstream.vae_proxy[0].state_dict())
    var.config = replace(var.config, condition_dropout=0.0)
    upstream.cond_drop_rate = 0.0
    for block in upstream.blocks:
        # SDPA has xformers' kernel for masks, and an xformers whose extension does not load would end the run
        block.attn.using_xform = False
    return var, upstream


@dataclass(frozen=True)
class Sampler:
    """A contender: called, it samples images of these labels, as it does with truncation, and answers itself, whom the
    check asks for greedy tokens.

    Attributes:
        sample: from labels and sampling options to anything.
        tokens: from the same to the tokens (B, L) sampled.
    """

    sample: Callable[..., Any]
    tokens: Callable[..., torch.Tensor]

    def __call__(self, labels: torch.Tensor) -> Sampler:
        self.sample(labels, **TRUNCATION)
        return self

    def greedy(self, labels: torch.Tensor) -> torch.Tensor:
        return self.tokens(labels, top_k=1)


def our_sampler(var: VAR, decode: bool = False, graphs: bool | None = None) -> Sampler:
    def tokens(labels: torch.Tensor, **options: Any) -> torch.Tensor:
        return var.generate(labels, guidance=GUIDANCE, decode=decode, graphs=graphs, **options).tokens

    return Sampler(tokens, tokens)


def upstream_sampler(upstream: Any, device: torch.device, autocast: torch.dtype | None = None) -> Sampler:
    """FoundationVision/VAR's; the tokens are those that it looks up in the codebook."""

    def sample(labels: torch.Tensor, **options: Any) -> Any:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            return upstream.autoregressive_infer_cfg(len(labels), labels, g_seed=0, cfg=GUIDANCE, **options)

    def tokens(labels: torch.Tensor, **options: Any) -> torch.Tensor:
        looked_up: list[torch.Tensor] = []
        codebook = upstream.vae_quant_proxy[0].embedding
        with codebook.register_forward_hook(lambda _, arguments, __: looked_up.append(arguments[0])):
            sample(labels, **options)
        return torch.cat(looked_up, 1)

    return Sampler(sample, tokens)


def likeliest(var: VAR, labels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The likeliest tokens under guidance, each after the given ones of the coarser scales, by teacher forcing."""
    inputs = var.tokenizer.teacher_forcing(tokens)
    conditional = var(labels, inputs)
    with patch.object(var, "condition", lambda labels, *_: var.no_condition(len(labels))):
        unconditional = var(labels, inputs)
    weights = torch.tensor(guidance_per_scale(GUIDANCE, len(var.schedule)), device=labels.device)
    weight = weights[var.scale_index][:, None]
    return ((1 + weight) * conditional - weight * unconditional).argmax(-1)


def build(setting: Setting, device: torch.device) -> Problem:
    shape, dtype = shape_of(setting), getattr(torch, setting["dtype"])
    plain = dtype == torch.float32
    decode = setting.get("decoded", False)
    var, upstream = build_models(shape, device, decode)
    own_var = var if plain else var.clone().to(dtype)
    contenders: dict[str, Contender] = {OURS: our_sampler(own_var, decode), EAGER: "is what fastvar runs on a CPU"}
    if device.type == "cuda":
        contenders[EAGER] = our_sampler(own_var, decode, graphs=False)
    for name, autocast in {FLOAT32: None, **AUTOCAST}.items():
        if isinstance(upstream, str):
            contenders[name] = upstream
        elif plain and autocast:
            contenders[name] = "is compared in the settings of low precision"
        elif autocast == torch.float16 and device.type == "cpu":
            contenders[name] = "float16 is upstream's choice for GPUs"
        else:
            contenders[name] = upstream_sampler(upstream, device, autocast)

    labels = torch.arange(setting["batch"], device=device) * 37 % CLASSES

    def wrong_tokens(found: Sampler, _: Any) -> float:
        tokens = found.greedy(labels[:CHECKED])
        return (tokens != likeliest(var, labels[:CHECKED], tokens)).double().mean().item()

    flops, moved = work(shape, setting["batch"], dtype)
    if decode:
        flops += decoder_flops(var.tokenizer, setting["batch"])
    problem = Problem(
        {"labels": labels},
        contenders,
        check=wrong_tokens,
        limit=2e-3 if plain else 0.1,  # where two tokens are about as likely, rounding decides
        flops=flops,
        bytes=moved,
    )
    sampler = contenders[OURS]
    assert isinstance(sampler, Sampler)

    def noted(labels: torch.Tensor, **options: Any) -> None:
        replayed = Replayed()
        sampler.sample(labels, **options)
        problem.backend = "graphs" if replayed.nbytes() else "no graphs"

    contenders[OURS] = replace(sampler, sample=noted)
    return problem


def work(shape: ModelShape, batch: int, dtype: torch.dtype) -> tuple[float, float]:
    """Operations and bytes of sampling with guidance, without what is small beside them."""
    rows, schedule, width = 2 * batch, shape.schedule, shape.width
    pairs = sum(n * end for n, end in zip(schedule.lengths, schedule.ends, strict=True))
    matrices = 12 * shape.depth * width**2 + width * shape.vocab_size  # qkv, projection, MLP; head
    modulation = 6 * shape.depth * width**2  # once an image
    flops = 2.0 * rows * (shape.tokens * matrices + modulation + 2 * shape.depth * width * pairs)
    # every scale reads all matrices and the keys and values so far; each of these is written once
    cached = 2 * rows * shape.depth * width * (sum(schedule.ends) + shape.tokens)
    return flops, dtype.itemsize * float(len(schedule) * matrices + modulation + cached)


SUITE = Suite(
    "generate",
    {
        "tiny": [
            {"model": "tiny", "batch": 2, "dtype": "float32"},
            {"model": "tiny", "batch": 1, "dtype": "float32", "decoded": True},
            {"grids": "1,2,3,4", "depth": 1, "width": 64, "batch": 2, "dtype": "bfloat16"},
        ],
        "cpu": [{"model": "VAR-d16", "batch": 1, "dtype": dtype} for dtype in ("float32", "bfloat16")],
        "gpu": [
            {"model": "VAR-d16", "batch": 8, "dtype": "float32"},
            *({"model": "VAR-d16", "batch": batch, "dtype": "bfloat16", "decoded": True} for batch in (1, 8, 64)),
            *({"model": "VAR-d16", "batch": batch, "dtype": "bfloat16"} for batch in (1, 8, 64)),
            {"model": "VAR-d30", "batch": 8, "dtype": "bfloat16"},
        ],
    },
    (OURS, EAGER, FLOAT32, *AUTOCAST),
    build,
    graphs=False,
)
