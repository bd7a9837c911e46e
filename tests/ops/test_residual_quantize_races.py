"""Whether members of the quantiser's blocks write what others read without a sync between: the threads that stand for
them, under ThreadSanitizer, which sees every access of theirs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastvar.build import find_cxx

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
CALLS = """
import sys

import torch

torch.set_num_threads(1)
torch.ops.load_library(sys.argv[1])
ops = torch.ops.fastvar_cpu
grids, length = [1, 1, 2, 3, 2, 5, 5, 7], 52
for channels, size, members, parts, rows, lines, znorm in [
    (12, 50, 4, 2, 0, 2, False), (5, 300, 3, 3, 0, 1, False), (12, 80, 6, 1, 16, 2, True), (1, 3000, 4, 2, 0, 5, True),
]:
    features, codebook = torch.randn(1, channels, 5, 7), torch.randn(size, channels)
    weight, bias = torch.randn(2, channels, channels, 3, 3), torch.randn(2, channels)
    tokens, usage = torch.zeros(1, length, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
    ops.residual_quantize_by_teams(
        features, codebook, weight, bias, 0.5, [0, 0, 1, 1], grids, znorm, members, parts, rows, lines, tokens,
        torch.empty_like(features), torch.empty(1, length - 1, channels), usage,
    )
ops.accumulate_scale_by_teams(
    torch.randn(1, 12, 5, 7), torch.arange(6)[None], torch.randn(9, 12), torch.randn(12, 12, 3, 3), torch.randn(12),
    0.5, 2, 3, 2, 5, 5, 8, 2, torch.empty(1, 12, 5, 7), torch.empty(1, 10, 12),
)
print("done")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ThreadSanitizer is loaded as on Linux")
@pytest.mark.skipif(not SOURCES.is_dir(), reason="an installed package has no sources")
def test_no_races(tmp_path: Path) -> None:
    compiler, folder = find_cxx(), Path(torch.__file__).parent
    found = subprocess.run([*compiler, "-print-file-name=libtsan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(found).is_file():
        pytest.skip(f"{compiler[0]} has no libtsan")
    library = tmp_path / "teams.so"
    command = [
        *compiler, "-std=c++20", "-O1", "-g", "-w", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off",
        "-fsanitize=thread", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-I.", "-isystem", str(folder / "include"),
        "residual_quantize/simulated_blocks.cpp", f"-L{folder / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(library),
    ]  # fmt: skip
    subprocess.run(command, cwd=SOURCES, check=True)
    watched = {
        **os.environ,
        "LD_PRELOAD": found,
        "TSAN_OPTIONS": "report_signal_unsafe=0 ignore_noninstrumented_modules=1",
    }
    done = subprocess.run([sys.executable, "-c", CALLS, str(library)], capture_output=True, text=True, env=watched)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not run with this kernel's addresses")
    assert done.stdout == "done\n" and done.returncode == 0, done.stderr[-3000:]
    assert "ThreadSanitizer" not in done.stderr, done.stderr[:3000]
