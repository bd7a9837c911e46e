"""Autograd inside an operator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality


@contextmanager
def recording() -> Iterator[None]:
    """Autograd records what happens inside, even where PyTorch is done with it: in an op that a dispatch mode or a
    compiled graph calls."""
    excluded = torch._C._dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD)
    torch._C._dispatch_tls_set_dispatch_key_excluded(_AUTOGRAD, False)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(_AUTOGRAD, excluded)
