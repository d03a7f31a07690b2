"""The employee system: a small HTTP application over PostgreSQL."""

__version__ = "1.0.0"
