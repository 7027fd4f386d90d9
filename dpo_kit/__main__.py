"""`python -m dpo_kit` is the command line."""

from dpo_kit.cli import main

main()
