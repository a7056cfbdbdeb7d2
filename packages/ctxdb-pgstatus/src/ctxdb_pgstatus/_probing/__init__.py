"""How a host is asked, and what its answers amount to."""
