"""The command line; `jdm` starts here."""

from jdm.cli.parser import main as main
