"""The seam between the hub and where events are stored and published. Only here may the hub know Redis."""
