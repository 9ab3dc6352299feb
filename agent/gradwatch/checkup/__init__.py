"""The checks that an engineer does by hand before training, and when it fails."""
