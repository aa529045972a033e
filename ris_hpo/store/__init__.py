"""The trial store: tickets in one transaction each, on SQLite or PostgreSQL. It knows nothing of studies."""
