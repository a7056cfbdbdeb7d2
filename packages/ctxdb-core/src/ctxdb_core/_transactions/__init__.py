"""What one transaction is given beyond SQLAlchemy: a limit, an isolation level, an end that can only be a roll-back."""
