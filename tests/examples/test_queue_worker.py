"""The worker: an order is carried out whole or is still there, whatever happens."""

from __future__ import annotations

import asyncio
import signal
from datetime import timedelta

import pytest
from tests.examples.conftest import Bank

from ctxdb_core import db_session, gather_in_new_ctx, new_db_ctx
from ctxdb_demo.database import db
from ctxdb_demo.jobs import queue_worker
from ctxdb_demo.jobs.queue_worker import Order, handle_next, work


async def order(source: str, target: str, amount: int) -> None:
    async with new_db_ctx():
        (await db_session(db)).add(Order(source=source, target=target, amount=amount))


async def orders(bank: Bank) -> int:
    return int((await bank.database.query("SELECT count(*) FROM ctxdb_demo_orders"))[0][0])


async def test_an_order_is_carried_out_and_removed(bank: Bank) -> None:
    await order("ada", "bob", 30)
    assert await handle_next()
    assert await bank.balances() == {"ada": 70, "bob": 130, "cy": 100}
    assert await orders(bank) == 0
    assert not await handle_next()


@pytest.mark.parametrize(
    ("target", "amount"), [("bob", 1000), ("nobody", 30)], ids=["refused by a statement", "refused by the commit"]
)
async def test_an_order_that_fails_is_undone_and_put_off(bank: Bank, target: str, amount: int) -> None:
    await order("ada", target, amount)
    await order("bob", "cy", 1)
    assert await handle_next()
    assert await bank.balances() == {"ada": 100, "bob": 100, "cy": 100}
    rows = await bank.database.query(
        "SELECT failures, due > now(), error <> '' FROM ctxdb_demo_orders WHERE source = 'ada'"
    )
    assert rows == [(1, True, True)]
    # The failed order does not hold the others up.
    assert await handle_next()
    assert not await handle_next()
    assert await bank.transfers() == 1


async def test_an_order_is_given_up_at_last(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_worker, "FIRST_PAUSE", timedelta(0))
    await order("ada", "bob", 1000)
    tries = 0
    while await handle_next():
        tries += 1
    assert tries == queue_worker.ATTEMPTS
    assert await bank.database.query("SELECT failures, due FROM ctxdb_demo_orders") == [(tries, None)]


async def test_an_order_whose_connection_breaks_is_carried_out_later(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_worker, "FIRST_PAUSE", timedelta(0))
    await order("ada", "bob", 30)
    async with bank.locked("bob"):
        handling = asyncio.create_task(handle_next())
        await bank.wait_until_a_job_is_held_up()
        bank.break_connection()
        assert await handling
    assert (await bank.balances())["ada"] == 100
    assert await handle_next()
    assert await bank.balances() == {"ada": 70, "bob": 130, "cy": 100}


async def test_workers_pass_by_the_orders_of_others(bank: Bank) -> None:
    await order("bob", "ada", 30)
    await order("ada", "cy", 30)
    async with bank.locked("bob"):
        slow = asyncio.create_task(handle_next())
        await bank.wait_until_a_job_is_held_up()
        async with asyncio.timeout(10):
            assert await handle_next()
            assert not await handle_next()
        assert await bank.balances() == {"ada": 70, "bob": 100, "cy": 130}
    assert await slow
    assert await bank.balances() == {"ada": 100, "bob": 70, "cy": 130}


async def test_many_workers_carry_each_order_out_once(bank: Bank) -> None:
    await gather_in_new_ctx(*(lambda: order("ada", "bob", 1) for _ in range(20)), max_concurrent=2)

    async def until_done() -> None:
        while await handle_next():
            pass

    await asyncio.gather(*(until_done() for _ in range(4)))
    assert await bank.balances() == {"ada": 80, "bob": 120, "cy": 100}
    assert await bank.transfers() == 20


async def test_a_worker_that_is_stopped_finishes_its_order_and_takes_no_other(bank: Bank) -> None:
    stop = asyncio.Event()
    await order("ada", "bob", 30)
    await order("cy", "bob", 30)
    async with bank.locked("bob"):
        worker = asyncio.create_task(work(stop))
        await bank.wait_until_a_job_is_held_up()
        stop.set()
    await worker
    assert await bank.balances() == {"ada": 70, "bob": 130, "cy": 100}
    assert await orders(bank) == 1


async def test_a_worker_that_is_idle_stops_at_once(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_worker, "IDLE_SECONDS", 300.0)
    stop = asyncio.Event()
    worker = asyncio.create_task(work(stop))
    await asyncio.sleep(0)
    stop.set()
    async with asyncio.timeout(10):
        await worker


async def test_a_worker_survives_a_database_that_is_away(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_worker, "IDLE_SECONDS", 0)
    stop = asyncio.Event()
    tries = 0

    async def fail() -> bool:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise OSError("no route to host")
        stop.set()
        return True

    monkeypatch.setattr(queue_worker, "handle_next", fail)
    await work(stop)
    assert tries == 3


async def test_a_signal_lets_the_process_finish_its_orders(bank: Bank) -> None:
    await order("ada", "bob", 30)
    async with bank.process("queue_worker") as worker:
        async with bank.locked("bob"):
            await bank.wait_until_a_job_is_held_up()
            worker.send(signal.SIGTERM)
        assert (await worker.ended())[0] == 0
    assert await bank.balances() == {"ada": 70, "bob": 130, "cy": 100}
    assert await orders(bank) == 0


async def test_a_second_signal_leaves_the_order_to_the_next_worker(bank: Bank) -> None:
    await order("ada", "bob", 30)
    async with bank.process("queue_worker") as worker, bank.locked("bob"):
        await bank.wait_until_a_job_is_held_up()
        worker.send(signal.SIGTERM)
        worker.send(signal.SIGINT)
        assert (await worker.ended())[0] == 0
    assert await bank.balances() == {"ada": 100, "bob": 100, "cy": 100}
    assert await orders(bank) == 1
    assert await handle_next()
    assert await bank.balances() == {"ada": 70, "bob": 130, "cy": 100}


async def test_a_process_that_is_killed_leaves_the_order_to_the_next_worker(bank: Bank) -> None:
    await order("ada", "bob", 30)
    async with bank.process("queue_worker") as worker, bank.locked("bob"):
        await bank.wait_until_a_job_is_held_up()
        worker.send(signal.SIGKILL)
        assert (await worker.ended())[0] == -signal.SIGKILL
        # A server that waits for a lock does not see that its client has gone.
        bank.break_connection()
    assert await handle_next()
    assert await bank.balances() == {"ada": 70, "bob": 130, "cy": 100}
