"""v0.9.5: users, departments, employees"""

import sqlalchemy as sa
from alembic import op

from migrations.ledger import record

revision = "0001_base"
down_revision = None

NOW = sa.text("now()")


def upgrade():
    op.create_table(
        "users",
        sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
        sa.Column("username", sa.String(80), nullable=False, unique=True),
        sa.Column("password_hash", sa.Text, nullable=False),
        sa.Column("is_active", sa.Boolean, nullable=False, server_default=sa.true()),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=NOW),
    )
    op.create_table(
        "departments",
        sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
        sa.Column("name", sa.String(80), nullable=False, unique=True),
    )
    op.create_table(
        "employees",
        sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
        sa.Column("first_name", sa.String(80), nullable=False),
        sa.Column("last_name", sa.String(80), nullable=False),
        sa.Column("email", sa.String(254), unique=True),
        sa.Column("position", sa.String(120)),
        sa.Column(
            "department_id",
            sa.BigInteger,
            sa.ForeignKey("departments.id", name="employees_department_id_fkey"),
        ),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=NOW),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False, server_default=NOW),
    )
    op.create_index("employees_department_id_idx", "employees", ["department_id"])
    op.create_index("employees_name_idx", "employees", ["last_name", "first_name"])
    record("upgrade", revision)


def downgrade():
    op.drop_table("employees")
    op.drop_table("departments")
    op.drop_table("users")
    record("downgrade", revision)
