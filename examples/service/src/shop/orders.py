"""Placing and cancelling orders."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from datetime import timedelta
from decimal import Decimal

from sqlalchemy import func, select
from sqlalchemy.orm import selectinload

from ctxdb_core import db_session
from shop import mails
from shop.database import db
from shop.errors import CouponError, OrderStatusError, OutOfStockError
from shop.models import Coupon, Order, OrderLine, OrderStatus, Product, Stock, User


async def place(user_id: uuid.UUID, quantities: Mapping[int, int], coupon_code: str | None = None) -> Order:
    """Place an order for so many (`quantities`) of each product, by the ids of the products.

    Raises:
        OutOfStockError: there are not as many, or there is no such product.
        CouponError: there is no such coupon, or it is used up.
    """
    session = await db_session(db)
    order = Order(user_id=user_id, coupon_code=coupon_code, total=Decimal())
    for product in await _take_from_stock(quantities):
        order.lines.append(OrderLine(product_id=product.id, quantity=quantities[product.id], price=product.price))
    total = sum((line.price * line.quantity for line in order.lines), Decimal())
    if coupon_code is not None:
        total = (total * (100 - await _use_coupon(coupon_code)) / 100).quantize(Decimal("0.01"))
    order.total = total
    session.add(order)
    await session.flush()
    await session.refresh(order, ["placed"])
    await mails.write((await session.get_one(User, user_id)).email, f"Your order {order.id}")
    return order


async def _take_from_stock(quantities: Mapping[int, int]) -> list[Product]:
    session = await db_session(db)
    # In the same order by everyone: two orders that lock the same rows wait for each other, and not in a circle.
    query = select(Stock, Product).join(Stock.product).where(Stock.product_id.in_(quantities))
    rows = (await session.execute(query.order_by(Stock.product_id).with_for_update(of=Stock))).all()
    if missing := quantities.keys() - {product.id for _, product in rows}:
        raise OutOfStockError(f"There is no product {min(missing)}.")
    for stock, product in rows:
        if stock.quantity < quantities[product.id]:
            raise OutOfStockError(f"There are {stock.quantity} of {product.name} left.")
        stock.quantity -= quantities[product.id]
    return [product for _, product in rows]


async def _use_coupon(code: str) -> int:
    coupon = await (await db_session(db)).get(Coupon, code, with_for_update=True)
    if coupon is None or coupon.uses_left == 0:
        raise CouponError(f"The coupon {code} is not valid.")
    coupon.uses_left -= 1
    return coupon.percent


async def list_of_user(user_id: uuid.UUID) -> Sequence[Order]:
    """Return a customer's orders, the newest first."""
    query = select(Order).where(Order.user_id == user_id).options(selectinload(Order.lines)).order_by(Order.id.desc())
    return (await (await db_session(db)).scalars(query)).all()


async def get_of_user(user_id: uuid.UUID, order_id: int, *, lock: bool = False) -> Order:
    """Return one of a customer's orders; `NoResultFound` if there is none."""
    query = select(Order).where(Order.id == order_id, Order.user_id == user_id).options(selectinload(Order.lines))
    if lock:
        query = query.with_for_update(of=Order)
    return (await (await db_session(db)).scalars(query)).one()


async def cancel(order: Order) -> None:
    """Cancel an order that is not paid, and put its products back. `order` must be locked."""
    if order.status is not OrderStatus.PLACED:
        raise OrderStatusError(f"Order {order.id} is {order.status}.")
    order.status = OrderStatus.CANCELLED
    quantities = {line.product_id: line.quantity for line in order.lines}
    query = select(Stock).where(Stock.product_id.in_(quantities)).order_by(Stock.product_id).with_for_update()
    for stock in await (await db_session(db)).scalars(query):
        stock.quantity += quantities[stock.product_id]


async def cancel_next_unpaid(after: timedelta) -> bool:
    """Cancel the oldest order that was not paid in time, and return whether there was one."""
    session = await db_session(db)
    query = select(Order).where(Order.status == OrderStatus.PLACED, Order.placed < func.now() - after)
    query = query.order_by(Order.id).limit(1).with_for_update(of=Order, skip_locked=True)
    order = await session.scalar(query.options(selectinload(Order.lines), selectinload(Order.user)))
    if order is None:
        return False
    await cancel(order)
    await mails.write(order.user.email, f"Your order {order.id} is cancelled")
    return True
