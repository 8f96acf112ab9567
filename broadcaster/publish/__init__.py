"""The publisher's half: from an event that is due to Redis' answer. Knows no hub from the inside."""
