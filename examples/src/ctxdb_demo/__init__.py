"""Example applications of ctxdb over one domain module, and the demo that drives them on a real database.

The application: `database`, `domain`, `schemas`, and one module for each framework. The demo starts in `cli`.
"""
