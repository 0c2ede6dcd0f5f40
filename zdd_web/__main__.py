"""`python -m zdd_web`: the command `zdd-web`, where its script is not on the PATH."""

from zdd_web.cli import main

main(prog_name="zdd-web")
