"""The entries of `planted.py` fit the code: what they replace is there once, and their tests exist."""

from __future__ import annotations

import re

from tests.planted import FAULTS, ROOT


def test_faults_can_be_planted() -> None:
    for fault in FAULTS:
        assert (ROOT / fault.file).read_text().count(fault.old) == 1 and fault.new != fault.old, fault
        assert fault.tests, fault
        for test in fault.tests:
            path, name = test.partition("[")[0].split("::")
            assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), test
