"""Catching up: what a channel or a subscriber missed is read from the log. Knows the fan-out, and no connection."""
