"""How a command ends: exit codes, and the one exception that carries a message to the person at the keyboard."""

from __future__ import annotations

from typing import Final

EXIT_NO: Final = 1
"""The answer is no, or what was asked for failed: denied, invalid documents, a timeout, books that disagree."""

EXIT_USAGE: Final = 2
"""The command line or a file it names is wrong; nothing was done. Also what Typer ends with on its own errors."""

EXIT_UNREACHABLE: Final = 3
"""The control plane or the sidecar cannot be reached."""

EXIT_CODES_HELP: Final = (
    "Exit codes: 0 ok; 1 the answer is no, or it failed; 2 usage or bad input;"
    " 3 the server or sidecar cannot be reached."
)


class CliError(Exception):
    """Ends the command: ``message`` says what is wrong and where, ``fix`` what to do about it."""

    def __init__(self, message: str, *, fix: str = "", exit_code: int = EXIT_NO) -> None:
        super().__init__(message)
        self.fix = fix
        self.exit_code = exit_code
