"""Blocks with a transaction of their own: each joins the one that it finds, nests in it, or begins another."""
