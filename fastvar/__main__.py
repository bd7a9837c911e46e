"""`python -m fastvar` is the command `fastvar`."""

from fastvar.cli import main

main()
