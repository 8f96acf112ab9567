"""Catching up: what a channel or a subscription missed is read from the log. May not know connections."""
