"""The schedule search: a database of results, a worker that measures candidates, and what to try next."""
