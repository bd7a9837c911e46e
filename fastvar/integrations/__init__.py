"""fastvar inside code that people already have: `apply` puts the operators into a VAR, Infinity, HART or Switti of the
public code or of a fork, `shims` stand in for attention packages that are not there."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvar.integrations.patching import PARTS, Applied, apply, undo

__all__ = ["PARTS", "Applied", "apply", "undo"]


def __getattr__(name: str) -> Any:
    # On first use: a process that only wants the shims need not wait for torch.
    if name in __all__:
        from fastvar.integrations import patching

        return getattr(patching, name)
    raise AttributeError(f"module 'fastvar.integrations' has no attribute {name!r}")
