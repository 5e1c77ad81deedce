"""Alembic's entry point. The connection comes from `database.migrate`; there is no alembic.ini."""

from alembic import context

from openmint.catalog.tables import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    transactional_ddl=False,  # `migrate` holds the one transaction around every revision
)
context.run_migrations()
