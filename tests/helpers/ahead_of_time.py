"""Compiles Triton kernels for GPUs that are not there, exactly as their launches would ask for them."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from fastvar.kernels.common.launching import Kernel
from fastvar.kernels.common.tiling import SHARED, Card, family_of
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from fastvar import ops  # noqa: F401  (registers the operators)
from fastvar.ops._dispatch import REGISTRY
from fastvar.ops._triton import triton_modules

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.uint8: "u8",
}
# All that ask for the card, imported before it is replaced there.
MODULES = [module for module in triton_modules() if hasattr(module, "card")]
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")


class Launch(NamedTuple):
    """A kernel, what it was called with, positional and by name, and on how many blocks along each axis."""

    kernel: Any
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    grid: tuple[int, ...] = ()


class Compiled(NamedTuple):
    """What a compilation gave: registers and bytes of stack (spills and local arrays) of a thread, bytes of shared
    memory, the assembly, and the code before that, which says how tensors lie over the threads."""

    registers: int
    stack: int
    shared: int
    ptx: str
    ttgir: str = ""


class Needs:
    """Which gradients a backward pass is asked for."""

    def __init__(self, *names: str) -> None:
        self._names = names

    def __getattr__(self, name: str) -> bool:
        return name in self._names


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, kernels are not run but recorded."""
    launches: list[Launch] = []

    def record(self: Kernel, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        launches.append(Launch(self.function, arguments, constants, grid))

    with patch.object(Kernel, "launch", record):
        yield launches


class _Inside(TorchDispatchMode):
    """Ops of the library are their implementations, on tensors without memory too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastvar":
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def launches_of(call: Callable[[], Any], capability: int | None = None) -> list[Launch]:
    """What public functions with the backend "triton" launch, and their backward pass if they were given anything that
    requires a gradient, on a card of a compute capability such as 90. New tensors have no memory."""
    here = {
        op: tuple(replace(each, devices=()) if each.backend == "triton" else each for each in implementations)
        for op, implementations in REGISTRY.items()
    }
    with ExitStack() as stack:
        for module in MODULES if capability else ():
            family = family_of(divmod(capability or 0, 10))
            stack.enter_context(patch.object(module, "card", return_value=Card("", family, SHARED[family])))
        stack.enter_context(patch.dict(REGISTRY, here))
        stack.enter_context(patch("torch.is_autocast_enabled", return_value=False))  # knows no such device
        launches = stack.enter_context(recorded())
        stack.enter_context(torch.device("meta"))
        stack.enter_context(_Inside())
        results = call()
        results = [results] if isinstance(results, torch.Tensor) else results
        outputs = [r for r in results if isinstance(r, torch.Tensor) and r.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(r) for r in outputs])
    return launches


def compile_for(launch: Launch, capability: int) -> Compiled:
    """For a compute capability such as 90, with the specialisations that the launcher makes: integers that are 1 are
    constants, and what divides by 16 is known to."""
    values = dict(zip([p.name for p in launch.kernel.params], launch.arguments, strict=False)) | launch.named
    options = {name: values.pop(name) for name in OPTIONS if name in values}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, parameter in enumerate(launch.kernel.params):
        value = values[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and special):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and special:
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = _resources(kernel.asm["cubin"])
    return Compiled(registers, stack, kernel.metadata.shared, kernel.asm["ptx"], kernel.asm["ttgir"])


def accesses(ptx: str) -> Counter[tuple[str, int]]:
    """How many loads ("ld") and stores ("st") of global memory of how many bytes a thread there are."""
    found: Counter[tuple[str, int]] = Counter()
    for kind, vector, bits in re.findall(r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx):
        found[kind, int(vector or 1) * int(bits) // 8] += 1
    for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global[\w.:]* \[[^]]*\], *\[[^]]*\], *(\w+)", ptx):
        found["ld", int(size, 0)] += 1
    return found


def _resources(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])
