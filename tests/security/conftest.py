"""The real PostgreSQL of the service's tests."""

from tests.service.conftest import postgres

__all__ = ["postgres"]
