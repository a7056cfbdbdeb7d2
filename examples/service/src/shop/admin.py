"""Pages for employees, by sqladmin."""

from __future__ import annotations

import uuid
from typing import ClassVar

from fastapi import FastAPI
from fastapi.security import OAuth2PasswordRequestForm
from sqladmin import Admin, ModelView
from sqladmin.authentication import AuthenticationBackend
from starlette.requests import Request

from ctxdb_core import db_session, joining_session
from shop import settings
from shop.database import db
from shop.models import Category, Coupon, Mail, Order, Payment, Product, Review, Stock, User
from shop.users import get_user_db, get_user_manager


class EmployeesOnly(AuthenticationBackend):
    """Employees log in with the password that they have in the shop."""

    async def login(self, request: Request) -> bool:
        """Check the password, and remember the employee."""
        form = await request.form()
        given = OAuth2PasswordRequestForm(username=str(form["username"]), password=str(form["password"]))
        async with joining_session(db) as session:
            user = await get_user_manager(get_user_db(session)).authenticate(given)
        if user is None or not _may_enter(user):
            return False
        request.session["employee"] = str(user.id)
        return True

    async def logout(self, request: Request) -> bool:
        """Forget the employee."""
        request.session.clear()
        return True

    async def authenticate(self, request: Request) -> bool:
        """Check that the user is still an employee: the browser may have logged in before that changed."""
        known = request.session.get("employee")
        user = await (await db_session(db)).get(User, uuid.UUID(known)) if known else None
        return user is not None and _may_enter(user)


def _may_enter(user: User) -> bool:
    return user.is_active and user.is_superuser


class Users(ModelView, model=User):
    """Customers and employees."""

    column_list: ClassVar = ["email", "is_active", "is_superuser"]
    form_columns: ClassVar = ["email", "is_active", "is_superuser"]
    can_create = False


class Categories(ModelView, model=Category):
    """Shelves."""

    column_list: ClassVar = [Category.name]
    name_plural = "Categories"


class Products(ModelView, model=Product):
    """Products."""

    column_list: ClassVar = [Product.name, Product.category, Product.price]
    form_columns: ClassVar = [Product.name, Product.description, Product.price, Product.category]


class Stocks(ModelView, model=Stock):
    """The stock of each product."""

    column_list: ClassVar = [Stock.product, Stock.quantity]
    name_plural = "Stock"


class Coupons(ModelView, model=Coupon):
    """Reductions."""

    column_list: ClassVar = [Coupon.code, Coupon.percent, Coupon.uses_left]
    form_include_pk = True


class Orders(ModelView, model=Order):
    """Orders, to be looked at."""

    column_list: ClassVar = [Order.id, Order.user, Order.status, Order.total, Order.placed]
    can_create = can_edit = can_delete = False


class Payments(ModelView, model=Payment):
    """Payments, to be looked at."""

    column_list: ClassVar = [Payment.order_id, Payment.amount, Payment.status, Payment.begun]
    can_create = can_edit = can_delete = False


class Reviews(ModelView, model=Review):
    """Reviews by customers; they can be deleted."""

    column_list: ClassVar = [Review.product_id, Review.stars, Review.words]
    can_create = can_edit = False


class Mails(ModelView, model=Mail):
    """Mails, and whether they were sent."""

    column_list: ClassVar = [Mail.recipient, Mail.subject, Mail.sent]
    can_create = can_edit = can_delete = False


VIEWS = (Users, Categories, Products, Stocks, Coupons, Orders, Payments, Reviews, Mails)


def add_admin(app: FastAPI) -> None:
    """Add the pages at ``/admin``. They write in sessions of their own, which `lazy_session_maker` makes."""
    admin = Admin(
        app, session_maker=db.lazy_session_maker, authentication_backend=EmployeesOnly(settings.SECRET), title="Shop"
    )
    for view in VIEWS:
        admin.add_view(view)
