"""Orders by REST."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends

from shop import orders, payments
from shop.api.schemas import OrderIn, OrderOut, PaymentOut
from shop.models import Order, Payment
from shop.users import CurrentUser

router = APIRouter(prefix="/orders", tags=["orders"])


@router.post("", response_model=OrderOut, status_code=201)
async def place(order: OrderIn, user: CurrentUser) -> Order:
    """Place an order."""
    return await orders.place(user.id, order.quantities, order.coupon)


@router.get("", response_model=list[OrderOut])
async def list_orders(user: CurrentUser) -> object:
    """Return the customer's orders."""
    return await orders.list_of_user(user.id)


@router.get("/{order_id}", response_model=OrderOut)
async def get_order(order_id: int, user: CurrentUser) -> Order:
    """Return one of the customer's orders."""
    return await orders.get_of_user(user.id, order_id)


@router.post("/{order_id}/payment", response_model=PaymentOut, status_code=201)
async def pay(
    order_id: int, user: CurrentUser, provider: Annotated[payments.Provider, Depends(payments.get_provider)]
) -> Payment:
    """Pay an order."""
    return await payments.pay(user.id, order_id, provider)


@router.delete("/{order_id}", status_code=204)
async def cancel(order_id: int, user: CurrentUser) -> None:
    """Cancel an order that is not paid."""
    await orders.cancel(await orders.get_of_user(user.id, order_id, lock=True))
