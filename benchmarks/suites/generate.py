"""Sampling of whole images: `generate` of VAR and Infinity against FoundationVision's `autoregressive_infer_cfg`.

Both have the same random weights, sample with guidance and truncation as in VAR's evaluation and Infinity's scripts,
and stop short of decoding unless a setting says so (tokenizer_decode checks images). They draw other random numbers, so
it is greedy samples (top_k=1) that are checked before anything is timed: the error is the share of tokens, of Infinity
bits, that are not the likeliest after those before them, by teacher forcing in float32. Two contenders without error
have the same tokens. The logits of an Infinity are held against the public ones before that. A setting's dtype is that
of our weights; Infinity's own scripts have blocks in bfloat16 under autocast. Its texts are random features, encoded
before; a setting may name their lengths. The backend of a row says whether a CUDA graph answered our last call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import upstream_infinity
from benchmarks.cases import OURS, Contender, Problem, Setting, Suite
from benchmarks.memory import Replayed
from benchmarks.rivals import checkout
from benchmarks.shapes import MODELS, ModelShape
from benchmarks.suites.tokenizer_decode import decoder_flops
from benchmarks.upstream import build_upstream
from benchmarks.upstream_infinity import build_infinity
from fastvar.models import VAR, Infinity, TextFeatures, VARConfig, VQTokenizer, VQTokenizerConfig, load_var
from fastvar.models.var import guidance_per_scale

GUIDANCE = 1.5
TRUNCATION = {"top_k": 900, "top_p": 0.96}
# what Infinity's scripts sample the 2B with
INFINITY_GUIDANCE, INFINITY_TEMPERATURE, INFINITY_TRUNCATION = 3.0, 0.5, {"top_k": 900, "top_p": 0.97}
CLASSES = 1000
CHECKED = 2  # images of the greedy check: one more would show nothing else, and costs time
EAGER = "fastvar without graphs"
FLOAT32 = "upstream float32"
AUTOCAST = {"upstream bfloat16 autocast": torch.bfloat16, "upstream float16 autocast": torch.float16}


def shape_of(setting: Setting) -> ModelShape:
    """The model by its name, with the setting's grids and depth if it has some; without a name a VAR of the setting's
    grids, depth and width, with heads as VAR has them."""
    if "model" in setting:
        changes = {name: setting[name] for name in ("grids", "depth") if name in setting}
        return replace(MODELS[setting["model"]], **changes)
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
    """A contender: called, it samples images of these labels or texts, as it does with truncation, and answers itself,
    whom the check asks for greedy tokens.

    Attributes:
        sample: from labels or texts and sampling options to anything.
        tokens: from the same to the tokens (B, L) or bits (B, L, d) sampled.
        truncation: the options when called.
        model: that samples, of a rival.
    """

    sample: Callable[..., Any]
    tokens: Callable[..., torch.Tensor]
    truncation: Mapping[str, float]
    model: Any = None

    def __call__(self, prompts: Any) -> Sampler:
        self.sample(prompts, **self.truncation)
        return self

    def greedy(self, prompts: Any) -> torch.Tensor:
        return self.tokens(prompts, top_k=1)


def our_sampler(var: VAR, decode: bool = False, graphs: bool | None = None) -> Sampler:
    def tokens(labels: torch.Tensor, **options: Any) -> torch.Tensor:
        return var.generate(labels, guidance=GUIDANCE, decode=decode, graphs=graphs, **options).tokens

    return Sampler(tokens, tokens, TRUNCATION)


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

    return Sampler(sample, tokens, TRUNCATION, upstream)


def our_infinity_sampler(net: Infinity, decode: bool = False, graphs: bool | None = None) -> Sampler:
    common: dict[str, Any] = {"guidance": INFINITY_GUIDANCE, "temperature": INFINITY_TEMPERATURE, "decode": decode}

    def tokens(texts: TextFeatures, **options: Any) -> torch.Tensor:
        return net.generate(texts, graphs=graphs, **common, **options).tokens

    return Sampler(tokens, tokens, INFINITY_TRUNCATION)


def upstream_infinity_sampler(net: Infinity, upstream: Any, decode: bool, autocast: torch.dtype | None) -> Sampler:
    """FoundationVision/Infinity's."""
    options: dict[str, Any] = {"guidance": INFINITY_GUIDANCE, "temperature": INFINITY_TEMPERATURE, "decode": decode}

    def run(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(texts: TextFeatures, **truncation: Any) -> Any:
            with torch.autocast(texts.packed.device.type, autocast, enabled=autocast is not None):
                return function(upstream, texts, net.schedule, **options, **truncation)

        return call

    return Sampler(run(upstream_infinity.sample), run(upstream_infinity.sampled_bits), INFINITY_TRUNCATION, upstream)


def likeliest(var: VAR, labels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The likeliest tokens under guidance, each after the given ones of the coarser scales, by teacher forcing."""
    inputs = var.tokenizer.teacher_forcing(tokens)
    conditional = var(labels, inputs)
    with patch.object(var, "condition", lambda labels, *_: var.no_condition(len(labels))):
        unconditional = var(labels, inputs)
    weights = torch.tensor(guidance_per_scale(GUIDANCE, len(var.schedule)), device=labels.device)
    weight = weights[var.scale_index][:, None]
    return ((1 + weight) * conditional - weight * unconditional).argmax(-1)


def likeliest_bits(net: Infinity, texts: TextFeatures, bits: torch.Tensor) -> torch.Tensor:
    """The same for bits."""
    inputs = net.tokenizer.teacher_forcing(bits)
    conditional, unconditional = net(texts, inputs), net(net.no_text(texts.lengths), inputs)
    return INFINITY_GUIDANCE * conditional + (1 - INFINITY_GUIDANCE) * unconditional > 0


def build(setting: Setting, device: torch.device) -> Problem:
    shape, dtype = shape_of(setting), getattr(torch, setting["dtype"])
    decode = setting.get("decoded", False)
    of_this_kind = build_var_contenders if shape.vocab_size else build_infinity_contenders
    model, contenders, prompts, checked = of_this_kind(setting, device)
    best = likeliest if isinstance(model, VAR) else likeliest_bits

    def wrong_tokens(found: Sampler, _: Any) -> float:
        tokens = found.greedy(checked)
        return (tokens != best(model, checked, tokens)).double().mean().item()

    flops, moved = work(shape, setting["batch"], dtype)
    if decode:
        flops += decoder_flops(model.tokenizer, setting["batch"])
    problem = Problem(
        {"prompts": prompts},
        contenders,
        check=wrong_tokens,
        limit=2e-3 if dtype == torch.float32 else 0.1,  # where two tokens are about as likely, rounding decides
        flops=flops,
        bytes=moved,
    )
    sampler = contenders[OURS]
    assert isinstance(sampler, Sampler)

    def noted(prompts: Any, **options: Any) -> None:
        replayed = Replayed()
        sampler.sample(prompts, **options)
        problem.backend = "graphs" if replayed.nbytes() else "no graphs"

    contenders[OURS] = replace(sampler, sample=noted)
    return problem


Contest = tuple[Any, dict[str, Contender], Any, Any]  # our model in float32, contenders, what to sample, and to check


def build_var_contenders(setting: Setting, device: torch.device) -> Contest:
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
    return var, contenders, labels, labels[:CHECKED]


def build_infinity_contenders(setting: Setting, device: torch.device) -> Contest:
    shape, dtype = shape_of(setting), getattr(torch, setting["dtype"])
    plain = dtype == torch.float32
    decode = setting.get("decoded", False)
    wide = decode and setting["size"] != "tiny"
    net, upstream = build_infinity(shape, device, decode=wide, plain=setting["size"] == "tiny")
    own_net = net if plain else net.clone().to(dtype)
    contenders: dict[str, Contender] = {
        OURS: our_infinity_sampler(own_net, decode),
        EAGER: "is what fastvar runs on a CPU",
        **dict.fromkeys((FLOAT32, *AUTOCAST), upstream if isinstance(upstream, str) else "is not how it samples here"),
    }
    if device.type == "cuda":
        contenders[EAGER] = our_infinity_sampler(own_net, decode, graphs=False)
    if not isinstance(upstream, str):
        if not plain and device.type == "cpu":
            contenders["upstream bfloat16 autocast"] = "it keeps autocast out of its texts and head on GPUs alone"
        elif not plain:
            upstream_infinity.as_its_scripts(upstream)
            sampler = upstream_infinity_sampler(net, upstream, decode, torch.bfloat16)
            contenders["upstream bfloat16 autocast"] = sampler
        else:
            contenders[FLOAT32] = upstream_infinity_sampler(net, upstream, decode, None)
    texts = upstream_infinity.texts_of(setting.get("texts"), setting["batch"], device)
    return net, contenders, texts, texts.some(slice(CHECKED))


def work(shape: ModelShape, batch: int, dtype: torch.dtype) -> tuple[float, float]:
    """Operations and bytes of sampling with guidance, without what is small beside them."""
    rows, schedule, width = 2 * batch, shape.schedule, shape.width
    pairs = sum(n * end for n, end in zip(schedule.lengths, schedule.ends, strict=True))
    matrices = weights_of_a_token(shape)
    modulation = 6 * (shape.depth if shape.vocab_size else 1) * width**2  # once an image
    flops = 2.0 * rows * (shape.tokens * matrices + modulation + 2 * shape.depth * width * pairs)
    # every scale reads all matrices and the keys and values so far; each of these is written once
    cached = 2 * rows * shape.depth * width * (sum(schedule.ends) + shape.tokens)
    return flops, dtype.itemsize * float(len(schedule) * matrices + modulation + cached)


def weights_of_a_token(shape: ModelShape) -> int:
    """Elements of the matrices that each token meets: qkv, projection, MLP, those of the attention to texts; head."""
    of_a_block = 12 if shape.vocab_size else 14
    return of_a_block * shape.depth * shape.width**2 + shape.width * (shape.vocab_size or shape.channels)


SUITE = Suite(
    "generate",
    {
        "tiny": [
            {"model": "tiny", "batch": 2, "dtype": "float32"},
            {"model": "tiny", "batch": 1, "dtype": "float32", "decoded": True},
            {"grids": "1,2,3,4", "depth": 1, "width": 64, "batch": 2, "dtype": "bfloat16"},
            {"model": "Infinity-tiny", "batch": 1, "dtype": "float32", "decoded": True},
            # a rectangle, and texts of one token and of many
            {"model": "Infinity-tiny", "grids": "infinity-0.06M-0.571", "batch": 1, "dtype": "float32"},
            {"model": "Infinity-tiny", "batch": 2, "texts": "1,512", "dtype": "float32"},
            {"model": "Infinity-tiny", "batch": 1, "dtype": "bfloat16"},
        ],
        "cpu": [
            *({"model": "VAR-d16", "batch": 1, "dtype": dtype} for dtype in ("float32", "bfloat16")),
            {"model": "Infinity-2B-0.06M", "depth": 4, "batch": 1, "dtype": "float32"},
        ],
        "gpu": [
            {"model": "VAR-d16", "batch": 8, "dtype": "float32"},
            *({"model": "VAR-d16", "batch": batch, "dtype": "bfloat16", "decoded": True} for batch in (1, 8, 64)),
            *({"model": "VAR-d16", "batch": batch, "dtype": "bfloat16"} for batch in (1, 8, 64)),
            {"model": "VAR-d30", "batch": 8, "dtype": "bfloat16"},
            *(
                {"model": model, "batch": batch, "dtype": "bfloat16", "decoded": True}
                for model in ("Infinity-2B-0.06M", "Infinity-2B-0.25M", "Infinity-2B")
                for batch in (1, 8)
            ),
        ],
    },
    (OURS, EAGER, FLOAT32, *AUTOCAST),
    build,
    graphs=False,
)
