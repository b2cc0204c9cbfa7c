"""Alembic's entry, called by `afina.server.store.migrate` with a connection in a transaction."""

from alembic import context

from afina.server.store import BaseRow

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=BaseRow.metadata,
    render_as_batch=True,
)
context.run_migrations()
