// Types of the client of critical-event-broadcaster (client.js).

/** The place of a stored event in its channel; written `<epoch>-<offset>`. */
export interface Position {
  epoch: string;
  offset: number;
}

export type Severity = "info" | "warning" | "critical";

/** An event, once, in the order of its channel. */
export interface BroadcastEvent {
  kind: "event";
  id: string;
  type: string;
  source: string;
  sequence: number;
  severity: Severity;
  data: Record<string, unknown>;
  /** Null for an event that is not stored (a plain PUBLISH). */
  channel: string | null;
  position: Position | null;
  /** Milliseconds since 1970, by the publisher's clock. */
  publishedAt: number;
  /** Milliseconds since 1970, by this one's. */
  receivedAt: number;
  /** All fields as they came. */
  fields: Record<string, unknown>;
}

/** A range of events that cannot be delivered. */
export interface Gap {
  kind: "gap";
  channel: string;
  /** As in docs/contract.md: `expired`, `redis_restarted`, `shed`, `refused`, `closed`, ... */
  cause: string;
  epoch: string | null;
  /** The first missing offset; null: not known. */
  first: number | null;
  /** The last missing offset; null: it is not known whether and how many there were. */
  last: number | null;
  /** Delivery goes on after it. */
  position: Position | null;
}

/** Heartbeats are missing: what happens now is not seen. */
export interface Stale {
  kind: "stale";
  silentS: number;
}

/** Heartbeats come again; what was missed was delivered, or is a gap. */
export interface Fresh {
  kind: "fresh";
}

export type Item = BroadcastEvent | Gap | Stale | Fresh;

export type State = "idle" | "connecting" | "open" | "waiting" | "paused" | "closed";
export type Transport = "websocket" | "sse";

export interface StateChange {
  kind: "state";
  state: State;
  transport: Transport | null;
  /** Close code (1006: lost without one), or HTTP status, and why. */
  code?: number;
  status?: number;
  reason?: string;
  /** `waiting`: milliseconds until the next attempt. */
  waitMs?: number;
  error?: Error;
}

export interface Handlers {
  event: BroadcastEvent;
  gap: Gap;
  stale: Stale;
  fresh: Fresh;
  state: StateChange;
  /** The hub warns: this client is too slow. */
  lag: { kind: "lag"; channel: string; behindMs: number; behindEvents: number };
  /** The hub is going; the client comes back by itself. */
  drain: { kind: "drain"; reconnectAfterS: number };
  welcome: { kind: "welcome"; channel: string; position: Position | null; recovered: boolean | null };
  beat: { kind: "beat"; channel: string; position: Position | null };
}

export interface Storage {
  getItem(key: string): string | null;
  setItem(key: string, value: string): void;
}

export interface Options {
  /** Of a hub, such as `wss://hub.example/ws`; default: the page's own, or ws://127.0.0.1:8765/ws. */
  url?: string | URL;
  /** Default: those of the url, or the hub's default channel. */
  channels?: string[];
  /** Receive only events with one of these values; default: all. */
  types?: string[];
  sources?: string[];
  severities?: Severity[];
  /** Begin after this position, or after those of each channel; or at a time (`10m`, ISO 8601, `all`); default: now. */
  since?: string | Record<string, string | Position> | null;
  /** Begin so many events before the newest one, on each channel that `since` says nothing of. */
  last?: number | null;
  /** API key or token; a function is called before each connection, so that it can return a fresh one. */
  token?: string | (() => string | Promise<string>);
  /** Where positions outlive the page; what it holds comes before `since`. One key per reader. */
  storage?: "localStorage" | Storage | null;
  storageKey?: string;
  /** Items that may wait for the loop; of more, the connection is closed and resumed when there is room. Default 4096. */
  queueEvents?: number;
  /** Default 5 s. */
  connectTimeoutS?: number;
  /** The longest bound between attempts; after connections in vain it is 30 s. Default 5 s. */
  reconnectMaxS?: number;
  /** Larger events are gaps (`refused`); default: the hub's limit. */
  maxBytes?: number | null;
  /** Default both: SSE where a WebSocket does not get through. */
  transports?: Transport[];
  /** Node.js 20 has none: give that of the package `ws`. */
  WebSocket?: unknown;
  fetch?: typeof fetch;
  onEvent?(event: BroadcastEvent): void;
  onGap?(gap: Gap): void;
  onStale?(stale: Stale): void;
  onFresh?(fresh: Fresh): void;
  onState?(change: StateChange): void;
  onLag?(lag: Handlers["lag"]): void;
  onDrain?(drain: Handlers["drain"]): void;
  onWelcome?(welcome: Handlers["welcome"]): void;
  onBeat?(beat: Handlers["beat"]): void;
}

/** The hub refuses this client (HTTP status or close code), and a retry would not help. */
export class HubRefused extends Error {
  status: number;
}

/**
 * `for await (const event of new Subscriber({ url })) ...`, or callbacks and `connect()`.
 *
 * A lost connection is opened again, with full-jitter backoff, and resumes after the last position: what was published
 * meanwhile is delivered, and what cannot be is a gap.
 */
export class Subscriber implements AsyncIterable<BroadcastEvent> {
  constructor(options?: Options);
  /** Per channel, as text: up to where everything was handed out and dealt with, or announced as a gap. */
  readonly positions: Record<string, string>;
  readonly position: string | null;
  readonly queued: number;
  readonly state: State;
  readonly transport: Transport | null;
  readonly stale: boolean;
  readonly received: number;
  readonly duplicates: number;
  readonly gaps: number;
  /** Messages that were no valid events; each is a gap, too. */
  readonly invalid: number;
  readonly reconnects: number;
  /** Why positions are not stored; null if they are. */
  readonly storageError: unknown;
  on<K extends keyof Handlers>(kind: K, handler: (item: Handlers[K]) => void): () => void;
  /** Begin to give out to the callbacks; iterating begins by itself. */
  connect(): this;
  /** End for good; a loop ends, too. */
  close(): void;
  /** Events only. Throws `HubRefused`. */
  [Symbol.asyncIterator](): AsyncIterableIterator<BroadcastEvent>;
  /** Events, and in their place among them gaps, `stale` and `fresh`. */
  items(): AsyncIterableIterator<Item>;
}

export function parsePosition(text: unknown): Position | null;
