"""Patched models that DDP and FSDP wrap learn as plain ones do, in one process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from fastvar.integrations import apply
from tests.helpers import public_hart, public_infinity, public_switti, public_var

TEXTS = torch.randn(5, public_infinity.WIDTH), torch.tensor([0, 2, 5]).int(), 3
KEPT = (torch.arange(public_hart.LENGTH) < public_hart.LENGTH - 5).expand(2, -1)
INPUTS = torch.randn(2, 29, 4)
# models, their blocks, and what they are called with
FAMILIES: dict[str, tuple[type[nn.Module], type[nn.Module], tuple[Any, ...]]] = {
    "VAR": (public_var.PublicVAR, public_var.Block, (torch.tensor([1, 4]), INPUTS)),
    "Infinity": (
        public_infinity.PublicInfinity,
        public_infinity.Block,
        (TEXTS, torch.randn(2, 16, public_infinity.BITS), public_infinity.SIZES),
    ),
    "HART": (
        public_hart.PublicHART,
        public_hart.Block,
        (torch.randn(2, 3, 5), INPUTS, torch.arange(3).expand(2, 3), torch.ones(2, 3, dtype=torch.int64), KEPT),
    ),
    "Switti": (
        public_switti.PublicSwitti,
        public_switti.Block,
        (INPUTS, torch.randn(2, 5, public_switti.TEXT), torch.zeros(2, 5)),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("group") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def wrap(model: nn.Module, block: type[nn.Module], how: str) -> Any:
    if how == "DDP":
        return DistributedDataParallel(model)
    if how == "FSDP":
        policy = ModuleWrapPolicy({block})
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"))
    mesh = init_device_mesh("cpu", (1,))
    for module in [*(each for each in model.modules() if isinstance(each, block)), model]:
        fully_shard(module, mesh=mesh)
    return model


@pytest.mark.filterwarnings("ignore:FSDP")
@pytest.mark.parametrize("how", ["DDP", "FSDP", "FSDP2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_wrapped_models_learn_as_before(family: str, how: str) -> None:
    """Two steps with the same dropout, of which the second has the weights of the first."""
    torch.manual_seed(0)
    kind, block, arguments = FAMILIES[family]
    model = kind().train()
    for module in list(model.modules()):
        if hasattr(module, "proj_drop"):
            module.proj_drop = nn.Dropout(0.2)
        if hasattr(module, "drop_path"):
            module.drop_path = public_var.DropRows()
    plain = copy.deepcopy(model)
    apply(model)
    wrapped = wrap(model, block, how)
    losses: list[list[float]] = [[], []]
    for each, noted in zip((wrapped, plain), losses, strict=True):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.05)
        for _ in range(2):
            optimizer.zero_grad()
            torch.manual_seed(1)
            loss = each(*arguments).square().mean()
            loss.backward()
            optimizer.step()
            noted.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[1][0] != losses[1][1]
    if how == "FSDP":
        with FullyShardedDataParallel.summon_full_params(wrapped):
            found = [parameter.clone() for parameter in model.parameters()]
    else:
        found = [each.full_tensor() if how == "FSDP2" else each for each in model.parameters()]
    for ours, theirs in zip(found, plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)
