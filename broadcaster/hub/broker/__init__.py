"""The seam between the hub and where events are stored and published; only here does the hub know Redis."""
