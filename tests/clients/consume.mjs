// The JavaScript client at work, in node or in a page: says one line per item that it gives out.

export function consume(Subscriber, options, say) {
  const subscriber = new Subscriber({ ...options, onState: ({ state, reason, transport }) => say({ state, reason, transport }) });
  const read = async () => {
    try {
      for await (const item of subscriber.items()) say(item.kind === "event" ? { event: item.id, ...item.position } : item);
      say({ ended: true });
    } catch (error) {
      say({ refused: error.message });
    }
  };
  return { subscriber, done: read() };
}

// In node: `node consume.mjs CLIENT OPTIONS`; `ws` is that package's WebSocket, of which node 20 has none of its own.
if (globalThis.process?.argv[1]?.endsWith("consume.mjs")) {
  const { createRequire } = await import("node:module");
  const { Subscriber } = await import(process.argv[2]);
  const { packages, ...options } = JSON.parse(process.argv[3]);
  const WebSocket = packages ? createRequire(`${packages}/`)("ws") : undefined;
  consume(Subscriber, { ...options, WebSocket }, (said) => console.log(JSON.stringify(said)));
}
