"""Imported before torch comes, this sets how the threads of OpenMP wait, unless the user has.

By default they spin for long, which makes a step on two cores several times slower where another process holds one of
them; not at all costs half as much again where none does. OpenMP reads it once, when torch loads it.
"""

import os
import sys

if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
