"""Tables and plots of recorded rows, and the support matrix.

`python -m benchmarks.report` writes them into README.md and docs/.

Rows come from `benchmarks/data/suites.jsonl`; of each suite, setting and pass on a device the newest one counts, as
long as the suite still has the setting.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.cases import OURS, PASSES, setting_name
from benchmarks.records import ROOT, read
from benchmarks.rivals import rivals_of
from benchmarks.suites import cases
from fastvar.ops import support
from fastvar.ops._dispatch import REGISTRY

if TYPE_CHECKING:
    from PIL.Image import Image

Row = Mapping[str, Any]
ROWS = ROOT / "benchmarks" / "data" / "suites.jsonl"
INSTRUCTIONS = ROOT / "benchmarks" / "data" / "instructions.jsonl"
HOST = ROOT / "benchmarks" / "data" / "host.jsonl"
PLACES = ("cpu", "gpu")


def newest(rows: Sequence[Row], place: str, device: str | None = None) -> list[Row]:
    """The newest row of each suite, setting and pass that was measured at a size ("cpu" or "gpu"), in the order of the
    suites; of one device, or of the newest row's."""
    asked = [_key(suite.name, setting, pass_) for suite, setting, pass_ in cases(place, passes=PASSES)]
    latest: dict[str, Row] = {}
    for row in rows:
        key = _key(row["suite"], row["setting"], row["pass"])
        if key in asked and device in (None, row["device"]):
            if device is None and latest and next(iter(latest.values()))["device"] != row["device"]:
                latest = {}  # another device since
            latest[key] = row
    return [latest[key] for key in asked if key in latest]


def devices(rows: Sequence[Row], place: str) -> list[str]:
    """What was measured at a size, in order."""
    return list(dict.fromkeys(row["device"] for row in rows if row["setting"]["size"] == place))


def _key(suite: str, setting: Mapping[str, Any], pass_: str) -> str:
    return json.dumps([suite, setting, pass_])


def tables(rows: Sequence[Row]) -> str:
    """A table for each suite: a line for each setting and pass, a column for each contender."""
    parts = []
    for suite in dict.fromkeys(row["suite"] for row in rows):
        own = [row for row in rows if row["suite"] == suite]
        names = list(dict.fromkeys(name for row in own for name in row["contenders"] if name != OURS))
        head = ["", "fastvar", *names]
        parts += [f"### {suite}", "", _line(head), "|" + " --- |" * len(head)]
        for row in own:
            parts.append(_line([_title(row, own), _ours(row), *(_rival(row, name) for name in names)]))
        parts += ["", *(f"{note}\n" for note in _notes(own))]
    return "\n".join(parts).strip() + "\n"


def summary(rows: Sequence[Row]) -> str:
    """One line for each suite: in how many of its passes ours is faster than every rival, even with the fastest one
    (the interval of the ratio contains 1) or slower, and the least and largest ratio of the fastest rival's time to
    ours; forward passes on a GPU count as calls and as graphs, the worse of which decides."""
    head = ["operator or job", "faster", "even", "slower", "fastest rival's time over ours"]
    parts = [_line(head), "|" + " --- |" * len(head)]
    for suite in dict.fromkeys(row["suite"] for row in rows):
        ratios = [standing.ratio for row in rows if row["suite"] == suite for standing in _standings(row)]
        ends = dict.fromkeys(f"{end(ratios):.2f}x" for end in (min, max) if ratios)
        parts.append(_line([suite, *map(str, _counts(rows, suite)), " to ".join(ends) or "no rival"]))
    return "\n".join(parts) + "\n"


def overview(rows: Mapping[str, Sequence[Row]]) -> str:
    """One line for each device's rows: in how many passes of all suites ours is faster, even or slower, and the suites
    where it is slower in some pass."""
    head = ["measured on", "faster than every rival", "even", "slower", "slower in some pass of"]
    parts = [_line(head), "|" + " --- |" * len(head)]
    for device, own in rows.items():
        faster, even, slower = _counts(own)
        losing = [suite for suite in dict.fromkeys(row["suite"] for row in own) if _counts(own, suite)[2]]
        commits = ", ".join(dict.fromkeys((row["commit"] or "unknown")[:7] for row in own))
        counts = map(str, (faster, even, slower))
        parts.append(_line([f"{device} ({commits})", *counts, ", ".join(f"`{suite}`" for suite in losing) or "none"]))
    return "\n".join(parts) + "\n"


def _counts(rows: Sequence[Row], suite: str | None = None) -> tuple[int, int, int]:
    """Passes where ours is faster than every rival, even with the fastest one, slower; of one suite or of all."""
    each = [standings for row in rows if suite in (None, row["suite"]) and (standings := _standings(row))]
    slower = sum(any(standing.high < 1 for standing in standings) for standings in each)
    faster = sum(all(standing.low > 1 for standing in standings) for standings in each)
    return faster, len(each) - faster - slower, slower


class Standing(NamedTuple):
    """The fastest rival's time over ours, and the interval of that."""

    ratio: float
    low: float
    high: float


def _standings(row: Row) -> list[Standing]:
    """The standings of calls and, where both have them, of graphs."""
    rivals, ours, standings = rivals_of(row), row["contenders"][OURS], []
    if rivals:
        ratio = min((row["ratios"][name] for name in rivals), key=lambda ratio: ratio["median"])
        standings.append(Standing(ratio["median"], ratio["low"], ratio["high"]))
    graphs = [contender["graph_seconds"] for contender in rivals.values() if "graph_seconds" in contender]
    if graphs and "graph_seconds" in ours:
        theirs, own = min(graphs, key=lambda seconds: seconds["median"]), ours["graph_seconds"]
        ratios = (theirs["median"] / own["median"], theirs["low"] / own["high"], theirs["high"] / own["low"])
        standings.append(Standing(*ratios))
    return standings


def conditions(rows: Sequence[Row]) -> str:
    """On what, with what and when rows were measured."""
    if not rows:
        return "No rows yet.\n"
    fields = {
        "device": [row["device"] for row in rows],
        "caches": [f"caches {row['caches']}" for row in rows if row.get("caches")],
        "threads": [f"{row['threads']} threads on {row['cores']} cores" for row in rows],
        "torch": [f"torch {row['torch']}" for row in rows],
        "triton": [f"triton {row['triton']}" for row in rows if row.get("triton")],
        "versions": [
            f"{name} {v[:12] if v != 'None' else 'of an unknown commit'}"
            for row in rows
            for name, v in sorted(row.get("versions", {}).items())
        ],
        "cuda": [f"CUDA {row['cuda']}, driver {row['driver']}" for row in rows if row.get("cuda")],
        "python": [f"Python {row['python']}" for row in rows],
        "commit": [f"commit {(row['commit'] or 'unknown')[:7]}{_changes(row)}" for row in rows],
        "tuned": [f"tiles that fastvar tune chose on {row['tuned'][:10]}" for row in rows if row.get("tuned")],
        "date": sorted({row["date"][:10] for row in rows}),
    }
    words = [word for values in fields.values() for word in dict.fromkeys(values)]
    rounds, loads = ([row[name] for row in rows] for name in ("rounds", "load"))
    return f"""Measured on {", ".join(words)}; {min(rounds)} to {max(rounds)} rounds, load {min(loads)} to {max(loads)}.
"""


def _changes(row: Row) -> str:
    """What was changed in the commit that a row was measured with; a row of a changed tree should say it."""
    return (f" with changes ({row['changes']})" if row.get("changes") else " with changes") if row["dirty"] else ""


def instructions(rows: Sequence[Row]) -> str:
    """The newest count of each suite's setting, of `benchmarks.instructions`."""
    newest = {_key(row["suite"], row["setting"], ""): row for row in rows}
    parts = [_line(["operator", "", "instructions", "commit"]), "|" + " --- |" * 4]
    for row in newest.values():
        words = [row["suite"], setting_name(row["setting"]), f"{row['instructions']:,}", row["commit"][:7]]
        parts.append(_line(words))
    return "\n".join(parts) + "\n" if newest else "No rows yet.\n"


def host_times(rows: Sequence[Row]) -> str:
    """The newest times of each operator and pass, of `benchmarks.host`."""
    newest = {(row["suite"], row["pass"]): row for row in rows}
    head = ["operator", "pass", "launches", "µs", "µs, launched by Triton", "commit"]
    parts = [_line(head), "|" + " --- |" * len(head)]
    for row in newest.values():
        words = [row["suite"], row["pass"], str(row["launches"]), f"{row['us']:.0f}", f"{row['by_triton_us']:.0f}"]
        parts.append(_line([*words, row["commit"][:7]]))
    return "\n".join(parts) + "\n" if newest else "No rows yet.\n"


def plot(rows: Sequence[Row]) -> Image:
    """How many times as long as ours each rival takes: a point with its spread for each pass, one line a rival."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
    from PIL import Image as pil

    labels = [f"{row['suite']}: {_title(row, [r for r in rows if r['suite'] == row['suite']])}" for row in rows]
    names = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    figure = Figure(figsize=(11, 1.4 + 0.24 * len(rows)), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, name in enumerate(names):
        places = [i for i, row in enumerate(rows) if name in row["ratios"]]
        ratios = [rows[i]["ratios"][name] for i in places]
        middle = [ratio["median"] for ratio in ratios]
        spread = [[r["median"] - r["low"] for r in ratios], [r["high"] - r["median"] for r in ratios]]
        marker = "os^Dv<>Pp*hX"[number % 12]
        axes.errorbar(middle, places, xerr=spread, fmt=marker, markersize=5, capsize=2, label=name)
    axes.axvline(1, color="grey", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("time of the rival / time of fastvar (right of 1: fastvar is faster)")
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="upper center", bbox_to_anchor=(0.3, -0.02 - 1.2 / max(len(rows), 4)), ncols=3, fontsize=8)
    canvas.draw()
    return pil.frombuffer("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")


def between(text: str, marker: str, content: str) -> str:
    """A text with the part between `<!-- marker -->` and `<!-- end of marker -->` replaced.

    Raises:
        ValueError: the text has no such part.
    """
    start, end = f"<!-- {marker} -->\n", f"<!-- end of {marker} -->"
    if start not in text or end not in text:
        raise ValueError(f"report: expected {start.strip()} and {end} in the text")
    return re.sub(f"{re.escape(start)}.*?{re.escape(end)}", lambda _: start + content + end, text, flags=re.DOTALL)


def texts(root: Path, rows: Sequence[Row]) -> dict[Path, str]:
    """README.md, with the support matrix, and docs/benchmarks.md, both with the tables of the rows in them."""
    readme, page = root / "README.md", root / "docs" / "benchmarks.md"
    pages = {readme: readme.read_text(), page: page.read_text()}
    by_device: dict[str, Sequence[Row]] = {}
    for place in PLACES:
        short, long = [], []
        measured = [device for device in devices(rows, place) if newest(rows, place, device)]
        for device in measured:  # one table each: rows of two devices are never compared
            own = by_device[device] = newest(rows, place, device)
            under, over = conditions(own), f"{device}:\n\n" if len(measured) > 1 else ""
            short.append(over + summary(own) + "\n" + under)
            long.append(f"{over}{under}\n{tables(own)}\n![Times of the rivals]({picture(place, device)})\n")
        pages[page] = between(pages[page], f"summary {place}", "\n".join(short) or "No rows yet.\n")
        pages[page] = between(pages[page], f"suites {place}", "\n".join(long) or "No rows yet.\n")
    pages[readme] = between(pages[readme], "benchmarks", overview(by_device))
    pages[readme] = between(pages[readme], "support matrix", support().markdown())
    counted = read(INSTRUCTIONS) if INSTRUCTIONS.is_file() else []
    pages[page] = between(pages[page], "instructions", instructions(counted))
    timed = read(HOST) if HOST.is_file() else []
    pages[page] = between(pages[page], "host", host_times(timed))
    return pages


def picture(place: str, device: str) -> str:
    """The name of a device's plot."""
    return f"benchmarks_{place}_{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.png"


def main() -> None:
    rows = read(ROWS) if ROWS.is_file() else []
    for path, text in texts(ROOT, rows).items():
        path.write_text(text)
    for place in PLACES:
        for device in devices(rows, place):
            own = [row for row in newest(rows, place, device) if row["ratios"]]
            if own:
                plot(own).save(ROOT / "docs" / picture(place, device), optimize=True)


def _title(row: Row, suite: Sequence[Row]) -> str:
    """A setting and, in a suite that has several, the pass."""
    several = any(other["pass"] != "forward" for other in suite)
    return setting_name(row["setting"]) + (f": {row['pass']}" if several else "")


def _ours(row: Row) -> str:
    ours = row["contenders"][OURS]
    # a job runs many operators: no one backend is what it ran
    words = [_time(ours["seconds"]["median"]) + (f" ({row['backend']})" if row["suite"] in REGISTRY else "")]
    if "graph_seconds" in ours:
        words.append(f"{_time(ours['graph_seconds']['median'])} as a graph")
    if "roofline" in ours:
        words.append(f"{100 * ours['roofline']:.0f} % of the roofline")
    return ", ".join([*words, *_memory(ours)])


def _rival(row: Row, name: str) -> str:
    if name not in row["contenders"]:
        return "wrong" if name in row["wrong"] else "-"
    rival = row["contenders"][name]
    words = [_ratio(row["ratios"][name])]
    if "graph_seconds" in rival:
        words.append(f"{_time(rival['graph_seconds']['median'])} as a graph")
    return ", ".join([*words, *_memory(rival)])


def _notes(rows: Sequence[Row]) -> list[str]:
    """Who is missing or wrong, and why."""
    missing: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in row["missing"].items():
            missing.setdefault((name, reason), []).append(_title(row, rows))
    why: dict[str, None] = {}
    for (name, reason), places in missing.items():
        everywhere = all(name in row["missing"] for row in rows)
        why[f"{name}: {reason}" if everywhere else f"{name} ({'; '.join(places)}): {reason}"] = None
    for row in rows:
        why |= {f"{n}: wrong, error {e:.2g}, limit {row['limit']:.2g}": None for n, e in row["wrong"].items()}
    return ["Not measured: " + "; ".join(why) + "."] if why else []


def _memory(contender: Mapping[str, Any]) -> list[str]:
    return [f"{contender['peak_mib']:.0f} MiB"] if contender.get("peak_mib", 0) >= 1 else []


def _ratio(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1), ("ms", 1e-3)):
        if seconds >= 0.9995 * size:  # what would be rounded to a thousand of the next one
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
