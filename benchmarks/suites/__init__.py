"""All suites, the most important one first: where time is short, the last ones are left out."""

from benchmarks.suites import adaptive_layer_norm

SUITES = (adaptive_layer_norm.SUITE,)
