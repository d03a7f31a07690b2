"""The employee system: a small HTTP application over PostgreSQL."""

__version__ = "1.1.0"
