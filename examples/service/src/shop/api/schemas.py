"""The schemas of requests and responses."""

from __future__ import annotations

import uuid
from datetime import datetime
from decimal import Decimal
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from shop.models import OrderStatus, PaymentStatus


class Sent(BaseModel):
    """A schema that is filled from a model."""

    model_config = ConfigDict(from_attributes=True)


class Named(Sent):
    """A category."""

    name: str


class InStock(Sent):
    """How many there are."""

    quantity: int


class ProductOut(Sent):
    """A product."""

    id: int
    name: str
    description: str
    price: Decimal
    category: Named
    stock: InStock


class ProductIn(BaseModel):
    """A new product."""

    name: str
    price: Annotated[Decimal, Field(gt=0, decimal_places=2)]
    category: str
    quantity: Annotated[int, Field(ge=0)] = 0


class ReviewIn(BaseModel):
    """A new review."""

    stars: Annotated[int, Field(ge=1, le=5)]
    words: str = ""


class ReviewOut(Sent):
    """A review."""

    id: int
    stars: int
    words: str


class OrderIn(BaseModel):
    """A new order: how many of each product, by the products' ids."""

    quantities: Annotated[dict[int, Annotated[int, Field(gt=0)]], Field(min_length=1)]
    coupon: str | None = None


class OrderLineOut(Sent):
    """A line of an order."""

    product_id: int
    quantity: int
    price: Decimal


class OrderOut(Sent):
    """An order."""

    id: int
    status: OrderStatus
    total: Decimal
    placed: datetime
    lines: list[OrderLineOut]


class PaymentOut(Sent):
    """A payment."""

    id: uuid.UUID
    amount: Decimal
    status: PaymentStatus
