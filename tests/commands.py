"""Commands run in this process."""

from typer.testing import CliRunner

from hf_blockprune.cli import app


def run(*arguments):
    """The result of a command."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments):
    """The one line on standard error of a command that must end with exit code 1, and print nothing else."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]
