"""The demo of a small Infinity in very small: what it promises is written, and a second call trains nothing again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvar.cli import main
from fastvar.data import Reading
from fastvar.evaluation import draw, evaluate_texts
from fastvar.handwriting import infinity_demo
from fastvar.handwriting.infinity_demo import infinity_headline
from fastvar.models import Infinity, SamplingOptions, load_text_encoder
from fastvar.random import derive
from fastvar.training import InfinityTask


class Zeros:
    """Reads 0 off every image; fitting the reader takes longer than all the rest."""

    def __init__(self, *, cache: Path) -> None:
        pass

    def __call__(self, images: torch.Tensor) -> list[Reading]:
        assert images.min() >= 0 and images.max() <= 1
        return [Reading("0", torch.zeros(1, 4), torch.ones(1), 1.0)] * len(images)


def test_infinity_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(infinity_demo, "Reader", Zeros)
    started, used = [], []

    def task(net: Infinity, *arguments: Any, **more: Any) -> InfinityTask:
        started.append(net.text_in.weight.detach().clone())
        return InfinityTask(net, *arguments, **more)

    def evaluated(model: Infinity, numbers: list[str], options: SamplingOptions, reader: Any) -> Any:
        used.append(options)
        return evaluate_texts(model, numbers, options, reader)

    monkeypatch.setattr(infinity_demo, "InfinityTask", task)
    monkeypatch.setattr(infinity_demo, "evaluate_texts", evaluated)
    output = tmp_path / "demo"
    few = {"tokenizer-steps": 2, "var-steps": 2, "scenes": 32, "samples": 8, "bits": 4, "width": 32, "depth": 1}
    run = ["demo", "--model", "infinity", "--output", str(output)]
    run += ["--sampling.temperature", "0.8", "--sampling.top-k", "5", "--sampling.batch-size", "3"]
    run += [str(part) for name, value in few.items() for part in (f"--{name}", value)]
    output.mkdir()
    summary = {"word_accuracy": 0.5, "word_accuracy_95": [0.4, 0.6], "ned": 0.7}
    (output / "results.json").write_text(json.dumps({"scores": {"samples, guided": summary}}))
    main(run)
    told = capsys.readouterr()
    results = json.loads((output / "infinity.json").read_text())
    for name, figure in infinity_headline(results):
        assert f"{name}: {figure}" in told.out
    assert f"report: {output}/infinity.html" in told.out and "stage 3 of 3" in told.err
    assert all(score["images"] == 8 for score in results["scores"].values()) and len(results["scores"]) == 5
    drawn_so = ("samples, guided, at half the temperature", "samples, guided", "samples, no guidance")
    for kind in drawn_so:  # one of eight digits is 0
        assert results["scores"][kind]["word_accuracy"] == 0.125
    page = (output / "infinity.html").read_text()
    assert page.count("data:image/png;base64,") == 8 + 1
    assert "<td>VAR of this folder: samples, guided</td><td>50.0 % (40.0 to 60.0)</td>" in page
    lines = {name: (output / name / "metrics.jsonl").read_text() for name in ("bits", "infinity")}
    net = Infinity.from_pretrained(output / "infinity")
    net.text_encoder = load_text_encoder(net.config.text_encoder, max_length=net.config.text_length)
    torch.manual_seed(derive(0, "weights"))
    assert torch.equal(started[0], Infinity(net.config).text_in.weight)
    options = SamplingOptions(guidance=2.0, temperature=0.8, top_k=5, top_p=0.9, batch_size=3)
    assert used == [replace(options, temperature=0.4), options, SamplingOptions(guidance=1.0, batch_size=3)]
    drawn = draw(net, ["7", "4"], options)
    assert drawn.shape == (2, 3, 16, 16)
    main(run)
    assert json.loads((output / "infinity.json").read_text())["scores"] == results["scores"]
    for name, before in lines.items():  # with their seconds: nothing was trained again
        assert (output / name / "metrics.jsonl").read_text() == before
    with pytest.raises(SystemExit):
        main([*run, "--bits", "0"])
    assert "bits: expected at least 1, got 0" in capsys.readouterr().err
