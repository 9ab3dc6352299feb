"""`python -m gradwatch_server.migrate`: bring the database's tables up to date, then end.

Collectors do the same when they start. This is for those who start many parts together, or who
want to see an upgrade succeed before anything serves.
"""

from __future__ import annotations

import click
from alembic.runtime.migration import MigrationContext

from gradwatch_server.__main__ import load_settings
from gradwatch_server.database import migrate, open_database


@click.command()
def main() -> None:
    """Bring the tables of GRADWATCH_DATABASE_URL up to date. Running it again changes nothing."""
    engine = open_database(load_settings().database)
    migrate(engine)
    with engine.connect() as connection:
        revision = MigrationContext.configure(connection).get_current_revision()
    shown = engine.url.render_as_string(hide_password=True)
    click.echo(f"{shown} is at revision {revision}")
    engine.dispose()


if __name__ == "__main__":
    main()
