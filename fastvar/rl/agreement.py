"""Whether the policy that is trained is the one that was drawn from."""

from __future__ import annotations


def check_agreement(mean: float, largest: list[float], limit: float) -> dict[str, float]:
    """How much the log-probabilities of rollout and training differ, for the log.

    Args:
        mean: over the trained tokens.
        largest: of each scale.
        limit: what the mean may be, as rounding explains it.

    Raises:
        RuntimeError: more than the limit: another policy would be trained than was drawn from.
    """
    most = max(largest)
    if mean > limit:
        difference = f"{mean:.2g} on average (tolerance {limit:g}), {most:.2g} at scale {largest.index(most)}"
        raise RuntimeError(
            f"VMRGRPOTrainer: log-probabilities of rollout and training differ by {difference}: cached sampling and "
            "teacher forcing are not the same model (precision? dropout? a patched forward?)"
        )
    return {"rollout_difference": most, "rollout_difference_mean": mean}
