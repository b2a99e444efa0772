"""Where the ``licet`` console script starts. Imports nothing heavy before it knows that the libraries are there."""

from __future__ import annotations

import os
import sys
from typing import Final

_EXIT_INTERRUPTED: Final = 130  # 128 + SIGINT, as shells report it


def main() -> int:
    """Run the command line; returns the exit code."""
    # gRPC reports on standard error what its caller learns from the status anyway. It reads this when it is loaded.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        from licet_control_plane.cli.app import command
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("licet", "licet_control_plane"):
            raise  # a defect of ours, not a missing library
        print(f"licet: {error.name} is not installed. Fix: pip install 'licet[server]'", file=sys.stderr)
        return 2
    from licet_control_plane.cli.failure import EXIT_NO, CliError

    try:
        command(prog_name="licet")
    except CliError as error:
        print(f"licet: {error}", file=sys.stderr)
        if error.fix:
            print(f"  fix: {error.fix}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("licet", "licet_control_plane"):
            raise
        print(f"licet: {error.name} is not installed. Fix: pip install 'licet[dev]'", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader (`| head`) left. Python would complain again while it closes standard output: give it another one.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_NO
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED
    except SystemExit as end:  # how Typer ends, always
        return end.code if isinstance(end.code, int) else EXIT_NO if end.code else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
