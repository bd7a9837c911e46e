"""The Infinity transformer: next-scale prediction of bits, conditioned on a text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import nn

from fastvar.models import sampling
from fastvar.models.bsq_tokenizer import BSQTokenizer
from fastvar.models.encoded_texts import EncodedTexts
from fastvar.models.infinity_block import TextBlock, rotations, scale_indices
from fastvar.models.infinity_config import InfinityConfig
from fastvar.models.kept_texts import KeptTexts
from fastvar.models.linear import Linear
from fastvar.models.next_scale import NextScaleModel, Positions
from fastvar.models.sampling import Generation, PerScale, SamplingState
from fastvar.models.text import (
    PaddedTexts,
    Places,
    TextEncoder,
    TextFeatures,
    TextPool,
    checked_texts,
    padded,
    places,
    row_indices,
)
from fastvar.models.var_block import Modulations
from fastvar.ops import SampledTokens, TokenLogProbs, sample_bits, token_log_probs
from fastvar.ops.token_log_probs import Head
from fastvar.ranges import GUIDANCE, Range
from fastvar.schedule import ScaleSchedule

Texts = TextFeatures | Sequence[str]


class TextsAndOpposites(NamedTuple):
    """Texts, and those to keep away from; None for the learned ones that say nothing."""

    texts: PaddedTexts
    against: PaddedTexts | None


class Infinity(NextScaleModel[BSQTokenizer]):
    """Next-scale prediction over the bits of a `BSQTokenizer`; the streams of images and subjects are those of
    `NextScaleModel`.

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
    no_guidance, guidance_range = 1.0, Range(GUIDANCE.low + 1, GUIDANCE.high)  # the operators count from 1 less
    config: InfinityConfig
    blocks: Sequence[TextBlock]
    _text_encoder: tuple[TextEncoder, ...]  # in a tuple, so that it is no submodule

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
        if config.subject != "none":
            self.subject_embed = nn.Parameter(torch.empty(width))
            self.subject_text = nn.Parameter(torch.empty(1, config.text_channels))  # what subjects read as their text
        self.text_in = Linear(config.text_channels, width)
        self.text_out = Linear(width, width)
        self.shared_modulation = Linear(width, 6 * width)
        drop_path = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(TextBlock(config, p) for p in drop_path)  # type: ignore[assignment]  # not generic
        self.head_modulation = Linear(width, 2 * width)
        self.head = Linear(width, config.bits)  # of each bit the logit of 1 less that of 0
        self._initialise([self.start_embed, self.scale_embed.weight, self.text_pool.query])
        self.text_encoder = text_encoder
        self._attach(tokenizer)

    @torch.no_grad()
    def _initialise(self, embeddings: Iterable[torch.Tensor]) -> None:
        super()._initialise(embeddings)
        nn.init.trunc_normal_(self.null_text, std=1.2).div_(self.config.text_channels**0.5)
        if self.config.subject != "none":
            nn.init.trunc_normal_(self.subject_embed, std=(3 * self.config.embed_dim) ** -0.5)
            self._start_subject()
        for block in self.blocks:
            block.text_attention.proj.weight.div_(math.sqrt(2 * self.config.depth))

    # -- texts -------------------------------------------------------------------------------------------------------

    @property
    def text_encoder(self) -> TextEncoder:
        """What makes features of texts; None set detaches it.

        Raises:
            RuntimeError: none was attached.
        """
        if not self._text_encoder:
            raise RuntimeError(
                "Infinity: text_encoder: none attached; pass one to Infinity(...), set model.text_encoder, or "
                "pass features instead of texts"
            )
        return self._text_encoder[0]

    @text_encoder.setter
    def text_encoder(self, encoder: TextEncoder | None) -> None:
        self._text_encoder = () if encoder is None else (encoder,)

    def keep_texts(self) -> None:
        """Let the text encoder remember texts (`KeptTexts`), for a caller who asks about the same ones again. One that
        reads features from a file, or none, is left alone."""
        if self._text_encoder and not isinstance(self.text_encoder, EncodedTexts | KeptTexts):
            self.text_encoder = KeptTexts(self.text_encoder)

    def _shared(self) -> tuple[object, ...]:
        return (*self._tokenizer, *self._text_encoder)

    def _share(self, other: Self) -> None:
        super()._share(other)
        self._text_encoder = other._text_encoder

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

    def encode(self, prompts: Texts, against: Texts | None = None) -> TextsAndOpposites:
        features = self.features(prompts)
        other = None if against is None else self.features(against)
        if other is not None and len(other.lengths) != len(features.lengths):
            raise ValueError(f"generate: negative: expected {len(features.lengths)} texts, got {len(other.lengths)}")
        longest = self.config.text_length
        return TextsAndOpposites(padded(features, longest), None if other is None else padded(other, longest))

    def count(self, encoded: TextsAndOpposites) -> int:
        return len(encoded.texts.counts)

    def batches(self, prompts: Texts, size: int) -> list[TextFeatures]:
        if isinstance(prompts, TextFeatures):
            features = self.features(prompts)
            return [features.some(slice(i, i + size)) for i in range(0, len(features.lengths), size)]
        texts = checked_texts("Infinity", prompts)  # all, before any is encoded
        return [self.features(texts[i : i + size]) for i in range(0, len(texts), size)]

    def take(self, batch: TextFeatures, rows: Sequence[int]) -> TextFeatures:
        return batch.take(rows)

    def begin(self, encoded: TextsAndOpposites, *, guided: bool) -> tuple[torch.Tensor, Modulations]:
        texts, against = encoded
        if guided and against is None:
            nothing = self.null_text[: texts.features.shape[1]].expand_as(texts.features)
            against = PaddedTexts(nothing, texts.counts)
        if guided and against is not None:
            texts = PaddedTexts.joined([texts, against])
        return self.read(texts.packed, texts.where)

    def read(self, packed: torch.Tensor, where: Places) -> tuple[torch.Tensor, Modulations]:
        """The condition (B, C), which modulates the blocks and starts the image, and all that the blocks are told, of
        packed features and their places. Neither changes over scales."""
        with torch.autocast(self.device.type, enabled=False):
            packed = self.text_norm(packed)
            condition = self.text_pool(packed, where)
            packed = self.text_out(self.text_in(packed, gelu=True))
            activated = F.silu(condition)
            shared = self.shared_modulation(activated).unflatten(1, (6, -1))
            head = self.head_modulation(activated).unflatten(1, (2, -1))
        # of what follows autocast reaches projections and their biases alone: the rows are sums
        rows, biases = zip(*(block.modulate(activated, shared) for block in self.blocks), strict=True)
        seen = [block.read_text(packed, where) for block in self.blocks]
        return condition, Modulations(list(rows), list(biases), head, seen)

    def token_positions(self, schedule: ScaleSchedule) -> Positions:
        indices = scale_indices(schedule, self.device)
        return Positions(self.scale_embed(indices), rotations(schedule, self.config.head_dim, self.device))

    # -- the subject's prefix ----------------------------------------------------------------------------------------

    def _subject_modulations(self, rows: int) -> Modulations:
        return self.read(self.subject_text.expand(rows, -1), places((1,) * rows, self.device))[1]

    @torch.no_grad()
    def _start_subject(self) -> None:
        self.subject_text.copy_(self.null_text[:1])

    # -- teacher forcing ---------------------------------------------------------------------------------------------

    def embed(
        self, condition: torch.Tensor, inputs: torch.Tensor | None, start: int, positions: torch.Tensor
    ) -> torch.Tensor:
        parts = [] if inputs is None else [self._codes(inputs)]
        if start == 0:
            parts.insert(0, (condition + self.start_embed)[:, None])
        x = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return x + positions[start : start + x.shape[1]]

    def _codes(self, inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return self.code_embed(inputs.to(self.start_embed.dtype))

    def hidden(
        self,
        texts: Texts,
        inputs: torch.Tensor,
        *,
        subject: torch.Tensor | None = None,
        schedule: ScaleSchedule | None = None,
    ) -> torch.Tensor:
        """The normalised hidden states before the head (B, L', C); arguments as `forward`."""
        whole = self.schedule if schedule is None else self.config.check_schedule(schedule)
        visible, batch = self._teacher_forced(inputs, whole), len(inputs)
        features = self.features(texts)
        if len(features.lengths) != batch:
            raise ValueError(f"Infinity: texts: expected one per row of inputs ({batch}), got {len(features.lengths)}")
        if subject is not None:
            self.check_subject("Infinity", subject, batch)
        keep, dropped = self._dropped(batch, subject)
        if dropped is not None:
            text, place = row_indices(tuple(features.lengths), self.device)
            packed = torch.where(dropped[text, None], self.null_text[place], features.packed)
            features = features._replace(packed=packed)
        condition, modulations = self.read(features.packed, places(tuple(features.lengths), self.device))
        positions = self.token_positions(whole)
        x = self.embed(condition, inputs, 0, positions.added)
        prefix = None if subject is None else self.prefill(subject, keep, schedule=whole)
        return self.through(x, modulations, visible, rope=positions.rope_of(0, visible.num_tokens), prefix=prefix)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, n, C) to difference logits (B, n, d), float32 at least."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(self.device.type, enabled=False):
            if hidden.dtype == dtype:
                return self.head(hidden)
            return F.linear(hidden.to(dtype), self.head.weight.to(dtype), self.head.bias.to(dtype))

    def scored(self, hidden: torch.Tensor) -> Head:
        return Head(self.logits(hidden))  # few, and of the precision that autocast would take from a head

    def forward(
        self,
        texts: Texts,
        inputs: torch.Tensor,
        *,
        bits: torch.Tensor | None = None,
        temperature: float = 1.0,
        subject: torch.Tensor | None = None,
        schedule: ScaleSchedule | None = None,
    ) -> torch.Tensor | TokenLogProbs:
        """Logits of every bit given the true coarser scales, or log-probabilities of given bits.

        Args:
            texts: B of them, or their features.
            inputs: (B, L - 1, d), `BSQTokenizer.teacher_forcing` of the bits; those of the first m scales run the model
                on these scales alone.
            bits: (B, L', d), bool or integers 0 and 1.
            temperature: divides the logits of the log-probabilities; the one that the bits were sampled with.
            subject: (B / G, L, d), `pyramid` of the reference subjects' bits, each shared by G adjacent rows.
            schedule: the grids; the config's by default.

        Returns:
            without `bits` per bit the logit of 1 less that of 0, (B, L', d) float32; with them their `TokenLogProbs`,
            summed over a token's bits.

        In training mode texts and subjects are dropped at the config's rates.

        Raises:
            ValueError: arguments that do not fit, see also `features`.
        """
        hidden = self.hidden(texts, inputs, subject=subject, schedule=schedule)
        if bits is None:
            return self.logits(hidden)
        return token_log_probs(*self.scored(hidden), bits, temperature=temperature)

    # -- sampling ----------------------------------------------------------------------------------------------------

    def empty_tokens(self, batch: int) -> torch.Tensor:
        return torch.empty(batch, 0, self.config.bits, dtype=torch.bool, device=self.device)

    def sample(self, logits: torch.Tensor, **options: Any) -> SampledTokens:
        options["top_k"] = min(options["top_k"], 2)
        return SampledTokens(*sample_bits(logits, **options))

    def generate(
        self,
        texts: Texts | None = None,
        *,
        negative: Texts | None = None,
        subject: torch.Tensor | None = None,
        guidance: PerScale = 1.0,
        guidance_layer: int | None = None,
        temperature: PerScale = 1.0,
        top_k: int | Sequence[int] = 0,
        top_p: PerScale = 1.0,
        seed: int = 0,
        first_sample: int = 0,
        schedule: ScaleSchedule | None = None,
        stop: int | None = None,
        state: SamplingState | None = None,
        log_probs: bool = False,
        decode: bool = True,
        decode_dtype: torch.dtype | None = None,
        decode_tile: int | None = None,
        graphs: bool | None = None,
    ) -> Generation:
        """Sample images for texts, or continue a state; the model is to be in evaluation mode.

        Args:
            texts: B of them, or their features.
            negative: B texts to keep away from, in place of the one that says nothing; without guidance they do
                nothing.
            subject: (B / G, L, d), `pyramid` of the reference subjects' bits, each shared by G adjacent samples.
                Guidance contrasts with neither text nor subject.
            guidance: g in g conditional + (1 - g) unconditional, one number or one a scale: Infinity's `cfg`. 1 is no
                guidance, and if it is 1 for all scales the unconditional rows are not computed.
            guidance_layer: what guidance mixes. 0: the logits. n from 1 to depth - 1: the hidden states after block
                depth - n, counted from 0, as Infinity's -n; the blocks after it run on the mixture alone. None is 0, or
                the state's own.
            temperature: divides the logits, one number or one a scale: Infinity's `tau`.
            top_k, top_p: see `fastvar.ops.sample_bits`, one number or one a scale; of a bit any top_k above 1 keeps
                both values, as 0 does.
            schedule: the grids, see `fastvar.schedule.infinity_schedule`; the config's by default.
            log_probs: as `VAR.generate` has it; where guidance mixes hidden states, of the mixture.
            graphs: as `VAR.generate` has it. Texts are padded to a power of two of rows, so that a graph serves many
                prompts.
            seed, first_sample, stop, state, decode, decode_dtype, decode_tile: as `VAR.generate` has them.

        Returns:
            tokens (B, L', d) bool, images (B, 3, H, W) in [0, 1], log-probabilities (B, L') of tokens, summed over
            bits.

        Raises:
            ValueError: arguments that do not fit each other.
        """
        if state is None:
            schedule = self.schedule if schedule is None else self.config.check_schedule(schedule)
            guidance_layer = 0 if guidance_layer is None else guidance_layer
        else:
            if negative is not None:
                raise ValueError("generate: negative: expected None with a state, which has its own, got some")
            for name, own, given in (
                ("schedule", state.schedule, schedule),
                ("guidance_layer", state.guidance_layer, guidance_layer),
            ):
                if given is not None and given != own:
                    raise ValueError(f"generate: {name}: expected None or the state's own, {own}, got {given}")
            schedule, guidance_layer = state.schedule, state.guidance_layer
        depth = self.config.depth
        if not 0 <= guidance_layer < depth:
            raise ValueError(
                f"generate: guidance_layer: expected 0 to {depth - 1}, one less than blocks, got {guidance_layer}"
            )
        return sampling.generate(
            self,
            texts,
            state,
            name="texts",
            against=negative,
            subject=subject,
            schedule=schedule,
            guidance=guidance,
            guidance_layer=guidance_layer,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            first_sample=first_sample,
            stop=stop,
            log_probs=log_probs,
            decode=decode,
            decode_dtype=decode_dtype,
            decode_tile=decode_tile,
            graphs=graphs,
        )
