"""Makes helper modules beside the tests importable under pytest's importlib mode: `from golden.golden import ...`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
