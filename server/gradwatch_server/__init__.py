"""The collector and its workers: takes frames, keeps them, judges them, raises alerts."""
