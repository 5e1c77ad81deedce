"""Alembic revisions of the catalogue, run by `Catalog.open`."""
