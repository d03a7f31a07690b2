"""Puts the first data into an empty database: the admin user, departments, employees. What is there already stays.

Environment: DATABASE_URL, ADMIN_PASSWORD.  python scripts/seed.py [--employees 200]
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sqlalchemy import text

from app.auth import hash_password
from app.db import open_engine

DEPARTMENTS = ("Accounting", "Engineering", "Operations", "Sales", "Support", "Testing")
FIRST = ("Ada", "Ben", "Carla", "David", "Elif", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Liam", "Mona")
LAST = ("Adler", "Brandt", "Costa", "Dietz", "Evans", "Fischer", "Gupta", "Hansen", "Ito", "Jansen", "Keller")
POSITIONS = ("Analyst", "Engineer", "Manager", "Planner", "Technician")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--employees", type=int, default=200)
    count = parser.parse_args().employees
    missing = [name for name in ("DATABASE_URL", "ADMIN_PASSWORD") if not os.environ.get(name)]
    if missing:
        sys.exit(f"not set: {', '.join(missing)}")

    with open_engine(os.environ["DATABASE_URL"]).begin() as connection:
        connection.execute(
            text("INSERT INTO users (username, password_hash) VALUES ('admin', :hash) ON CONFLICT DO NOTHING"),
            {"hash": hash_password(os.environ["ADMIN_PASSWORD"])},
        )
        connection.execute(
            text("INSERT INTO departments (name) VALUES (:name) ON CONFLICT DO NOTHING"),
            [{"name": name} for name in DEPARTMENTS],
        )
        connection.execute(
            text(
                "INSERT INTO employees (first_name, last_name, email, position, department_id)"
                " SELECT :first, :last, :email, :position, id FROM departments WHERE name = :department"
                " ON CONFLICT DO NOTHING"
            ),
            [employee(number) for number in range(1, count + 1)],
        )
        for table in ("users", "departments", "employees"):
            print(f"{table}: {connection.execute(text(f'SELECT count(*) FROM {table}')).scalar()} rows")


def employee(number):
    """The same people on every run. The lists' lengths share no factor, so neighbours differ in everything."""
    first, last = FIRST[number % len(FIRST)], LAST[number % len(LAST)]
    return {
        "first": first,
        "last": last,
        "email": f"{first}.{last}.{number}@example.com".lower(),
        "position": POSITIONS[number % len(POSITIONS)],
        "department": DEPARTMENTS[number % len(DEPARTMENTS)],
    }


if __name__ == "__main__":
    main()
