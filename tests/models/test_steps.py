"""What a step asks of a device: how many operators, and never to wait for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastvar.models import VAR, SamplingOptions, TextFeatures, bitwise_loss, scale_weights
from fastvar.models.linear import linear
from fastvar.models.var_block import attend_to_scales
from fastvar.ops import bitwise_residual_quantize
from fastvar.rl import LossOptions, Prompts, roll_out, segment_loss
from fastvar.training import TokenizerTask, VARTask
from tests.helpers.tiny import some_subjects, some_tokens, tiny_var
from tests.helpers.waits import GPU, Waits, fake_infinity, run_without_waiting
from tests.models.test_var_sampling import LABELS

VIEWS = {"alias", "detach", "empty", "expand", "select", "slice", "split", "t", "transpose", "unbind", "unsqueeze"}
VIEWS |= {"_unsafe_view", "device", "empty_like", "permute", "split_with_sizes", "view"}


class Launches(TorchDispatchMode):
    """Counts the operators inside that are more than a view."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(count for name, count in self.counts.items() if name not in VIEWS)


def launches(depth: int, **options: Any) -> Launches:
    var = tiny_var(depth=depth)
    with torch.backends.mkldnn.flags(enabled=False), Launches() as found:
        var.generate(LABELS, guidance=1.5, decode=False, **options)
    return found


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_launches_of_a_block_and_of_a_scale() -> None:
    """A block is four products, attention and what comes before it, and two fused norms; a GELU that is not in its
    product's epilogue, as on GPUs, is one more. The model has three scales."""
    one, two = launches(1), launches(2)
    block = two.total - one.total
    assert block <= 3 * (4 + 2 + 2 + 1) + 3, two.counts - one.counts  # and its modulation, once
    scale = one.total - launches(1, stop=2).total - 9
    assert scale <= 7, one.counts
    assert one.total - block - 3 * scale <= 19, one.counts
    assert launches(2, log_probs=True).total <= two.total + 3


def test_two_streams_take_the_launches_of_one() -> None:
    """Subjects are more rows of the images' launches. A block attends twice and puts the results together; before the
    first block the rows are put together, in the last one the subjects' keys and values are made apart."""
    counts = []
    for subject in (False, True):
        for depth in (2, 3):
            var = tiny_var(depth=depth, subject="block_causal")
            tokens = some_tokens(var, 4)
            options = {"subject": some_subjects(var, 2)} if subject else {}
            inputs = var.tokenizer.teacher_forcing(tokens)
            with torch.backends.mkldnn.flags(enabled=False), torch.no_grad(), Launches() as found:
                var.hidden(torch.arange(4), inputs, **options)
            counts.append(found.total)
    one, one_more, two, two_more = counts
    assert two_more - two <= one_more - one + 2, counts
    assert two - one <= 2 + 15, counts


def test_two_streams_are_prefill_and_images() -> None:
    """Rows of one tensor or one stream after the other, it is the same."""
    for kind in ("block_causal", "bidirectional"):
        var = tiny_var(depth=3, subject=kind)
        inputs, subjects = var.tokenizer.teacher_forcing(some_tokens(var, 4)), some_subjects(var, 2)
        x, modulations = (
            var.embed(var.condition(torch.arange(4)), inputs),
            var.modulations(var.condition(torch.arange(4))),
        )
        for block, modulation, prefix in zip(var.blocks, modulations.blocks, var.prefill(subjects), strict=True):
            x = block(x, modulation, attend_to_scales(var.schedule, prefix))
        found = var.hidden(torch.arange(4), inputs, subject=subjects)
        torch.testing.assert_close(found, var.before_head(x, modulations), rtol=1e-5, atol=1e-5)


def test_gelu_is_in_the_epilogue_on_a_gpu() -> None:
    """On CUDA, where it is the tanh approximation."""

    with FakeTensorMode(), torch.no_grad():
        x, weight, bias = (torch.empty(shape, device=GPU) for shape in ((2, 5, 16), (8, 16), (8,)))
        with Launches() as found:
            assert linear(x, weight, bias, gelu=True).shape == (2, 5, 8)
    assert found.total == found.counts["_addmm_activation"] == 1, found.counts


@pytest.mark.parametrize("subject", ["none", "block_causal"])
def test_sampling_waits_for_nothing(subject: str) -> None:
    def call(var: VAR) -> None:
        pyramids = None
        if subject != "none":
            pyramids = var.tokenizer.pyramid(torch.zeros(2, 14, dtype=torch.int64, device=GPU))
        options: dict[str, Any] = {"guidance": 1.5, "top_k": 5, "top_p": 0.9, "log_probs": True}
        labels = torch.arange(4, device=GPU)
        state = var.generate(labels, subject=pyramids, stop=2, **options).state
        assert var.generate(state=state.fork(2), **options).images.shape == (8, 3, 6, 6)

    assert run_without_waiting(call, subject=subject) > 100


@pytest.mark.parametrize(
    ("message", "wait"),
    [
        ("copy from cpu to cuda:0", lambda x: x[[1, 0]]),
        ("index by indices on the host", lambda x: x[torch.tensor([1, 0])]),
        ("index by a mask", lambda x: x[x > 0]),
        ("copy from cpu to cuda:0", lambda x: x + torch.ones(3).to(x.device)),
        ("copy from cpu to cuda:0", lambda x: torch.tensor([1, 2], device=x.device)),
        ("copy from cuda to cpu", lambda x: x.cpu()),
        ("_local_scalar_dense", lambda x: x.sum().item()),
        ("_local_scalar_dense", lambda x: bool(x.any())),
        ("nonzero", lambda x: x.nonzero()),
    ],
)
def test_a_wait_is_found(message: str, wait: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(AssertionError, match=message):
        run_without_waiting(lambda var: wait(torch.ones(3, device=GPU)))


def test_training_waits_for_nothing() -> None:
    def call(var: VAR) -> None:
        task = object.__new__(VARTask)  # what it notes of the model for the run's settings cannot be read of a fake
        task.model, task.label_smoothing, task.token_weights = var.train(), 0.1, torch.ones(14, device=GPU)
        images = torch.zeros(4, 3, 6, 6, device=GPU)
        batch = {"image": images, "reference": images[:2], "label": torch.arange(4, device=GPU)}
        task.loss(var, batch)
        tokenizer = var.tokenizer.requires_grad_(True).train()
        TokenizerTask(tokenizer).loss(tokenizer, batch)

    assert run_without_waiting(call, subject="block_causal") > 100


@pytest.mark.parametrize("segment", ["whole", "coarse", "fine"])
def test_rollouts_and_their_losses_wait_for_nothing(segment: Any) -> None:
    def call(var: VAR) -> None:
        prompts = Prompts(["a", "b"], torch.arange(2, device=GPU))
        drawn = roll_out(
            var, prompts, segment=segment, group_size=3, middle=1, continuations=2, seed=1,
            options=SamplingOptions(guidance=1.0, batch_size=4),
        )  # fmt: skip
        options, reference = LossOptions(kl_weight=0.1), var.clone()
        for rows in (None, [0, 2, 5]):
            old = drawn.log_probs
            advantages = torch.zeros(6, device=GPU)
            totals = torch.ones(len(var.schedule.with_num_tokens(old.shape[1])), device=GPU)
            others = {"mask_totals": totals, "old_log_probs": old, "reference": reference}
            mask = torch.ones_like(old)
            found = segment_loss(var, drawn, advantages, options, rows=rows, mask=mask, **others)
            assert found.loss.device == GPU

    assert run_without_waiting(call) > 100


def test_infinity_waits_for_nothing() -> None:
    """A forward pass of training with flips, and sampling, for texts of lengths that were not seen before; what is kept
    for a schedule is made first."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        net = fake_infinity(((1, 1), (1, 7)))

        def texts(*lengths: int) -> TextFeatures:
            return TextFeatures(torch.zeros(sum(lengths), 12, device=GPU), lengths)

        features = torch.zeros(3, 8, 1, 7, device=GPU)
        net(texts(1, 1, 1), torch.zeros(3, 7, 8, device=GPU))
        with Waits() as waits:
            found = bitwise_residual_quantize(features, net.schedule, flip_probability=[0.25, 0.1])
            logits = net.train()(texts(3, 1, 2), found.teacher_forcing)
            bitwise_loss(logits, found.bits, scale_weights(net.schedule, GPU))
            state = net.eval().generate(texts(2, 5), guidance=1.5, top_p=0.9, stop=1).state
            assert net.generate(state=state.fork(2), guidance=1.5).images.shape == (4, 3, 2, 14)
    assert waits.calls > 100
