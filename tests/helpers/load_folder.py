"""Loads two folders that hub/build.py made, with the package kernels, and runs their operators: a process of
tests/test_hub.py, in which fastvar cannot be imported at first. TRITON_INTERPRET=1 has to be set.

Arguments: the folders, the first of them loaded as docs/hub.md does, and the checkout.
"""

import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from kernels._rust import Digest, DigestAlgorithm, Metadata

from kernels import get_local_kernel


def check_digests(folder: Path) -> None:
    """All files are those that the metadata speaks of, as the package counts them."""
    for variant in (folder / "build").iterdir():
        metadata = Metadata.read_from_file(variant / "metadata.json")
        assert metadata.digest is not None and metadata.id.startswith(f"_fastvar_{variant.name.split('-')[1]}_")
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))


def answers(build: ModuleType, backend: str) -> list[torch.Tensor]:
    """Of the operators of a build."""
    torch.manual_seed(0)
    schedule = build.ScaleSchedule((1, 2, 3))
    q, k, v = torch.randn(2, 14, 3, 2, 16, requires_grad=True).unbind(2)
    head = (torch.randn(2, 14, 8), torch.randn(20, 8, requires_grad=True), None)
    tokens, seeds = torch.randint(20, (2, 14)), torch.arange(2)
    attended = build.block_causal_attention(q, k, v, schedule, backend=backend)
    loss = build.policy_loss(head, tokens, torch.tensor([1.0, -1.0]), schedule, backend=backend).loss
    found = [
        attended,
        loss,
        build.token_log_probs(*head, tokens, backend=backend).log_probs,
        build.cross_entropy(*head, tokens, backend=backend).loss,
        build.sample_tokens(torch.randn(2, 14, 20), seeds=seeds, top_k=5, backend=backend).tokens,
        build.propagate_mask(torch.rand(2, 3, 3), schedule, soft=True, backend=backend),
        build.adaptive_layer_norm(head[0], head[0][:, 0], head[0][:, 1], backend=backend),
    ]
    return [*found, *torch.autograd.grad(attended.sum() + loss, [q, head[1]])]


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected)


def main(folders: list[Path], checkout: Path) -> None:
    sys.modules["fastvar"] = None  # type: ignore[assignment]  # importing it raises
    for folder in folders:
        check_digests(folder)
    os.chdir(folders[0].parent)
    (block,) = re.findall(r"```python\n(.*?get_local_kernel.*?)```", (checkout / "docs/hub.md").read_text(), re.DOTALL)
    q, k, v = torch.randn(1, 680, 3, 1, 16).unbind(2)
    page: dict[str, Any] = {"q": q, "k": k, "v": v}
    exec(compile(block, "docs/hub.md", "exec"), page)
    builds = [page["fastvar"], *(get_local_kernel(folder, backend="cpu") for folder in folders[1:])]
    expected = answers(builds[0], "reference")
    for build in builds:
        same(answers(build, "auto"), expected)
        rows = torch.randn(2, 3, 8), torch.randn(2, 8), torch.randn(2, 8)
        plain, by_triton = (build.adaptive_layer_norm(*rows, backend=backend) for backend in ("reference", "triton"))
        same(by_triton, plain)
        op = getattr(torch.ops, build.__name__).adaptive_layer_norm
        same(op(*rows, 1e-6, "reference"), plain)
    try:
        builds[0].propagate_mask(torch.rand(2, 3, 3), builds[0].ScaleSchedule((1, 2, 3)), backend="cuda")
    except RuntimeError as error:
        assert "cannot run" in str(error), error
    assert [name for name in sys.modules if name.split(".")[0] == "fastvar"] == ["fastvar"]

    del sys.modules["fastvar"]
    sys.path.insert(0, str(checkout))
    import fastvar.ops

    fastvar.ops.ScaleSchedule = fastvar.ScaleSchedule  # as a build has it
    same(answers(fastvar.ops, "reference"), expected)
    print("fine", *(build.__name__ for build in builds))


if __name__ == "__main__":
    main([Path(path) for path in sys.argv[1:3]], Path(sys.argv[3]))
