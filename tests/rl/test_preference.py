"""FASTVAR_BACKEND reaches every operator that models, sampling, rewards and the trainer call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from policies import policy, redness

from fastvar.ops import _dispatch
from fastvar.ops._operator import Operator
from fastvar.rl import RLConfig, VMRGRPOTrainer
from fastvar.rl.rewards import RewardSum

CONFIG = RLConfig(iterations=2, prompts=1, group_size=2, coarse_updates=1, save_every=2)


@pytest.mark.parametrize(
    ("preference", "expected"),
    [
        ("reference", {"*": "reference"}),
        ("triton,cpu", {"*": "cpu", "sample_tokens": "reference"}),
        ("cpu,token_log_probs=reference", {"token_log_probs": "reference", "sample_tokens": "reference", "*": "cpu"}),
    ],
)
def test_the_trainer_obeys(
    preference: str, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dispatch, "PREFERENCE", _dispatch.parse_preference(preference))
    ran: dict[str, set[str]] = {}
    find = Operator._implementation

    def found(self: Operator, backend: str, tensor: torch.Tensor) -> Any:
        ran.setdefault(self.name, set()).add(backend)
        return find(self, backend, tensor)

    monkeypatch.setattr(Operator, "_implementation", found)
    VMRGRPOTrainer(policy(), RewardSum({"it": redness}), ["0", "1"], CONFIG, tmp_path).train()
    assert {"block_causal_attention", "cached_attention", "sample_tokens", "policy_loss", "token_log_probs"} <= set(ran)
    built = _dispatch._find("accumulate_scale", "cpu")
    assert built is not None
    for op, backends in ran.items():
        wanted = expected.get(op, expected["*"])
        if op == "accumulate_scale" and built.missing() is not None:
            wanted = "reference"
        assert backends == {wanted}, op
