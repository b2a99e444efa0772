"""What the error replies of Redis mean: whether they pass by themselves, and what an operator does about them.

Pure: both programs translate the errors of their client with it, each into exceptions of its own.
Source: https://redis.io/docs/latest/develop/reference/protocol-spec/#simple-errors (the first word is the code).
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple


class ErrorReply(NamedTuple):
    """``passes``: it may pass without anybody doing anything, so the same call is worth repeating."""

    passes: bool
    fix: str


ERROR_REPLIES: Final = {
    "READONLY": ErrorReply(True, "this is a replica: give the address of the primary; after a failover it passes"),
    "LOADING": ErrorReply(True, "it is reading its data after a start; wait"),
    "OOM": ErrorReply(True, "its memory is full: raise maxmemory; maxmemory-policy must be noeviction"),
    "MISCONF": ErrorReply(True, "it cannot write to its disk: free space there, or mend it"),
    "NOREPLICAS": ErrorReply(True, "fewer replicas are connected than its min-replicas-to-write: bring them back"),
    "BUSY": ErrorReply(True, "a script of somebody else occupies it: SCRIPT KILL ends it"),
    "UNKILLABLE": ErrorReply(True, "a script of somebody else occupies it, and can only be ended with the server"),
    "MASTERDOWN": ErrorReply(True, "this is a replica that lost its primary: give the address of the primary"),
    "TRYAGAIN": ErrorReply(True, "it is moving keys; wait"),
    "CLUSTERDOWN": ErrorReply(True, "its cluster does not serve all slots: CLUSTER INFO says more"),
    "NOSCRIPT": ErrorReply(True, "its scripts were flushed in that moment; they are sent again"),
    "EXECABORT": ErrorReply(True, "it refused one of several commands in a transaction; its log says why"),
    "MOVED": ErrorReply(
        False, "this is a Redis Cluster of several nodes, which is not supported yet: give a server that has all keys"
    ),
    "ASK": ErrorReply(
        False, "this is a Redis Cluster of several nodes, which is not supported yet: give a server that has all keys"
    ),
    "CROSSSLOT": ErrorReply(
        False, "this is a Redis Cluster, which is not supported yet: give a server that is not in cluster mode"
    ),
    "NOPERM": ErrorReply(False, "give this user the access rules in deploy/k8s/base/secret.example.yaml"),
    "NOAUTH": ErrorReply(False, "set user and password in LICET_REDIS_URL"),
    "WRONGPASS": ErrorReply(False, "set the user and password that Redis has in LICET_REDIS_URL"),
    "NOPROTO": ErrorReply(False, "it is too old: Redis 7 or newer, or Valkey, is needed"),
    "WRONGTYPE": ErrorReply(
        False, "something else writes under LICET_REDIS_PREFIX: give each its own prefix, and delete the key"
    ),
}
"""By code. Retrying what does not pass is harmless too, and notices when an operator has mended it."""

_UNKNOWN: Final = ErrorReply(False, "its log may say more")
_BY_TEXT: Final = (
    ("unknown command", ErrorReply(False, "it is too old, or the command was renamed: Redis 7.2 or newer, or Valkey")),
    ("max number of clients", ErrorReply(True, "it has no room for connections: raise maxclients")),
    ("DB index is out of range", ErrorReply(False, "give a database that exists at the end of LICET_REDIS_URL")),
    ("cannot be used with replica", ErrorReply(True, "this is a replica: give the address of the primary")),
    # What a script says that met one of the above in the middle names it further on.
    ("OOM command not allowed", ERROR_REPLIES["OOM"]),
    ("MISCONF", ERROR_REPLIES["MISCONF"]),
    ("READONLY", ERROR_REPLIES["READONLY"]),
)
_CODE: Final = re.compile(r"[A-Z][A-Z0-9_]{2,}\b")
_ANNOTATED: Final = re.compile(r"^Command # \d+ \(.*\) of pipeline caused error: \((.*?),?\)$", re.DOTALL)


def plain_text(text: str) -> str:
    """An error's text without the command that a client puts around it in a pipeline: that holds data, and is new each
    time."""
    found = _ANNOTATED.match(text)
    return found[1].strip("'\"") if found else text


def error_code(text: str) -> str:
    """The code an error reply begins with; empty when there is none."""
    found = _CODE.match(text)
    return found[0] if found else ""


def meaning_of(code: str, text: str) -> ErrorReply:
    """What a reply with this code, or else with this text, means."""
    known = ERROR_REPLIES.get(code or error_code(text))
    if known is not None:
        return known
    return next((reply for part, reply in _BY_TEXT if part in text), _UNKNOWN)
