"""Batches of requests."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """To this form."""
    numbers = ("total", "completed", "failed")
    op.create_table(
        "batches",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("owner", sa.String(), index=True),
        sa.Column("admin", sa.Boolean(), nullable=False),
        sa.Column("status", sa.String(), nullable=False, index=True),
        sa.Column("endpoint", sa.String(), nullable=False),
        sa.Column("input_file", sa.String(), nullable=False),
        sa.Column("output_file", sa.String()),
        sa.Column("error_file", sa.String()),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.Column("errors", sa.JSON(), nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in numbers),
        sa.Column("created", sa.BigInteger(), nullable=False),
        sa.Column("started", sa.BigInteger()),
        sa.Column("finished", sa.BigInteger()),
    )
