"""The stores of the service's tests."""

from tests.service.conftest import sqlite_store, store, url

__all__ = ["sqlite_store", "store", "url"]
