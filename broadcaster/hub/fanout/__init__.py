"""The fan-out of one channel: subscriptions, filters, ring buffer, slow-consumer policy. Knows no log and no socket."""
