"""What holds for a transaction beyond SQLAlchemy: limits, propagation, repetition, callbacks."""
