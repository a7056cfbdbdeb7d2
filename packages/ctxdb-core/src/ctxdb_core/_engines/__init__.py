"""An engine on one host and event loop: how it is made, and what it is taught."""
