"""The tables of docs/scaling.md: `python -m benchmarks.scaling` writes them between their markers.

The cost model is in `benchmarks.costs` (one device) and `benchmarks.cluster` (several). Here it is also held against
the newest recorded rows; those of settings that it does not know are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, product
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import records, report
from benchmarks.cases import OURS, Setting, setting_name
from benchmarks.cluster import SEGMENTS, Cluster, Memory, Plan, cycle, fit, memory, rollout, work
from benchmarks.costs import ARCHITECTURES, GIB, RATES, Architecture, decoding, sampling, subject, total, training
from benchmarks.suites import generate
from benchmarks.suites.generate import shape_of
from benchmarks.suites.vmr_grpo_step import make_policy
from fastvar.files import write_text

DOCUMENT = records.ROOT / "docs" / "scaling.md"
SMALLEST = Plan(chunk=2, micro_batch=1, checkpointing=True)
LAYOUTS = {"DDP": False, "FSDP2": True}
COUNTS = (1, 8, 64, 1024)
Row = dict[str, Any]
Line = tuple[str, ...]


def work_table() -> str:
    """Operations, bytes and seconds of each part of an iteration on one device."""
    lines: dict[str, list[str]] = {}
    for model, segment in product(ARCHITECTURES.values(), SEGMENTS):
        parts = work(model, planned(model, Cluster(64, sharded=True)), segment)
        for part, jobs in {**parts, "all": list(chain(*parts.values()))}.items():
            done = total(jobs)
            values = (done.flops / 1e12, done.bytes / 1e12, sum(job.seconds for job in jobs))
            lines.setdefault(part, []).append(" / ".join(map(number, values)))
    columns = (f"{name}, {segment}" for name, segment in product(ARCHITECTURES, SEGMENTS))
    return table(["TFLOP / TB / s", *columns], [(part, *cells) for part, cells in lines.items()])


def memory_table() -> str:
    """What a GPU holds: by part on 64 GPUs, and at its peak on any number."""
    rows = []
    for (name, model), (layout, sharded) in product(ARCHITECTURES.items(), LAYOUTS.items()):
        on_64 = Cluster(64, sharded)
        cells = [number(value / GIB) for value in memory(model, planned(model, on_64), on_64)]
        for place in clusters(sharded):
            plan, peak = fit(model, place, Plan()), number(memory(model, planned(model, place), place).peak / GIB)
            how = f"{plan.micro_batch}{' r' if plan.checkpointing else ''}, {plan.chunk}" if plan else ""
            cells.append(f"{peak} ({how})" if plan else f"**{peak}**")
        rows.append((name, layout, *cells))
    return table(["GiB", "", *Memory._fields, *(f"peak on {gpus:,}" for gpus in COUNTS)], rows)


def cycle_table() -> str:
    """Seconds and communication of a cycle."""
    rows = []
    for (name, model), (layout, sharded) in product(ARCHITECTURES.items(), LAYOUTS.items()):
        cells, largest = [], ""
        for place in clusters(sharded):
            plan, cell = fit(model, place, Plan()), "does not fit"
            if plan is not None:
                step = cycle(model, plan, place)
                cell = " / ".join(map(number, (step.total, step.seconds["waiting"], step.received / 1e9)))
                part = max(step.seconds, key=step.share)
                largest = f"{part} {100 * step.share(part):.0f} %"
            cells.append(cell)
        rows.append((name, layout, *cells, largest))
    return table(["s / s waiting / GB", "", *(f"{gpus:,}" for gpus in COUNTS), f"largest on {COUNTS[-1]:,}"], rows)


def clusters(sharded: bool) -> list[Cluster]:
    """Of all sizes; one GPU shards nothing."""
    return [Cluster(gpus, sharded and gpus > 1) for gpus in COUNTS]


def planned(model: Architecture, place: Cluster) -> Plan:
    """The plan that fits, or the smallest."""
    return fit(model, place, Plan()) or SMALLEST


def steps_table(rows: Sequence[Row]) -> str:
    """Recorded training steps and sampling: operations over the row's own rate of large matrix products."""

    def line(row: Row) -> Line:
        model, batch = Architecture(shape_of(row["setting"])), row["setting"]["batch"]
        if not model.shape.vocab_size:
            raise ValueError("the tables are VAR's: nothing is predicted of an Infinity's texts")
        is_training = row["suite"] == "training_step"  # sampling is guided, and without decoding
        jobs = training(model, batch, model.scales) if is_training else sampling(model, 2 * batch)
        flops, measured = total(jobs).flops, row["contenders"][OURS]["seconds"]["median"]
        guess = flops / row["peaks"]["flops"]
        return number(flops / 1e12), number(guess), number(measured), f"{measured / guess:.2f}"

    columns = ["suite", "setting", "device, date", "TFLOP", "predicted, s", "measured, s", "ratio"]
    return table(columns, [*known(rows, "training_step", line), *known(rows, "generate", line)])


def infinity_table() -> str:
    """What sampling of Infinity-2B takes at least."""
    lines = []
    for setting in generate.SUITE.settings["gpu"]:
        if str(setting.get("model")).startswith("Infinity"):
            flops, moved = generate.work(shape_of(setting), setting["batch"], torch.bfloat16)
            least = max(flops / RATES.matmul, moved / RATES.bandwidth)
            cells = (number(flops / 1e12), number(moved / 1e9), number(least))
            lines.append((setting["model"], str(setting["batch"]), *cells))
    return table(["model", "batch", "TFLOP", "GB", "s, at least"], lines)


def savings_table(rows: Sequence[Row]) -> str:
    """The suite "vmr_grpo_step": how many times as long it takes without what saves, and the ratio of operations."""

    def line(row: Row) -> Line:
        setting, ratio = row["setting"], row["ratios"]["without"]
        size = setting["prompts"] * setting["group_size"]
        plan = Plan(segments=size, group=setting["group_size"], chunk=2 * size, guided=False)
        model = Architecture(shape_of(setting), setting["middle"], decoder_flops=decoder_flops(setting))
        guess = savings(model, plan)[setting["case"]]
        return f"{guess:.2f}", f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"

    columns = ["suite", "setting", "device, date", "predicted", "measured"]
    return table(columns, known(rows, "vmr_grpo_step", line))


def known(rows: Sequence[Row], suite: str, line: Callable[[Row], Line]) -> list[Line]:
    """The lines of a suite's rows, without those that cannot be predicted."""
    lines = []
    for row in rows:
        if row["suite"] == suite:
            try:
                cells = line(row)
            except (LookupError, TypeError, ValueError):  # another model, another case, no peaks
                continue
            lines.append((suite, setting_name(row["setting"]), f"{row['device']}, {row['date'][:10]}", *cells))
    return lines or [(suite, "no row yet")]


def savings(model: Architecture, plan: Plan) -> dict[str, float]:
    """How many times as many operations the cases of the suite "vmr_grpo_step" take without what saves them."""
    rows, groups, full = plan.segments, plan.segments / plan.group, model.scales

    def update(scales: int = full, checkpointing: bool = False, prefixes: float = 0.0) -> float:
        return total(training(model, rows, scales, checkpointing, prefixes)).flops

    shares = {
        "subject update": update(prefixes=rows) / update(prefixes=groups),
        "coarse update": update() / update(model.middle),
        "checkpointing": update() / update(checkpointing=True),
    }
    for segment in SEGMENTS:
        images, decoded = plan.images(segment), decoding(model, plan.images(segment)).flops
        states, scales = (rows, model.middle) if segment == "coarse" else (groups, full)
        tokens = states * model.coarse_tokens + images * (model.tokens - model.coarse_tokens)
        whole = total(sampling(model, images * plan.rows)).flops + decoded
        forked = total(rollout(model, plan, segment)).flops + decoded
        shares[f"{segment} rollout"] = whole / forked
        whole += subject(model, images * model.tokens, images).flops + update(prefixes=rows)
        forked += subject(model, tokens, groups).flops + update(scales, prefixes=groups)
        shares[f"{segment} iteration"] = whole / forked
    return shares


def decoder_flops(setting: Setting) -> int:
    """Of the tokenizer in the suite "vmr_grpo_step", for one image."""
    with torch.device("meta"), torch.no_grad():
        tokenizer = make_policy(setting).tokenizer
        features = torch.empty(1, tokenizer.config.code_channels, *tokenizer.config.grids[-1])
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            tokenizer.decode_features(features)
    return counter.get_total_flops()


def number(value: float) -> str:
    """Three digits, at most three of them decimals."""
    if 0 < value < 0.0005:
        return "<0.001"
    digits = 2 - math.floor(math.log10(value)) if value else 0
    return f"{value:,.{min(max(digits, 0), 3)}f}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows may lack cells at their end."""
    filled = ([*row, *[""] * (len(columns) - len(row))] for row in rows)
    return "".join("| " + " | ".join(cells) + " |\n" for cells in (columns, ["---"] * len(columns), *filled))


def with_tables(text: str) -> str:
    """A text with all tables put between their markers."""
    rows = records.read(report.ROWS) if report.ROWS.is_file() else []
    newest = [dict(row) for place in report.PLACES for row in report.newest(rows, place)]
    tables = {"work": work_table(), "memory": memory_table(), "cycle": cycle_table()}
    tables |= {"steps": steps_table(newest), "savings": savings_table(newest), "infinity": infinity_table()}
    for name, content in tables.items():
        text = report.between(text, name, content)
    return text


if __name__ == "__main__":
    write_text(DOCUMENT, with_tables(DOCUMENT.read_text()))
