"""Files that appear whole, and JSON that everything reads."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest

from fastvar.files import json_text, replacing, write_json
from fastvar.training.log import RunLog, read_metrics


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    value = {"a": [1.5, math.nan, (math.inf, 2)], "b": {"c": -math.inf, "d": True, "e": None}}
    write_json(tmp_path / "file", value)
    expected = {"a": [1.5, None, [None, 2]], "b": {"c": None, "d": True, "e": None}}
    assert json.loads((tmp_path / "file").read_text()) == json.loads(json_text(value)) == expected


def test_a_metric_that_is_not_finite_is_null_in_the_file(tmp_path: Path) -> None:
    """Also in lines that a resumed run copies."""
    for first_step in (0, 1):
        log = RunLog(tmp_path, first_step, 2, title="run")
        log.write(first_step + 1, {"loss": math.inf})
        log.close()
    assert "Infinity" not in (text := (tmp_path / "metrics.jsonl").read_text()) and text.count('"loss": null') == 2
    assert [math.isnan(line["loss"]) for line in read_metrics(tmp_path / "metrics.jsonl")] == [True, True]
    assert {"command", "date", "versions"} <= json.loads((tmp_path / "provenance.json").read_text()).keys()


def test_after_an_error_all_is_as_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError, match="disk full"), replacing(tmp_path / "file") as temporary:
        temporary.mkdir()
        (temporary / "part").write_text("new")
        raise OSError("disk full")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "old"


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a program that is ended between two renames loses it."""
    folder, rename = tmp_path / "model", os.replace
    folder.mkdir()
    (folder / "weights").write_text("old")

    def fails(source: Path, target: Path) -> None:
        if source.name == ".model.tmp":
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="could not be written"), replacing(folder) as temporary:
        temporary.mkdir()
    monkeypatch.undo()
    assert (folder / "weights").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["model"]
    folder.rename(tmp_path / ".model.old")
    with pytest.raises(KeyError), replacing(folder):
        raise KeyError
    assert (folder / "weights").read_text() == "old"
