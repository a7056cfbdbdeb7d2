"""The catalogue by REST."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from shop import catalogue
from shop.api.schemas import ProductIn, ProductOut, ReviewIn, ReviewOut
from shop.models import Product, Review
from shop.users import CurrentUser, Employee

router = APIRouter(tags=["catalogue"])


@router.get("/products", response_model=list[ProductOut])
async def list_products(
    category: str | None = None,
    after: Annotated[int, Query(description="the id of the last product of the page before")] = 0,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> object:
    """Return a page of the catalogue."""
    return await catalogue.list_products(category=category, after=after, limit=limit)


@router.post("/products", response_model=ProductOut, status_code=201)
async def add_product(product: ProductIn, employee: Employee) -> Product:
    """Add a product."""
    return await catalogue.add_product(product.name, product.price, product.category, product.quantity)


@router.get("/products/{product_id}", response_model=ProductOut)
async def get_product(product_id: int) -> Product:
    """Return a product."""
    return await catalogue.get_product(product_id)


@router.get("/products/{product_id}/reviews", response_model=list[ReviewOut])
async def list_reviews(product_id: int) -> object:
    """Return the reviews of a product."""
    await catalogue.get_product(product_id)
    return (await catalogue.reviews_of([product_id]))[product_id]


@router.post("/products/{product_id}/reviews", response_model=ReviewOut, status_code=201)
async def add_review(product_id: int, review: ReviewIn, user: CurrentUser) -> Review:
    """Review a product that the customer has bought."""
    return await catalogue.add_review(user.id, product_id, review.stars, review.words)
