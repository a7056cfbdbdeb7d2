"""The one room that knows how SQLAlchemy and its drivers work inside: sessions, engines, private names."""
