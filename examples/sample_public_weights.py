"""Images of classes from FoundationVision/VAR's own files, such as var_d16.pth and vae_ch160v4096z32.pth."""

from pathlib import Path

import torch
import tyro

from fastvar.models import load_var


def main(
    transformer: Path, tokenizer: Path, labels: tuple[int, ...] = (207, 388), output: Path = Path("samples.png")
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    var, _ = load_var(transformer, tokenizer)  # shapes are read off the files
    var.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    drawn = var.generate(torch.tensor(labels, device=device), guidance=1.5, top_k=900, top_p=0.96, seed=0)
    drawn.picture().save(output)


if __name__ == "__main__":
    tyro.cli(main)
