"""Rollouts: images drawn from a policy, and which of their tokens are to be trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch

from fastvar.models import Model, SamplingOptions, SamplingState, state_after
from fastvar.random import derive
from fastvar.rl.adapters import as_reference
from fastvar.rl.prompts import Prompts, subject_of
from fastvar.rl.rows import taken
from fastvar.training.sharded import called

Segment = Literal["whole", "coarse", "fine"]


class Rollout(NamedTuple):
    """n drawn segments, those of a group adjacent; the rows `rows` of a whole batch of P groups of G.

    Attributes:
        prompts: n, one for each row.
        conditions: n, the prompts as the model takes them (`NextScaleModel.batches`), encoded once for rollout and
            update, which are to see the same.
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
    conditions: Any
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
    continue_with: Model | None = None,
    each_part: Callable[[torch.Tensor, Prompts], None] | None = None,
) -> Rollout:
    """Draw G segments for each prompt.

    "whole": images, trained from the first scale on: the rollout of plain GRPO. "coarse": the scales before `middle`,
    each continued `continuations` times to an image, from its cached state or by another model. "fine": the scales from
    `middle` on, the G of a prompt continuing one drawn coarse segment.

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
        continue_with: draws the continuations of a coarse segment, whose tokens then pass it too: the reference policy
            of the paper's value of a state. The model itself stands for itself without its adapters. None is the
            model as it is.
        each_part: called with the images of each part of `options.batch_size` rows when it is decoded, and their
            prompts, in the order of `Rollout.images`; what comes next is drawn after it returns.

    Raises:
        ValueError: a middle scale that the schedule does not have.
    """
    if segment != "whole" and not 1 <= middle < len(model.schedule):
        raise ValueError(f"roll_out: middle: expected 1 to {len(model.schedule) - 1}, got {middle}")
    rows = range(len(prompts) * group_size) if rows is None else rows
    artist = _Artist(model, prompts, rows, group_size, seed, options, continue_with)
    drawn: list[_Drawn] = []
    times = continuations if segment == "coarse" else 1

    def prompts_of(part: range) -> Prompts:
        return prompts.take([row // group_size for row in part])

    def keep(own: _Drawn, part: range) -> None:
        drawn.append(own)
        if each_part is not None and own.images is not None:
            each_part(own.images, prompts_of(part).repeated(times))

    if segment == "whole":
        for part in _chunks(rows, options.batch_size):
            keep(artist.start(part), part)
    elif segment == "coarse":
        for part in _chunks(rows, options.batch_size // continuations):
            coarse = artist.start(part, stop=middle)
            fine = artist.continuations_of(coarse, continuations, part)
            keep(coarse._replace(images=fine.images, state=None), part)
    else:
        for part in _whole_groups(rows, group_size, options.batch_size):
            groups = range(part.start // group_size, (part.stop - 1) // group_size + 1)
            coarse = artist.start(groups, stop=middle, rows_per_prompt=1)
            keep(artist.go_on(coarse, len(part) // len(groups), part.start), part)
    return Rollout(
        prompts_of(rows),
        artist.conditions_of(rows, group_size),
        torch.cat([d.tokens for d in drawn]),
        torch.cat([d.log_probs for d in drawn if d.log_probs is not None]),
        torch.cat([d.images for d in drawn if d.images is not None]),
        times,
        middle if segment == "fine" else 0,
        rows,
        group_size,
        None if artist.subject is None else taken(artist.subject, artist.owners(rows, group_size)),
        artist.passed_tokens,
    )


class _Drawn(NamedTuple):
    tokens: torch.Tensor
    log_probs: torch.Tensor | None  # None of a reference's continuations
    images: torch.Tensor | None
    state: SamplingState | None


class _Artist:
    """Draws parts of some rows of one rollout; of the prompts it reads those of these rows alone."""

    def __init__(
        self,
        model: Model,
        prompts: Prompts,
        rows: range,
        group_size: int,
        seed: int,
        options: SamplingOptions,
        reference: Model | None,
    ) -> None:
        self.model, self.reference, self.group_size = model, reference, group_size
        self.seed, self.options = seed, options
        self.first_prompt = rows.start // group_size
        own = prompts.take(range(self.first_prompt, -(-rows.stop // group_size)))
        [self.conditions] = model.batches(own.conditions, len(own))
        self.subject = subject_of(model, own)
        self.passed_tokens = 0

    def owners(self, rows: range, rows_per_prompt: int) -> list[int]:
        """Which of the prompts that were read each row belongs to."""
        return [row // rows_per_prompt - self.first_prompt for row in rows]

    def conditions_of(self, rows: range, rows_per_prompt: int) -> Any:
        return self.model.take(self.conditions, self.owners(rows, rows_per_prompt))

    def subjects_of(self, rows: range, rows_per_prompt: int) -> torch.Tensor | None:
        """One for each prompt where all its rows are there, else one for each row."""
        if self.subject is None:
            return None
        aligned = rows.start % rows_per_prompt == 0 and rows.stop % rows_per_prompt == 0
        return taken(self.subject, self.owners(rows[::rows_per_prompt] if aligned else rows, rows_per_prompt))

    def start(self, rows: range, *, stop: int | None = None, rows_per_prompt: int | None = None) -> _Drawn:
        """Rows from the first scale on; `rows_per_prompt` of them, G by default, belong to a prompt."""
        times = self.group_size if rows_per_prompt is None else rows_per_prompt
        conditions, subject = self.conditions_of(rows, times), self.subjects_of(rows, times)
        return self._draw(self.model, conditions, None, stop, self.seed, rows.start, subject)

    def go_on(self, drawn: _Drawn, times: int, first_row: int) -> _Drawn:
        """`times` continuations of every row, to the end; nothing of what they share is computed or kept twice."""
        assert drawn.state is not None
        return self._continue(self.model, drawn.state, times, first_row)

    def continuations_of(self, drawn: _Drawn, times: int, rows: range) -> _Drawn:
        """`times` continuations of rows of coarse segments, by the reference if there is one."""
        first_row, reference = rows.start * times, self.reference
        if reference is None:
            return self.go_on(drawn, times, first_row)
        with as_reference(reference, self.model):
            drawn_by_it: _Drawn = called(reference, self._continued_after, drawn.tokens, times, rows, first_row)
            return drawn_by_it

    def _continued_after(
        self, reference: Model, tokens: torch.Tensor, times: int, rows: range, first_row: int
    ) -> _Drawn:
        conditions, subject = self.conditions_of(rows, self.group_size), self.subjects_of(rows, self.group_size)
        guided = self.options.guides(reference)
        state = state_after(reference, conditions, tokens, subject=subject, guided=guided)
        self._count(reference, tokens, 0)
        return self._continue(reference, state, times, first_row)

    def _continue(self, model: Model, state: SamplingState, times: int, first_row: int) -> _Drawn:
        return self._draw(model, None, state.fork(times), None, derive(self.seed, "continuations"), first_row, None)

    def _draw(
        self,
        model: Model,
        conditions: Any,
        state: SamplingState | None,
        stop: int | None,
        seed: int,
        first_sample: int,
        subject: torch.Tensor | None,
    ) -> _Drawn:
        before = 0 if state is None else state.tokens.shape[1]
        out = model.generate(
            conditions,
            state=state,
            stop=stop,
            subject=subject,
            seed=seed,
            first_sample=first_sample,
            log_probs=state is None or state.log_probs is not None,
            decode=stop is None,
            **self.options.arguments(model),
        )
        self._count(model, out.tokens, before)
        return _Drawn(out.tokens, out.log_probs, out.images, out.state)

    def _count(self, model: Model, tokens: torch.Tensor, before: int) -> None:
        rows = len(tokens) * (2 if self.options.guides(model) else 1)
        self.passed_tokens += rows * (tokens.shape[1] - before)


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
