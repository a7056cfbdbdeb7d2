"""What the integrations with other tools share: following units of work, their transactions, and pools."""
