"""Databases as the application knows them: `DBConnect`, its engines by host and event loop, what it tells."""
