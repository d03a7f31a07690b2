"""The employee system: a small HTTP application over PostgreSQL."""

__version__ = "0.9.5"
