"""Playing episodes: tables, seats, concurrency, faults."""
