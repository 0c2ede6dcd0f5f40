"""`python -m zdd_web.cli`."""

from zdd_web.cli import main

main(prog_name="zdd-web")
