"""`python -m audioflamingo.cli`, the same as `af3`."""

from audioflamingo.cli import main

main()
