"""v1.0.0: employees.hired_on and employee_fields"""

import sqlalchemy as sa
from alembic import op

from migrations.ledger import record

revision = "0002_extended_fields"
down_revision = "0001_base"


def upgrade():
    # Nullable and without a default: a release of before goes on inserting rows.
    op.add_column("employees", sa.Column("hired_on", sa.Date))
    # updated_at stays as it is: nobody has edited these employees.
    op.execute("UPDATE employees SET hired_on = (created_at AT TIME ZONE 'UTC')::date")
    op.create_index("employees_hired_on_idx", "employees", ["hired_on"])
    op.create_table(
        "employee_fields",
        sa.Column(
            "employee_id",
            sa.BigInteger,
            # A release of before deletes employees without knowing this table.
            sa.ForeignKey("employees.id", name="employee_fields_employee_id_fkey", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("name", sa.String(60), primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )
    record("upgrade", revision)


def downgrade():
    op.drop_table("employee_fields")
    op.drop_index("employees_hired_on_idx", "employees")
    op.drop_column("employees", "hired_on")
    record("downgrade", revision)
