"""Modules under the names of attention packages that are not there, for code that imports them without need.

They are found last of all: a package that is installed is never hidden. What they hold is in
`fastvar.integrations.attention`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

_FLASH = ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_varlen_kvpacked_func")
# Modules, and of each name in them the function of `attention` that it stands for.
_MODULES: dict[str, dict[str, str]] = {
    "flash_attn": {name: name for name in _FLASH},
    "flash_attn.flash_attn_interface": {name: name for name in _FLASH},
    "flash_attn.ops": {},
    "flash_attn.ops.rms_norm": {"rms_norm": "rms_norm", "dropout_add_rms_norm": "not_there"},
    "flash_attn.ops.layer_norm": {"dropout_add_layer_norm": "not_there"},
    "flash_attn.ops.fused_dense": {"fused_mlp_func": "fused_mlp_func"},
    "xformers": {},
    "xformers.ops": {"memory_efficient_attention": "memory_efficient_attention"},
    # HART's own extension
    "hart_backend": {},
    "hart_backend.fused_kernels": {
        "rms_norm": "rms_norm_into",
        "fused_rope_forward_func": "not_there",
        "fused_rope_backward_func": "not_there",
        "fused_rope_with_pos_forward_func": "not_there",
    },
}
PACKAGES = ("flash_attn", "xformers", "hart_backend")


class _Finder:
    """At the end of `sys.meta_path`: asked for what nobody else has found."""

    def __init__(self) -> None:
        self.packages: set[str] = set()

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        package, _, inner = name.partition(".")
        if name not in _MODULES or package not in self.packages:
            return None
        if inner and not _is_ours(sys.modules.get(package)):  # a part that the package itself lacks
            return None
        return ModuleSpec(name, self, origin="fastvar", is_package=True)  # type: ignore[arg-type]  # is a loader

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Fill a module with its functions."""
        for name, function in _MODULES[module.__name__].items():
            setattr(module, name, resolve_name(f"fastvar.integrations.attention:{function}"))


_FINDER = _Finder()


def install(*packages: str) -> bool:
    """Let imports of packages find stand-ins from now on, where no package of the name is there.

    Args:
        packages: some of `PACKAGES`: "flash_attn", "xformers", "hart_backend" (HART's extension).

    Returns:
        whether all of them are stand-ins; False if one is installed itself, which is then what is imported.

    Raises:
        ValueError: another name.
    """
    unknown = [name for name in packages if name not in PACKAGES]
    if unknown:
        expected = ", ".join(PACKAGES)
        raise ValueError(f"shims.install: packages: expected some of {expected}, got {', '.join(unknown)}")
    _FINDER.packages |= set(packages)
    if _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)
    return all(_is_ours(find_spec(name)) for name in packages)


def uninstall() -> None:
    """Take all stand-ins away, from `sys.modules` too; what has imported from them keeps it."""
    _FINDER.packages.clear()
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
    for name in _MODULES:
        if _is_ours(sys.modules.get(name)):
            del sys.modules[name]


@contextmanager
def startup(*packages: str) -> Iterator[Path]:
    """A folder by which, on PYTHONPATH, every process that starts below has the stand-ins."""
    # Python imports this module when it starts; one that it hides takes its place afterwards.
    code = f"""
import sys
here = __file__.rpartition("/")[0]
sys.path = [place for place in sys.path if place != here]
from fastvar.integrations import shims
shims.install(*{packages!r})
this = sys.modules.pop("sitecustomize")
try:
    import sitecustomize
except ImportError:
    sys.modules["sitecustomize"] = this
"""
    with TemporaryDirectory(prefix="fastvar_shims_") as folder:
        (Path(folder) / "sitecustomize.py").write_text(code)
        yield Path(folder)


def _is_ours(found: ModuleType | ModuleSpec | None) -> bool:
    """Whether a module, or the spec of one, is a stand-in."""
    spec = found.__spec__ if isinstance(found, ModuleType) else found
    return spec is not None and spec.loader is _FINDER
