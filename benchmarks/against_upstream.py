"""Sampling with `VAR.generate` against FoundationVision/VAR's own `autoregressive_infer_cfg`, on the same weights.

    python -m benchmarks.against_upstream --checkout PATH/TO/VAR --output benchmarks/data/against_upstream.jsonl

Both run in this process, one after the other in every round, with guidance, on random weights. With greedy sampling
(top_k=1) they must give the same tokens in float32, or nothing is timed. "truncated" is top_k=900, top_p=0.96, as in
VAR's evaluation; there each one draws its own random numbers. Images are decoded by neither: `decode=False` here, and
the feature map in place of the decoder there.
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import tyro
from torch import nn

from benchmarks import records
from fastvar.models import VAR, load_var

MODULES = ("models", "dist")  # the checkout's, under names that others use too
GUIDANCE = 1.5
SAMPLING: Mapping[str, Mapping[str, Any]] = {"greedy": {"top_k": 1}, "truncated": {"top_k": 900, "top_p": 0.96}}
BASELINE = "upstream float32"
Contenders = Mapping[str, Callable[[torch.Tensor, Mapping[str, Any]], Any]]  # from labels and sampling options


@contextlib.contextmanager
def upstream_modules(checkout: Path) -> Iterator[tuple[ModuleType, ModuleType]]:
    """The checkout's `models.var` and `models.vqvae`; afterwards sys.path and sys.modules are as before."""
    others = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in MODULES}
    for name in others:
        del sys.modules[name]
    sys.path.insert(0, str(checkout))
    try:
        import dist

        dist.get_device = lambda: "cpu"
        import models.var
        import models.vqvae

        yield models.var, models.vqvae
    finally:
        sys.path.remove(str(checkout))
        for name in [name for name in sys.modules if name.partition(".")[0] in MODULES]:
            del sys.modules[name]
        sys.modules.update(others)


@torch.no_grad()
def build_upstream(checkout: Path, depth: int) -> Any:
    """Upstream's VAR of a depth with random weights, in evaluation mode; it answers feature maps, not images.

    Embeddings have variance 1 and weights 1 / fan-in, so that every block counts and logits differ clearly: upstream's
    own initialisation all but switches the blocks off. The tokenizer's encoder and decoder are narrow, as they do not
    run.
    """
    # its constructor prints
    with upstream_modules(checkout) as (var, vqvae), contextlib.redirect_stdout(io.StringIO()):
        tokenizer = vqvae.VQVAE(ch=32)
        model = var.VAR(tokenizer, depth=depth, embed_dim=64 * depth, num_heads=depth, attn_l2_norm=True)
    for module in [*model.modules(), *tokenizer.modules()]:
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.normal_(std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, nn.Embedding):
            module.weight.normal_()
    model.pos_start.normal_()
    model.pos_1LC.normal_()
    tokenizer.fhat_to_img = lambda feature_map: feature_map
    return model.eval()


def make_contenders(upstream: Any, var: VAR, dtypes: tuple[str, ...]) -> Contenders:
    """By name, functions that sample once. Those of upstream answer the tokens that they look up in the codebook."""

    def sample_upstream(labels: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
        looked_up: list[torch.Tensor] = []
        codebook = upstream.vae_quant_proxy[0].embedding
        with codebook.register_forward_hook(lambda _, arguments, __: looked_up.append(arguments[0])):
            upstream.autoregressive_infer_cfg(len(labels), labels, g_seed=0, cfg=GUIDANCE, **options)
        return torch.cat(looked_up, 1)

    def sample_upstream_autocast(labels: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return sample_upstream(labels, options)

    def sampler(model: VAR) -> Callable[[torch.Tensor, Mapping[str, Any]], torch.Tensor]:
        return lambda labels, options: model.generate(labels, guidance=GUIDANCE, decode=False, **options).tokens

    contenders = {BASELINE: sample_upstream, "fastvar float32": sampler(var)}
    if "bfloat16" in dtypes:
        half = VAR(var.config, var.tokenizer).to(torch.bfloat16).eval()
        half.load_state_dict(var.state_dict())
        contenders["upstream bfloat16 autocast"] = sample_upstream_autocast
        contenders["fastvar bfloat16 weights"] = sampler(half)
    if "float32" not in dtypes:  # upstream in float32 stays, as what the others are compared with
        del contenders["fastvar float32"]
    return contenders


def compare(contenders: Contenders, batch: int, sampling: str, rounds: int) -> dict[str, Any]:
    """Seconds of every contender in every round, and with greedy sampling the share of upstream's float32 tokens.

    Raises:
        RuntimeError: greedy tokens in float32 that are not upstream's.
    """
    labels, options = torch.arange(batch) * 37 % 1000, SAMPLING[sampling]
    tokens = {name: sample(labels, options) for name, sample in contenders.items()}  # warms up, too
    equal = {}
    if sampling == "greedy":
        equal = {name: (found == tokens[BASELINE]).double().mean().item() for name, found in tokens.items()}
        if equal.get("fastvar float32", 1) != 1:
            raise RuntimeError(f"greedy float32 tokens: expected upstream's, equal are only {equal['fastvar float32']}")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:  # everyone comes first once
            start = time.perf_counter()
            contenders[name](labels, options)
            seconds[name].append(time.perf_counter() - start)
    return {"batch": batch, "sampling": sampling, "seconds": seconds, "equal_tokens": equal}


def table(record: Mapping[str, Any]) -> str:
    """Median seconds, and how many times faster than upstream in float32: ratio of medians, 20 to 80 % of rounds."""
    lines = [f"depth {record['depth']}, batch {record['batch']}, {record['sampling']}, {record['threads']} threads"]
    baseline = record["seconds"][BASELINE]
    for name, seconds in record["seconds"].items():
        own = records.spread(seconds)
        ratios = records.spread(theirs / ours for theirs, ours in zip(baseline, seconds, strict=True))
        equal = record["equal_tokens"].get(name)
        lines.append(
            f"  {name:<28}{own.median:8.3f} s ({own.low:.3f} to {own.high:.3f})"
            f"{records.spread(baseline).median / own.median:7.2f} x ({ratios.low:.2f} to {ratios.high:.2f})"
            + ("" if equal is None else f"{equal:8.1%} equal tokens")
        )
    return "\n".join(lines)


def main(
    checkout: Path,
    depth: int = 16,
    batch: tuple[int, ...] = (1, 4),
    dtype: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16"),
    sampling: tuple[Literal["greedy", "truncated"], ...] = ("greedy", "truncated"),
    threads: int = 2,
    rounds: int = 5,
    output: Path | None = None,
) -> None:
    """Compare sampling with FoundationVision/VAR.

    Args:
        checkout: a checkout of FoundationVision/VAR.
        depth: of the model; its width is 64 times that, as in all public ones.
        batch: images at a time.
        dtype: which contenders run; bfloat16 means bfloat16 weights here and autocast there.
        sampling: "greedy" is top_k=1, "truncated" top_k=900 and top_p=0.96.
        threads: of PyTorch.
        rounds: how often each contender is timed.
        output: append the results to this file.
    """
    if not (checkout / "models" / "var.py").is_file():
        sys.exit(f"against_upstream: --checkout: expected a clone of FoundationVision/VAR, found none at {checkout}")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    upstream = build_upstream(checkout.resolve(), depth)
    var, _ = load_var(upstream.state_dict(), upstream.vae_proxy[0].state_dict())
    contenders = make_contenders(upstream, var, dtype)
    for images in batch:
        for name in sampling:
            record = {"benchmark": "against_upstream", **records.provenance()}
            record |= {"upstream_commit": records.commit(checkout), "depth": depth, "guidance": GUIDANCE}
            record |= compare(contenders, images, name, rounds)
            print(table(record), flush=True)
            if output is not None:
                records.append(output, record)


if __name__ == "__main__":
    tyro.cli(main)
