"""The errors by which the shop's functions refuse, each with its HTTP status."""

from __future__ import annotations

from http import HTTPStatus


class ShopError(Exception):
    """The base of errors that a client has caused. The message is for the client."""

    status = HTTPStatus.CONFLICT


class OutOfStockError(ShopError):
    """There are not as many of a product as were ordered."""


class CouponError(ShopError):
    """There is no such coupon, or it is used up."""


class OrderStatusError(ShopError):
    """An order is not in the state in which this could be done."""


class PaymentDeclinedError(ShopError):
    """The provider refuses the payment."""

    status = HTTPStatus.PAYMENT_REQUIRED


class NotBoughtError(ShopError):
    """Only a customer who has bought a product may review it."""

    status = HTTPStatus.FORBIDDEN
