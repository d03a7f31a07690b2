"""What this release expects of the database."""

from .validate import email, text

# The tables without which the release cannot work.
REQUIRED_TABLES = ("alembic_version", "departments", "employees", "users")

# The columns of `employees` that a client may write, and what each accepts. `department` is apart: clients name
# it, the table stores its id.
EMPLOYEE_FIELDS = {
    "first_name": text(80, required=True),
    "last_name": text(80, required=True),
    "email": email,
    "position": text(120),
}
