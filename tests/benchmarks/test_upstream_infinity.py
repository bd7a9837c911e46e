"""Infinity in the suites: the public code, where there is a checkout of it, and ours are one model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import upstream_infinity
from benchmarks.cases import OURS, Suite, setting_name
from benchmarks.runner import Checked, Options, Runner, Wrong
from benchmarks.suites import generate, training_step
from benchmarks.upstream_infinity import public_package, texts_of
from fastvar.models import Infinity

TINY = [
    (suite, {**setting, "size": "tiny"})
    for suite in (generate.SUITE, training_step.SUITE)
    for setting in suite.settings["tiny"]
    if setting.get("model") == "Infinity-tiny"
]
PUBLIC = public_package()
needs_public = pytest.mark.skipif(isinstance(PUBLIC, str), reason=str(PUBLIC))


def checked(suite: Suite, setting: Any) -> Checked:
    return Runner(Options(torch.device("cpu"))).check(suite, setting, "forward")


@needs_public
@pytest.mark.parametrize(("suite", "setting"), TINY, ids=lambda x: x.name if isinstance(x, Suite) else setting_name(x))
def test_the_public_code_agrees(suite: Suite, setting: Any) -> None:
    """In float32 all bits are its bits, and its loss and the norm of its gradient are ours."""
    found = checked(suite, setting)
    theirs = {name: error for name, error in found.errors.items() if not name.startswith(OURS)}
    assert found.failed == {} and bool(theirs) == (setting["dtype"] == "float32")
    assert all(error <= found.limit for error in found.errors.values())
    if suite is generate.SUITE:
        assert not any(theirs.values())


@needs_public
def test_a_wrong_rival_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here one that samples under another guidance."""
    right = upstream_infinity.sample
    monkeypatch.setattr(upstream_infinity, "sample", lambda *a, **k: right(*a, **{**k, "guidance": 1.5}))
    found = checked(generate.SUITE, TINY[1][1])
    assert found.errors[OURS] <= found.limit < found.errors[generate.FLOAT32]


@needs_public
def test_another_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with a weight that is not the public one."""
    load = upstream_infinity.load_infinity

    def other(*states: Any, **options: Any) -> Any:
        net, tokenizer = load(*states, **options)
        with torch.no_grad():
            net.blocks[1].text_attention.proj.weight.mul_(1.1)
        return net, tokenizer

    monkeypatch.setattr(upstream_infinity, "load_infinity", other)
    with pytest.raises(ValueError, match=r"Infinity: the public code's logits differ from ours by 0\.0\d+ of the"):
        checked(*TINY[1])


@pytest.mark.parametrize(("suite", "setting"), [TINY[1], TINY[-1]], ids=["generate", "training_step"])
def test_ours_is_checked_without_the_public_code(suite: Suite, setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_infinity, "public_package", lambda: "there is none")
    found = checked(suite, setting)
    assert {name for name, why in found.problem.contenders.items() if why == "there is none"} > {suite.contenders[-1]}
    assert found.errors[OURS] <= found.limit
    if suite is generate.SUITE:
        right = Infinity.generate
        monkeypatch.setattr(Infinity, "generate", lambda *a, **k: right(*a, **{**k, "guidance": 1.5}))
        with pytest.raises(Wrong, match="fastvar: error"):
            checked(suite, setting)


def test_lengths_of_texts() -> None:
    device = torch.device("cpu")
    assert texts_of("1,64", 2, device).lengths == (1, 64) and len(set(texts_of(None, 8, device).lengths)) == 8
    with pytest.raises(ValueError, match="texts: expected 3 lengths, got 1,64"):
        texts_of("1,64", 3, device)
