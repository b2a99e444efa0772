"""Opens the database, and runs each piece of work in a transaction on the right thread.

What differs between the databases is here and in ``upsert``; everything else is SQLAlchemy Core that SQLite and
PostgreSQL both run.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, Table, create_engine, event, make_url
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import InternalError, OperationalError
from sqlalchemy.pool import QueuePool

P = ParamSpec("P")
T = TypeVar("T")

READERS_MAX: Final = 4
"""Threads that read. SQLite's readers never wait for the writer, so a few are enough for an operator's requests."""
BUSY_TIMEOUT_MS: Final = 10_000
"""How long SQLite waits for another process's lock, such as a backup's."""
CACHE_KIB: Final = 32 * 1024
WAL_PAGES_MAX: Final = 8_000
"""Pages (32 MB) after which the log is copied to the file: at a ledger's pace every second or two, not every commit."""
_MIGRATIONS: Final = Path(__file__).parent / "migrations"


class DatabaseUnavailable(Exception):
    """The database did not do what was asked, but may later: nothing was changed."""


class Database:
    """The engine and its threads. ``write`` and ``read`` are the only ways in.

    Work takes the transaction's connection first, then the arguments that are given with it, and never commits.
    """

    def __init__(self, url: str) -> None:
        """Opens nothing yet. ``url`` as SQLAlchemy takes it, ``sqlite:///path`` or ``postgresql+psycopg://…``."""
        self.engine = _engine(url)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="db-write")
        self._readers = ThreadPoolExecutor(READERS_MAX, thread_name_prefix="db-read")

    def migrate(self) -> None:
        """Bring the schema to this program's version. May be repeated.

        Raises:
            DatabaseUnavailable: it cannot be opened or written.
        """
        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        try:
            with self.engine.connect().execution_options(licet_write=True) as connection, connection.begin():
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
        except (OperationalError, InternalError) as error:
            raise DatabaseUnavailable(f"the database does not open: {error.orig}") from error

    async def write(self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of ``work`` in a transaction that is committed when this returns, and rolled back if it raises.

        Raises:
            DatabaseUnavailable: the database failed; nothing was changed.
            SQLAlchemyError: the data does not fit the tables; trying again will not help. Nothing was changed.
        """
        return await asyncio.get_running_loop().run_in_executor(
            self._writer, partial(self.write_now, work, *args, **kwargs)
        )

    async def read(self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of ``work``, which sees one committed state and changes nothing.

        Raises:
            DatabaseUnavailable: the database failed.
        """
        return await asyncio.get_running_loop().run_in_executor(
            self._readers, partial(self.read_now, work, *args, **kwargs)
        )

    def write_now(self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """``write``, on the calling thread. Only where no other thread writes."""
        return self._transact(True, lambda connection: work(connection, *args, **kwargs))

    def read_now(self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """``read``, on the calling thread."""
        return self._transact(False, lambda connection: work(connection, *args, **kwargs))

    def _transact(self, writes: bool, work: Callable[[Connection], T]) -> T:
        try:
            with self.engine.connect().execution_options(licet_write=writes) as connection:
                try:
                    with connection.begin():
                        return work(connection)
                except BaseException:
                    # A query that was left in the middle would keep SQLite's old snapshot open on this connection,
                    # for whoever gets it next.
                    connection.invalidate()
                    raise
        except (OperationalError, InternalError) as error:
            raise DatabaseUnavailable(f"the database failed: {error.orig}") from error

    async def shred(self) -> None:
        """Let what was overwritten disappear from the database's own log too, as far as readers let it.

        PostgreSQL keeps what was overwritten until it vacuums, and its log until it is recycled.
        """
        if self.engine.dialect.name == "sqlite":
            await asyncio.get_running_loop().run_in_executor(self._writer, self._checkpoint)

    def _checkpoint(self) -> None:
        with self.engine.connect() as connection:
            driver: Any = connection.connection.dbapi_connection
            driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        """Finish what runs, then close every connection."""
        self._writer.shutdown()
        self._readers.shutdown()
        self.engine.dispose()


def upsert(connection: Connection, table: Table) -> sqlite.Insert:
    """An INSERT with ``on_conflict_do_update`` and ``on_conflict_do_nothing``, for the connection's database."""
    if connection.dialect.name == "postgresql":
        return postgresql.insert(table)  # type: ignore[return-value]  # the two have the same methods
    return sqlite.insert(table)


@lru_cache
def insert_sql(dialect: str, table: Table, columns: tuple[str, ...]) -> str:
    """An INSERT of ``columns`` that takes tuples, for ``exec_driver_sql`` on a database of ``dialect``."""
    dialects: Any = postgresql if dialect == "postgresql" else sqlite
    positional = dialects.dialect(paramstyle="format" if dialect == "postgresql" else "qmark")
    return str(table.insert().compile(dialect=positional, column_keys=list(columns)))


def read_only_engine(url: str) -> Engine:
    """An engine that cannot change anything, for whoever only looks: another process, or an auditor with a copy.

    Raises:
        ArgumentError, NoSuchModuleError, ModuleNotFoundError: no database can be meant by ``url``.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return create_engine(url, execution_options={"postgresql_readonly": True})
    path = Path(parsed.database or "").absolute()

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{path.as_uri()}?mode=ro", uri=True, check_same_thread=False, isolation_level=None
        )
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        return connection

    engine = create_engine("sqlite://", creator=connect, poolclass=QueuePool)

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    return engine


def _engine(url: str) -> Engine:
    if not url.startswith("sqlite"):
        return create_engine(url, pool_pre_ping=True)
    engine = create_engine(
        url, poolclass=QueuePool, pool_size=READERS_MAX + 1, connect_args={"check_same_thread": False}
    )

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions are begun below, not by the driver
        for pragma in (
            f"busy_timeout = {BUSY_TIMEOUT_MS}",
            "journal_mode = WAL",
            "synchronous = FULL",
            f"cache_size = -{CACHE_KIB}",
            "secure_delete = ON",  # what is erased must not stay behind in a free part of a page
            f"wal_autocheckpoint = {WAL_PAGES_MAX}",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # IMMEDIATE takes the write lock at once: a transaction that reads first never fails when it comes to write.
        write = connection.get_execution_options().get("licet_write")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine
