// What a program in TypeScript may write, and what its compiler must refuse. Nothing of it is run.
import { HubRefused, Subscriber, parsePosition } from "./client.js";
import type { BroadcastEvent, Gap, Item, Options, Position, StateChange } from "./client.js";

const options: Options = {
  url: new URL("wss://hub.example/ws"),
  channels: ["events.critical"],
  severities: ["critical", "warning"],
  since: { "events.critical": "abc-7" },
  last: 5,
  token: async () => "token",
  storage: "localStorage",
  transports: ["sse"],
  onGap: (gap) => console.log(gap.cause, gap.first ?? 0),
};

export async function everything(): Promise<void> {
  const subscriber = new Subscriber(options);
  const forget: () => void = subscriber.on("state", (change: StateChange) => console.log(change.state));
  for await (const event of subscriber) {
    const place: Position | null = event.position;
    console.log(place?.offset, event.data["host"], event.receivedAt - event.publishedAt);
  }
  for await (const item of subscriber.items()) console.log(told(item));
  forget();
  subscriber.connect().close();
}

function told(item: Item): string {
  switch (item.kind) {
    case "event": return (item satisfies BroadcastEvent).id;
    case "gap": return (item satisfies Gap).cause;
    case "stale": return `${item.silentS} s`;
    case "fresh": return "";
  }
}

export const status = (error: unknown): number => (error instanceof HubRefused ? error.status : 0);
export const epoch: string | undefined = parsePosition("abc-7")?.epoch;

// @ts-expect-error: no such severity
new Subscriber({ severities: ["fatal"] });
// @ts-expect-error: no such option
new Subscriber({ channel: "events.critical" });
// @ts-expect-error: an event of a plain PUBLISH has no position
export const offset = (event: BroadcastEvent): number => event.position.offset;
// @ts-expect-error: counters are not written
new Subscriber().gaps = 0;
// @ts-expect-error: no such happening
new Subscriber().on("message", console.log);
