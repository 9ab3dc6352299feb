"""When runs were heard of, and since when collectors have listened"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "listening",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("since", sa.Float(), nullable=False),
        sa.Column("until", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_listening")),
    )
    # Runs that are there already were heard of by nobody: no clock runs for them.
    with op.batch_alter_table("runs") as table:
        table.add_column(sa.Column("heard_at", sa.Float(), nullable=True))
        table.add_column(
            sa.Column("longest_pause_s", sa.Float(), server_default="0", nullable=False)
        )


def downgrade() -> None:
    with op.batch_alter_table("runs") as table:
        table.drop_column("longest_pause_s")
        table.drop_column("heard_at")
    op.drop_table("listening")
