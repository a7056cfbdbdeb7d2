"""What clients send and get, for every framework's version of the application."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

Owner = Annotated[str, Field(min_length=1, max_length=40)]
Amount = Annotated[int, Field(gt=0, le=1_000_000)]
Deposit = Annotated[int, Field(ge=-1_000_000, le=1_000_000)]


class NewAccount(BaseModel):
    """An account to be opened."""

    owner: Owner
    balance: Annotated[int, Field(ge=0, le=1_000_000)]


class AccountModel(BaseModel):
    """An account as it is."""

    model_config = ConfigDict(from_attributes=True)

    owner: str
    balance: int


class NewTransfer(BaseModel):
    """A transfer to be made."""

    source: Owner
    target: Owner
    amount: Amount


class TransferModel(BaseModel):
    """A transfer that was made."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    source: str
    target: str
    amount: int


class Withdrawal(BaseModel):
    """Cash that is asked for."""

    owner: Owner
    amount: Amount


class Bonus(BaseModel):
    """A bonus for everyone."""

    amount: Amount


Accounts = TypeAdapter(list[AccountModel])
Deposits = TypeAdapter(list[Deposit])
Salaries = TypeAdapter(dict[Owner, Amount])
