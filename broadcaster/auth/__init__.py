"""Access control: rights to subscribe and publish, by API key or signed token. Knows no hub and no connection."""
