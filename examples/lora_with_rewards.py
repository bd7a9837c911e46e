"""Low-rank adapters on FoundationVision/Infinity's own weights, trained with weighted rewards on prompts from a file.

python examples/lora_with_rewards.py --transformer infinity_2b_reg.pth --tokenizer infinity_vae_d32reg.pth
    --text-encoder google/flan-t5-xl --hpsv2 HPS_v2.1_compressed.pt --prompts prompts.txt --output runs/lora

Only the adapters have gradients; the policy that the KL refers to is the model without them. What is saved is a plain
model. `fastvar rl --adapter-rank` is the same with all settings.
"""

from pathlib import Path

import tyro

from fastvar.data import read_prompts
from fastvar.models import load_infinity, load_text_encoder
from fastvar.ops import PolicyLossOptions
from fastvar.rl import Prompts, RLConfig, VMRGRPOTrainer, add_adapters
from fastvar.rl.rewards import RewardSum, create


def main(
    transformer: Path,
    tokenizer: Path,
    text_encoder: str,
    hpsv2: Path,
    prompts: Path,
    output: Path,
    clip: str = "openai",
    grids: tuple[int, ...] | None = None,
    iterations: int = 100,
    group_size: int = 8,
) -> None:
    # before the models, which take long to load; each with its weights, and what it counts
    rewards = {"hpsv2": create("hpsv2", checkpoint=hpsv2), "clip-t": create("clip-t", pretrained=clip)}
    scored = RewardSum(rewards, {"hpsv2": 1.0, "clip-t": 0.5})
    encoder = load_text_encoder(text_encoder)
    net, _ = load_infinity(transformer, tokenizer, grids=grids, text_encoder=encoder)  # 1024 x 1024 without grids
    net = add_adapters(net.float(), rank=32)
    config = RLConfig(
        iterations=iterations,
        prompts=2,
        group_size=group_size,
        middle=1,  # scales before it are the coarse segment; `fastvar choose-middle` finds it
        learning_rate=1e-4,
        loss=PolicyLossOptions(panw_alpha=0.6, kl_weight=0.01),
    )
    texts = Prompts([each.prompt for each in read_prompts(prompts)])
    VMRGRPOTrainer(net, scored, texts, config, output).train()


if __name__ == "__main__":
    tyro.cli(main)
