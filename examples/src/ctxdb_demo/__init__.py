"""Example applications of ctxdb over one domain module, and the demo that drives them on a real database."""
