"""Says whether the database holds what this release needs, whole: tables, foreign keys, indexes, an admin.

Environment: DATABASE_URL. Exit code: 0 whole, 1 not, 2 not to be found out.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from app.db import open_engine, reason
from app.schema import REQUIRED_TABLES

# Every foreign key of the schema, from the catalog, so that a new table's keys are looked at without being named
# here. quote_ident and regclass do the quoting.
FOREIGN_KEYS = """
SELECT conname, conrelid::regclass::text AS child, confrelid::regclass::text AS parent, convalidated,
       (SELECT string_agg(format('p.%I = c.%I', pa.attname, ca.attname), ' AND ')
          FROM unnest(conkey, confkey) AS k(child_no, parent_no)
          JOIN pg_attribute ca ON ca.attrelid = conrelid AND ca.attnum = child_no
          JOIN pg_attribute pa ON pa.attrelid = confrelid AND pa.attnum = parent_no) AS matches,
       (SELECT string_agg(format('c.%I IS NOT NULL', attname), ' AND ')
          FROM pg_attribute WHERE attrelid = conrelid AND attnum = ANY (conkey)) AS given
  FROM pg_constraint WHERE contype = 'f' AND connamespace = 'public'::regnamespace ORDER BY conname
"""
INVALID_INDEXES = """
SELECT indexrelid::regclass::text FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
 WHERE relnamespace = 'public'::regnamespace AND NOT indisvalid
"""


def findings(connection):
    """(what was looked at, problem or None), in the order of looking."""

    def value(sql):
        return connection.execute(text(sql)).scalar()

    present = set(connection.execute(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")).scalars())
    missing = sorted(set(REQUIRED_TABLES) - present)
    yield "required tables", f"missing: {', '.join(missing)}" if missing else None

    for key in connection.execute(text(FOREIGN_KEYS)).mappings().all():
        orphans = value(
            f"SELECT count(*) FROM {key['child']} c WHERE {key['given']}"
            f" AND NOT EXISTS (SELECT FROM {key['parent']} p WHERE {key['matches']})"
        )
        problem = f"{orphans} rows without a parent" if orphans else None if key["convalidated"] else "not validated"
        yield f"foreign key {key['conname']}", problem

    broken = connection.execute(text(INVALID_INDEXES)).scalars().all()
    yield "indexes", f"not valid: {', '.join(broken)}" if broken else None

    if "users" in present:
        yield "an active user", None if value("SELECT count(*) FROM users WHERE is_active") else "there is none"


def main():
    if not os.environ.get("DATABASE_URL"):
        print("not set: DATABASE_URL", file=sys.stderr)
        return 2
    try:
        with open_engine(os.environ["DATABASE_URL"]).connect() as connection:
            found = list(findings(connection))
    except SQLAlchemyError as exc:
        print(reason(exc), file=sys.stderr)
        return 2
    for subject, problem in found:
        print(f"FAIL  {subject}: {problem}" if problem else f"ok    {subject}")
    return 1 if any(problem for _, problem in found) else 0


if __name__ == "__main__":
    sys.exit(main())
