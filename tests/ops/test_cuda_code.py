"""The code of the CUDA library, read from the file that was built: no GPU is needed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import fastvar

triton = pytest.importorskip("triton")

LIBRARY = Path(fastvar.__file__).parent / "_cuda.abi3.so"
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

pytestmark = [
    pytest.mark.skipif(not LIBRARY.is_file(), reason="the CUDA library is not built: fastvar build --cuda"),
    pytest.mark.skipif(not TOOL.is_file(), reason="this triton has no cuobjdump"),
]


def dumped(option: str) -> str:
    return subprocess.run([str(TOOL), option, str(LIBRARY)], capture_output=True, text=True, check=True).stdout


def test_nothing_spills() -> None:
    """No kernel has a stack, on any GPU that the library is compiled for."""
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", dumped("-res-usage"))
    assert len(usage) >= 3
    assert [entry for entry in usage if entry[2] != "0"] == []


def test_divisions_and_roots_are_rounded_as_on_a_cpu() -> None:
    """Ties between equally near codes are decided as in PyTorch only if directions have the same bits."""
    code = dumped("-ptx")
    assert "div.rn.f32" in code and "sqrt.rn.f32" in code
    assert re.findall(r"\b(?:div|sqrt|rsqrt|rcp)\.(?:approx|full)\S*", code) == []


def test_the_search_is_on_matrix_units() -> None:
    """On every GPU it reads codes in 16 bytes a lane; codes of tokens are copied so."""
    functions = [part.split("\n", 1) for part in dumped("-sass").split("Function : ")[1:]]
    for kernel, needed in {
        "residual_quantize_fwd_search_kernel": ("HMMA.16816.F32.BF16", "LDG.E.128.CONSTANT"),
        "residual_quantize_fwd_image_kernel": ("HMMA.16816.F32.BF16", "LDG.E.128.CONSTANT", "LDGSTS.E.BYPASS.128"),
        "residual_quantize_fwd_cluster_kernel": ("HMMA.16816.F32.BF16", "LDG.E.128.CONSTANT", "LDGSTS.E.BYPASS.128"),
        "residual_quantize_fwd_add_kernel": ("LDGSTS.E.BYPASS.128",),
        "accumulate_scale_fwd_kernel": ("LDGSTS.E.BYPASS.128",),
    }.items():
        bodies = [body for name, body in functions if "8quantize" in name and kernel in name]
        assert len(bodies) >= 3
        for body in bodies:
            assert [word for word in needed if word not in body] == []
