"""From a broker's messages to the fan-outs: the channels, and the proof that events arrive. Knows no connection."""
