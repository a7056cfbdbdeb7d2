"""REST: what clients send and get, and which function does it."""
