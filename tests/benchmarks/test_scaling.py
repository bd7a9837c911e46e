"""The cost model of docs/scaling.md against real models: parameters, operations, activations, cache."""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import report, scaling
from benchmarks.cases import OURS, Suite
from benchmarks.cluster import (
    Cluster,
    Plan,
    activations,
    all_reduce,
    cache,
    cycle,
    fit,
    gather,
    iteration,
    memory,
    rollout,
    work,
)
from benchmarks.costs import (
    ARCHITECTURES,
    GIB,
    RATES,
    Architecture,
    blocks,
    condition,
    forward,
    head,
    sampling,
    total,
    training,
    visible,
)
from benchmarks.records import append
from benchmarks.shapes import MODELS, ModelShape
from benchmarks.suites import generate, training_step, vmr_grpo_step
from fastvar.models import VAR, VARConfig, VQTokenizer, VQTokenizerConfig
from fastvar.models.autoencoder import Decoder
from fastvar.ops._operator import Operator

SHAPE = ModelShape("1,2,3x4", depth=3, width=32, heads=2, vocab_size=48, channels=8)
DECODERS: dict[str, tuple[int, tuple[int, ...], int, bool, int]] = {
    # channels, multipliers, latent channels, attention, side of the latent
    "VAR-d30": (160, (1, 1, 2, 2, 4), 32, True, 16),
    "Infinity-2B": (128, (1, 2, 4, 4, 4), 32, False, 64),
    "Infinity-8B": (128, (1, 2, 4, 4), 14, False, 128),
}


@pytest.fixture(autouse=True)
def _no_dense_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs attention of few tokens computes all pairs, unlike on GPUs."""
    monkeypatch.setattr("fastvar.kernels.block_causal_attention.impl_torch.DENSE", 0)


def real(model: Architecture, device: str = "cpu", **options: Any) -> VAR:
    """The VAR that an architecture describes, in evaluation mode; a small one has a small tokenizer."""
    shape = model.shape
    grids = shape.schedule.grids
    torch.manual_seed(0)
    with torch.device(device):
        config = VARConfig(
            grids=grids,
            depth=shape.depth,
            embed_dim=shape.width,
            num_heads=shape.heads,
            vocab_size=shape.vocab_size,
            code_channels=shape.channels,
            shared_adaln=model.shared_adaln,
            **options,
        )
        if device == "meta":
            return VAR(config)
        sizes: dict[str, Any] = {"channels": 8, "channel_multipliers": (1, 2), "blocks_per_level": 1, "norm_groups": 4}
        codes: dict[str, Any] = {"vocab_size": shape.vocab_size, "code_channels": shape.channels}
        return VAR(config, VQTokenizer(VQTokenizerConfig(grids=grids, **codes, **sizes))).eval()


def small(**options: Any) -> Architecture:
    return Architecture(SHAPE, middle=2, **options)


def operators() -> dict[str, Operator]:
    modules = (importlib.import_module(f"fastvar.ops.{name}") for name in ("block_causal_attention", *OTHER_MODULES))
    return {value.name: value for module in modules for value in vars(module).values() if isinstance(value, Operator)}


OTHER_MODULES = (
    *("adaptive_layer_norm", "cached_attention", "policy_loss", "qk_norm_rope", "residual_quantize"),
    *("sample_tokens", "token_log_probs"),
)


def product(_: Any, a: Any, b: Any, **__: Any) -> int:
    """Operations of an addmm_, which the counter does not know."""
    return 2 * a[0] * a[1] * b[1]


def products(q: Any, k: Any, *_: Any, **__: Any) -> int:
    """Operations of attention, two products of (B, H, n, D) and (B, H, N, D)."""
    return 4 * math.prod(q) * k[2]


def five_products(_: Any, q: Any, k: Any, *__: Any, **___: Any) -> int:
    """Of its backward pass: the scores again, and a gradient of each operand."""
    return 5 * products(q, k) // 2


ATEN = torch.ops.aten
KNOWN = {
    ATEN.addmm_: product,
    ATEN._scaled_dot_product_flash_attention_for_cpu: products,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: five_products,
}


def counted(call: Callable[[], Any]) -> Counter[str]:
    """Operations of a call by where they are made: "linears" outside of operators, or an operator's name. PyTorch's
    counter does not look into operators: each of them is run once more under a counter of its own, in a thread of its
    own, as autograd is off where the first counter works. Attention is made of products that a counter can see."""

    def inside(run: Callable[..., Any]) -> Callable[..., int]:
        def alone(args: Any) -> int:
            counter = FlopCounterMode(display=False, custom_mapping=KNOWN)
            with sdpa_kernel(SDPBackend.MATH), counter:
                run(*args)
            return counter.get_total_flops()

        def formula(*args: Any, out_val: Any = None, **_: Any) -> int:
            with ThreadPoolExecutor(1) as threads:
                return threads.submit(alone, args).result()

        formula._get_raw = True  # type: ignore[attr-defined]
        return formula

    mapping = {}
    for name, operator in operators().items():
        mapping[getattr(torch.ops.fastvar, name)] = inside(operator._run)
        if operator._function is not None:
            mapping[getattr(torch.ops.fastvar, f"{name}_backward")] = inside(operator._run_backward)
    with (
        torch.backends.mkldnn.flags(enabled=False),  # its fused linear layers are unknown to the counter
        FlopCounterMode(display=False, custom_mapping=mapping) as counter,
    ):
        call()
    found: Counter[str] = Counter()
    for op, flops in counter.get_flop_counts()["Global"].items():
        text = str(op)
        found[text.removeprefix("fastvar.") if text.startswith("fastvar.") else "linears"] += flops
    return found


def test_parameters() -> None:
    model = ARCHITECTURES["VAR-d30"]
    var = real(model, "meta")
    assert model.parameters == sum(p.numel() for p in var.parameters())
    assert model.shape.depth * model.block_parameters == sum(p.numel() for p in var.blocks.parameters())
    assert len(list(var.blocks.parameters())) == 12 * model.shape.depth
    for name in ("Infinity-2B", "Infinity-8B"):  # nearly all are matrices: with keys and values of the text 16 squares
        model = ARCHITECTURES[name]
        assert 1 < model.block_parameters / (16 * model.shape.width**2) < 1.001
        assert 0.95 < model.shape.depth * model.block_parameters / model.parameters < 1


@pytest.mark.parametrize("name", DECODERS)
def test_operations_of_decoding(name: str) -> None:
    channels, multipliers, latent, attention, side = DECODERS[name]
    with torch.device("meta"):
        decoder = Decoder(channels, multipliers, latent, attention=attention)
        features = torch.empty(1, latent, side, side)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        image = decoder(features)
    assert ARCHITECTURES[name].decoder_flops == counter.get_total_flops()
    assert ARCHITECTURES[name].decoder_bytes == 10 * multipliers[1] * channels * image[0, 0].numel()


@pytest.mark.parametrize("shared_adaln", [False, True])
@pytest.mark.parametrize("scales", [3, 2])
def test_operations_of_an_update(shared_adaln: bool, scales: int) -> None:
    model, rows = small(shared_adaln=shared_adaln), 3
    var = real(model)
    tokens, _ = visible(model, scales)
    drawn = torch.randint(SHAPE.vocab_size, (rows, tokens))
    inputs = torch.randn(rows, tokens - 1, SHAPE.channels)

    def update() -> None:
        var(torch.tensor([0, 1, 5]), inputs, tokens=drawn).log_probs.sum().backward()

    found = counted(update)
    ahead, back = training(model, rows, scales)
    # the first token of a row is no code
    not_embedded = 2 * 2 * rows * SHAPE.channels * SHAPE.width
    assert found["linears"] == (ahead + back).work["linears"][0] - not_embedded
    assert found["block_causal_attention"] == ahead.work["attention"][0]
    # kernels save no scores: five products
    assert found["block_causal_attention_backward"] == back.work["attention"][0] == 2.5 * ahead.work["attention"][0]
    padded = -(-rows * tokens // 16) * 16  # the reference pads its rows to a multiple of 16
    logits = head(model, padded).flops
    assert found["token_log_probs"] == logits and found["token_log_probs_backward"] == 3 * logits
    # in all within five per cent, at a size where the padding matters more than at any real one
    assert sum(found.values()) == pytest.approx((ahead + back).flops, rel=0.05)


def test_operations_of_a_prefix() -> None:
    model, rows, groups = small(), 4, 2
    var = real(model, subject="block_causal")
    inputs = torch.randn(rows, model.tokens - 1, SHAPE.channels)
    prefixes = torch.randn(groups, model.tokens, SHAPE.channels)
    with torch.no_grad():
        found = counted(lambda: var.hidden(torch.tensor([0, 1, 5, 2]), inputs, subject=prefixes))
    expected = forward(model, rows, 3, groups).work
    assert found["linears"] == expected["linears"][0] - 2 * rows * SHAPE.channels * SHAPE.width
    assert found["block_causal_attention"] == expected["attention"][0]


def test_operations_of_recomputed_blocks() -> None:
    model, rows = small(), 3
    var = real(model)
    tokens, pairs = visible(model, 3)
    inputs, drawn = torch.randn(rows, tokens - 1, SHAPE.channels), torch.zeros(rows, tokens, dtype=torch.int64)

    def update() -> None:
        var(torch.tensor([0, 1, 5]), inputs, tokens=drawn).log_probs.sum().backward()

    plain = counted(update)
    var.gradient_checkpointing = True
    again = counted(update)["linears"] - plain["linears"]
    embedded = 2 * rows * tokens * SHAPE.channels * SHAPE.width  # outside of the blocks
    assert again == blocks(model, rows, tokens, pairs, 0).work["linears"][0] - embedded
    more, less = (training(model, rows, 3, checkpointing)[1] for checkpointing in (True, False))
    assert more.flops - less.flops == blocks(model, rows, tokens, pairs, 0).flops


@pytest.mark.parametrize("guided", [False, True])
def test_operations_of_sampling(guided: bool) -> None:
    model, images = small(), 2
    var = real(model)
    guidance = 1.5 if guided else 0.0
    labels = torch.tensor([0, 1])
    rows = images * (2 if guided else 1)
    first = 2 * rows * SHAPE.channels * SHAPE.width  # the first token is no code

    found = counted(lambda: var.generate(labels, guidance=guidance, decode=False))
    expected = total(sampling(model, rows))
    assert found["linears"] == expected.work["linears"][0] + expected.work["head"][0] - first
    assert found["cached_attention"] == expected.work["attention"][0]
    # what is left are the tokenizer's convolutions between the scales
    assert sum(found.values()) == pytest.approx(expected.flops, rel=0.05)

    coarse = var.generate(labels, guidance=guidance, stop=2, decode=False)
    forked = counted(lambda: var.generate(state=coarse.state.fork(3), guidance=guidance, decode=False))
    expected = total(sampling(model, 3 * rows, 2, forks=3))
    assert forked["linears"] == expected.work["linears"][0] + expected.work["head"][0]
    assert forked["cached_attention"] == expected.work["attention"][0]


def test_condition_and_scales_add_up_to_a_forward_pass() -> None:
    for model in ARCHITECTURES.values():
        full = len(model.shape.schedule)
        drawn, seen = total(sampling(model, 2)), forward(model, 2, full) + head(model, 2 * model.tokens)
        assert drawn.flops == pytest.approx(seen.flops, rel=1e-12)
        assert condition(model, 2).flops < 0.02 * drawn.flops


def test_saved_activations() -> None:
    """Under bf16 autocast, each tensor once; what does not grow with the batch is weights."""
    model = Architecture(ModelShape("1,2,3,4,5,6", depth=6, width=64, heads=2, vocab_size=48, channels=8))
    var = real(model)

    def saved(rows: int) -> int:
        storages: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        inputs, labels = torch.randn(rows, model.tokens - 1, 8), torch.zeros(rows, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            result = var.hidden(labels, inputs)
            del result
        return sum(storage.nbytes() for storage in storages.values())

    assert saved(12) - saved(4) == pytest.approx(activations(model, 8, False), rel=0.05)
    var.gradient_checkpointing = True
    # the block that is being recomputed is not there yet
    one_block = activations(model, 8, False) / model.shape.depth
    assert saved(12) - saved(4) == pytest.approx(activations(model, 8, True) - one_block, rel=0.25)


def test_cache() -> None:
    model = small()
    var = real(model).to(torch.bfloat16)
    out = var.generate(torch.tensor([0, 1]), stop=model.middle, decode=False)
    forked = out.state.fork(3).cache
    assert out.state.cache.nbytes == 2 * model.coarse_tokens * model.cache_bytes
    forked.reserve(model.tokens - model.coarse_tokens)
    assert forked.nbytes == 6 * (model.tokens - model.coarse_tokens) * model.cache_bytes
    assert out.state.cache.nbytes + forked.nbytes == cache(model, Plan(chunk=6, continuations=3, guided=False))


def test_communication() -> None:
    assert gather(1e9, 1, 1) == all_reduce(1e9, 1) == (0.0, 0.0)
    assert gather(8e9, 0, 8) == (7e9, pytest.approx(7e9 / RATES.nvlink))
    assert all_reduce(8e9, 8).bytes == 14e9 and all_reduce(8e9, 8).seconds > 2 * gather(8e9, 0, 8).seconds
    # a node takes it in by all of its ports
    assert gather(8e9, 0, 16).seconds == pytest.approx(7.5e9 / (8 * RATES.network))
    model, plan = ARCHITECTURES["Infinity-2B"], Plan()
    coarse, fine = (iteration(model, plan, Cluster(8, True), segment) for segment in ("coarse", "fine"))
    layers = 7 / 8 * 4 * model.shape.depth * model.block_parameters
    # two passes over all scales or one, the reference, forward and backward, gradients
    assert coarse.received == pytest.approx((13 + 1 + 2) * layers + 7 / 8 * 4 * model.parameters)
    assert fine.received == coarse.received


def test_memory() -> None:
    model, plan = ARCHITECTURES["VAR-d30"], Plan()
    alone, ddp, fsdp = (memory(model, plan, place) for place in (Cluster(), Cluster(8), Cluster(8, True)))
    assert alone.weights == alone.gradients == ddp.buckets == 4 * model.parameters and ddp.gradients == 0
    assert fsdp.optimizer == alone.optimizer / 8 and fsdp.copies == alone.copies / 8
    assert memory(model, Plan(micro_batch=8), Cluster(8, True)).gradients == alone.gradients
    for place in (Cluster(8), Cluster(64, True)):
        found = fit(model, place, plan)
        assert found is not None and memory(model, found, place).peak <= RATES.usable * RATES.capacity


def test_cycle() -> None:
    model, plan = ARCHITECTURES["VAR-d30"], Plan()
    coarse, fine = (iteration(model, plan, Cluster(), segment) for segment in ("coarse", "fine"))
    whole = cycle(model, plan, Cluster())
    assert whole.total == pytest.approx(3 * coarse.total + fine.total) and coarse.seconds["waiting"] == 0.0
    assert whole.seconds["update"] == 3 * coarse.seconds["update"] + fine.seconds["update"] and whole.received == 0.0
    sharded = [cycle(model, plan, Cluster(gpus, True)).total for gpus in (8, 64, 1024)]
    assert sharded == sorted(sharded)


def test_micro_batches_are_the_same_work() -> None:
    model = ARCHITECTURES["Infinity-2B"]
    for segment in ("coarse", "fine"):
        once, parts = (work(model, Plan(micro_batch=size, chunk=2 * size), segment) for size in (16, 4))
        for part in ("rollout", "decoding", "reference", "update"):
            assert total(parts[part]).flops == pytest.approx(total(once[part]).flops, rel=0.01)
            assert total(parts[part]).bytes >= total(once[part]).bytes


def share_of_one_gpu(model: Architecture, gpus: int) -> float:
    """The rate of the paper's 256 segments under DDP, in units of that of one GPU."""
    seconds = []
    for count in (1, gpus):
        plan = fit(model, Cluster(count), Plan(segments=256 // count))
        assert plan is not None
        seconds.append(cycle(model, plan, Cluster(count)).total)
    return seconds[0] / gpus / seconds[1]


def test_what_the_document_concludes() -> None:
    d30, two, eight = ARCHITECTURES.values()
    plan, counts = Plan(), scaling.COUNTS
    assert (RATES.matmul, RATES.attention, RATES.convolution) == (790e12, 0.6 * 790e12, 0.5 * 790e12)
    assert (RATES.bandwidth, RATES.nvlink, RATES.network) == (0.8 * 4.8e12, 0.8 * 450e9, 0.8 * 50e9)
    assert (RATES.capacity, RATES.usable, RATES.node) == (139 * GIB, 0.9, 8)
    assert (RATES.hop, RATES.reward) == (2e-6, 0.01)
    # memory
    for model in (d30, two, eight):
        found = memory(model, Plan(micro_batch=1), Cluster(8))
        assert found.kept == 26 * model.parameters and found.kept + found.gradients == 30 * model.parameters
    assert 4.4e9 < RATES.capacity * RATES.usable / 30 < RATES.capacity * RATES.usable / 26 < 5.2e9
    assert all(fit(model, Cluster(gpus), plan) for model in (d30, two) for gpus in counts)
    assert not any(fit(eight, Cluster(gpus), plan) for gpus in counts)
    least = memory(eight, scaling.SMALLEST, Cluster(8, True))
    assert round(8 * least.copies / GIB) == 62 and least.peak + 7 * least.copies > RATES.capacity * RATES.usable
    assert fit(eight, Cluster(8, True), plan) == replace(plan, micro_batch=4, chunk=4, checkpointing=True)
    # seconds and bytes
    for place in (Cluster(8), Cluster(1024)):
        sharded = cycle(d30, plan, replace(place, sharded=True)).total
        assert 1.25 < sharded / cycle(d30, plan, place).total < 3.15
        assert cycle(d30, plan, place).share("waiting") < 0.065
    chosen = fit(two, Cluster(64, True), plan)
    assert chosen is not None
    sharded, whole = (cycle(two, chosen, place) for place in (Cluster(64, True), Cluster(64)))
    assert round(sharded.received / 1e12, 1) == 1.9 and round(whole.received / 1e9) == 69
    assert 0.6 < sharded.share("rollout") < whole.share("rollout") < 0.67 and sharded.share("waiting") < 0.1
    layers = gather(4 * two.shape.depth * two.block_parameters, two.shape.depth, 1024).seconds
    assert 1023 * two.shape.depth * RATES.hop > layers / 2
    assert max(cycle(d30, plan, Cluster()).seconds, key=cycle(d30, plan, Cluster()).share) == "reward"
    assert [round(100 * share_of_one_gpu(two, 64))] == [97]
    assert [round(100 * share_of_one_gpu(d30, gpus)) for gpus in (8, 64)] == [96, 63]
    # what saves
    assert (d30.coarse_tokens, d30.tokens, two.coarse_tokens, two.tokens) == (30, 680, 521, 10521)
    for model in (d30, two, eight):
        own = scaling.planned(model, Cluster(64, True))
        coarse, fine = (sum(job.seconds for job in work(model, own, part)["update"]) for part in ("coarse", "fine"))
        assert 8 < fine / coarse < 35.5
        guided, plain = (rollout(model, replace(own, guided=guided), "coarse") for guided in (True, False))
        assert sum(job.seconds for job in guided) / sum(job.seconds for job in plain) > 1.95
        assert 0.04 < model.coarse_tokens / model.tokens < 0.05
        assert round(cache(model, Plan(chunk=8)) / (8 * 2 * model.cache_bytes * model.tokens), 2) in (0.97, 0.98)
        found = scaling.savings(model, plan)
        assert all(0.015 < 1 - 1 / found[f"{segment} rollout"] < 0.045 for segment in ("coarse", "fine"))
        assert 0.36 <= round(1 - 1 / found["subject update"], 2) <= 0.45
        assert all(0.325 < 1 - 1 / found[f"{segment} iteration"] < 0.645 for segment in ("coarse", "fine"))


# So many rows that the head pads none, which the model leaves out.
SETTING = {"model": "tiny", "middle": 2, "prompts": 2, "group_size": 8, "dtype": "float32", "size": "tiny"}
PREDICTED = [case for case in vmr_grpo_step.CASES if case != "micro-batches"]  # which saves memory alone


@pytest.mark.parametrize("case", PREDICTED)
def test_savings(case: str, row: Any) -> None:
    """Operations of the suite's contenders, at a size where little is saved and padding matters."""
    setting = {"case": case, **SETTING}
    problem = vmr_grpo_step.build(setting, torch.device("cpu"))
    with torch.no_grad():
        ours, without = (sum(counted(problem.contenders[name]).values()) for name in (OURS, "without"))  # type: ignore[arg-type]
    text = scaling.savings_table([row("vmr_grpo_step", setting=setting, ratios={"without": MEASURED})])
    predicted, measured = text.splitlines()[-1].split(" | ")[-2:]
    assert measured == "1.50 (1.25 to 2.00) |" and float(predicted) == pytest.approx(without / ours, rel=0.05)


MEASURED = {"median": 1.5, "low": 1.25, "high": 2.0}


def test_recorded_steps(row: Any) -> None:
    model = Architecture(MODELS["VAR-d16"])
    step, drawn = total(training(model, 2, 10)).flops, total(sampling(model, 4)).flops
    unknown = row("training_step", setting={"model": "of the future", "batch": 2, "dtype": "float32", "size": "gpu"})
    rows = [row("training_step", ours=100.0), unknown, row("generate", ours=1.0, peaks=None), row("sample_tokens")]
    text = scaling.steps_table(rows)
    names = "| training_step | VAR-d16, batch 2, float32 | a CPU, 2026-11-21 "
    numbers = f"| {scaling.number(step / 1e12)} | {scaling.number(step / 1e11)} | 100 | {1e13 / step:.2f} |"
    assert text.splitlines()[2:] == [names + numbers, "| generate | no row yet |  |  |  |  |  |"]
    setting = {"grids": "1,2,3", "depth": 2, "width": 64, "batch": 2, "dtype": "float32", "size": "cpu"}
    text = scaling.steps_table([row("generate", setting=setting)])
    assert "| grids 1,2,3, depth 2, width 64, batch 2, float32 |" in text
    assert f"| {scaling.number(drawn / 1e12)} |" in scaling.steps_table([row("generate")])


def test_unknown_savings_are_left_out(row: Any) -> None:
    settings = [{"case": case, **SETTING} for case in ("micro-batches", "of the future")]
    settings += [{"case": "coarse update", **SETTING, **new} for new in ({"middle": 9}, {"model": "new"})]
    settings += [{key: value for key, value in settings[-1].items() if key != missing} for missing in ("case", "model")]
    rows = [row("vmr_grpo_step", setting=setting, ratios={"without": MEASURED}) for setting in settings]
    rows.append(row("vmr_grpo_step", setting={"case": "coarse update", **SETTING}))
    assert scaling.savings_table(rows).splitlines()[2:] == ["| vmr_grpo_step | no row yet |  |  |  |"]


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_no_setting_of_the_suites_is_left_out(row: Any, size: Any) -> None:
    def rows(suite: Suite) -> list[dict[str, Any]]:
        settings = [{**setting, "size": size} for setting in suite.settings[size]]
        return [row(suite.name, setting=setting, ratios={"without": MEASURED}) for setting in settings]

    cases, steps = rows(vmr_grpo_step.SUITE), [*rows(training_step.SUITE), *rows(generate.SUITE)]
    steps = [found for found in steps if "Infinity" not in found["setting"].get("model", "")]
    known = [found for found in cases if found["setting"]["case"] in PREDICTED]
    assert scaling.savings_table(cases).count("| vmr_grpo_step |") == len(known) > 6
    assert len(scaling.steps_table(steps).splitlines()) == 2 + len(steps)


def test_newest_rows_of_both_places(row: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "ROWS", tmp_path / "rows.jsonl")
    text = scaling.DOCUMENT.read_text()
    assert scaling.with_tables(text).count("no row yet") == 3
    cpu = {"model": "VAR-d16", "batch": 1, "dtype": "float32", "size": "cpu"}
    gpu = {"model": "VAR-d16", "batch": 8, "dtype": "bfloat16", "size": "gpu"}
    for setting, seconds in ((cpu, 7.0), (cpu, 8.0), (gpu, 9.0)):
        append(report.ROWS, row("generate", setting=setting, ours=seconds))
    text = scaling.with_tables(text)
    assert "| 8.00 |" in text and "| 9.00 |" in text and "| 7.00 |" not in text and text.count("no row yet") == 2


def test_document_has_the_tables() -> None:
    """Those about recorded rows too: after new ones, run python -m benchmarks.scaling."""
    text = scaling.DOCUMENT.read_text()
    assert scaling.with_tables(text) == text
