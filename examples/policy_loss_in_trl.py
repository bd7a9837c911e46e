"""TRL's GRPOTrainer with fastvar's policy loss, from hidden states and the head to gradients without logits in memory.

The numbers are those of TRL's `loss_type="bnpo"` with `use_bias_correction_kl=False`; other losses, such as its default
"dapo", raise an error, and so does what would change this one. A text is one scale; with the schedule of a next-scale
model the same lines weigh its scales (`panw_alpha`) as well. Compared with the trainer of TRL 1.16, which computes its
loss in `_compute_loss`: losses and gradients, by token and sequence, with a KL and several updates, were equal to
rounding. The head has to be a linear layer, without scaling or a soft cap. DDP wants `find_unused_parameters=False`.
"""

from typing import Any

import torch
import tyro

from fastvar import ScaleSchedule
from fastvar.ops import PolicyLossOptions, policy_loss


class FusedLoss:
    """To put before GRPOTrainer: `class Trainer(FusedLoss, GRPOTrainer)`."""

    def _compute_loss(self: Any, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        self._check(inputs)
        tokens, mask = inputs["completion_ids"], inputs["completion_mask"]  # (B, T)
        ids = torch.cat([inputs["prompt_ids"], tokens], 1)
        attention = torch.cat([inputs["prompt_mask"], mask], 1)
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        head.forward = lambda hidden: hidden  # the head of this object answers with what it is given
        try:
            hidden = model(input_ids=ids, attention_mask=attention, logits_to_keep=tokens.shape[1] + 1).logits[:, :-1]
        finally:
            del head.forward
        options = PolicyLossOptions(
            panw_alpha=0.0,
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
            ratio_level={"token": "token", "sequence": "sample"}[self.importance_sampling_level],
            kl_weight=self.beta,
            kl_estimator="k3",
        )
        out = policy_loss(
            (hidden, head.weight, head.bias),
            tokens,
            inputs["advantages"],
            ScaleSchedule([(1, tokens.shape[1])]),
            options,
            old_log_probs=inputs.get("old_per_token_logps"),
            reference_log_probs=inputs.get("ref_per_token_logps"),
            token_mask=mask.bool(),
            temperature=self.temperature,
        )
        mode = "train" if self.model.training else "eval"
        for name in ("kl", "entropy", "clip_fraction"):
            self._metrics[mode][name].append(getattr(out, name).item())
        return out.loss / (self.current_gradient_accumulation_steps if mode == "train" else 1)

    def _check(self: Any, inputs: dict[str, torch.Tensor]) -> None:
        """Raise a ValueError that names the settings by which TRL would compute another loss."""
        others = {
            "loss_type other than 'bnpo'": self.loss_type != "bnpo",
            "delta": self.args.delta is not None,
            "top_entropy_quantile": self.top_entropy_quantile != 1,
            "off_policy_mask_threshold": self.off_policy_mask_threshold is not None,
            "use_bias_correction_kl": self.beta != 0 and self.args.use_bias_correction_kl,
            "use_vllm": self.use_vllm,
            "tools": "tool_mask" in inputs,
            "entropy_coef": self.args.entropy_coef != 0 or self.args.use_adaptive_entropy,
            "router_aux_loss_coef": self.aux_loss_enabled,
        }
        if found := [name for name, is_set in others.items() if is_set]:
            raise ValueError(f"FusedLoss: expected the plain loss_type='bnpo', got {', '.join(found)}")


def main(model: str, output: str, steps: int = 100) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    class Trainer(FusedLoss, GRPOTrainer):
        pass

    def short(completions: list[str], **_: Any) -> list[float]:
        return [-float(len(text)) for text in completions]

    options = {"loss_type": "bnpo", "beta": 0.04, "use_bias_correction_kl": False, "report_to": "none"}
    options["ddp_find_unused_parameters"] = False  # the head's weights are used outside the forward pass
    config = GRPOConfig(output_dir=output, max_steps=steps, bf16=torch.cuda.is_available(), **options)
    prompts = Dataset.from_dict({"prompt": ["Say yes.", "Say no."] * 8})
    Trainer(model, reward_funcs=short, args=config, train_dataset=prompts).train()


if __name__ == "__main__":
    tyro.cli(main)
