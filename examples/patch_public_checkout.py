"""fastvar's operators inside a checkout of FoundationVision/VAR, as it is or changed: the same logits, then images.

python examples/patch_public_checkout.py --checkout VAR --transformer var_d16.pth --tokenizer vae_ch160v4096z32.pth
"""

import sys
from pathlib import Path
from typing import Any

import torch
import tyro
from torchvision.utils import save_image

from fastvar.integrations import apply

SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


def build(checkout: Path, transformer: Path, tokenizer: Path, depth: int, device: str) -> Any:
    """The checkout's model, as its own demo makes it."""
    sys.path.insert(0, str(checkout))
    from models import build_vae_var  # of the checkout

    sizes = {"V": 4096, "Cvae": 32, "ch": 160, "share_quant_resi": 4, "num_classes": 1000, "shared_aln": False}
    vae, var = build_vae_var(device=device, patch_nums=SIDES, depth=depth, **sizes)
    vae.load_state_dict(torch.load(tokenizer, map_location=device))
    var.load_state_dict(torch.load(transformer, map_location=device))
    return var.eval()


@torch.no_grad()
def compare(var: Any, labels: torch.Tensor) -> float:
    """The largest difference between the logits of the model and of the model with fastvar's operators."""
    tokens = sum(side**2 for side in var.patch_nums)
    inputs = torch.randn(len(labels), tokens - 1, var.word_embed.in_features, device=labels.device)
    rate, var.cond_drop_rate = var.cond_drop_rate, 0  # else labels are dropped at random, in evaluation mode too
    before = var(labels, inputs)
    with apply(var) as applied:
        print(applied)  # what was replaced, what was not and why
        difference = (var(labels, inputs) - before).abs().max().item()
    var.cond_drop_rate = rate
    return difference


def main(
    checkout: Path,
    transformer: Path,
    tokenizer: Path,
    depth: int = 16,
    labels: tuple[int, ...] = (207, 388),
    output: Path = Path("patched.png"),
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    var = build(checkout, transformer, tokenizer, depth, device)
    classes = torch.tensor(labels, device=device)
    print(f"largest difference of logits {compare(var, classes):.1e}")
    apply(var)  # from here on; its `undo()` takes the operators out again
    images = var.autoregressive_infer_cfg(len(labels), classes, g_seed=0, cfg=4.0, top_k=900, top_p=0.95)
    save_image(images, output)


if __name__ == "__main__":
    tyro.cli(main)
