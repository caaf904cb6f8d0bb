"""The command line `dse`. Each command is one file that parses its options, calls the library and prints the result."""

from dse.cli.main import build_parser as build_parser
from dse.cli.main import main as main
