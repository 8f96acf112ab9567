"""Everything that speaks to Redis or starts it; the only home of redis-py and hiredis. Knows no hub."""
