"""v1.1.0: shifts and departments.min_staff"""

import sqlalchemy as sa
from alembic import op

from migrations.ledger import record

revision = "0003_shifts"
down_revision = "0002_extended_fields"


def upgrade():
    op.add_column("departments", sa.Column("min_staff", sa.Integer, nullable=False, server_default="0"))
    op.create_table(
        "shifts",
        sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
        sa.Column(
            "employee_id",
            sa.BigInteger,
            sa.ForeignKey("employees.id", name="shifts_employee_id_fkey", ondelete="CASCADE"),
            nullable=False,
        ),
        sa.Column("starts_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ends_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("ends_at > starts_at", name="shifts_end_after_start"),
    )
    op.create_index("shifts_employee_id_idx", "shifts", ["employee_id", "starts_at"])
    record("upgrade", revision)


def downgrade():
    op.drop_table("shifts")
    op.drop_column("departments", "min_staff")
    record("downgrade", revision)
