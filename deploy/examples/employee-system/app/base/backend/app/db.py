"""The way to the database. Nothing here connects before it is asked to."""

from sqlalchemy import create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.pool import NullPool


def sqlalchemy_url(database_url):
    """`postgresql://` is what operators write and libpq reads; SQLAlchemy wants its driver named as well."""
    return make_url(database_url).set(drivername="postgresql+psycopg")


def open_engine(database_url, **options):
    return create_engine(
        sqlalchemy_url(database_url),
        # One connection per request and none in between: when the database is fenced off, no idle session of
        # ours has to be ended first, and when it comes back, no stale one is handed out.
        poolclass=NullPool,
        # Keeps bound values (password hashes, personal data) out of exception texts.
        hide_parameters=True,
        connect_args={"connect_timeout": 3, "fallback_application_name": "employee-backend"},
        **options,
    )


def reason(exc):
    """The first line of what the driver said. The further lines may quote row values."""
    text = str(getattr(exc, "orig", None) or exc).strip()
    return f"{type(exc).__name__}: {text.splitlines()[0] if text else ''}"
