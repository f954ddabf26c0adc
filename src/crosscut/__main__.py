"""``python -m crosscut``: the command line."""

from crosscut.cli import main

main()
