"""``python -m gankit``, for machines where the script is not on the path, and for torchrun."""

from gankit.cli import main

main(prog_name="gankit")
