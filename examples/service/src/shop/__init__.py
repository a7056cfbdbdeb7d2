"""A shop: catalogue, orders, payments, reviews; by REST, by GraphQL, with an admin and a worker."""
