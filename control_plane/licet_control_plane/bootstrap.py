"""Where a server is put together, from configuration to running: the composition root."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Final

import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from licet.wire.signing import SigningKey
from licet_control_plane.api.app import make_app
from licet_control_plane.archive.files import ArchiveDamaged, ArchiveDirectory, ArchiveInUse, ArchiveUnavailable
from licet_control_plane.archive.follower import Archive, ArchiveAhead
from licet_control_plane.config import ServerConfig
from licet_control_plane.control_plane import ControlPlane
from licet_control_plane.core.subject_keys import LedgerKey
from licet_control_plane.server import listen, serve
from licet_control_plane.state_dir import StartError, StateDir
from licet_control_plane.store import access, meta, subjects
from licet_control_plane.store.access import ADMIN, SIDECAR
from licet_control_plane.store.database import Database, DatabaseUnavailable
from licet_control_plane.telemetry import configure_logging

KEYS: Final = ((ADMIN, "admin-key"), (SIDECAR, "sidecar-key"))
"""(role and name, file) of the keys that the first start makes."""

log = structlog.get_logger(__name__)


async def run_server(
    config: ServerConfig,
    *,
    stop: asyncio.Event | None = None,
    on_listening: Callable[[int], None] | None = None,
) -> None:
    """Run a control plane until SIGTERM, SIGINT, or ``stop``; then end it cleanly.

    ``on_listening`` is called with the port once requests are taken. Redis need not be there: the server keeps trying,
    and ``/readyz`` says so.

    Raises:
        StartError: it cannot start; the message says why, ``fix`` what to do.
    """
    configure_logging(config.log_level)
    os.umask(0o077)  # the database holds usage of people, whatever directory it was given
    stop = stop or asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)
    for one in signals:
        loop.add_signal_handler(one, stop.set)
    try:
        state_dir = StateDir.claim(config.state_dir)
        try:
            # Before anything is made: a taken port is the commonest reason not to start.
            listener = listen(config.host, config.port)
            try:
                database, key, ledger_key, deployment = await asyncio.to_thread(_prepare, config, state_dir)
                archive = await asyncio.to_thread(_open_archive, config, database, deployment)
                plane = ControlPlane.assemble(
                    config,
                    database=database,
                    key=key,
                    ledger_key=ledger_key,
                    deployment=deployment,
                    archive=archive,
                    now_s=time.time,
                    keep_keys=state_dir.keep_keys,
                )
                plane.start()
                port: int = listener.getsockname()[1]
                log.info(
                    "control plane started",
                    version=version("licet"),
                    listen=f"{config.host}:{port}",
                    state_dir=str(config.state_dir),
                    deployment=deployment,
                    public_key=key.public_key,
                )
                if on_listening is not None:
                    on_listening(port)
                try:
                    await serve(make_app(plane), listener, stop, trusted_proxies=config.trusted_proxies)
                finally:
                    await plane.stop()
                    log.info("control plane stopped")
            finally:
                listener.close()
        finally:
            state_dir.close()
    finally:
        for one in signals:
            loop.remove_signal_handler(one)


def _prepare(config: ServerConfig, state_dir: StateDir) -> tuple[Database, SigningKey, LedgerKey, str]:
    """The database at this version, with its deployment and its administrator; the signing key; the ledger's key."""
    try:
        database = Database(config.database)
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        raise StartError(
            f"LICET_DATABASE_URL cannot be used: {error}.",
            "Give sqlite:///path, or postgresql+psycopg://… with psycopg installed.",
        ) from error
    try:
        database.migrate()
        is_new = database.write_now(meta.ensure, deployment=secrets.token_hex(16), now_us=time.time_ns() // 1_000)
        # A key that is made belongs to a new database, or to one whose first start was cut short before it.
        is_new = is_new or not database.read_now(access.keys)
        key = state_dir.signing_key(may_create=is_new)
        ledger_key = state_dir.ledger_key(may_create=is_new)
        if not database.read_now(subjects.fits, ledger_key):
            raise StartError(
                f"The ledger key in {config.state_dir} is not the one of this database.",
                "Put the file ledger-key back that belongs to the database.",
            )
        if is_new:
            for role, file in KEYS:
                database.write_now(_add_key, role, state_dir.new_api_key(file))
        return database, key, ledger_key, database.read_now(meta.read).deployment
    except DatabaseUnavailable as error:
        database.close()
        raise StartError(
            f"The database does not work: {error}.", "Look at LICET_DATABASE_URL, at its disk and at its permissions."
        ) from error
    except StartError:
        database.close()
        raise


def _add_key(connection: Connection, role: str, key: str) -> None:
    access.create_key(connection, name=role, role=role, key=key, by="licet server", now_us=time.time_ns() // 1_000)


def _open_archive(config: ServerConfig, database: Database, deployment: str) -> Archive | None:
    """The archive, recovered and claimed. Closes the database when it cannot be had."""
    if config.archive_dir is None:
        return None
    try:
        directory = ArchiveDirectory.claim(config.archive_dir)
        try:
            return Archive.open(directory, database, deployment, now_s=time.time)
        except BaseException:
            directory.close()
            raise
    except ArchiveAhead as error:
        fix = (
            "If the database was restored from a backup, run: licet ledger rebuild --from-archive"
            f" {config.archive_dir}. Otherwise name another, empty directory with --archive-dir."
        )
        database.close()
        raise StartError(f"The archive does not fit the ledger: {error}.", fix) from error
    except (ArchiveDamaged, ArchiveInUse, ArchiveUnavailable) as error:
        database.close()
        raise StartError(
            f"The archive cannot be used: {error}.",
            "Look at the disk and the files; or keep them, and name another, empty directory with --archive-dir.",
        ) from error
    except DatabaseUnavailable as error:
        database.close()
        raise StartError(
            f"The database does not work: {error}.", "Look at LICET_DATABASE_URL and at its disk."
        ) from error
