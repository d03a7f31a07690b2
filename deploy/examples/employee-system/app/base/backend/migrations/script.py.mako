"""${message}

Revision ID: ${up_revision}
Revises: ${down_revision | comma,n}
"""

from alembic import op

from migrations.ledger import record

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}


def upgrade():
    ${upgrades if upgrades else "pass"}
    record("upgrade", revision)


def downgrade():
    ${downgrades if downgrades else "pass"}
    record("downgrade", revision)
