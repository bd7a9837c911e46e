"""Steps of sampling that are not plain: masks, and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastvar.integrations import apply
from tests.helpers import public_hart, public_infinity, public_switti, public_var

POSITIONS, TURNS = torch.arange(3).expand(2, 3), public_infinity.rotations()
# attention, its width, and how it is called with tokens and a mask of scale k
FAMILIES: dict[str, tuple[Callable[[], Any], int, Callable[..., torch.Tensor]]] = {
    "VAR": (lambda: public_var.Attention(16, 2, True), 16, lambda a, x, mask, k: a(x, mask)),
    "Infinity": (
        public_infinity.Attention,
        public_infinity.WIDTH,
        lambda a, x, mask, k: a(x, mask, None, public_infinity.SIZES, TURNS, k),
    ),
    "HART": (lambda: public_hart.Attention(True), public_hart.WIDTH, lambda a, x, mask, k: a(x, mask, k, POSITIONS)),
    "Switti": (public_switti.ImageAttention, public_switti.WIDTH, lambda a, x, mask, k: a(x, mask)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_while_caching(family: str) -> None:
    """An image that begins with a mask is the former method's; one in the middle is an error."""
    torch.manual_seed(0)
    make, width, call = FAMILIES[family]
    attention = make().eval()
    first, second = (3 if family == "HART" else 1), 4
    steps = [torch.randn(2, tokens, width) for tokens in (first, second)]
    masks = [torch.zeros(1, 1, first, first), torch.randn(1, 1, second, first + second)]

    def image(masks: list[Any]) -> torch.Tensor:
        attention.kv_caching(True)
        found = [call(attention, x, mask, k) for k, (x, mask) in enumerate(zip(steps, masks, strict=True))]
        attention.kv_caching(False)
        return torch.cat(found, 1)

    with torch.no_grad():
        expected, plain = image(masks), image([None, None])
        with apply(attention, "attention"):
            assert torch.equal(image(masks), expected)
            with pytest.raises(RuntimeError, match="expected all steps of an image without mask and gradients"):
                image([None, masks[1]])
            with torch.enable_grad(), pytest.raises(RuntimeError, match="all steps of an image without mask"):
                call(attention, steps[1], None, 1)
            torch.testing.assert_close(image([None, None]), plain, atol=1e-5, rtol=1e-5)
            assert torch.equal(image([masks[0], None]), plain)  # is the former method's to its end
    assert not torch.equal(expected, plain)
