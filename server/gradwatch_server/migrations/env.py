"""Runs migrations on the connection that gradwatch_server.database.migrate hands over."""

from alembic import context

from gradwatch_server.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
