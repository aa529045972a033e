"""The real PostgreSQL of the service's tests."""

from tests.hpo.conftest import postgres

__all__ = ["postgres"]
