"""The command line `dse`: arguments and printing only."""

from dse.cli.main import build_parser as build_parser
from dse.cli.main import main as main
