"""The server that runs a job, with its lease; idempotency keys; sizes of adapters."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """To this form."""
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("server", sa.String()))
        jobs.add_column(sa.Column("lease", sa.BigInteger()))
        jobs.add_column(sa.Column("started", sa.BigInteger()))
        jobs.add_column(sa.Column("attempt", sa.BigInteger(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("idempotency_key", sa.String()))
        jobs.create_index("job_of_key", ["owner", "idempotency_key"], unique=True)
    with op.batch_alter_table("adapters") as adapters:
        adapters.add_column(sa.Column("bytes", sa.BigInteger(), nullable=False, server_default="0"))


def downgrade() -> None:
    """And back."""
    with op.batch_alter_table("adapters") as adapters:
        adapters.drop_column("bytes")
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_index("job_of_key")
        for name in ("server", "lease", "started", "attempt", "idempotency_key"):
            jobs.drop_column(name)
