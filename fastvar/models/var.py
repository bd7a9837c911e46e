"""The VAR transformer: next-scale prediction of visual tokens, optionally after the prefix of a reference subject."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from fastvar.models.kv_cache import KVCache
from fastvar.models.linear import Linear
from fastvar.models.sampling import generate
from fastvar.models.var_block import (
    Block,
    Modulations,
    attend_in_two_streams,
    attend_to_cache,
    attend_to_scales,
)
from fastvar.models.var_config import VARConfig
from fastvar.models.vq_tokenizer import VQTokenizer
from fastvar.models.with_tokenizer import WithTokenizer
from fastvar.ops import (
    CrossEntropy,
    PrefixKV,
    TokenLogProbs,
    adaptive_layer_norm,
    cross_entropy,
    gated_residual_norm,
    token_log_probs,
)
from fastvar.schedule import ScaleSchedule

Labels = torch.Tensor | Sequence[str]


def _prefill_block(
    block: Block, schedule: ScaleSchedule, x: torch.Tensor, modulation: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A block's output (B, L, C), and the keys and values (B, L, H, D) that other streams see of its input."""
    seen: list[PrefixKV] = []
    x = block(x, modulation, attend_to_scales(schedule, seen=seen), bias)
    return x, seen[0].k, seen[0].v


class VAR(WithTokenizer[VQTokenizer]):
    """Next-scale prediction over the tokens of a `VQTokenizer`.

    The image stream (B rows) and the prefix stream of the reference subjects (B / G rows) pass the same layers; only
    attention joins them, so a group's prefix is computed once. The prefix sees neither the image nor the condition,
    hence it can be kept for a subject whatever the prompt.

    Args:
        config: the shape.
        tokenizer: needed by `generate` alone. It is not a submodule: it has no part in this module's parameters and
            state dict, but follows its device.
    """

    config_class = VARConfig
    tokenizer_class = VQTokenizer
    agreed = ("grids", "vocab_size", "code_channels")
    config: VARConfig
    blocks: Sequence[Block]
    scale_index: torch.Tensor

    def __init__(self, config: VARConfig, tokenizer: VQTokenizer | None = None) -> None:
        super().__init__()
        self.config = config
        self.schedule = config.schedule
        width, std = config.embed_dim, (3 * config.embed_dim) ** -0.5
        self.code_embed = Linear(config.code_channels, width)
        if config.text_length:
            self.text_embed = nn.Parameter(torch.empty(config.text_length, len(config.alphabet) + 1, width))
            self.text_mix = nn.Parameter(torch.zeros(self.schedule.num_tokens, config.text_length))
            self.null_condition = nn.Parameter(torch.empty(1 + config.text_length, width))
        else:
            self.class_embed = nn.Embedding(config.num_classes + 1, width)  # the last one is "no condition"
        self.start_embed = nn.Parameter(torch.empty(self.schedule.lengths[0], width))
        self.position_embed = nn.Parameter(torch.empty(self.schedule.num_tokens, width))
        self.scale_embed = nn.Embedding(len(self.schedule), width)
        if config.subject != "none":
            self.subject_embed = nn.Parameter(torch.empty(width))
            self.subject_condition = nn.Parameter(torch.empty(width))
        self.shared_modulation = Linear(width, 6 * width) if config.shared_adaln else None
        drop_path = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, p) for p in drop_path)  # type: ignore[assignment]  # not generic
        self.head_modulation = Linear(width, 2 * width)
        self.head = Linear(width, config.vocab_size)
        self.register_buffer("scale_index", torch.tensor(self.schedule.scale_of_token), persistent=False)
        self._initialise(std)
        self._attach(tokenizer)

    @torch.no_grad()
    def _initialise(self, std: float) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith("_condition") or ("embed" in name and not name.endswith("bias")):
                nn.init.trunc_normal_(parameter, std=std)
        self.head.weight.mul_(0.02)
        self.head_modulation.weight.mul_(0.5)
        for block in self.blocks:
            block.proj.weight.div_(math.sqrt(2 * self.config.depth))
            block.mlp_out.weight.div_(math.sqrt(2 * self.config.depth))
            # gates start small, scales and shifts at half
            rows = block.modulation_table if self.config.shared_adaln else block.modulation.weight.unflatten(0, (6, -1))
            rows[:2].mul_(1e-3)
            rows[2:].mul_(0.5)
            start = block.modulation_table if self.config.shared_adaln else block.modulation.bias.unflatten(0, (6, -1))
            start[:2].add_(self.config.gate_init)

    # -- condition ---------------------------------------------------------------------------------------------------

    def condition(self, labels: Labels) -> torch.Tensor:
        """The condition (B, 1 + T, C) of class indices (B,) or names, texts or their characters (B, T = text_length).

        The first row modulates the blocks. A text has a row for each character besides: every token of the image adds
        a mixture of them that depends on its position, so that the model need not guess which character goes where.

        Raises:
            ValueError: labels of another kind or shape than the model's condition; for labels on the CPU also indices
                out of range (elsewhere that would need a synchronisation).
        """
        labels = self.indices(labels)
        if not self.config.text_length:
            return self.class_embed(labels)[:, None]
        characters = self.text_embed[torch.arange(self.config.text_length, device=self.device), labels]
        return torch.cat([characters.sum(1, keepdim=True), characters], 1)

    def indices(self, labels: Labels) -> torch.Tensor:
        """Labels as indices on the model's device: classes (B,) or characters (B, T); errors as `condition`."""
        config = self.config
        if not isinstance(labels, torch.Tensor):
            labels = config.encode_text(labels) if config.text_length else config.encode_classes(labels)
        if labels.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"VAR: labels: expected int64 or int32, got {labels.dtype}")
        if config.text_length and (labels.ndim != 2 or labels.shape[1] != config.text_length):
            raise ValueError(
                f"VAR: labels: expected texts or characters (B, {config.text_length}), got {tuple(labels.shape)}"
            )
        if not config.text_length and labels.ndim != 1:
            raise ValueError(f"VAR: labels: expected class indices (B,), got {tuple(labels.shape)}")
        if labels.device.type == "cpu" and labels.numel() and not torch.compiler.is_compiling():
            # the padding of texts is a label, the row of `class_embed` for "no condition" is none
            last = len(config.alphabet) if config.text_length else config.num_classes - 1
            smallest, largest = (int(bound) for bound in labels.aminmax())
            if smallest < 0 or largest > last:
                raise ValueError(f"VAR: labels: expected indices from 0 to {last}, got {smallest} to {largest}")
        # the caller may change pinned memory before it is copied; any other is copied at once, without a wait
        stays = torch.compiler.is_compiling() or labels.device == self.device
        return labels.to(self.device, non_blocking=stays or not labels.is_pinned())

    def no_condition(self, batch: int) -> torch.Tensor:
        """The condition (B, 1 + T, C) that says nothing, for guidance."""
        rows = self.null_condition if self.config.text_length else self.class_embed.weight[-1:]
        return rows.expand(batch, -1, -1)

    def modulations(self, condition: torch.Tensor) -> Modulations:
        """All modulations of a stream from its condition (B, 1 + T, C); computed once for all scales."""
        activated = F.silu(condition[:, 0])
        shared = None
        if self.shared_modulation is not None:
            shared = self.shared_modulation(activated).unflatten(1, (6, -1))
        found = [block.modulate(activated, shared) for block in self.blocks]
        head = self.head_modulation(activated).unflatten(1, (2, -1))
        return Modulations([rows for rows, _ in found], [bias for _, bias in found], head)

    # -- inputs ------------------------------------------------------------------------------------------------------

    def positions(self, start: int, end: int) -> torch.Tensor:
        """(n, C), what tokens start : end are told of their place."""
        return self.position_embed[start:end] + self.scale_embed(self.scale_index[start:end])

    def embed(
        self,
        condition: torch.Tensor,
        inputs: torch.Tensor | None,
        start: int = 0,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The residual stream's start (B, n, C) for tokens start : start + n.

        Args:
            condition: (B, 1 + T, C); the first scale's tokens start from its first row.
            inputs: (B, n, code_channels), without the first scale's tokens if `start` is 0; None for none.
            positions: those of all tokens, if they were computed before.
        """
        parts = [] if inputs is None else [self._codes(inputs)]
        if start == 0:
            parts.insert(0, (condition[:, :1] + self.start_embed).to(self.position_embed.dtype))
        x = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        end = start + x.shape[1]
        x = x + (self.positions(start, end) if positions is None else positions[start:end])
        if self.config.text_length:
            x = x + self.text_mix[start:end].softmax(-1) @ condition[:, 1:]
        return x

    def _codes(self, inputs: torch.Tensor) -> torch.Tensor:
        # The residual stream has the parameters' dtype in training and sampling alike, whatever autocast makes of
        # the projection: otherwise the same tokens would get two different log-probabilities.
        dtype = self.position_embed.dtype
        return self.code_embed(inputs.to(dtype)).to(dtype)

    # -- the subject's prefix ----------------------------------------------------------------------------------------

    def prefill(self, subject: torch.Tensor, keep: torch.Tensor | None = None) -> list[PrefixKV]:
        """Keys and values of every layer for reference subjects; they depend on the subject alone.

        Args:
            subject: (R, L, code_channels), `VQTokenizer.pyramid` of the subjects' tokens.
            keep: (R,) bool, False where the subject is dropped; None keeps all.

        Returns:
            per layer a `PrefixKV` (R, L, H, D).

        Raises:
            ValueError: a model without subject prefix, a wrong shape.
        """
        x, condition, schedule = self._subject_stream(subject)
        lengths = None if keep is None else keep.to(torch.int32) * schedule.num_tokens
        modulations = self.modulations(condition)
        prefix = []
        for i, (block, modulation, bias) in enumerate(
            zip(self.blocks, modulations.blocks, modulations.biases, strict=True)
        ):
            if i + 1 < len(self.blocks):
                x, k, v = self._run(partial(_prefill_block, block, schedule), x, modulation, bias)
            else:
                k, v, _ = block.keys_and_values(x, modulation, bias)
            if self.gradient_checkpointing or not torch.is_grad_enabled():
                # slices would keep the memory of the whole projection, of which nothing else is needed
                k, v = k.contiguous(), v.contiguous()
            prefix.append(PrefixKV(k, v, lengths))
        return prefix

    def _subject_stream(self, subject: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, ScaleSchedule]:
        """The start of the residual stream (R, L, C), the condition (R, 1, C) and how tokens see each other."""
        config, schedule = self.config, self.schedule
        if config.subject == "none":
            raise ValueError("VAR: subject: this model has no subject prefix; see VARConfig.subject and add_subject")
        shape = tuple(subject.shape) if isinstance(subject, torch.Tensor) else type(subject).__name__
        if len(shape) != 3 or shape[1:] != (schedule.num_tokens, config.code_channels):
            raise ValueError(f"VAR: subject: expected (R, {schedule.num_tokens}, {config.code_channels}), got {shape}")
        if config.subject == "bidirectional":
            schedule = ScaleSchedule(((1, schedule.num_tokens),))
        x = self._codes(subject) + self.positions(0, subject.shape[1]) + self.subject_embed
        return x, self.subject_condition.expand(subject.shape[0], 1, -1), schedule

    def add_subject(self, subject: str = "block_causal") -> VAR:
        """A copy of this model with a subject prefix, for fine-tuning; everything else keeps its weights.

        Args:
            subject: "block_causal" or "bidirectional".

        Raises:
            ValueError: another kind of subject.
        """
        if subject == "none":
            raise ValueError('VAR.add_subject: subject: expected "block_causal" or "bidirectional", got "none"')
        model = VAR(replace(self.config, subject=subject), *self._tokenizer).to(self.device, self.head.weight.dtype)
        own = model.state_dict()
        own.update(self.state_dict())
        model.load_state_dict(own)
        if self.config.subject == "none":
            with torch.no_grad():
                model.subject_condition.copy_(self.no_condition(1)[0, 0])
        model.gradient_checkpointing = self.gradient_checkpointing
        return model.train(self.training)

    # -- teacher forcing ---------------------------------------------------------------------------------------------

    def hidden(self, labels: Labels, inputs: torch.Tensor, *, subject: torch.Tensor | None = None) -> torch.Tensor:
        """The normalised hidden states before the head (B, L', C); arguments as `forward`.

        The fused log-probabilities and losses take these and `head`, so that (B, L, V) logits never exist.
        """
        schedule = self._schedule_of(inputs)
        condition = self.condition(labels)
        batch = inputs.shape[0]
        if condition.shape[0] != batch:
            raise ValueError(f"VAR: labels: expected one per row of inputs ({batch}), got {condition.shape[0]}")
        keep = None
        rate: torch.Tensor | float = self.config.condition_dropout
        if subject is not None:
            if (subject.shape[0] == 0) != (batch == 0) or (batch and batch % subject.shape[0]):
                raise ValueError(
                    f"VAR: subject: expected a number of rows that divides {batch}, got {subject.shape[0]}"
                )
            if self.training:
                keep = torch.rand(subject.shape[0], device=self.device) >= self.config.subject_dropout
                # Guidance contrasts with neither subject nor condition: half of the groups without a subject train that
                group = batch // max(subject.shape[0], 1)
                rate = torch.where(keep, rate, max(rate, 0.5)).repeat_interleave(group)[:, None, None]
        if self.training:
            dropped = torch.rand(batch, 1, 1, device=self.device) < rate
            condition = torch.where(dropped, self.no_condition(batch), condition)
        x = self.embed(condition, inputs)
        if subject is not None and x.shape[1] == subject.shape[1]:
            return self._hidden_of_two_streams(x, condition, schedule, subject, keep)
        prefix = None if subject is None else self.prefill(subject, keep)
        modulations = self.modulations(condition)
        for i, (block, modulation, bias) in enumerate(
            zip(self.blocks, modulations.blocks, modulations.biases, strict=True)
        ):
            attend = attend_to_scales(schedule, None if prefix is None else prefix[i])
            x = self._run(block, x, modulation, attend, bias)
        return self.before_head(x, modulations)

    def _hidden_of_two_streams(
        self,
        x: torch.Tensor,
        condition: torch.Tensor,
        schedule: ScaleSchedule,
        subject: torch.Tensor,
        keep: torch.Tensor | None,
    ) -> torch.Tensor:
        """The image stream's hidden states. Where both streams are of one length they pass the blocks as rows of one
        tensor, which takes half as many launches as one after the other; attention alone tells them apart."""
        first, subject_condition, subject_schedule = self._subject_stream(subject)
        rows = len(first)
        lengths = None if keep is None else keep.to(torch.int32) * subject.shape[1]
        modulations = self.modulations(torch.cat([subject_condition, condition[:, :1]]))
        x = torch.cat([first, x])
        attend = attend_in_two_streams(schedule, subject_schedule, rows, lengths)
        *blocks, last = zip(self.blocks, modulations.blocks, modulations.biases, strict=True)
        for block, modulation, bias in blocks:
            x = self._run(block, x, modulation, attend, bias)
        block, modulation, bias = last  # of the subjects it gives keys and values alone
        (first, x), (of_first, of_images) = (t.split([rows, len(t) - rows]) for t in (x, modulation))
        k, v, _ = block.keys_and_values(first, of_first, bias)
        if self.gradient_checkpointing or not torch.is_grad_enabled():
            k, v = k.contiguous(), v.contiguous()  # as in `prefill`
        x = self._run(block, x, of_images, attend_to_scales(schedule, PrefixKV(k, v, lengths)), bias)
        return self.before_head(x, modulations._replace(head=modulations.head[rows:]))

    def _schedule_of(self, inputs: torch.Tensor) -> ScaleSchedule:
        """The scales that teacher-forcing inputs are for."""
        first, ends = self.schedule.lengths[0], self.schedule.ends
        channels = self.config.code_channels
        shape = tuple(inputs.shape) if isinstance(inputs, torch.Tensor) else type(inputs).__name__
        if len(shape) != 3 or shape[2] != channels or first + inputs.shape[1] not in ends:
            lengths = ", ".join(str(end - first) for end in ends)
            raise ValueError(f"VAR: inputs: expected (B, n, {channels}) with n one of {lengths}, got {shape}")
        return self.schedule.with_num_tokens(first + inputs.shape[1])

    def before_head(self, x: torch.Tensor, modulations: Modulations) -> torch.Tensor:
        scale, shift = modulations.head.unbind(1)
        return adaptive_layer_norm(x, scale, shift, eps=self.config.norm_eps)

    def forward(
        self,
        labels: Labels,
        inputs: torch.Tensor,
        *,
        subject: torch.Tensor | None = None,
        tokens: torch.Tensor | None = None,
        temperature: float = 1.0,
        label_smoothing: float | None = None,
        token_weights: torch.Tensor | None = None,
    ) -> torch.Tensor | TokenLogProbs | CrossEntropy:
        """Logits of every token given the true coarser scales, or log-probabilities or cross-entropy of given tokens.

        Args:
            labels: (B,) class indices or names, or texts, or characters (B, text_length).
            inputs: (B, L - n_1, code_channels), `VQTokenizer.teacher_forcing` of the tokens; those of the first m
                scales run the model on these scales alone.
            subject: (B / G, L, code_channels), `VQTokenizer.pyramid` of the reference subjects' tokens, each shared
                by G adjacent rows.
            tokens: (B, L') int64.
            temperature: divides the logits of the log-probabilities; the one that the tokens were sampled with.
            label_smoothing, token_weights: of the cross-entropy; see `fastvar.ops.cross_entropy`.

        Returns:
            without `tokens` the logits (B, L', V) float32; with them their `TokenLogProbs` or, if `label_smoothing` is
            a number, 0 included, their `CrossEntropy`, for which the logits are never held as a whole.

        In training mode conditions and subjects are dropped at the config's rates.

        Raises:
            ValueError: options that do not go together, see also `hidden`.
        """
        if token_weights is not None and label_smoothing is None:
            raise ValueError("VAR: token_weights: expected None without label_smoothing (0 for none), got a tensor")
        if label_smoothing is not None and (tokens is None or temperature != 1):
            raise ValueError("VAR: label_smoothing: expected None without tokens or with a temperature, got a number")
        hidden = self.hidden(labels, inputs, subject=subject)
        if tokens is None:
            return self.head(hidden).float()
        if label_smoothing is not None:
            head = (self.head.weight, self.head.bias)
            return cross_entropy(hidden, *head, tokens, label_smoothing=label_smoothing, weights=token_weights)
        return token_log_probs(hidden, self.head.weight, self.head.bias, tokens, temperature=temperature)

    # -- sampling ----------------------------------------------------------------------------------------------------

    def sample_scale(
        self, x: torch.Tensor, modulations: Modulations, cache: KVCache, *, position: int, end: int
    ) -> torch.Tensor:
        """One scale of sampling: (B, n, C) embedded inputs to normalised hidden states, keys and values cached.

        Args:
            x: (B, n, C) from `embed`.
            modulations: of the condition.
            cache: receives the scale's keys and values.
            position, end: where in the cache's own rows the scale starts and ends.
        """
        rows = [modulation.unbind(1) for modulation in modulations.blocks]
        norms = [(scale, shift) for _, _, scale, _, shift, _ in rows]
        head_scale, head_shift = modulations.head.unbind(1)
        norms.append((head_scale, head_shift))
        eps = self.config.norm_eps
        h = adaptive_layer_norm(x, *norms[0], eps=eps)
        for i, (block, modulation, bias) in enumerate(
            zip(self.blocks, modulations.blocks, modulations.biases, strict=True)
        ):
            x, h = block.mix(x, h, modulation, attend_to_cache(cache, i, position, end), bias)
            x, h = gated_residual_norm(x, h, rows[i][1], *norms[i + 1], eps=eps)
        cache.length = end
        return h

    generate = generate
