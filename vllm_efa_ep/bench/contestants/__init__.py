"""Everything that can do a round and be timed doing it."""
