"""Products, their stock, and their reviews."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from decimal import Decimal

from sqlalchemy import exists, select
from sqlalchemy.orm import joinedload

from ctxdb_core import db_session
from shop.database import db
from shop.errors import NotBoughtError
from shop.models import Category, Order, OrderLine, OrderStatus, Product, Review, Stock


async def list_products(*, category: str | None = None, after: int = 0, limit: int = 20) -> Sequence[Product]:
    """Return a page of the catalogue: the products with ids greater than `after`."""
    query = select(Product).options(joinedload(Product.category), joinedload(Product.stock))
    if category is not None:
        query = query.join(Product.category).where(Category.name == category)
    query = query.where(Product.id > after).order_by(Product.id).limit(limit)
    return (await (await db_session(db)).scalars(query)).all()


async def get_product(product_id: int) -> Product:
    """Return a product; `NoResultFound` if there is none."""
    options = [joinedload(Product.category), joinedload(Product.stock)]
    return await (await db_session(db)).get_one(Product, product_id, options=options)


async def add_product(name: str, price: Decimal, category: str, quantity: int) -> Product:
    """Add a product, and its category if that is new."""
    session = await db_session(db)
    shelf = await session.scalar(select(Category).where(Category.name == category))
    product = Product(name=name, price=price, category=shelf or Category(name=category), stock=Stock(quantity=quantity))
    session.add(product)
    await session.flush()
    return product


async def add_review(user_id: uuid.UUID, product_id: int, stars: int, words: str) -> Review:
    """Add a customer's review.

    Raises:
        NotBoughtError: the customer has not paid for an order with this product.
        IntegrityError: the customer has reviewed it before.
    """
    session = await db_session(db)
    orders = select(Order).join(Order.lines)
    bought = orders.where(
        Order.user_id == user_id, Order.status == OrderStatus.PAID, OrderLine.product_id == product_id
    )
    if not await session.scalar(select(exists(bought))):
        raise NotBoughtError("Only products that you have bought can be reviewed.")
    review = Review(user_id=user_id, product_id=product_id, stars=stars, words=words)
    session.add(review)
    await session.flush()
    return review


async def reviews_of(product_ids: Sequence[int]) -> dict[int, list[Review]]:
    """Return the reviews of some products, by one query."""
    found: dict[int, list[Review]] = {product_id: [] for product_id in product_ids}
    query = select(Review).where(Review.product_id.in_(product_ids)).order_by(Review.id)
    for review in await (await db_session(db)).scalars(query):
        found[review.product_id].append(review)
    return found
