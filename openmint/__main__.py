"""`python -m openmint` is the `openmint` command."""

from openmint.cli.main import main

main()
