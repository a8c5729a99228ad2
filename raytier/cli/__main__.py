"""`python -m raytier.cli` is the `raytier` command."""

from raytier.cli.main import app

app(prog_name="raytier")
