"""FASTVAR_BACKEND reaches every operator that models, sampling, rewards and the trainer call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastvar.ops import _dispatch, _operator
from fastvar.rl import RLConfig, VMRGRPOTrainer
from fastvar.rl.rewards import RewardSum
from tests.helpers.policies import policy, redness

CONFIG = RLConfig(iterations=2, prompts=1, group_size=2, coarse_updates=1, save_every=2)


@pytest.mark.parametrize(
    ("preference", "expected"),
    [
        ("reference", {"*": "reference"}),
        ("triton,torch,reference", {"*": "torch"}),
        ("torch,reference,policy_loss=reference", {"policy_loss": "reference", "*": "torch"}),
    ],
)
def test_the_trainer_obeys(
    preference: str, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dispatch, "PREFERENCE", _dispatch.parse_preference(preference))
    ran: dict[str, set[str]] = {}
    choose = _operator.choose

    def noted(op: str, *rest: Any) -> Any:
        chosen = choose(op, *rest)
        ran.setdefault(op, set()).add(chosen.backend)
        return chosen

    monkeypatch.setattr(_operator, "choose", noted)
    VMRGRPOTrainer(policy(), RewardSum({"it": redness}), ["0", "1"], CONFIG, tmp_path).train()
    assert {"block_causal_attention", "cached_attention", "sample_tokens", "policy_loss"} <= set(ran)
    for op, backends in ran.items():
        wanted = _dispatch._find(op, expected.get(op, expected["*"]))
        there = wanted is not None and wanted.missing() is None  # not built, or never written
        assert backends == {wanted.backend if there else "reference"}, op
