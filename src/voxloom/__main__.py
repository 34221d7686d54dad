"""Makes `python -m voxloom` the same as `voxloom`."""

from .cli.commands import main

main()
