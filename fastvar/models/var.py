"""The VAR transformer: next-scale prediction of visual tokens, optionally after the prefix of a reference subject."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastvar.models.kv_cache import KVCache
from fastvar.models.linear import Linear
from fastvar.models.pretrained import PretrainedModel, has_model
from fastvar.models.vq_tokenizer import VQTokenizer
from fastvar.ops import (
    PrefixKV,
    TokenLogProbs,
    adaptive_layer_norm,
    block_causal_attention,
    cached_attention,
    gated_residual,
    qk_norm_rope,
    qk_norm_rope_into_cache,
    token_log_probs,
)
from fastvar.schedule import VAR_256, ScaleSchedule

TOKENIZER_FOLDER = "tokenizer"
Labels = torch.Tensor | Sequence[str]


@dataclass(frozen=True)
class VARConfig:
    """Shape of a `VAR`; the defaults are those of the public VAR-d16."""

    grids: tuple[tuple[int, int], ...] = VAR_256.grids
    """Token grids (height, width), coarse to fine."""
    depth: int = 16
    embed_dim: int = 1024
    num_heads: int = 16
    mlp_ratio: float = 4.0
    vocab_size: int = 4096
    code_channels: int = 32
    """Channels of the tokenizer's feature map."""
    num_classes: int = 1000
    """Class condition; 0 for a text condition."""
    text_length: int = 0
    """Text condition: the most characters of a text; 0 for a class condition."""
    alphabet: str = "0123456789"
    """Text condition: the characters that a text may have."""
    subject: str = "none"
    """Prefix of a reference subject: "none", "block_causal" (a prefix token sees the prefix's coarser scales and its
    own) or "bidirectional" (it sees all of the prefix)."""
    shared_adaln: bool = False
    """One modulation of all blocks plus a table per block, instead of a linear layer per block."""
    qk_l2_norm: bool = True
    """Unit-length queries and keys with a learned scale per head; otherwise scores are scaled by 0.25 / sqrt(D)."""
    gate_init: float = 0.0
    """Where the residual gates start. From 0 a block begins as the identity, which deep models need; small ones that
    are trained for a few minutes learn faster from 1."""
    norm_eps: float = 1e-6
    condition_dropout: float = 0.1
    """Share of training samples whose condition is dropped, for guidance."""
    subject_dropout: float = 0.1
    """Share of training groups whose subject is dropped; half of their samples lose the condition too, as the
    unconditional side of guidance has neither."""
    drop_path: float = 0.0
    """Stochastic depth of the last block, growing linearly over the blocks."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "grids", ScaleSchedule(self.grids).grids)
        for name in ("depth", "embed_dim", "num_heads", "vocab_size", "code_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"VARConfig: {name}: expected at least 1, got {getattr(self, name)}")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"VARConfig: num_heads: expected a divisor of embed_dim {self.embed_dim}, got {self.num_heads}"
            )
        if self.subject not in ("none", "block_causal", "bidirectional"):
            raise ValueError(
                f'VARConfig: subject: expected "none", "block_causal" or "bidirectional", got {self.subject!r}'
            )
        for name in ("condition_dropout", "subject_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"VARConfig: {name}: expected a number in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"VARConfig: drop_path: expected a number in [0, 1), got {self.drop_path}")
        if (self.num_classes > 0) == (self.text_length > 0):
            raise ValueError(
                "VARConfig: num_classes, text_length: expected exactly one above 0, "
                f"got {self.num_classes} and {self.text_length}"
            )

    @property
    def schedule(self) -> ScaleSchedule:
        return ScaleSchedule(self.grids)

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        """Texts to character indices (B, text_length) int64; shorter texts are padded on the right.

        Raises:
            ValueError: no text condition, a text that is too long or has a character outside the alphabet.
        """
        if not self.text_length:
            raise ValueError("VAR: labels: expected a tensor of class indices, as this model has a class condition")
        if isinstance(texts, str):  # a sequence of texts of one character
            raise ValueError(f"VAR: labels: expected a list of texts, got the text {texts!r}")
        rows = []
        for text in texts:
            if len(text) > self.text_length or any(c not in self.alphabet for c in text):
                raise ValueError(
                    f"VAR: labels: expected texts of at most {self.text_length} characters out of "
                    f"{self.alphabet!r}, got {text!r}"
                )
            indices = [self.alphabet.index(c) for c in text]
            rows.append(indices + [len(self.alphabet)] * (self.text_length - len(indices)))
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.text_length)


class Modulations(NamedTuple):
    """The modulations of one stream; they do not change over scales.

    Attributes:
        blocks: per block (B, 6, C) in the order gate1, gate2, scale1, scale2, shift1, shift2.
        head: (B, 2, C), scale and shift before the head.
    """

    blocks: list[torch.Tensor]
    head: torch.Tensor


class _Block(nn.Module):
    """Attention and MLP with adaptive layer norm. It normalises, projects and mixes; who attends to what is the
    caller's affair: `attend` gets the queries, keys and values (B, L, H, D) and answers (B, L, H, D)."""

    def __init__(self, config: VARConfig, drop_path: float) -> None:
        super().__init__()
        width, self.heads, self.eps, self.drop_path = config.embed_dim, config.num_heads, config.norm_eps, drop_path
        hidden = round(width * config.mlp_ratio)
        self.qkv = Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))  # keys have no bias
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.log_scale = nn.Parameter(torch.full((self.heads,), math.log(4.0))) if config.qk_l2_norm else None
        self.softmax_scale = 1.0 if config.qk_l2_norm else 0.25 / math.sqrt(config.head_dim)
        self.proj = Linear(width, width)
        self.mlp_in = Linear(width, hidden)
        self.mlp_out = Linear(hidden, width)
        if config.shared_adaln:
            self.modulation_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        else:
            self.modulation = Linear(width, 6 * width)

    def modulate(self, activated: torch.Tensor, shared: torch.Tensor | None) -> torch.Tensor:
        """(B, 6, C) from the activated condition (B, C) or from the modulation shared by all blocks (B, 6, C)."""
        if shared is not None:
            return self.modulation_table + shared
        return self.modulation(activated).unflatten(1, (6, -1))

    def project(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values (B, L, H, D), not yet normalised."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = self.qkv(h, bias=bias).unflatten(2, (3, self.heads, -1)).unbind(2)
        return q, k, v

    def normalise(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (q, k) if self.log_scale is None else qk_norm_rope(q, k, log_scale=self.log_scale)

    def keys_and_values(self, x: torch.Tensor, modulation: torch.Tensor) -> PrefixKV:
        """What other streams see of this block's input (B, L, C)."""
        _, _, scale, _, shift, _ = modulation.unbind(1)
        q, k, v = self.project(adaptive_layer_norm(x, scale, shift, eps=self.eps))
        return PrefixKV(self.normalise(q, k)[1], v)

    def forward(self, x: torch.Tensor, modulation: torch.Tensor, attend: Attend) -> torch.Tensor:
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.unbind(1)
        h = adaptive_layer_norm(x, scale1, shift1, eps=self.eps)
        h = self.proj(attend(self, *self.project(h)).flatten(2))
        x = gated_residual(x, self._dropped(h), gate1)
        h = adaptive_layer_norm(x, scale2, shift2, eps=self.eps)
        if type(self.mlp_in) is Linear:  # noqa: SIM108
            h = self.mlp_in(h, gelu=True)
        else:  # wrapped, as by LoRA: what is added to the projection must pass the GELU too
            h = F.gelu(self.mlp_in(h), approximate="tanh")
        h = self.mlp_out(h)
        return gated_residual(x, self._dropped(h), gate2)

    def _dropped(self, h: torch.Tensor) -> torch.Tensor:
        if not self.training or self.drop_path == 0:
            return h
        keep = 1 - self.drop_path
        return h * (torch.rand(h.shape[0], 1, 1, device=h.device) < keep).to(h.dtype).div(keep)


Attend = Callable[[_Block, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _attend_to_scales(schedule: ScaleSchedule, prefix: PrefixKV | None = None) -> Attend:
    """Teacher forcing: every scale at once."""

    def attend(block: _Block, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k = block.normalise(q, k)
        return block_causal_attention(q, k, v, schedule, prefix=prefix, softmax_scale=block.softmax_scale)

    return attend


def _attend_to_cache(cache: KVCache, layer: int, position: int, end: int) -> Attend:
    """Sampling: the scale whose tokens go to rows position : end of the cache."""
    keys, values, prefix, trunk = cache.layer(layer)

    def attend(block: _Block, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q = qk_norm_rope_into_cache(q, k, v, keys, values, position, log_scale=block.log_scale)
        return cached_attention(
            q, keys[:, :end], values[:, :end], prefix=prefix, trunk=trunk, softmax_scale=block.softmax_scale
        )

    return attend


class VAR(PretrainedModel):
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
    config: VARConfig
    blocks: Sequence[_Block]
    scale_index: torch.Tensor

    def __init__(self, config: VARConfig, tokenizer: VQTokenizer | None = None) -> None:
        super().__init__()
        self.config = config
        self.schedule = config.schedule
        self.gradient_checkpointing = False
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
        self.blocks = nn.ModuleList(_Block(config, p) for p in drop_path)  # type: ignore[assignment]  # not generic
        self.head_modulation = Linear(width, 2 * width)
        self.head = Linear(width, config.vocab_size)
        self.register_buffer("scale_index", torch.tensor(self.schedule.scale_of_token), persistent=False)
        self._initialise(std)
        self._tokenizer: tuple[VQTokenizer, ...] = ()  # in a tuple, so that it is no submodule
        if tokenizer is not None:
            self.tokenizer = tokenizer

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

    # -- tokenizer, saving -------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> VQTokenizer:
        """The tokenizer whose tokens this model predicts.

        Raises:
            RuntimeError: none was attached.
        """
        if not self._tokenizer:
            raise RuntimeError("VAR: tokenizer: none attached; pass one to VAR(...) or set var.tokenizer")
        return self._tokenizer[0]

    @tokenizer.setter
    def tokenizer(self, tokenizer: VQTokenizer) -> None:
        ours, theirs = self.config, tokenizer.config
        for name in ("grids", "vocab_size", "code_channels"):
            if getattr(ours, name) != getattr(theirs, name):
                raise ValueError(
                    f"VAR: tokenizer: expected {name} {getattr(ours, name)}, got {getattr(theirs, name)}",
                )
        self._tokenizer = (tokenizer.to(self.device),)

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module would register the tokenizer as a submodule before a property's setter saw it
        if name == "tokenizer":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self._tokenizer:
            self._tokenizer[0].to(self.device)
        return self

    def clone(self) -> Self:
        """A copy with weights of its own, adapters included, and this one's tokenizer."""
        return copy.deepcopy(self, {id(tokenizer): tokenizer for tokenizer in self._tokenizer})

    def _save_pretrained(self, save_directory: Path) -> None:
        if self._tokenizer:
            self.tokenizer._save_pretrained(save_directory / TOKENIZER_FOLDER)
        else:
            shutil.rmtree(save_directory / TOKENIZER_FOLDER, ignore_errors=True)
        super()._save_pretrained(save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **kwargs: Any) -> Self:
        model = super()._from_pretrained(model_id=model_id, **kwargs)
        if has_model(model_id, TOKENIZER_FOLDER, **kwargs):
            model.tokenizer = VQTokenizer._from_pretrained(model_id=model_id, subfolder=TOKENIZER_FOLDER, **kwargs)
        return model

    # -- condition ---------------------------------------------------------------------------------------------------

    def condition(self, labels: Labels) -> torch.Tensor:
        """The condition (B, 1 + T, C) of class indices (B,), texts or their character indices (B, T = text_length).

        The first row modulates the blocks. A text has a row for each character besides: every token of the image adds
        a mixture of them that depends on its position, so that the model need not guess which character goes where.

        Raises:
            ValueError: labels of another kind or shape than the model's condition; for labels on the CPU also indices
                out of range (elsewhere that would need a synchronisation).
        """
        config = self.config
        if not isinstance(labels, torch.Tensor):
            labels = config.encode_text(labels)
        if labels.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"VAR: labels: expected int64 or int32, got {labels.dtype}")
        if labels.device.type == "cpu" and labels.numel() and not torch.compiler.is_compiling():
            last = len(config.alphabet) if config.text_length else config.num_classes
            smallest, largest = (int(bound) for bound in labels.aminmax())
            if smallest < 0 or largest > last:
                raise ValueError(f"VAR: labels: expected indices from 0 to {last}, got {smallest} to {largest}")
        labels = labels.to(self.device)
        if config.text_length:
            if labels.ndim != 2 or labels.shape[1] != config.text_length:
                raise ValueError(
                    f"VAR: labels: expected texts or characters (B, {config.text_length}), got {tuple(labels.shape)}"
                )
            characters = self.text_embed[torch.arange(config.text_length, device=self.device), labels]
            return torch.cat([characters.sum(1, keepdim=True), characters], 1)
        if labels.ndim != 1:
            raise ValueError(f"VAR: labels: expected class indices (B,), got {tuple(labels.shape)}")
        return self.class_embed(labels)[:, None]

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
        blocks = [block.modulate(activated, shared) for block in self.blocks]
        return Modulations(blocks, self.head_modulation(activated).unflatten(1, (2, -1)))

    # -- inputs ------------------------------------------------------------------------------------------------------

    def _positions(self, start: int, end: int) -> torch.Tensor:
        return self.position_embed[start:end] + self.scale_embed(self.scale_index[start:end])

    def embed(self, condition: torch.Tensor, inputs: torch.Tensor, start: int = 0) -> torch.Tensor:
        """The residual stream's start (B, n, C) for tokens start : start + n.

        Args:
            condition: (B, 1 + T, C); the first scale's tokens start from its first row.
            inputs: (B, n, code_channels), without the first scale's tokens if `start` is 0.
        """
        x = self._codes(inputs)
        if start == 0:
            x = torch.cat([(condition[:, :1] + self.start_embed).to(x.dtype), x], 1)
        end = start + x.shape[1]
        x = x + self._positions(start, end)
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
        config, schedule = self.config, self.schedule
        if config.subject == "none":
            raise ValueError("VAR: subject: this model has no subject prefix; see VARConfig.subject and add_subject")
        if subject.ndim != 3 or tuple(subject.shape[1:]) != (schedule.num_tokens, config.code_channels):
            raise ValueError(
                f"VAR: subject: expected (R, {schedule.num_tokens}, {config.code_channels}), got {tuple(subject.shape)}"
            )
        lengths = None if keep is None else keep.to(torch.int32) * schedule.num_tokens
        if config.subject == "bidirectional":
            schedule = ScaleSchedule(((1, schedule.num_tokens),))

        modulations = self.modulations(self.subject_condition.expand(subject.shape[0], 1, -1))
        x = self._codes(subject) + self._positions(0, subject.shape[1]) + self.subject_embed
        prefix = []
        for i, (block, modulation) in enumerate(zip(self.blocks, modulations.blocks, strict=True)):
            k, v, _ = block.keys_and_values(x, modulation)
            prefix.append(PrefixKV(k, v, lengths))
            if i + 1 < len(self.blocks):
                x = self._run(block, x, modulation, _attend_to_scales(schedule))
        return prefix

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

    def _run(self, block: _Block, x: torch.Tensor, modulation: torch.Tensor, attend: Attend) -> torch.Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, modulation, attend, use_reentrant=False)
        return block(x, modulation, attend)

    def hidden(self, labels: Labels, inputs: torch.Tensor, *, subject: torch.Tensor | None = None) -> torch.Tensor:
        """The normalised hidden states before the head (B, L', C); arguments as `forward`.

        The fused log-probabilities and losses take these and `head`, so that (B, L, V) logits never exist.
        """
        schedule = self._schedule_of(inputs)
        condition = self.condition(labels)
        batch = inputs.shape[0]
        if condition.shape[0] != batch:
            raise ValueError(f"VAR: labels: expected one per row of inputs ({batch}), got {condition.shape[0]}")
        prefix: list[PrefixKV] | None = None
        rate: torch.Tensor | float = self.config.condition_dropout
        if subject is not None:
            if (subject.shape[0] == 0) != (batch == 0) or (batch and batch % subject.shape[0]):
                raise ValueError(
                    f"VAR: subject: expected a number of rows that divides {batch}, got {subject.shape[0]}"
                )
            keep = None
            if self.training:
                keep = torch.rand(subject.shape[0], device=self.device) >= self.config.subject_dropout
                # Guidance contrasts with neither subject nor condition: half of the groups without a subject train that
                group = batch // max(subject.shape[0], 1)
                rate = torch.where(keep, rate, max(rate, 0.5)).repeat_interleave(group)[:, None, None]
            prefix = self.prefill(subject, keep)
        if self.training:
            dropped = torch.rand(batch, 1, 1, device=self.device) < rate
            condition = torch.where(dropped, self.no_condition(batch), condition)
        modulations = self.modulations(condition)
        x = self.embed(condition, inputs)
        for i, (block, modulation) in enumerate(zip(self.blocks, modulations.blocks, strict=True)):
            attend = _attend_to_scales(schedule, None if prefix is None else prefix[i])
            x = self._run(block, x, modulation, attend)
        return self.before_head(x, modulations)

    def _schedule_of(self, inputs: torch.Tensor) -> ScaleSchedule:
        """The scales that teacher-forcing inputs are for."""
        first, ends = self.schedule.lengths[0], self.schedule.ends
        channels = self.config.code_channels
        if inputs.ndim != 3 or inputs.shape[2] != channels or first + inputs.shape[1] not in ends:
            lengths = ", ".join(str(end - first) for end in ends)
            raise ValueError(
                f"VAR: inputs: expected (B, n, {channels}) with n one of {lengths}, got {tuple(inputs.shape)}"
            )
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
    ) -> torch.Tensor | TokenLogProbs:
        """Logits of every token given the true coarser scales, or the log-probabilities of given tokens.

        Args:
            labels: (B,) class indices, or texts, or characters (B, text_length).
            inputs: (B, L - n_1, code_channels), `VQTokenizer.teacher_forcing` of the tokens; those of the first m
                scales run the model on these scales alone.
            subject: (B / G, L, code_channels), `VQTokenizer.pyramid` of the reference subjects' tokens, each shared
                by G adjacent rows.
            tokens: (B, L') int64.
            temperature: divides the logits of the log-probabilities; the one that the tokens were sampled with.

        Returns:
            without `tokens` the logits (B, L', V) float32; with them their `TokenLogProbs`, for which the logits are
            never held as a whole.

        In training mode conditions and subjects are dropped at the config's rates.
        """
        hidden = self.hidden(labels, inputs, subject=subject)
        if tokens is None:
            return self.head(hidden).float()
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
        for i, (block, modulation) in enumerate(zip(self.blocks, modulations.blocks, strict=True)):
            x = block(x, modulation, _attend_to_cache(cache, i, position, end))
        cache.length = end
        return self.before_head(x, modulations)

    def generate(self, labels: Labels | None = None, **options: Any) -> Any:
        """Sample images; see `fastvar.models.sampling.generate` for all options."""
        from fastvar.models.sampling import generate

        return generate(self, labels, **options)
