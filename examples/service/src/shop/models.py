"""The tables."""

from __future__ import annotations

import uuid
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import ClassVar

from fastapi_users_db_sqlalchemy import SQLAlchemyBaseUserTableUUID
from fastapi_users_db_sqlalchemy.access_token import SQLAlchemyBaseAccessTokenTableUUID
from sqlalchemy import (
    CheckConstraint,
    DateTime,
    Enum,
    ForeignKey,
    Index,
    MetaData,
    Numeric,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class Base(DeclarativeBase):
    """The base of all tables. Constraints have names, so that a migration can speak of them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar = {datetime: DateTime(timezone=True), Decimal: Numeric(10, 2)}


class OrderStatus(StrEnum):
    """The status of an order. `orders` and `payments` decide which one may follow another."""

    PLACED = "placed"
    PAYING = "paying"
    PAID = "paid"
    CANCELLED = "cancelled"


class PaymentStatus(StrEnum):
    """`PENDING` until the provider has answered."""

    PENDING = "pending"
    PAID = "paid"
    DECLINED = "declined"


class User(SQLAlchemyBaseUserTableUUID, Base):
    """A customer; an employee, if `is_superuser`."""

    __tablename__ = "users"

    def __str__(self) -> str:
        return self.email


class AccessToken(SQLAlchemyBaseAccessTokenTableUUID, Base):
    """The token of a client that has logged in."""

    __tablename__ = "access_token"

    user_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True)


class Category(Base):
    """A shelf of the shop."""

    __tablename__ = "category"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)

    def __str__(self) -> str:
        return self.name


class Product(Base):
    """A product of the catalogue."""

    __tablename__ = "product"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    description: Mapped[str] = mapped_column(default="")
    price: Mapped[Decimal]
    category_id: Mapped[int] = mapped_column(ForeignKey("category.id"), index=True)

    category: Mapped[Category] = relationship()
    stock: Mapped[Stock] = relationship(back_populates="product", cascade="all, delete-orphan")

    def __str__(self) -> str:
        return self.name


class Stock(Base):
    """How many of a product are left. A table of its own, as orders lock its rows: editors of products do not wait."""

    __tablename__ = "stock"
    __table_args__ = (CheckConstraint("quantity >= 0", name="quantity"),)

    product_id: Mapped[int] = mapped_column(ForeignKey("product.id"), primary_key=True)
    quantity: Mapped[int] = mapped_column(default=0)

    product: Mapped[Product] = relationship(back_populates="stock")


class Review(Base):
    """A customer's review of a product."""

    __tablename__ = "review"
    __table_args__ = (
        UniqueConstraint("product_id", "user_id"),
        CheckConstraint("stars BETWEEN 1 AND 5", name="stars"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    product_id: Mapped[int] = mapped_column(ForeignKey("product.id"))
    user_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id"))
    stars: Mapped[int]
    words: Mapped[str] = mapped_column(default="")


class Coupon(Base):
    """A reduction, for so many orders."""

    __tablename__ = "coupon"
    __table_args__ = (
        CheckConstraint("percent BETWEEN 1 AND 100", name="percent"),
        CheckConstraint("uses_left >= 0", name="uses_left"),
    )

    code: Mapped[str] = mapped_column(primary_key=True)
    percent: Mapped[int]
    uses_left: Mapped[int]


class Order(Base):
    """A customer's order."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id"), index=True)
    status: Mapped[OrderStatus] = mapped_column(
        Enum(OrderStatus, native_enum=False, length=20), default=OrderStatus.PLACED
    )
    coupon_code: Mapped[str | None] = mapped_column(ForeignKey("coupon.code"))
    total: Mapped[Decimal]
    placed: Mapped[datetime] = mapped_column(server_default=func.now())

    user: Mapped[User] = relationship()
    lines: Mapped[list[OrderLine]] = relationship(cascade="all, delete-orphan", order_by="OrderLine.product_id")


class OrderLine(Base):
    """A quantity of one product, at the price of the day."""

    __tablename__ = "order_line"
    __table_args__ = (CheckConstraint("quantity > 0", name="quantity"),)

    order_id: Mapped[int] = mapped_column(ForeignKey("orders.id"), primary_key=True)
    product_id: Mapped[int] = mapped_column(ForeignKey("product.id"), primary_key=True)
    quantity: Mapped[int]
    price: Mapped[Decimal]


class Payment(Base):
    """An attempt to pay an order. Its id is the key by which the provider recognises a repetition."""

    __tablename__ = "payment"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    order_id: Mapped[int] = mapped_column(ForeignKey("orders.id"), index=True)
    amount: Mapped[Decimal]
    status: Mapped[PaymentStatus] = mapped_column(
        Enum(PaymentStatus, native_enum=False, length=20), default=PaymentStatus.PENDING
    )
    begun: Mapped[datetime] = mapped_column(server_default=func.now())


class Mail(Base):
    """A mail to be sent: written in the transaction that it tells of, and sent by the worker."""

    __tablename__ = "mail"
    __table_args__ = (Index("ix_mail_unsent", "id", postgresql_where=text("sent IS NULL")),)

    id: Mapped[int] = mapped_column(primary_key=True)
    recipient: Mapped[str]
    subject: Mapped[str]
    sent: Mapped[datetime | None]
