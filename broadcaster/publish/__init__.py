"""Publishing: from an event that is due to the reply of Redis. Knows a hub only by its status over HTTP."""
