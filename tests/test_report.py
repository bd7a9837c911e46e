"""The report is a page of what it was given, readable whatever the text holds."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
from PIL import Image

from fastvar.report import Report, curves


def test_page(tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (3, 4, 3), dtype=np.uint8))
    report = Report("a < b")
    report.heading("<head>")
    report.text("c & d")
    report.table(["<x>", "y"], [["1 < 2", 3], [4, "5 & 6"]])
    report.picture(picture, 'of "<1>"')
    report.picture(picture, "plot", plot=True)
    report.write(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    for part in (
        *("<title>a &lt; b</title>", "<h1>a &lt; b</h1>", "<h2>&lt;head&gt;</h2>", "<p>c &amp; d</p>"),
        "<tr><th>&lt;x&gt;</th><th>y</th></tr>",
        "<tr><td>1 &lt; 2</td><td>3</td></tr><tr><td>4</td><td>5 &amp; 6</td></tr></table>",
        *('alt="of &quot;&lt;1&gt;&quot;"', "<figcaption>of &quot;&lt;1&gt;&quot;</figcaption>"),
    ):
        assert part in page, part
    shown = re.findall(r'<img( class="plot")? alt="[^"]*" src="data:image/png;base64,([^"]*)">', page)
    assert [kind for kind, _ in shown] == ["", ' class="plot"']
    for _, data in shown:
        assert np.array_equal(np.array(Image.open(io.BytesIO(base64.b64decode(data)))), np.array(picture))


def test_a_curve_skips_lines_without_its_metric() -> None:
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "other": 9.0}, {"step": 3, "loss": 1.0}]
    assert curves({"run": lines}, "loss", ylabel="loss") == curves({"run": lines[::2]}, "loss", ylabel="loss")
    assert curves({"run": lines}, "loss", ylabel="loss") != curves({"run": lines[:1]}, "loss", ylabel="loss")
