"""From a broker's messages to the fan-outs: channels, and the delivery probe. May not know connections."""
