"""The unit of work: its sessions, how they end together, and the functions that ask for them."""
