"""Runs the migrations, all of one call in one transaction, or prints their SQL (`--sql`)."""

import os
from logging.config import fileConfig

from alembic import context

from app.db import open_engine

fileConfig(context.config.config_file_name, disable_existing_loggers=False)


def limits():
    """The statements that bound the wait for locks and the work itself. Printed in offline mode too: what is
    reviewed is what runs."""
    for setting in ("lock_timeout", "statement_timeout"):
        if milliseconds := os.environ.get(f"{setting.upper()}_MS"):
            yield f"SET LOCAL {setting} = {int(milliseconds)}"


def run():
    with context.begin_transaction():
        for statement in limits():
            context.execute(statement)
        context.run_migrations()


if context.is_offline_mode():
    # Needs no database, and so no DATABASE_URL.
    context.configure(dialect_name="postgresql", literal_binds=True)
    run()
else:
    with open_engine(os.environ["DATABASE_URL"]).connect() as connection:
        context.configure(connection=connection)
        run()
