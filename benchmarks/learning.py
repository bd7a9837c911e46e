"""How scales share a gradient, with and without PANW, and how runs learn; as VAR RL Done Right plots it.

    python -m benchmarks.learning gradients --model outputs/demo/var/model --output benchmarks/data/learning.jsonl
    python -m benchmarks.learning run --folder outputs/rl --output benchmarks/data/learning.jsonl
    python -m benchmarks.learning docs        the table and the pictures of docs/learning.md

Of a rollout's policy loss, the gradient of each scale's tokens alone: they add up to the whole one. A record of a run
has its settings and a metric by iteration.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import tyro
from torch.nn.functional import cosine_similarity

from benchmarks import records
from benchmarks.report import between
from benchmarks.shapes import MODELS
from fastvar.models import VAR, SamplingOptions
from fastvar.ops import PolicyLossOptions, group_advantages
from fastvar.pictures import save_picture
from fastvar.report import points
from fastvar.rl import Prompts, roll_out, score, segment_loss
from fastvar.rl.rewards import RewardSum, create
from fastvar.rl.update import token_totals
from fastvar.training.log import read_metrics

DATA = records.ROOT / "benchmarks" / "data" / "learning.jsonl"
DOCUMENT = records.ROOT / "docs" / "learning.md"
ALPHAS = (0.0, 0.6, 1.0)
REWARDS: dict[str, dict[str, Any]] = {"colour": {}, "ocr": {"reader": "handwriting"}}


def gradients(model: Path, output: Path = DATA, rollouts: int = 8, prompts: int = 8, group_size: int = 16) -> None:
    """Measure and append a record for each reward and alpha: of each scale its tokens, the norm of its gradient and the
    cosines to those of the other scales and to the whole, means over rollouts.

    Args:
        model: folder of a VAR of handwriting scenes.
        output: file of JSON lines to append to.
        rollouts: of other prompts and seeds each.
        prompts: groups of a rollout.
        group_size: images of a group.
    """
    var = VAR.from_pretrained(model).eval()
    for name, options in REWARDS.items():
        reward = RewardSum({name: create(name, **options)})
        found: dict[float, list[torch.Tensor]] = {alpha: [] for alpha in ALPHAS}
        for seed in range(rollouts):
            numbers = torch.randperm(100, generator=torch.Generator().manual_seed(seed))[:prompts]
            chosen = Prompts([f"{n:02d}" for n in numbers.tolist()])
            drawn = roll_out(var, chosen, group_size=group_size, seed=seed, options=SamplingOptions())
            scores = reward.combine(score(drawn, reward, var.schedule).each)
            advantages = group_advantages(scores, group_size)
            for alpha in ALPHAS:
                found[alpha].append(by_scale(var, drawn, advantages, PolicyLossOptions(panw_alpha=alpha)))
        for alpha, each in found.items():
            stacked = torch.stack(each).mean(0)  # (K, K + 2): norm, cosine to the whole, cosines to the scales
            record = {
                "benchmark": "gradients",
                **records.provenance(),
                "reward": name,
                "panw_alpha": alpha,
                "rollouts": rollouts,
                "prompts": prompts,
                "group_size": group_size,
                "tokens": list(var.schedule.lengths),
                "norms": stacked[:, 0].tolist(),
                "cosine_with_all": stacked[:, 1].tolist(),
                "cosines": stacked[:, 2:].tolist(),
            }
            records.append(output, record)
            print(json.dumps({key: record[key] for key in ("reward", "panw_alpha", "norms", "cosine_with_all")}))


def by_scale(var: VAR, drawn: Any, advantages: torch.Tensor, options: PolicyLossOptions) -> torch.Tensor:
    """(K, K + 2): of the gradient of each scale's part of the loss its norm, its cosine to that of the whole loss, and
    those to the parts of all scales."""
    totals = token_totals(torch.ones_like(drawn.log_probs), var.schedule)
    weights = [p for p in var.parameters() if p.requires_grad]
    parts = []
    for scale in range(len(var.schedule)):
        mask = torch.zeros_like(drawn.log_probs)
        mask[:, var.schedule.starts[scale] : var.schedule.ends[scale]] = 1
        with torch.enable_grad():
            loss = segment_loss(var, drawn, advantages, options, mask=mask, mask_totals=totals).loss
            gradient = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        parts.append(torch.cat([g.double().flatten() for g in gradient]))
    stacked = torch.stack(parts)
    cosines = cosine_similarity(stacked[:, None], stacked[None], dim=2)
    whole = cosine_similarity(stacked, stacked.sum(0)[None], dim=1)
    return torch.cat([stacked.norm(dim=1, keepdim=True), whole[:, None], cosines], 1)


def run(folder: Path, name: str, output: Path = DATA, metrics: tuple[str, ...] = ("reward", "kl", "entropy")) -> None:
    """Append a record of a run of `fastvar rl`: its settings, and metrics by iteration.

    Args:
        folder: of the run.
        name: of its line in the picture.
        output: file of JSON lines to append to.
        metrics: which ones.
    """
    lines = read_metrics(folder / "metrics.jsonl")
    record = {
        "benchmark": "run",
        **records.provenance(),
        "name": name,
        "provenance": json.loads((folder / "provenance.json").read_text()),
        "settings": json.loads((folder / "settings.json").read_text()),
        "metrics": {metric: [[line["step"], line[metric]] for line in lines if metric in line] for metric in metrics},
    }
    records.append(output, record)


def docs(data: Path = DATA, document: Path = DOCUMENT) -> None:
    """Write the table and the pictures.

    Args:
        data: file of the records.
        document: what they are written into; pictures go beside it.
    """
    rows = records.read(data)
    measured: dict[tuple[str, float], Any] = {
        (row["reward"], row["panw_alpha"]): row for row in rows if row["benchmark"] == "gradients"
    }
    document.write_text(between(document.read_text(), "gradients", table(measured)))
    tokens = {
        f"{name}, {grids}": [(step, float(count)) for step, count in enumerate(MODELS[model].schedule.lengths)]
        for name, grids, model in (
            ("demo", "32 x 32", "demo"),
            ("VAR", "256 px", "VAR-d16"),
            ("VAR", "512 px", "VAR-d36-512"),
            ("Infinity", "1M", "Infinity-2B"),
        )
    }
    beside = document.parent
    save_picture(points(tokens, xlabel="scale", ylabel="tokens", log=True), beside / "learning_tokens.png")
    norms = {f"{reward}, alpha {alpha:g}": list(enumerate(row["norms"])) for (reward, alpha), row in measured.items()}
    save_picture(points(norms, xlabel="scale", ylabel="norm of the gradient", log=True), beside / "learning_norms.png")
    runs = {row["name"]: smoothed(row["metrics"]["reward"]) for row in rows if row["benchmark"] == "run"}
    if runs:
        save_picture(points(runs, xlabel="iteration", ylabel="reward"), beside / "learning_runs.png")


def smoothed(line: list[list[float]], count: int = 10) -> list[tuple[float, float]]:
    """Means of so many points after each other, at the last one's place."""
    parts = [line[i : i + count] for i in range(0, len(line), count)]
    return [(part[-1][0], fmean(value for _, value in part)) for part in parts]


def table(measured: dict[tuple[str, float], Any]) -> str:
    """A line for each reward and alpha."""
    lines = [
        "| reward | alpha | norm of a scale's gradient | largest / smallest | cosine to the whole gradient |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (reward, alpha), row in measured.items():
        norms, cosines = row["norms"], row["cosine_with_all"]
        lines.append(
            f"| {reward} | {alpha:g} | {', '.join(f'{norm:.3g}' for norm in norms)} | {max(norms) / min(norms):.1f} | "
            f"{', '.join(f'{cosine:.2f}' for cosine in cosines)} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"gradients": gradients, "run": run, "docs": docs})
