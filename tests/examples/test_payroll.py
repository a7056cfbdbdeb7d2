"""The script: batches are paid whole or not at all, and each once, whatever happens."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest
from sqlalchemy.exc import DBAPIError
from tests.examples.conftest import Bank

from ctxdb_demo import domain
from ctxdb_demo.jobs import payroll
from ctxdb_demo.jobs.payroll import Salary


@pytest.fixture(autouse=True)
def batches_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payroll, "BATCH", 2)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "may.csv"
    path.write_text("ada,1\nbob,2\ncy,3\n")
    return path


SALARIES = [Salary("ada", 1), Salary("bob", 2), Salary("cy", 3)]


async def test_the_script_pays_everyone_once(bank: Bank, file: Path) -> None:
    for _ in range(2):
        async with bank.process("payroll", str(file)) as script:
            assert await script.ended() == (0, "")
    assert await bank.balances() == {"ada": 101, "bob": 102, "cy": 103}


async def test_a_batch_with_a_mistake_is_not_paid_and_can_be_paid_later(bank: Bank) -> None:
    with pytest.raises(domain.UnknownAccountError, match="line 4: eve"):
        await payroll.pay("may", [*SALARIES, Salary("eve", 4)], asyncio.Event())
    assert await bank.balances() == {"ada": 101, "bob": 102, "cy": 100}
    assert await payroll.pay("may", SALARIES, asyncio.Event())
    assert await bank.balances() == {"ada": 101, "bob": 102, "cy": 103}


async def test_the_script_says_which_line_is_wrong(bank: Bank, file: Path) -> None:
    file.write_text("ada,1\neve,2\n")
    async with bank.process("payroll", str(file)) as script:
        status, output = await script.ended()
    assert (status, output) == (1, "may.csv: line 2: eve has no account. The batch with this line was not paid.\n")
    assert (await bank.balances())["ada"] == 100


async def test_a_batch_that_conflicts_with_another_transaction_is_tried_again(bank: Bank) -> None:
    attempts = await bank.let_the_first_change_conflict()
    assert await payroll.pay("may", SALARIES, asyncio.Event())
    # There were three tries: one that failed, and one for each of the two batches.
    assert await attempts() == 4
    assert await bank.balances() == {"ada": 101, "bob": 102, "cy": 103}


async def test_a_batch_whose_connection_breaks_is_undone_and_paid_the_next_time(bank: Bank) -> None:
    async with bank.locked("bob"):
        paying = asyncio.create_task(payroll.pay("may", SALARIES, asyncio.Event()))
        await bank.wait_until_a_job_is_held_up()
        bank.break_connection()
        with pytest.raises(DBAPIError):
            await paying
    assert await bank.balances() == {"ada": 100, "bob": 100, "cy": 100}
    assert await payroll.pay("may", SALARIES, asyncio.Event())
    assert await bank.balances() == {"ada": 101, "bob": 102, "cy": 103}


async def test_two_scripts_with_one_payroll_file_pay_each_line_once(bank: Bank) -> None:
    both = [payroll.pay("may", SALARIES, asyncio.Event()) for _ in range(2)]
    assert await asyncio.gather(*both) == [True, True]
    assert await bank.balances() == {"ada": 101, "bob": 102, "cy": 103}


async def test_a_signal_lets_the_script_finish_its_batch(bank: Bank, file: Path) -> None:
    async with bank.process("payroll", str(file)) as script:
        async with bank.locked("cy"):
            await bank.wait_until_a_job_is_held_up()
            script.send(signal.SIGTERM)
        status, _ = await script.ended()
    # This was the last batch, but the script has stopped before it could see that.
    assert status == 3
    assert await bank.balances() == {"ada": 101, "bob": 102, "cy": 103}


async def test_a_second_signal_undoes_the_batch_at_once(bank: Bank, file: Path) -> None:
    async with bank.process("payroll", str(file)) as script, bank.locked("cy"):
        await bank.wait_until_a_job_is_held_up()
        script.send(signal.SIGTERM)
        script.send(signal.SIGINT)
        status, output = await script.ended()
    assert (status, output) == (3, "may.csv: stopped. Call this again for the rest.\n")
    assert await bank.balances() == {"ada": 100, "bob": 100, "cy": 100}
