"""Rollouts: images drawn from a policy, and which of their tokens are to be trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch

from fastvar.models import Model, SamplingOptions, SamplingState
from fastvar.random import derive
from fastvar.rl.prompts import Prompts, subject_of
from fastvar.rl.rows import taken

Segment = Literal["whole", "coarse", "fine"]


class Rollout(NamedTuple):
    """n drawn segments, those of a group adjacent; the rows `rows` of a whole batch of P groups of G.

    Attributes:
        prompts: n, one for each row.
        tokens: (n, L') int64, or bits (n, L', d) bool, from the first scale on to the end of the segment.
        log_probs: (n, L') float32, of the tokens when they were drawn, under the model itself.
        images: (n K, 3, H, W) in [0, 1], the K continuations of a segment adjacent; K = 1 but for coarse segments.
        continuations: K.
        first_scale: scales before it are not trained.
        rows: which rows of the whole batch these are.
        group_size: G.
        subject: (n, L, C) pyramids of the rows' references, or None.
        passed_tokens: how many tokens passed the network.
    """

    prompts: Prompts
    tokens: torch.Tensor
    log_probs: torch.Tensor
    images: torch.Tensor
    continuations: int
    first_scale: int
    rows: range
    group_size: int
    subject: torch.Tensor | None
    passed_tokens: int


@torch.no_grad()
def roll_out(
    model: Model,
    prompts: Prompts,
    *,
    segment: Segment = "whole",
    group_size: int,
    middle: int = 0,
    continuations: int = 1,
    seed: int,
    options: SamplingOptions,
    rows: range | None = None,
) -> Rollout:
    """Draw G segments for each prompt.

    "whole": images, trained from the first scale on: the rollout of plain GRPO. "coarse": the scales before `middle`,
    each continued `continuations` times to an image from its cached state. "fine": the scales from `middle` on, the G
    of a prompt continuing one drawn coarse segment.

    Args:
        model: the policy, in evaluation mode.
        prompts: P, one per group.
        segment: what to draw.
        group_size: G.
        middle: m, 1 to K - 1; not read by "whole".
        continuations: K of a coarse segment.
        seed: of this rollout.
        options: how to draw.
        rows: the rows of the batch of P G that are wanted, all by default. A row does not depend on which others are
            drawn with it, so several processes may share a rollout.

    Raises:
        ValueError: a middle scale that the schedule does not have.
    """
    if segment != "whole" and not 1 <= middle < len(model.schedule):
        raise ValueError(f"roll_out: middle: expected 1 to {len(model.schedule) - 1}, got {middle}")
    rows = range(len(prompts) * group_size) if rows is None else rows
    artist = _Artist(model, prompts, group_size, seed, options)
    drawn: list[_Drawn] = []
    if segment == "whole":
        drawn = [artist.start(part) for part in _chunks(rows, options.batch_size)]
    elif segment == "coarse":
        for part in _chunks(rows, options.batch_size // continuations):
            coarse = artist.start(part, stop=middle)
            fine = artist.go_on(coarse, continuations, part.start * continuations)
            drawn.append(coarse._replace(images=fine.images, state=None))
    else:
        for part in _whole_groups(rows, group_size, options.batch_size):
            groups = range(part.start // group_size, (part.stop - 1) // group_size + 1)
            coarse = artist.start(groups, stop=middle, rows_per_prompt=1)
            drawn.append(artist.go_on(coarse, len(part) // len(groups), part.start))
    return Rollout(
        artist.prompts_of(rows, group_size),
        torch.cat([d.tokens for d in drawn]),
        torch.cat([d.log_probs for d in drawn]),
        torch.cat([d.images for d in drawn if d.images is not None]),
        continuations if segment == "coarse" else 1,
        middle if segment == "fine" else 0,
        rows,
        group_size,
        None if artist.subject is None else taken(artist.subject, [row // group_size for row in rows]),
        artist.passed_tokens,
    )


class _Drawn(NamedTuple):
    tokens: torch.Tensor
    log_probs: torch.Tensor
    images: torch.Tensor | None
    state: SamplingState | None


class _Artist:
    """Draws parts of one rollout."""

    def __init__(self, model: Model, prompts: Prompts, group_size: int, seed: int, options: SamplingOptions) -> None:
        self.model, self.prompts, self.group_size, self.seed, self.options = model, prompts, group_size, seed, options
        self.subject = subject_of(model, prompts)
        self.passed_tokens = 0

    def prompts_of(self, rows: range, rows_per_prompt: int) -> Prompts:
        return self.prompts.take([row // rows_per_prompt for row in rows])

    def start(self, rows: range, *, stop: int | None = None, rows_per_prompt: int | None = None) -> _Drawn:
        """Rows from the first scale on; `rows_per_prompt` of them, G by default, belong to a prompt."""
        times = self.group_size if rows_per_prompt is None else rows_per_prompt
        labels = self.prompts_of(rows, times).conditions
        subject = None
        if self.subject is not None:
            aligned = rows.start % times == 0 and rows.stop % times == 0
            owners = [row // times for row in (rows[::times] if aligned else rows)]
            subject = taken(self.subject, owners)
        return self._draw(labels, None, stop, self.seed, rows.start, subject)

    def go_on(self, drawn: _Drawn, times: int, first_row: int) -> _Drawn:
        """`times` continuations of every row, to the end; nothing of what they share is computed or kept twice."""
        assert drawn.state is not None
        return self._draw(None, drawn.state.fork(times), None, derive(self.seed, "continuations"), first_row, None)

    def _draw(
        self,
        labels: object,
        state: SamplingState | None,
        stop: int | None,
        seed: int,
        first_sample: int,
        subject: torch.Tensor | None,
    ) -> _Drawn:
        options = self.options
        before = 0 if state is None else state.tokens.shape[1]
        out = self.model.generate(
            labels,
            state=state,
            stop=stop,
            subject=subject,
            seed=seed,
            first_sample=first_sample,
            log_probs=True,
            decode=stop is None,
            **options.arguments(self.model),
        )
        rows = len(out.tokens) * (1 if options.guidance_of(self.model) == self.model.no_guidance else 2)
        self.passed_tokens += rows * (out.tokens.shape[1] - before)
        assert out.log_probs is not None  # they were asked for
        return _Drawn(out.tokens, out.log_probs, out.images, out.state)


def _chunks(rows: range, size: int) -> Iterator[range]:
    size = max(size, 1)
    for start in range(rows.start, rows.stop, size):
        yield range(start, min(start + size, rows.stop))


def _whole_groups(rows: range, group_size: int, size: int) -> Iterator[range]:
    """Parts of whole groups, about `size` rows each, and a part of its own for a group that is cut at either end; parts
    of groups if a group is larger."""
    if size < group_size:
        for start in range(rows.start // group_size * group_size, rows.stop, group_size):
            yield from _chunks(range(max(start, rows.start), min(start + group_size, rows.stop)), size)
        return
    first = min(-(-rows.start // group_size) * group_size, rows.stop)
    last = max(rows.stop // group_size * group_size, first)
    if rows.start < first:
        yield range(rows.start, first)
    yield from _chunks(range(first, last), max(size // group_size, 1) * group_size)
    if last < rows.stop:
        yield range(last, rows.stop)
