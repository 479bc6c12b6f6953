"""`optimum-cli blockprune ...`: the `blockprune` command, with its options, output and exit codes.

optimum imports every file of this namespace when its command starts, so nothing heavy is imported before it is needed.
"""

import argparse
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

NAME = "blockprune"


class BlockPruneCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name=NAME, help="Prune vision transformers in blocks; evaluate, measure and export them.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("arguments", nargs=argparse.REMAINDER)
        # The command knows its subcommands, argparse does not.
        parser.print_help = lambda file=None: _blockprune(["--help"])

    def run(self) -> None:
        assert self.args is not None
        _blockprune(self.args.arguments)


def _blockprune(arguments: list[str]) -> None:
    from hf_blockprune.cli import app

    app(arguments, prog_name=f"optimum-cli {NAME}")


# optimum asks once for each folder of the namespace that has this file, as where a checkout is on the path beside an
# installed package, and argparse refuses a command that comes twice: so only the first who asks gets it.
REGISTER_COMMANDS = iter([BlockPruneCommand])
