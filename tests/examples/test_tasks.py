"""The broker's tasks: each call is committed once, or rolled back and delivered again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from taskiq import InMemoryBroker
from tests.examples.conftest import Bank

from ctxdb_core import new_db_ctx
from ctxdb_demo.jobs import tasks
from ctxdb_demo.jobs.tasks import order_transfer, transfer


@pytest.fixture(autouse=True)
async def broker(bank: Bank) -> AsyncIterator[InMemoryBroker]:
    """The broker of the module, started; it closes the connections when it is shut down."""
    await tasks.broker.startup()
    yield tasks.broker
    await finished(tasks.broker)
    await tasks.close(tasks.broker.state)


async def finished(broker: InMemoryBroker) -> None:
    """Wait for the tasks, and for those that a failed one has been replaced by."""
    while broker._running_tasks:
        await broker.wait_all()


async def test_a_task_is_committed_before_it_has_a_result(bank: Bank) -> None:
    task = await transfer.kiq("ada", "bob", 30)
    assert (await task.wait_result()).return_value is True
    assert await bank.balances() == {"ada": 70, "bob": 130, "cy": 100}


async def test_a_task_that_keeps_failing_is_given_up(bank: Bank, broker: InMemoryBroker) -> None:
    task = await transfer.kiq("ada", "bob", 1000)
    await finished(broker)
    result = await task.get_result()
    assert result.is_err
    assert "ada has no account with 1000" in str(result.error)
    assert await bank.balances() == {"ada": 100, "bob": 100, "cy": 100}
    assert await bank.database.query("SELECT * FROM ctxdb_demo_finished_tasks") == []


async def test_a_task_whose_commit_fails_has_failed(bank: Bank, broker: InMemoryBroker) -> None:
    task = await transfer.kiq("ada", "nobody", 30)
    await finished(broker)
    assert (await task.get_result()).is_err
    assert await bank.balances() == {"ada": 100, "bob": 100, "cy": 100}


async def test_a_task_whose_connection_breaks_is_tried_again(bank: Bank, broker: InMemoryBroker) -> None:
    async with bank.locked("bob"):
        task = await transfer.kiq("ada", "bob", 30)
        await bank.wait_until_a_job_is_held_up()
        bank.break_connection()
        await bank.wait_until_a_job_is_held_up()
    await finished(broker)
    assert not (await task.get_result()).is_err
    assert await bank.balances() == {"ada": 70, "bob": 130, "cy": 100}


async def test_a_task_that_is_delivered_twice_is_done_once(bank: Bank) -> None:
    for expected in (True, False):
        task = await transfer.kicker().with_task_id("one").kiq("ada", "bob", 30)
        assert (await task.wait_result()).return_value is expected
        await finished(tasks.broker)
        tasks.broker.result_backend.results.clear()
    assert await bank.balances() == {"ada": 70, "bob": 130, "cy": 100}


async def test_a_task_that_is_cancelled_in_mid_work_is_delivered_again_and_done_once(
    bank: Bank, broker: InMemoryBroker
) -> None:
    async with bank.locked("bob"):
        await transfer.kiq("ada", "bob", 30)
        await bank.wait_until_a_job_is_held_up()
        (running,) = broker._running_tasks
        running.cancel()
        await asyncio.wait([running])
        assert await bank.balances() == {"ada": 100, "bob": 100, "cy": 100}
        # The broker has it again.
        await bank.wait_until_a_job_is_held_up()
    await finished(broker)
    assert await bank.balances() == {"ada": 70, "bob": 130, "cy": 100}


async def test_the_broker_hears_of_a_task_once_it_is_committed(bank: Bank, broker: InMemoryBroker) -> None:
    with pytest.raises(LookupError):
        async with new_db_ctx():
            await order_transfer("ada", "bob", 30)
            raise LookupError
    assert not broker._running_tasks
    async with new_db_ctx():
        await order_transfer("ada", "cy", 30)
        assert not broker._running_tasks
    await finished(broker)
    assert await bank.balances() == {"ada": 70, "bob": 100, "cy": 130}
