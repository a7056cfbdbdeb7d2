"""The catalogue and orders by GraphQL: the same functions as REST has."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from decimal import Decimal

import strawberry
from strawberry.dataloader import DataLoader
from strawberry.extensions import SchemaExtension
from strawberry.fastapi import BaseContext, GraphQLRouter
from strawberry.types.graphql import OperationType

from ctxdb_core import set_rollback_only
from shop import catalogue, models, orders
from shop.users import OptionalUser


async def load_reviews(product_ids: Sequence[int]) -> list[list[models.Review]]:
    """Load the reviews of many products by one query."""
    found = await catalogue.reviews_of(product_ids)
    return [found[product_id] for product_id in product_ids]


@dataclass
class Context(BaseContext):
    """The data of a request that resolvers get. The session is not among it: they ask `db_session(db)`."""

    user: models.User | None

    def __post_init__(self) -> None:
        super().__init__()
        self.reviews: DataLoader[int, list[models.Review]] = DataLoader(load_reviews)

    @property
    def customer(self) -> models.User:
        if self.user is None:
            raise PermissionError("You are not logged in.")
        return self.user


def get_context(user: OptionalUser) -> Context:
    """Make the context of a request."""
    return Context(user)


@strawberry.type
class Review:
    """A customer's review of a product."""

    stars: int
    words: str


@strawberry.type
class Product:
    """A product of the catalogue."""

    id: strawberry.ID
    name: str
    price: Decimal

    @strawberry.field
    async def reviews(self, info: strawberry.Info[Context, None]) -> list[Review]:
        """Return the product's reviews."""
        loaded = await info.context.reviews.load(int(self.id))
        return [Review(stars=review.stars, words=review.words) for review in loaded]

    @classmethod
    def of(cls, product: models.Product) -> Product:
        return cls(id=strawberry.ID(str(product.id)), name=product.name, price=product.price)


@strawberry.type
class Order:
    """A customer's order."""

    id: strawberry.ID
    status: str
    total: Decimal

    @classmethod
    def of(cls, order: models.Order) -> Order:
        return cls(id=strawberry.ID(str(order.id)), status=order.status, total=order.total)


@strawberry.input
class Item:
    """A quantity of a product."""

    product: strawberry.ID
    quantity: int = 1


@strawberry.type
class Query:
    """The queries."""

    @strawberry.field
    async def products(self, category: str | None = None, after: int = 0, limit: int = 20) -> list[Product]:
        """Return a page of the catalogue."""
        found = await catalogue.list_products(category=category, after=after, limit=min(limit, 100))
        return [Product.of(product) for product in found]

    @strawberry.field
    async def orders(self, info: strawberry.Info[Context, None]) -> list[Order]:
        """Return the customer's orders."""
        return [Order.of(order) for order in await orders.list_of_user(info.context.customer.id)]


@strawberry.type
class Mutation:
    """The mutations."""

    @strawberry.mutation
    async def place_order(
        self, info: strawberry.Info[Context, None], items: list[Item], coupon: str | None = None
    ) -> Order:
        """Place an order."""
        quantities = {int(item.product): item.quantity for item in items}
        return Order.of(await orders.place(info.context.customer.id, quantities, coupon))


class RollBackFailedMutations(SchemaExtension):
    """A failed mutation is answered by a 200, which would commit the half of it that was done."""

    async def on_operation(self) -> AsyncIterator[None]:
        """Roll back an operation that has failed, when it ends."""
        yield
        result = self.execution_context.result
        if result and result.errors and self.execution_context.operation_type is OperationType.MUTATION:
            set_rollback_only()


schema = strawberry.Schema(Query, Mutation, extensions=[RollBackFailedMutations])
router: GraphQLRouter[Context, None] = GraphQLRouter(schema, context_getter=get_context)
