"""`python -m danlu`: the commands, where the console script is not on the PATH."""

from danlu.cli import main

main()
