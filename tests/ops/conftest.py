"""Makes the sibling module samples.py importable under pytest's importlib mode."""
