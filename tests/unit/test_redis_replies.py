"""What the error replies of Redis are taken to mean."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from licet.wire.redis_replies import ERROR_REPLIES, error_code, meaning_of, plain_text

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"


@pytest.mark.parametrize(
    ("text", "code", "passes", "fix"),
    [
        ("MISCONF Errors writing to the AOF file: No space left on device", "MISCONF", True, "free space"),
        ("ERR unknown command 'WAITAOF', with args beginning with: '1'", "ERR", False, "7.2 or newer"),
        ("ERR max number of clients reached", "ERR", True, "maxclients"),
        ("ERR DB index is out of range", "ERR", False, "LICET_REDIS_URL"),
        ("ERR WAITAOF cannot be used with replica instances.", "ERR", True, "address of the primary"),
        ("ERR Error running script: OOM command not allowed when used memory > 'maxmemory'", "ERR", True, "maxmemory"),
        ("ERR something that nobody has seen yet", "ERR", False, "log"),
        ("what is this", "", False, "log"),
        ("", "", False, "log"),
    ],
)
def test_a_reply_means(text: str, code: str, passes: bool, fix: str) -> None:
    assert error_code(text) == code
    meaning = meaning_of("", text)
    assert meaning.passes is passes
    assert fix in meaning.fix


def test_the_code_a_client_took_out_of_the_text_counts() -> None:
    assert meaning_of("READONLY", "You can't write against a read only replica.").passes
    assert not meaning_of("MOVED", "1 127.0.0.1:7000").passes


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Command # 1 (HSET licet:sidecars a secret) of pipeline caused error: ('ERR bad',)", "ERR bad"),
        ('Command # 12 (X (1) y) of pipeline caused error: ("You can\'t",)', "You can't"),
        ("Command # 1 (A\nB) of pipeline caused error: ('READONLY no',)", "READONLY no"),
        ("BUSY Redis is busy", "BUSY Redis is busy"),
    ],
)
def test_what_a_client_puts_around_an_error_in_a_pipeline_is_taken_off(text: str, plain: str) -> None:
    assert plain_text(text) == plain


def test_operations_lists_every_code() -> None:
    section = OPERATIONS.read_text().partition("### What Redis answers")[2].partition("\n## ")[0]
    rows = [row.split("|") for row in section.splitlines() if row.startswith("| ")]
    listed = {code: row for row in rows for code in re.findall(r"`([A-Z]{3,})`", row[1])}
    assert set(listed) | {"EXECABORT"} == set(ERROR_REPLIES)
    assert {code for code, row in listed.items() if row[3].strip() == "no"} == {
        code for code, reply in ERROR_REPLIES.items() if not reply.passes
    }
