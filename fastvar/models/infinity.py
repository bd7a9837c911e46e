"""The Infinity transformer: next-scale prediction of bits, conditioned on a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastvar.models.bsq_tokenizer import BSQTokenizer
from fastvar.models.infinity_block import TextBlock, attend_to_scales, rotations, scale_indices
from fastvar.models.infinity_config import InfinityConfig
from fastvar.models.infinity_sampling import generate
from fastvar.models.linear import Linear
from fastvar.models.text import TextEncoder, TextFeatures, TextKV, TextPool, places, row_indices
from fastvar.models.var_block import Modulations
from fastvar.models.with_tokenizer import WithTokenizer
from fastvar.ops import TokenLogProbs, adaptive_layer_norm, token_log_probs
from fastvar.schedule import ScaleSchedule

Texts = TextFeatures | Sequence[str]


class Infinity(WithTokenizer[BSQTokenizer]):
    """Next-scale prediction over the bits of a `BSQTokenizer`.

    Weights of any schedule fit any other: positions are rotary, on the grid of `rotation_grid`. What depends on a
    schedule takes one, and the config's without.

    Where autocast is on, only the blocks run in its dtype: texts, modulations, the residual stream and the head have
    the weights' own, in training and in sampling alike. Logits are float32.

    Args:
        config: the shape.
        tokenizer: needed by `generate` alone, see `WithTokenizer`.
        text_encoder: needed for texts that are not encoded yet. It is no submodule either.
    """

    config_class = InfinityConfig
    tokenizer_class = BSQTokenizer
    agreed = ("grids", "bits")
    keeps_dtype = True
    config: InfinityConfig
    blocks: Sequence[TextBlock]

    def __init__(
        self, config: InfinityConfig, tokenizer: BSQTokenizer | None = None, text_encoder: TextEncoder | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.schedule = config.schedule
        width = config.embed_dim
        self.code_embed = Linear(config.bits, width)
        self.start_embed = nn.Parameter(torch.empty(1, width))
        self.scale_embed = nn.Embedding(config.max_scales, width)
        self.null_text = nn.Parameter(torch.empty(config.text_length, config.text_channels))
        self.text_norm = nn.RMSNorm(config.text_channels, eps=config.norm_eps)
        self.text_pool = TextPool(width, config.text_channels, config.pool_heads)
        self.text_in = Linear(config.text_channels, width)
        self.text_out = Linear(width, width)
        self.shared_modulation = Linear(width, 6 * width)
        drop_path = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(TextBlock(config, p) for p in drop_path)  # type: ignore[assignment]  # not generic
        self.head_modulation = Linear(width, 2 * width)
        self.head = Linear(width, config.bits)  # of each bit the logit of 1 less that of 0
        self._initialise((3 * width) ** -0.5)
        self._text_encoder: tuple[TextEncoder, ...] = () if text_encoder is None else (text_encoder,)
        self._attach(tokenizer)

    @torch.no_grad()
    def _initialise(self, std: float) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for parameter in (self.start_embed, self.scale_embed.weight, self.text_pool.query):
            nn.init.trunc_normal_(parameter, std=std)
        nn.init.trunc_normal_(self.null_text, std=1.2).div_(self.config.text_channels**0.5)
        self.head.weight.mul_(0.02)
        self.head_modulation.weight.mul_(0.5)
        for block in self.blocks:
            for last in (block.proj, block.text_attention.proj, block.mlp_out):
                last.weight.div_(math.sqrt(2 * self.config.depth))
            block.modulation_table[:2].mul_(1e-3).add_(self.config.gate_init)
            block.modulation_table[2:].mul_(0.5)

    # -- texts -------------------------------------------------------------------------------------------------------

    @property
    def text_encoder(self) -> TextEncoder:
        """What makes features of texts.

        Raises:
            RuntimeError: none was attached.
        """
        if not self._text_encoder:
            raise RuntimeError(
                "Infinity: text_encoder: none attached; pass one to Infinity(...), or features instead of texts"
            )
        return self._text_encoder[0]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "text_encoder":  # a module would become a submodule
            self._text_encoder = () if value is None else (value,)
        else:
            super().__setattr__(name, value)

    def _shared(self) -> tuple[object, ...]:
        return (*self._tokenizer, *self._text_encoder)

    def features(self, texts: Texts) -> TextFeatures:
        """Texts as features on the model's device and in its dtype.

        Raises:
            ValueError: features of another width, a text of no row or of more than `text_length`; a single text instead
                of a list of them.
            RuntimeError: texts without a text encoder.
        """
        if isinstance(texts, str):
            raise ValueError(f"Infinity: texts: expected a list of texts, got the text {texts!r}")
        found = texts if isinstance(texts, TextFeatures) else self.text_encoder(texts)
        found = found.check("Infinity: texts", self.config.text_channels, self.config.text_length)
        return found._replace(packed=found.packed.to(self.device, self.null_text.dtype))

    def no_text(self, lengths: Sequence[int]) -> TextFeatures:
        """Features that say nothing, for guidance; those of public models depend on the text's length."""
        _, place = row_indices(tuple(lengths), self.device)
        return TextFeatures(self.null_text[place], tuple(lengths))

    def _with_dropout(self, texts: TextFeatures) -> TextFeatures:
        """Each text replaced by one that says nothing, at the config's rate."""
        text, place = row_indices(tuple(texts.lengths), self.device)
        dropped = torch.rand(len(texts.lengths), device=self.device) < self.config.condition_dropout
        return texts._replace(packed=torch.where(dropped[text, None], self.null_text[place], texts.packed))

    def read(self, texts: TextFeatures) -> tuple[torch.Tensor, list[TextKV]]:
        """The condition (B, C), which modulates the blocks and starts the image, and what each block's tokens see of
        the texts. Neither changes over scales."""
        where = places(tuple(texts.lengths), self.device)
        with torch.autocast(self.device.type, enabled=False):
            packed = self.text_norm(texts.packed)
            condition = self.text_pool(packed, where)
            packed = self.text_out(self.text_in(packed, gelu=True))
        return condition, [block.read_text(packed, where) for block in self.blocks]

    def modulations(self, condition: torch.Tensor) -> Modulations:
        """All modulations from the condition (B, C); computed once for all scales."""
        with torch.autocast(self.device.type, enabled=False):
            activated = F.silu(condition)
            shared = self.shared_modulation(activated).unflatten(1, (6, -1))
            head = self.head_modulation(activated).unflatten(1, (2, -1))
        rows, biases = zip(*(block.modulate(activated, shared) for block in self.blocks), strict=True)
        return Modulations(list(rows), list(biases), head)

    # -- teacher forcing ---------------------------------------------------------------------------------------------

    def embed(
        self, condition: torch.Tensor, inputs: torch.Tensor | None, schedule: ScaleSchedule, start: int = 0
    ) -> torch.Tensor:
        """The residual stream's start (B, n, C) for tokens start : start + n of a schedule.

        Args:
            condition: (B, C); the first token starts from it.
            inputs: (B, n, d), without the first token if `start` is 0; None for none.
            schedule: the grids.
            start: index of the first token.
        """
        with torch.autocast(self.device.type, enabled=False):
            parts = [] if inputs is None else [self.code_embed(inputs.to(self.start_embed.dtype))]
            if start == 0:
                parts.insert(0, (condition + self.start_embed)[:, None])
            x = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return x + self.scale_embed(scale_indices(schedule, self.device)[start : start + x.shape[1]])

    def hidden(self, texts: Texts, inputs: torch.Tensor, *, schedule: ScaleSchedule | None = None) -> torch.Tensor:
        """The normalised hidden states before the head (B, L', C); arguments as `forward`. `fastvar.ops.policy_loss`
        takes these and `head`."""
        whole = self.schedule if schedule is None else self.config.check_schedule(schedule)
        channels = self.config.bits
        shape = tuple(inputs.shape) if isinstance(inputs, torch.Tensor) else type(inputs).__name__
        if len(shape) != 3 or shape[2] != channels or 1 + inputs.shape[1] not in whole.ends:
            lengths = ", ".join(str(end - 1) for end in whole.ends)
            raise ValueError(f"Infinity: inputs: expected (B, n, {channels}) with n one of {lengths}, got {shape}")
        features = self.features(texts)
        if len(features.lengths) != len(inputs):
            raise ValueError(
                f"Infinity: texts: expected one per row of inputs ({len(inputs)}), got {len(features.lengths)}"
            )
        if self.training:
            features = self._with_dropout(features)
        condition, read = self.read(features)
        modulations = self.modulations(condition)
        x = self.embed(condition, inputs, whole)
        cos, sin = rotations(whole, self.config.head_dim, self.device)
        rope = cos[: x.shape[1]], sin[: x.shape[1]]
        attend = attend_to_scales(whole.with_num_tokens(x.shape[1]), rope)
        for block, modulation, bias, text in zip(
            self.blocks, modulations.blocks, modulations.biases, read, strict=True
        ):
            x = self._run(block, x, modulation, attend, bias, text)
        return self.before_head(x, modulations)

    def before_head(self, x: torch.Tensor, modulations: Modulations) -> torch.Tensor:
        scale, shift = modulations.head.unbind(1)
        return adaptive_layer_norm(x, scale, shift, eps=self.config.norm_eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, n, C) to difference logits (B, n, d), float32 at least."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(self.device.type, enabled=False):
            if hidden.dtype == dtype:
                return self.head(hidden)
            return F.linear(hidden.to(dtype), self.head.weight.to(dtype), self.head.bias.to(dtype))

    def forward(
        self,
        texts: Texts,
        inputs: torch.Tensor,
        *,
        bits: torch.Tensor | None = None,
        temperature: float = 1.0,
        schedule: ScaleSchedule | None = None,
    ) -> torch.Tensor | TokenLogProbs:
        """Logits of every bit given the true coarser scales, or log-probabilities of given bits.

        Args:
            texts: B of them, or their features.
            inputs: (B, L - 1, d), `BSQTokenizer.teacher_forcing` of the bits; those of the first m scales run the model
                on these scales alone.
            bits: (B, L', d), bool or integers 0 and 1.
            temperature: divides the logits of the log-probabilities; the one that the bits were sampled with.
            schedule: the grids; the config's by default.

        Returns:
            without `bits` per bit the logit of 1 less that of 0, (B, L', d) float32; with them their `TokenLogProbs`,
            summed over a token's bits.

        In training mode texts are dropped at the config's rate.

        Raises:
            ValueError: arguments that do not fit, see also `features`.
        """
        logits = self.logits(self.hidden(texts, inputs, schedule=schedule))
        if bits is None:
            return logits
        return token_log_probs(logits, None, None, bits, temperature=temperature)

    generate = generate
