"""``python -m lbllm_compile``: the command line."""

from lbllm_compile.cli import main

main()
