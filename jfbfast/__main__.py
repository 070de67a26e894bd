"""`python -m jfbfast`: the command line."""

from jfbfast.cli import main

main()
