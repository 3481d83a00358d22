"""`coterie serve`: vLLM's HTTP API on the in-process engine."""
