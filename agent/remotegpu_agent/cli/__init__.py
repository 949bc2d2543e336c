"""The command line: one verb a file. What is heavy is imported inside of the functions that need it."""

from remotegpu_agent.cli.app import main

__all__ = ["main"]
