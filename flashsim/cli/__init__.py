"""The command line: parse, call, print. Everything heavy is imported by the command that needs it.

Exit codes: 0 done, 1 the thing asked about failed, 2 bad input, 130 interrupted.
"""

from flashsim.cli.app import app, main

# Each adds its commands to the app; `--help` lists them in this order.
from flashsim.cli import predicting, checking, kernels, validating, calibrating, listing  # noqa: F401  # isort: skip

__all__ = ["app", "main"]
