"""Files that a user writes or reads: scenarios, measured rows, what is known of a session, JSON output."""
