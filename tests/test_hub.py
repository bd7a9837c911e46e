"""The folder for Hugging Face's package kernels, loaded by it; and what cannot be put into it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def hub() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hub_build", ROOT / "hub" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_builds_and_fastvar_in_one_process(
    hub: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("kernels.importer", reason="the package kernels is not installed")
    files = hub.contents()
    hub.main(tmp_path / "fastvar-kernels", "OWNER/first")
    monkeypatch.setattr(hub, "contents", lambda: {**files, "schedule.py": files["schedule.py"] + "# later\n"})
    hub.main(tmp_path / "second")
    command = [sys.executable, "-I", str(ROOT / "tests/helpers/load_folder.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "fastvar-kernels"), str(tmp_path / "second"), str(ROOT)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert 'get_kernel("OWNER/first", ' in (tmp_path / "fastvar-kernels" / "README.md").read_text()
    (_, *names) = done.stdout.split()
    assert len(set(names)) == 2


def test_public_names(hub: ModuleType) -> None:
    """Those of fastvar.ops, but for the quantisers'."""
    import fastvar.ops

    scope = {name: None for name in hub.re.findall(r'"(\w+)",', hub.contents()["__init__.py"])}
    left_out = {"accumulate_bits", "accumulate_scale", "bitwise_residual_quantize", "residual_quantize"}
    left_out |= {"AccumulatedScale", "QuantizedBits", "QuantizedResidual", "ResidualConv", "residual_conv_index"}
    assert set(scope) == {*fastvar.ops.__all__, "ScaleSchedule"} - left_out


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("import scipy", "scipy"),
        ("import fastvar.schedule", "fastvar.schedule"),
        ("from .schedule import ScaleSchedule", "import from schedule"),
        ("from fastvar.models import VAR", "not in the folder"),
        ("torch.ops.fastvar.policy_loss", "namespace of ops"),
        ("import torch; from fastvar.schedule import ScaleSchedule", None),
        ("name = 'fastvar.kernels.sample_tokens'", 'expected "fastvar.'),
        ('name = "in fastvar.kernels"', 'expected "fastvar.'),
    ],
)
def test_what_cannot_be_rewritten_is_named(hub: ModuleType, line: str, problem: str | None) -> None:
    places = {"schedule.py", "ops/a.py"}
    if problem is None:
        assert "from ..schedule import" in hub.rewritten(line, "ops/a.py", places)
        return
    with pytest.raises(hub.CannotRewrite, match=f"ops/a.py:2: .*{problem}"):
        hub.rewritten(f"\n{line}\n", "ops/a.py", places)


def test_what_is_there_is_not_overwritten(hub: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        hub.main(tmp_path)
