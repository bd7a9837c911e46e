"""The VAR transformer: next-scale prediction of visual tokens, optionally after the prefix of a reference subject."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastvar.models import sampling
from fastvar.models.linear import Linear
from fastvar.models.next_scale import NextScaleModel, Positions
from fastvar.models.sampling import Generation, PerScale, SamplingState, per_scale
from fastvar.models.var_block import Block, Modulations, attend_in_two_streams, attend_to_scales
from fastvar.models.var_config import VARConfig
from fastvar.models.vq_tokenizer import VQTokenizer
from fastvar.ops import (
    CrossEntropy,
    PrefixKV,
    SampledTokens,
    TokenLogProbs,
    cross_entropy,
    sample_tokens,
    token_log_probs,
)
from fastvar.ops._numbers import on_device
from fastvar.ops.token_log_probs import Head
from fastvar.ranges import GUIDANCE
from fastvar.schedule import ScaleSchedule

Labels = torch.Tensor | Sequence[str]


def guidance_per_scale(guidance: PerScale, num_scales: int) -> tuple[float, ...]:
    """The weight t_k of each scale in (1 + t_k) conditional - t_k unconditional.

    A number g grows linearly, t_k = g k / (K - 1), as VAR samples (g itself if K = 1); a sequence of K numbers is taken
    as it is, an array or a tensor of them too.
    """
    weights = per_scale("guidance", guidance, num_scales, GUIDANCE)
    if isinstance(guidance, Sequence) or getattr(guidance, "ndim", 0) > 0:
        return weights
    return tuple(g * (k / (num_scales - 1) if num_scales > 1 else 1.0) for k, g in enumerate(weights))


class VAR(NextScaleModel[VQTokenizer]):
    """Next-scale prediction over the tokens of a `VQTokenizer`; the streams of images and subjects are those of
    `NextScaleModel`.

    Args:
        config: the shape.
        tokenizer: needed by `generate` alone. It is not a submodule: it has no part in this module's parameters and
            state dict, but follows its device.
    """

    config_class = VARConfig
    tokenizer_class = VQTokenizer
    agreed = ("grids", "vocab_size", "code_channels")
    no_guidance, guidance_range = 0.0, GUIDANCE
    config: VARConfig
    blocks: Sequence[Block]
    scale_index: torch.Tensor

    def __init__(self, config: VARConfig, tokenizer: VQTokenizer | None = None) -> None:
        super().__init__()
        self.config = config
        self.schedule = config.schedule
        width = config.embed_dim
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
        named = self.named_parameters()
        self._initialise(
            p for name, p in named if name.endswith("_condition") or ("embed" in name and not name.endswith("bias"))
        )
        self._attach(tokenizer)

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

    def encode(self, prompts: Labels, against: Any = None) -> torch.Tensor:
        """Labels as `indices`; there is nothing else to keep away from than no condition."""
        return self.indices(prompts)

    def count(self, encoded: torch.Tensor) -> int:
        return len(encoded)

    def batches(self, prompts: Labels, size: int) -> list[torch.Tensor]:
        indices = self.indices(prompts)
        return list(indices.split(size)) if len(indices) else []

    def take(self, batch: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        return batch.index_select(0, on_device(tuple(rows), torch.int64, batch.device))

    def begin(self, encoded: torch.Tensor, *, guided: bool) -> tuple[torch.Tensor, Modulations]:
        condition = self.condition(encoded)
        if guided:
            condition = torch.cat([condition, self.no_condition(len(condition))])
        return condition, self.modulations(condition)

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

    def token_positions(self, schedule: ScaleSchedule) -> Positions:
        return Positions(self.positions(0, schedule.num_tokens), None)

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

    def _subject_modulations(self, rows: int) -> Modulations:
        return self.modulations(self.subject_condition.expand(rows, 1, -1))

    @torch.no_grad()
    def _start_subject(self) -> None:
        self.subject_condition.copy_(self.no_condition(1)[0, 0])

    # -- teacher forcing ---------------------------------------------------------------------------------------------

    def hidden(self, labels: Labels, inputs: torch.Tensor, *, subject: torch.Tensor | None = None) -> torch.Tensor:
        """The normalised hidden states before the head (B, L', C); arguments as `forward`.

        The fused log-probabilities and losses take these and `head`, so that (B, L, V) logits never exist.
        """
        schedule, batch = self._teacher_forced(inputs, self.schedule), inputs.shape[0]
        condition = self.condition(labels)
        if condition.shape[0] != batch:
            raise ValueError(f"VAR: labels: expected one per row of inputs ({batch}), got {condition.shape[0]}")
        if subject is not None:
            self.check_subject("VAR", subject, batch)
        keep, dropped = self._dropped(batch, subject)
        if dropped is not None:
            condition = torch.where(dropped[:, None, None], self.no_condition(batch), condition)
        x = self.embed(condition, inputs)
        if subject is not None and x.shape[1] == self.injection(self.schedule).visible.num_tokens:
            return self._hidden_of_two_streams(x, condition, schedule, subject, keep)
        prefix = None if subject is None else self.prefill(subject, keep)
        return self.through(x, self.modulations(condition), schedule, prefix=prefix)

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
        first, subject_schedule, _ = self._subject_stream(subject)
        rows = len(first)
        lengths = None if keep is None else keep.to(torch.int32) * first.shape[1]
        modulations = self.modulations(torch.cat([self.subject_condition.expand(rows, 1, -1), condition[:, :1]]))
        x = torch.cat([first, x])
        by_scale = self.injection(self.schedule).by_scale
        attend = attend_in_two_streams(schedule, subject_schedule, rows, lengths, by_scale=by_scale)
        *blocks, last = zip(self.blocks, modulations.blocks, modulations.biases, strict=True)
        for block, modulation, bias in blocks:
            x = self._run(block, x, modulation, attend, bias)
        block, modulation, bias = last  # of the subjects it gives keys and values alone
        (first, x), (of_first, of_images) = (t.split([rows, len(t) - rows]) for t in (x, modulation))
        k, v, _ = block.keys_and_values(first, of_first, bias)
        if self.gradient_checkpointing or not torch.is_grad_enabled():
            k, v = k.contiguous(), v.contiguous()  # as in `prefill`
        attend = attend_to_scales(schedule, PrefixKV(k, v, lengths), by_scale=by_scale)
        x = self._run(block, x, of_images, attend, bias)
        return self.before_head(x, modulations._replace(head=modulations.head[rows:]))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden)

    def scored(self, hidden: torch.Tensor) -> Head:
        return Head(hidden, self.head.weight, self.head.bias)

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
            subject: (B / G, L, code_channels), `pyramid` of the reference subjects' tokens, each shared by G adjacent
                rows.
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
            return self.logits(hidden).float()
        if label_smoothing is not None:
            head = self.scored(hidden)
            return cross_entropy(*head, tokens, label_smoothing=label_smoothing, weights=token_weights)
        return token_log_probs(*self.scored(hidden), tokens, temperature=temperature)

    # -- sampling ----------------------------------------------------------------------------------------------------

    def empty_tokens(self, batch: int) -> torch.Tensor:
        return torch.empty(batch, 0, dtype=torch.int64, device=self.device)

    def sample(self, logits: torch.Tensor, **options: Any) -> SampledTokens:
        return sample_tokens(logits, **options)

    def generate(
        self,
        labels: Labels | None = None,
        *,
        subject: torch.Tensor | None = None,
        guidance: PerScale = 0.0,
        temperature: PerScale = 1.0,
        top_k: int | Sequence[int] = 0,
        top_p: PerScale = 1.0,
        seed: int = 0,
        first_sample: int = 0,
        stop: int | None = None,
        state: SamplingState | None = None,
        log_probs: bool = False,
        decode: bool = True,
        decode_dtype: torch.dtype | None = None,
        decode_tile: int | None = None,
        graphs: bool | None = None,
    ) -> Generation:
        """Sample images for labels, or continue a state; the model is to be in evaluation mode.

        Args:
            labels: (B,) class indices or names, or texts, or characters (B, text_length).
            subject: (B / G, L, C), `pyramid` of the reference subjects' tokens, each shared by G adjacent samples.
                Guidance contrasts with neither condition nor subject.
            guidance: classifier-free guidance, one number, which grows over the scales, or one a scale: see
                `guidance_per_scale`; 0 runs the conditional rows alone.
            temperature, top_k, top_p: see `fastvar.ops.sample_tokens`, one number or one a scale; 0 and 1 switch top_k
                and top_p off.
            seed: of the run. Sample i depends on (seed, first_sample + i) and its label, not on the batch it is in.
            first_sample: index of the first sample, to draw a large set in several batches.
            stop: stop before this scale (1 to K); the state continues from there. K by default.
            state: continue this state instead of starting from labels; it is consumed (fork it to keep it). Guidance
                can only be kept if it was on before.
            log_probs: also return log-probabilities of the tokens drawn; with a state only if it has them for its
                tokens.
            decode: whether to decode the feature map to images.
            decode_dtype: what to decode in, see `VQTokenizer.decode_features`; by default bfloat16 if that is the dtype
                of the model's weights, else that of the tokenizer's. Pictures decoded in bfloat16 differ a little from
                those in float32, which torch.float32 gives with a tokenizer of float32 weights.
            decode_tile: decode in tiles of so many cells of the feature map a side, where memory is short, see
                `VQTokenizer.decode_features`; None for the whole picture at once.
            graphs: sample by a CUDA graph, which spares the launches of a few thousand small kernels an image; the
                tokens are the same. None takes one where it can: on a GPU, in evaluation mode, from the second call
                with the same shapes and options on; True takes one at once, or raises; False does not. See
                `fastvar.models.graphs` for what is captured apart, and for how much memory it may take.

        Raises:
            ValueError: arguments that do not fit each other.
        """
        return sampling.generate(
            self,
            labels,
            state,
            name="labels",
            subject=subject,
            schedule=self.schedule,
            guidance=guidance_per_scale(guidance, len(self.schedule)),
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
