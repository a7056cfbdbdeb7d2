"""Passwords in messages that drivers and servers have written."""

from __future__ import annotations

import pytest
from tests.support.server import http_client
from tests.support.sidecar_process import running

from ctxdb_pgstatus._mask import mask_password
from ctxdb_pgstatus.testing import PostgresCluster


def test_a_password_is_masked_wherever_it_stands() -> None:
    assert (
        mask_password("could not use 'hunter22hunter' (hunter22hunter)", "hunter22hunter")
        == "could not use '***' (***)"
    )


def test_a_long_password_is_masked_inside_of_other_words() -> None:
    assert mask_password("dsn=hunter22hunterx", "hunter22hunter") == "dsn=***x"


def test_a_short_password_is_masked_as_a_word_only() -> None:
    # "password a***uthentication" would tell it.
    assert mask_password("password authentication failed for a", "a") == "password authentication failed for ***"


@pytest.mark.parametrize("password", [None, ""])
def test_without_a_password_nothing_is_masked(password: str | None) -> None:
    assert mask_password("no route to host", password) == "no route to host"


def test_a_password_that_equals_a_public_name_does_not_hide_the_name() -> None:
    message = 'password authentication failed for user "postgres"'
    assert mask_password(message, "postgres", ("postgres", "shop")) == message


@pytest.mark.parametrize("password", [None, "hunter22hunter"])
def test_a_message_that_is_too_long_is_cut(password: str | None) -> None:
    masked = mask_password("a hunter22hunter " * 100_000, password)
    assert len(masked) < 1100
    assert masked.startswith("a *** a" if password else "a hunter22hunter a")
    assert masked.endswith("...")


def test_no_part_of_a_password_is_left_where_a_message_is_cut() -> None:
    for size in (*range(14), *range(1980, 2001)):
        assert "hunter" not in mask_password("a" * size + "hunter22hunter" * 1000, "hunter22hunter")


async def test_the_sidecar_names_its_user_where_the_password_is_the_same_word() -> None:
    async with PostgresCluster(standbys=0, password="another") as cluster:
        host = f"{cluster.primary.host}:{cluster.primary.port}"
        # The password is the default one, and equals the default user.
        async with running(hosts=host, max_fails="1") as sidecar, http_client(await sidecar.ready()) as client:
            (described,) = (await client.get("/hosts")).json()
    assert 'user "postgres"' in described["error"]
    assert "check the monitor's user (postgres)" in described["error"]
