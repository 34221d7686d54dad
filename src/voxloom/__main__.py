"""Makes `python -m voxloom` the same as `voxloom`."""

from .cli import main

main()
