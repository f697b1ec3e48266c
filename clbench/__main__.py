"""``python -m clbench``."""

from clbench.cli.main import main

main()
