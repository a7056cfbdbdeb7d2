"""REST: schemas, and endpoints that call the shop's functions."""
