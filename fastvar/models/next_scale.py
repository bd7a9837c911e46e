"""What sampling, evaluation and reinforcement learning need of a next-scale model, and what such models share.

`NextScaleModel` is the one protocol: whoever draws, evaluates or learns from rewards asks a model for nothing else.
Training has a task for each kind of model. A model says what its prompts, positions, tokens and guidance are; its two
streams, its way through the blocks and its subject's prefix are the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import torch
from torch import nn

from fastvar.models.injection import SUBJECTS, Injection
from fastvar.models.kv_cache import KVCache
from fastvar.models.scale_tokenizer import ScaleTokenizer
from fastvar.models.text import TextKV
from fastvar.models.var_block import Block, Modulations, Rope, attend_to_cache, attend_to_scales
from fastvar.models.with_tokenizer import WithTokenizer
from fastvar.ops import PrefixKV, SampledTokens, adaptive_layer_norm, gated_residual_norm
from fastvar.ops.token_log_probs import Head
from fastvar.ranges import Range
from fastvar.schedule import ScaleSchedule

Tokenizer = TypeVar("Tokenizer", bound=ScaleTokenizer)


class Positions(NamedTuple):
    """What tokens are told of their place.

    Attributes:
        added: (n, C), to the start of the residual stream.
        rope: rotary tables of n rows, or None.
    """

    added: torch.Tensor
    rope: Rope | None

    def rope_of(self, start: int, end: int) -> Rope | None:
        """The tables of tokens start : end."""
        return None if self.rope is None else (self.rope[0][start:end], self.rope[1][start:end])


class Mixture(NamedTuple):
    """Guidance on hidden states: after a block both halves of the rows become guidance conditional + (1 - guidance)
    unconditional, and the blocks after it run on that alone."""

    after: int
    guidance: float

    def of(self, x: torch.Tensor) -> torch.Tensor:
        conditional, unconditional = x.chunk(2)
        if self.guidance == 1:
            return conditional
        return self.guidance * conditional + (1 - self.guidance) * unconditional


class NextScaleModel(WithTokenizer[Tokenizer]):
    """A transformer over the scales of a `ScaleTokenizer`.

    The image stream (B rows) and the prefix stream of the reference subjects (B / G rows) pass the same layers; only
    attention joins them, so a group's prefix is computed once. The prefix sees neither the image nor the condition,
    hence it can be kept for a subject whatever the prompt.

    A subclass has a `config` with depth, widths, rates of dropout and the kind of `subject`, a `schedule`, `blocks` and
    a `head`, and `subject_embed` (C,) if its config has a subject. It answers `generate`, `hidden` and `forward`, whose
    arguments are its own, and what raises NotImplementedError here.
    """

    no_guidance: ClassVar[float]
    """The guidance that is none: with it on all scales no unconditional rows are computed."""
    guidance_range: ClassVar[Range]
    """What guidance may be; it is less `no_guidance` what the operators count."""
    schedule: ScaleSchedule
    blocks: Sequence[Block]
    head: nn.Linear
    head_modulation: nn.Linear
    subject_embed: nn.Parameter
    generate: Callable[..., Any]
    """Prompts to a `fastvar.models.Generation`; see the model's own for its arguments."""

    @torch.no_grad()
    def _initialise(self, embeddings: Iterable[torch.Tensor]) -> None:
        """Start values of a new model, as VAR has them."""
        config, std = self.config, (3 * self.config.embed_dim) ** -0.5
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for parameter in embeddings:
            nn.init.trunc_normal_(parameter, std=std)
        self.head.weight.mul_(0.02)
        self.head_modulation.weight.mul_(0.5)
        for block in self.blocks:
            block.proj.weight.div_(math.sqrt(2 * config.depth))
            block.mlp_out.weight.div_(math.sqrt(2 * config.depth))
            # gates start small, scales and shifts at half
            rows = block.modulation_table if config.shared_adaln else block.modulation.weight.unflatten(0, (6, -1))
            rows[:2].mul_(1e-3)
            rows[2:].mul_(0.5)
            start = block.modulation_table if config.shared_adaln else block.modulation.bias.unflatten(0, (6, -1))
            start[:2].add_(config.gate_init)

    # -- what a model says of itself ---------------------------------------------------------------------------------

    def encode(self, prompts: Any, against: Any = None) -> Any:
        """Prompts, and those to keep away from, checked and on the model's device: tensors in tuples.

        Raises:
            ValueError: prompts of another kind than the model's, `against` of another number.
        """
        raise NotImplementedError

    def count(self, encoded: Any) -> int:
        """B, of encoded prompts."""
        raise NotImplementedError

    def keep_texts(self) -> None:
        """Let the model remember what it reads of texts, for a caller who asks about the same ones again; nothing where
        reading them takes no time."""

    def batches(self, prompts: Any, size: int) -> list[Any]:
        """Prompts in batches of at most `size`, each as `generate` and `hidden` take them; all are checked. None of no
        prompts."""
        raise NotImplementedError

    def take(self, batch: Any, rows: Sequence[int]) -> Any:
        """These rows of a batch that `batches` answered, in this order; one may come several times."""
        raise NotImplementedError

    def begin(self, encoded: Any, *, guided: bool) -> tuple[torch.Tensor, Modulations]:
        """The conditions (R, ...) from which images start, and what they tell the blocks; they do not change over
        scales. R = B, or 2 B with guidance: conditional rows, then unconditional."""
        raise NotImplementedError

    def token_positions(self, schedule: ScaleSchedule) -> Positions:
        """Those of all tokens of a schedule."""
        raise NotImplementedError

    def embed(
        self, condition: torch.Tensor, inputs: torch.Tensor | None, start: int, positions: torch.Tensor
    ) -> torch.Tensor:
        """The start of the residual stream (B, n, C) for tokens start : start + n.

        Args:
            condition: (B, ...) as `begin` answers it; the first scale's tokens start from it.
            inputs: (B, n, c), without the first scale's tokens if `start` is 0; None for none.
            start: index of the first token.
            positions: (L', C), `Positions.added` of all tokens.
        """
        raise NotImplementedError

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, n, C) to logits: of classes (B, n, V), or of bits (B, n, d)."""
        raise NotImplementedError

    def scored(self, hidden: torch.Tensor) -> Head:
        """What log-probabilities and losses of tokens are computed from: hidden states (B, n, C) and the head, or the
        logits. They are the ones that tokens are drawn from, under autocast too."""
        raise NotImplementedError

    def empty_tokens(self, batch: int) -> torch.Tensor:
        """(B, 0) or (B, 0, d), in the dtype of tokens."""
        raise NotImplementedError

    def sample(self, logits: torch.Tensor, **options: Any) -> SampledTokens:
        """Tokens drawn from logits; options as `fastvar.ops.sample_tokens`."""
        raise NotImplementedError

    def hidden(self, prompts: Any, inputs: torch.Tensor, *, subject: torch.Tensor | None = None) -> torch.Tensor:
        """The normalised hidden states before the head (B, L', C) under teacher forcing."""
        raise NotImplementedError

    def forward(self, prompts: Any, inputs: torch.Tensor, *, subject: torch.Tensor | None = None) -> Any:
        """Logits of every token given the true coarser scales."""
        raise NotImplementedError

    def _codes(self, inputs: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _subject_modulations(self, rows: int) -> Modulations:
        raise NotImplementedError

    # -- the way through the blocks ----------------------------------------------------------------------------------

    def through(
        self,
        x: torch.Tensor,
        modulations: Modulations,
        schedule: ScaleSchedule,
        *,
        rope: Rope | None = None,
        prefix: list[PrefixKV] | None = None,
    ) -> torch.Tensor:
        """Teacher forcing: the start of the image stream (B, L', C) to the hidden states before the head."""
        by_scale = self.injection(schedule).by_scale
        for i, (block, told) in enumerate(zip(self.blocks, modulations.by_block(), strict=True)):
            modulation, bias, text = told
            attend = attend_to_scales(schedule, None if prefix is None else prefix[i], rope=rope, by_scale=by_scale)
            x = self._run(block, x, modulation, attend, bias, text)
        return self.before_head(x, modulations)

    def sample_scale(
        self,
        x: torch.Tensor,
        modulations: Modulations,
        cache: KVCache,
        *,
        position: int,
        end: int,
        rope: Rope | None = None,
        mixture: Mixture | None = None,
        prefix_tokens: int | None = None,
    ) -> torch.Tensor:
        """One scale of sampling: (R, n, C) embedded inputs to normalised hidden states, keys and values cached.

        Args:
            x: from `embed`.
            modulations: of the condition.
            cache: receives the scale's keys and values.
            position, end: where in the cache's own rows the scale starts and ends.
            rope: of the scale's tokens.
            mixture: guidance on hidden states.
            prefix_tokens: how many of the prefix's tokens the scale sees; None for all.

        Returns:
            (R, n, C), or with a mixture (R / 2, n, C).
        """
        eps, told, (gates, norms) = self.config.norm_eps, modulations, modulations.gates_and_norms()
        h = adaptive_layer_norm(x, *norms[0], eps=eps)
        for i, block in enumerate(self.blocks):
            modulation, bias = told.blocks[i], told.biases[i]
            text = told.texts[i] if told.texts else None
            attend = attend_to_cache(cache, i, len(x), position, end, rope, prefix_tokens)
            x, h = block.mix(x, h, modulation, attend, bias, text)
            x, h = gated_residual_norm(x, h, gates[i], *norms[i + 1], eps=eps)
            if mixture is not None and i == mixture.after:  # nothing of unconditional rows reaches the tokens any more
                x = mixture.of(x)
                told = modulations.map(lambda rows: rows[: len(rows) // 2])
                gates, norms = told.gates_and_norms()
                h = adaptive_layer_norm(x, *norms[i + 1], eps=eps)
        cache.length = end
        return h

    def before_head(self, x: torch.Tensor, modulations: Modulations) -> torch.Tensor:
        scale, shift = modulations.head.unbind(1)
        return adaptive_layer_norm(x, scale, shift, eps=self.config.norm_eps)

    # -- the subject's prefix ----------------------------------------------------------------------------------------

    def injection(self, schedule: ScaleSchedule) -> Injection:
        """How a subject of these grids is injected."""
        return Injection.of(self.config.subject, schedule)

    @torch.no_grad()
    def pyramid(self, tokens: torch.Tensor, *, schedule: ScaleSchedule | None = None) -> torch.Tensor:
        """Tokens of reference subjects to what `generate`, `hidden` and `forward` take as `subject`, (R, L, c): the
        complete feature map at every grid, or if the config says so the codes of each scale's own tokens. Of a kind
        that reads fewer scales it has all of them too."""
        if self.config.subject_own_tokens:
            return self.tokenizer.codes(tokens)
        return self.tokenizer.pyramid(tokens, schedule=schedule)

    def prefill(
        self, subject: torch.Tensor, keep: torch.Tensor | None = None, *, schedule: ScaleSchedule | None = None
    ) -> list[PrefixKV]:
        """Keys and values of every layer for reference subjects; they depend on the subject alone.

        Args:
            subject: (R, L, c), `pyramid` of the subjects' tokens.
            keep: (R,) bool, False where the subject is dropped; None keeps all.
            schedule: the subject's grids; the config's by default.

        Returns:
            per layer a `PrefixKV` (R, P, H, D), P = L but for subjects of fewer scales.

        Raises:
            ValueError: a model without subject prefix, a wrong shape.
        """
        x, visible, rope = self._subject_stream(subject, schedule)
        lengths = None if keep is None else keep.to(torch.int32) * visible.num_tokens
        prefix = []
        told = self._subject_modulations(len(subject))
        for i, (block, (modulation, bias, text)) in enumerate(zip(self.blocks, told.by_block(), strict=True)):
            if i + 1 < len(self.blocks):
                x, k, v = self._run(partial(_prefill_block, block, visible, rope), x, modulation, bias, text)
            else:
                k, v, _ = block.keys_and_values(x, modulation, bias, rope)
            if self.gradient_checkpointing or not torch.is_grad_enabled():
                # slices would keep the memory of the whole projection, of which nothing else is needed
                k, v = k.contiguous(), v.contiguous()
            prefix.append(PrefixKV(k, v, lengths))
        return prefix

    def _subject_stream(
        self, subject: torch.Tensor, schedule: ScaleSchedule | None = None
    ) -> tuple[torch.Tensor, ScaleSchedule, Rope | None]:
        """The start of the residual stream (R, P, C), how tokens see each other and their rotary tables. A subject's
        tokens have the positions of their own grids, as the image's have."""
        schedule, name = schedule or self.schedule, type(self).__name__
        if self.config.subject == "none":
            raise ValueError(
                f"{name}: subject: this model has no subject prefix; see {name}Config.subject and add_subject"
            )
        shape = tuple(subject.shape) if isinstance(subject, torch.Tensor) else type(subject).__name__
        expected = (schedule.num_tokens, self.config.code_channels)
        if len(shape) != 3 or shape[1:] != expected:
            raise ValueError(f"{name}: subject: expected (R, {expected[0]}, {expected[1]}), got {shape}")
        positions, (start, visible, _) = self.token_positions(schedule), self.injection(schedule)
        x = self._codes(subject[:, start:]) + positions.added[start:] + self.subject_embed
        return x, visible, positions.rope_of(start, schedule.num_tokens)

    def add_subject(self, subject: str = "block_causal", *, own_tokens: bool = False) -> Self:
        """A copy of this model with a subject prefix, for fine-tuning; everything else keeps its weights.

        Args:
            subject: the kind, see `VARConfig.subject`.
            own_tokens: see `VARConfig.subject_own_tokens`.

        Raises:
            ValueError: another kind of subject.
        """
        name = type(self).__name__
        if subject == "none":
            raise ValueError(f'{name}.add_subject: subject: expected one of {SUBJECTS[1:]}, got "none"')
        config = replace(self.config, subject=subject, subject_own_tokens=own_tokens)
        model = type(self)(config).to(self.device, self.head.weight.dtype)
        model._share(self)
        own = model.state_dict()
        own.update(self.state_dict())
        model.load_state_dict(own)
        if self.config.subject == "none":
            model._start_subject()
        model.gradient_checkpointing = self.gradient_checkpointing
        return model.train(self.training)

    def _start_subject(self) -> None:
        """Set the subjects' condition to the one that says nothing."""
        raise NotImplementedError

    def check_subject(self, owner: str, subject: torch.Tensor, batch: int) -> None:
        """Raise a ValueError unless the subjects' rows can be shared evenly by those of a batch."""
        if (subject.shape[0] == 0) != (batch == 0) or (batch and batch % subject.shape[0]):
            raise ValueError(
                f"{owner}: subject: expected a number of rows that divides {batch}, got {subject.shape[0]}"
            )

    def _dropped(self, batch: int, subject: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """In training, at the config's rates: which subjects (B / G,) are kept, and which conditions (B,) dropped."""
        if not self.training:
            return None, None
        rate: torch.Tensor | float = self.config.condition_dropout
        keep = None
        if subject is not None:
            keep = torch.rand(subject.shape[0], device=self.device) >= self.config.subject_dropout
            # Guidance contrasts with neither subject nor condition: half of the groups without a subject train that
            group = batch // max(subject.shape[0], 1)
            rate = torch.where(keep, rate, max(rate, 0.5)).repeat_interleave(group)
        return keep, torch.rand(batch, device=self.device) < rate

    def _teacher_forced(self, inputs: torch.Tensor, schedule: ScaleSchedule) -> ScaleSchedule:
        """The scales of a schedule that teacher-forcing inputs are for."""
        first, ends, channels = schedule.lengths[0], schedule.ends, self.config.code_channels
        shape = tuple(inputs.shape) if isinstance(inputs, torch.Tensor) else type(inputs).__name__
        if len(shape) != 3 or shape[2] != channels or first + inputs.shape[1] not in ends:
            lengths = ", ".join(str(end - first) for end in ends)
            raise ValueError(
                f"{type(self).__name__}: inputs: expected (B, n, {channels}) with n one of {lengths}, got {shape}"
            )
        return schedule.with_num_tokens(first + inputs.shape[1])


def _prefill_block(
    block: Block,
    schedule: ScaleSchedule,
    rope: Rope | None,
    x: torch.Tensor,
    modulation: torch.Tensor,
    bias: torch.Tensor,
    text: TextKV | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A block's output (B, L, C), and the keys and values (B, L, H, D) that other streams see of its input."""
    seen: list[PrefixKV] = []
    x = block(x, modulation, attend_to_scales(schedule, seen=seen, rope=rope), bias, text)
    return x, seen[0].k, seen[0].v


Model = NextScaleModel[Any]  # one of any tokenizer
