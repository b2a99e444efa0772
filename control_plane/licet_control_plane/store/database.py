"""Opens the database, and runs each piece of work in a transaction on the right thread.

What differs between the databases is here, in ``upsert`` and in ``partitions``; everything else is SQLAlchemy Core that
SQLite and PostgreSQL both run.

SQLite has one writer at a time. On PostgreSQL several control planes may write: whoever must not meet another takes a
row lock (``meta.lock``, the shard's row in ``ledger.record``), and locks several rows in the order of their keys.
"""

from __future__ import annotations

import asyncio
import contextvars
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, Select, Table, create_engine, event, func, literal_column, make_url
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, InternalError, OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import QueuePool

POSTGRESQL: Final = "postgresql"
SUM_MAX: Final = 2**63 - 1
"""Largest number that a column of a sum holds."""

P = ParamSpec("P")
T = TypeVar("T")

READERS_MAX: Final = 4
"""Threads that read. SQLite's readers never wait for the writer, so a few are enough for an operator's requests."""
BUSY_TIMEOUT_MS: Final = 10_000
"""How long SQLite waits for another process's lock, such as a backup's."""
CACHE_KIB: Final = 32 * 1024
WAL_PAGES_MAX: Final = 8_000
"""Pages (32 MB) after which the log is copied to the file: at a ledger's pace every second or two, not every commit."""
CONNECT_S_MAX: Final = 10
"""How long PostgreSQL may take to take a connection."""
SILENCE_S_MAX: Final = 30
"""After which a PostgreSQL that does not answer at all is given up: a failed node must not hold a worker for hours."""
LOCK_S_MAX: Final = 30
"""How long PostgreSQL waits for another's row lock. Ledger transactions take a second or two; whoever holds one for
longer is stuck, and its session ends after ``IDLE_IN_TRANSACTION_S_MAX``."""
IDLE_IN_TRANSACTION_S_MAX: Final = 60
"""After which PostgreSQL ends a session whose process was paused in the middle of a transaction."""
MIGRATION_LOCK: Final = 0x6C69636574
"""Advisory lock ("licet") of the one control plane that migrates."""
_MIGRATIONS: Final = Path(__file__).parent / "migrations"


_ALSO: ContextVar[Callable[[Connection], None] | None] = ContextVar("also", default=None)


@contextmanager
def with_each_commit(also: Callable[[Connection], None] | None) -> Iterator[None]:
    """Within it, each ``Database.write`` of this task does ``also`` in its own transaction, before its work: the last
    lock of a transaction is the audit trail's. ``None``: what is written is no part of what the caller asked for.
    """
    token = _ALSO.set(also)
    try:
        yield
    finally:
        _ALSO.reset(token)


class DatabaseUnavailable(Exception):
    """The database did not do what was asked, but may later: nothing was changed."""


class Database:
    """The engine and its threads. ``write`` and ``read`` are the only ways in.

    Work takes the transaction's connection first, then the arguments that are given with it, and never commits.
    """

    def __init__(self, url: str) -> None:
        """Opens nothing yet. ``url`` as SQLAlchemy takes it, ``sqlite:///path`` or ``postgresql+psycopg://…``.

        Raises:
            ArgumentError, NoSuchModuleError, ModuleNotFoundError: no database can be meant by it.
        """
        self.engine = _engine(url)
        # One committed state for all queries of a read, as SQLite has it by itself.
        self._read_options: dict[str, Any] = {"licet_write": False}
        if self.engine.dialect.name == POSTGRESQL:
            self._read_options |= {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
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
                if connection.dialect.name == POSTGRESQL:
                    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})")
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
        except (OperationalError, InternalError, ProgrammingError) as error:  # the last one: no right to make tables
            raise DatabaseUnavailable(f"the database does not open: {_first_line(error)}") from error

    async def write(self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of ``work`` in a transaction that is committed when this returns, and rolled back if it raises.

        Raises:
            DatabaseUnavailable: the database failed; nothing was changed.
            SQLAlchemyError: the data does not fit the tables; trying again will not help. Nothing was changed.
        """
        also = _ALSO.get()

        def all_of_it(connection: Connection) -> T:
            if also is not None:
                also(connection)
            return work(connection, *args, **kwargs)

        # With the caller's context: it says who acts, for the audit trail.
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(
            self._writer, lambda: context.run(self.write_now, all_of_it)
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
        options = {"licet_write": True} if writes else self._read_options
        try:
            with self.engine.connect().execution_options(**options) as connection:
                try:
                    with connection.begin():
                        return work(connection)
                except BaseException:
                    # A query that was left in the middle would keep SQLite's old snapshot open on this connection,
                    # for whoever gets it next.
                    connection.invalidate()
                    raise
        except DBAPIError as error:
            # A connection that was lost shows in several ways; the rest of what is not one of these two is the data's.
            if not (error.connection_invalidated or isinstance(error, OperationalError | InternalError)):
                raise
            raise DatabaseUnavailable(f"the database failed: {_first_line(error)}") from error
        except PoolTimeoutError as error:
            raise DatabaseUnavailable("the database failed: every connection is in use") from error

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
    if connection.dialect.name == POSTGRESQL:
        return postgresql.insert(table)  # type: ignore[return-value]  # the two have the same methods
    return sqlite.insert(table)


def insert_rows(connection: Connection, table: Table, columns: tuple[str, ...], rows: Iterable[Sequence[Any]]) -> None:
    """Insert many rows, each a tuple of values for ``columns``: straight to the driver, and on PostgreSQL by COPY.

    Naming each value would cost as much as inserting the row.
    """
    if connection.dialect.name != POSTGRESQL:
        connection.exec_driver_sql(insert_sql(connection.dialect.name, table, columns), list(rows))
        return
    import psycopg  # here, so that whoever has SQLite need not load it

    statement, types = _copy_sql(table, columns)
    raw: Any = connection.connection.driver_connection
    try:
        with raw.cursor() as cursor, cursor.copy(statement) as copy:
            copy.set_types(types)
            for row in rows:
                copy.write_row(row)
    except psycopg.Error as error:
        raise DBAPIError.instance(
            statement, None, error, psycopg.Error, connection_invalidated=raw.closed, dialect=connection.dialect
        ) from error


@lru_cache
def insert_sql(dialect: str, table: Table, columns: tuple[str, ...]) -> str:
    """An INSERT of ``columns`` that takes tuples in the table's order, for ``exec_driver_sql`` on ``dialect``."""
    # Inline: nobody asks for the number that a row got, and what is put behind it would come after a RETURNING.
    return str(table.insert().inline().compile(dialect=_positional(dialect), column_keys=list(columns)))


def raw_rows(connection: Connection, query: Select[Any], values: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows of a question as plain tuples, straight from the driver: of many rows, naming and converting the columns
    costs as much as reading them. ``values`` are those of its parameters, in the order in which it has them.
    """
    is_postgresql = connection.dialect.name == POSTGRESQL
    raw: Any = connection.connection.driver_connection
    cursor = raw.cursor(binary=True) if is_postgresql else raw.cursor()
    try:
        found: list[tuple[Any, ...]] = cursor.execute(
            _positional_sql(connection.dialect.name, query), values
        ).fetchall()
        return found
    finally:
        cursor.close()


@lru_cache
def _positional_sql(dialect: str, query: Select[Any]) -> str:
    return str(query.compile(dialect=_positional(dialect)))


def _positional(dialect: str) -> Any:
    """A dialect whose parameters have no names."""
    dialects: Any = postgresql if dialect == POSTGRESQL else sqlite
    return dialects.dialect(paramstyle="format" if dialect == POSTGRESQL else "qmark")


def read_only_engine(url: str) -> Engine:
    """An engine that cannot change anything, for whoever only looks: another process, or an auditor with a copy.

    Raises:
        ArgumentError, NoSuchModuleError, ModuleNotFoundError: no database can be meant by ``url``.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return create_engine(url, isolation_level="REPEATABLE READ", execution_options={"postgresql_readonly": True})
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


@lru_cache
def upsert_sql(
    dialect: str, table: Table, columns: tuple[str, ...], *, key: tuple[str, ...], added: tuple[str, ...]
) -> str:
    """``insert_sql`` that, where there is a row with the same ``key``, adds the ``added`` columns to it, up to
    ``SUM_MAX``: what was asked in vain may be any number, any number of times, and must not stop what comes with it.

    Like there, ``columns`` are in the order of the table.
    """
    dialects: Any = postgresql if dialect == POSTGRESQL else sqlite
    statement = dialects.insert(table)
    least = func.least if dialect == POSTGRESQL else func.min
    most: Any = literal_column(str(SUM_MAX))  # no parameter: those are the row's
    statement = statement.on_conflict_do_update(
        index_elements=[table.c[name] for name in key],
        set_={name: least(table.c[name], most - statement.excluded[name]) + statement.excluded[name] for name in added},
    )
    return str(statement.compile(dialect=_positional(dialect), column_keys=list(columns)))


@lru_cache
def _copy_sql(table: Table, columns: tuple[str, ...]) -> tuple[str, list[str]]:
    """A binary COPY, and the types that each value must be sent as: nothing is converted on the other side."""
    names = ", ".join(f'"{column}"' for column in columns)
    types = [_COPY_TYPES[table.c[column].type.as_generic().__class__.__name__] for column in columns]
    return f'COPY "{table.name}" ({names}) FROM STDIN (FORMAT BINARY)', types


_COPY_TYPES: Final = {
    "BigInteger": "int8",
    "Boolean": "bool",
    "Integer": "int4",
    "LargeBinary": "bytea",
    "String": "varchar",
    "Text": "text",
}


def _first_line(error: DBAPIError) -> str:
    """What the driver says, without the statement: a server's answer may go on over several lines."""
    return (str(error.orig).splitlines() or [""])[0]


def _engine(url: str) -> Engine:
    if not url.startswith("sqlite"):
        return _postgresql_engine(url)
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


def _postgresql_engine(url: str) -> Engine:
    limits = {
        "connect_timeout": CONNECT_S_MAX,
        "keepalives_idle": SILENCE_S_MAX // 3,
        "keepalives_interval": SILENCE_S_MAX // 6,
        "keepalives_count": 4,
        "tcp_user_timeout": SILENCE_S_MAX * 1_000,
    }
    given = make_url(url).query
    engine = create_engine(
        url,
        pool_size=READERS_MAX + 1,
        pool_pre_ping=True,  # after a restart of the server, connections are made anew and nobody notices
        isolation_level="READ COMMITTED",  # whatever the server's default: writers wait for row locks, and go on
        connect_args={name: value for name, value in limits.items() if name not in given},
    )
    settings = (
        f"set_config('lock_timeout', '{LOCK_S_MAX}s', false),"
        f" set_config('idle_in_transaction_session_timeout', '{IDLE_IN_TRANSACTION_S_MAX}s', false),"
        # What is acknowledged must be durable; stronger settings, such as remote_apply, are left.
        " CASE WHEN current_setting('synchronous_commit') IN ('off', 'local')"
        " THEN set_config('synchronous_commit', 'on', false) END"
    )

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        try:
            connection.execute(f"SELECT {settings}")
            connection.commit()
        except BaseException:
            connection.close()  # the pool does not know it yet
            raise

    return engine
