"""A session on its way: its statements, who watches it, and how it ends."""
