"""Everything that learns, measures or publishes."""
