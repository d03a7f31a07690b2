"""Migrations note in the file MIGRATION_LEDGER that they ran. In a file and not in a table: a table would come
back differently from a rollback, and would roll back with the transaction it is to bear witness of."""

import os

from alembic import context

from app.ledger import append_line


def record(kind, revision):
    path = os.environ.get("MIGRATION_LEDGER")
    # Offline mode runs the same functions to print SQL; nothing happens to a database then.
    if path and not context.is_offline_mode():
        append_line(path, kind, revision)
