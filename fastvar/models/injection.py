"""The ways in which a reference subject is injected: which of its tokens the prefix has, and what sees what.

In all of them the subject's tokens see neither the image nor the prompt, so that a group of samples shares the prefix,
it can be kept for a subject, and forks refer to it.
"""

from __future__ import annotations

from typing import NamedTuple

from fastvar.schedule import ScaleSchedule

SUBJECTS = ("none", "block_causal", "bidirectional", "last_scale", "interleaved")


class Injection(NamedTuple):
    """What a kind of subject is on a schedule.

    "block_causal" and "bidirectional" prefill all scales: a token of the prefix sees the prefix's coarser scales and
    its own, or all of the prefix as one block. "last_scale" prefills the finest scale alone. "interleaved" is the
    sequence of scales subject 1, image 1, subject 2, image 2, ... in which scale k of the image sees the subject's
    scales up to k, and a subject's scale the subject's coarser ones and its own. It differs from the plain sequence in
    that a subject's scale does not see the image's coarser ones; otherwise nothing could be shared.

    Attributes:
        start: which of the subject's tokens is the first of the prefix; all after it belong to it.
        visible: how the prefix's tokens see each other.
        by_scale: whether the image's scale k sees the prefix's scales up to k, instead of the whole prefix.

    Source: DreamVAR (arXiv 2601.22507), which prefills, and compares the others with it. It leaves open whether the
        prefix is block-causal, and gives no masks.
    """

    start: int
    visible: ScaleSchedule
    by_scale: bool

    @classmethod
    def of(cls, subject: str, schedule: ScaleSchedule) -> Injection:
        """That of a kind out of SUBJECTS but "none", on the subject's grids."""
        whole, last = schedule.num_tokens, schedule.lengths[-1]
        if subject == "bidirectional":
            return cls(0, ScaleSchedule(((1, whole),)), False)
        if subject == "last_scale":
            return cls(whole - last, ScaleSchedule(((1, last),)), False)
        return cls(0, schedule, subject == "interleaved")
