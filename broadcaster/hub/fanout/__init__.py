"""The fan-out of a channel: subscriptions, filters, ring buffer, slow consumers. May not know logs and sockets."""
