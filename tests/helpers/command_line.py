"""The command line, run within the test."""

from typer.testing import CliRunner

from jfbfast.cli import app


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])
