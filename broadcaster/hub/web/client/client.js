// The client of critical-event-broadcaster: events as an asynchronous iterator or by callbacks, with automatic
// resume and explicit gaps. One file, no dependencies; for browsers and Node.js 20 and later.
// Types and the meaning of each option: client.d.ts. What it relies on: docs/contract.md.

const V1 = "broadcaster.v1";
const MISSED_BEATS = 3;
const GRACE_MS = 500;
const LASTED_MS = 5_000;
const RECONNECT_MS = 200; // the first bound after a good connection
const IN_VAIN_MS = 1_000; // ... and after one that brought nothing
const IN_VAIN_MAX_MS = 30_000;
const LONGEST_HINT_S = 60;
const TRY_LATER_S = 2; // what close 1013 asks for, which has no number of its own
const SAVE_MS = 250;
const RECENT_IDS = 1_024;
const DEFAULT_MAX_BYTES = 65_536;
const LARGEST_BYTES = 16 * 2 ** 20;
const SEVERITIES = ["info", "warning", "critical"];

/** Close codes after which a client must not come back: it has to be mended. */
const FINAL_CLOSES = new Set([1002, 1007, 1008, 1009]);
const CLOSE_GAP = 4009;
const CLOSE_UNAVAILABLE = 4010;

/** The hub refuses this client, and a retry would not help. */
export class HubRefused extends Error {
  constructor(status, reason) {
    super(`${status} ${reason}`);
    this.name = "HubRefused";
    this.status = status;
  }
}

// Positions

const EPOCH = /^[0-9A-Za-z]{1,64}$/;
const TIMED = /^T[0-9a-v]{9}[0-9a-f]{6}$/;
const POSITION = /^([0-9A-Za-z]{1,64})-([0-9]{1,16})$/;
const PLACE = /^\{\s*"channel":\s*"([A-Za-z0-9._:-]{1,128})",\s*"epoch":\s*"([0-9A-Za-z]{1,64})",\s*"offset":\s*([1-9][0-9]{0,15})\s*[,}]/;
const STAMPED = /^"stored_at_us":[0-9]{1,16},/;

/** Read `<epoch>-<offset>`; null if it is something else. */
export function parsePosition(text) {
  const found = typeof text === "string" ? POSITION.exec(text) : null;
  const offset = found ? Number(found[2]) : NaN;
  return Number.isSafeInteger(offset) ? { epoch: found[1], offset } : null;
}

const positionText = (position) => (position ? `${position.epoch}-${position.offset}` : null);

/** Whether everything up to `known` includes a position, for certain: the name of an epoch orders it. */
function isWithin(position, known) {
  if (position.epoch === known.epoch) return position.offset <= known.offset;
  return TIMED.test(known.epoch) && (!TIMED.test(position.epoch) || position.epoch < known.epoch);
}

const makeGap = (channel, cause, epoch = null, first = null, last = null, position = null) => ({
  kind: "gap", channel, cause, epoch, first, last, position,
});

/** Positions per channel, updated by every frame, and gaps that were not announced. No input or output. */
export class ResumeState {
  #channels;
  #filters;
  #begin;
  #welcomed = new Set();
  #begun = new Set();

  constructor({ url, channels = [], since = null, last = null, types = [], sources = [], severities = [], kept = null }) {
    this.base = new URL(url);
    const given = [...this.base.searchParams];
    this.base.search = "";
    this.#channels = channels.length ? [...channels] : given.filter(([key]) => key === "channel").map(([, value]) => value);
    this.#filters = given.filter(([key]) => !["channel", "since", "last"].includes(key));
    for (const [key, values] of [["type", types], ["source", sources], ["severity", severities]]) {
      for (const value of values) this.#filters.push([key, value]);
    }
    since = since || (given.find(([key]) => key === "since") ?? [])[1] || null;
    last ??= (given.find(([key, value]) => key === "last" && value) ?? [])[1] ?? null;
    if (last !== null && !/^[0-9]+$/.test(last)) throw new RangeError("last is a number of events");
    this.positions = new Map();
    // Where to begin as the hub understands it, until it has said which position that is.
    this.#begin = last === null ? null : ["last", String(last)];
    const isPosition = typeof since === "string" && parsePosition(since);
    if (isPosition && this.#channels.length > 1) throw new RangeError("one position cannot be that of several channels");
    if (isPosition && !kept) this.positions.set(this.#channels.join(""), isPosition);
    if (typeof since === "string" && !isPosition) this.#begin = ["since", since];
    const positions = { ...(since && typeof since === "object" ? since : {}), ...kept }; // what was kept is later
    for (const [channel, position] of Object.entries(positions)) this.positions.set(channel, checked(position));
    if (!this.#channels.length) this.#channels = Object.keys(positions);
    this.hasOneChannel = this.#channels.length <= 1;
    this.seesEverything = this.hasOneChannel && !this.#filters.length;
  }

  /** The channels to connect to; one empty name stands for the hub's default channel. */
  get channels() {
    return this.#channels.length ? this.#channels : [""];
  }

  /** The query to connect with, so that nothing is missed. */
  query(channels = this.channels) {
    const query = new URLSearchParams();
    for (const channel of channels) {
      if (channel) query.append("channel", channel);
      const position = this.positions.get(channel) ?? (channel ? undefined : this.positions.values().next().value);
      if (position) query.append("since", positionText(position));
      else if (this.#begin && !this.#begun.has(channel) && (channel || !this.#begun.size)) query.append(...this.#begin);
    }
    for (const [key, value] of this.#filters) query.append(key, value);
    return query.toString();
  }

  onWelcome(frame) {
    const channel = String(frame.channel);
    const position = parsePosition(frame.position);
    const begins = this.#begin !== null && !this.#begun.has(channel); // the gap of the one before has not come
    const asked = begins || this.positions.has(channel) || this.positions.has("");
    const gap = asked || !this.#welcomed.has(channel) ? null : makeGap(channel, "no_history", null, null, null, position);
    this.#welcomed.add(channel);
    if (frame.recovered !== false) {
      this.#begun.add(channel);
      this.#move(channel, position); // else its gap moves: the connection may end between the two
    }
    return gap;
  }

  /** Whether an event lies before the known position: it was given, or announced as a gap. */
  has(event) {
    const known = event.position && this.positions.get(event.channel);
    return Boolean(known) && isWithin(event.position, known);
  }

  /** Handle an event, new or duplicate; return the gap before it if there is one that was not announced. */
  onEvent(event) {
    if (!event.position || this.has(event)) return null;
    const { epoch, offset } = event.position;
    const gap = this.#unexplained(event.channel, { epoch, offset: offset - 1 });
    this.#move(event.channel, event.position);
    return gap;
  }

  /** Handle a stored event that cannot be given out; return the gap before it, and the one that it is. */
  onRefused(channel, position) {
    const known = this.positions.get(channel);
    if (known && isWithin(position, known)) return [];
    const { epoch, offset } = position;
    const before = this.#unexplained(channel, { epoch, offset: offset - 1 });
    const gap = this.onGap(makeGap(channel, "refused", epoch, offset, offset, position));
    return [before, gap].filter(Boolean);
  }

  onBeat(frame) {
    const channel = String(frame.channel);
    const position = parsePosition(frame.position);
    const gap = position ? this.#unexplained(channel, position) : null;
    this.#move(channel, position);
    return gap;
  }

  /** Handle a gap; return it without what lies before the known position: that had arrived, or was announced. */
  onGap(gap) {
    const known = this.positions.get(gap.channel);
    if (known && gap.epoch && gap.first !== null && isWithin({ epoch: gap.epoch, offset: gap.first }, known)) {
      const end = gap.last === null ? gap.position : { epoch: gap.epoch, offset: gap.last };
      if (end && isWithin(end, known)) return null;
      gap = { ...gap, epoch: known.epoch, first: known.offset + 1 };
    }
    this.#begun.add(gap.channel);
    this.#move(gap.channel, gap.position);
    return gap;
  }

  /** The hub has closed as it cannot deliver what follows: resume with new events; return the gaps. */
  forget() {
    const names = new Set([...this.#channels, ...this.positions.keys()]);
    const gaps = [...(names.size ? names : [""])].map((channel) => {
      const known = this.positions.get(channel);
      return makeGap(channel, "closed", known?.epoch ?? null, known ? known.offset + 1 : null);
    });
    this.positions.clear();
    this.#welcomed.clear(); // what is missed before the next welcome lies in these gaps
    this.#begin = null;
    return gaps;
  }

  #unexplained(channel, position) {
    const known = this.positions.get(channel);
    if (!known || !this.seesEverything) return null;
    if (known.epoch !== position.epoch) {
      return makeGap(channel, "unexplained", known.epoch, known.offset + 1, null, position);
    }
    if (known.offset < position.offset) {
      return makeGap(channel, "unexplained", known.epoch, known.offset + 1, position.offset, position);
    }
    return null;
  }

  #move(channel, position) {
    if (!position) return;
    this.positions.delete(""); // given before the name of the channel was known
    this.positions.set(channel, position);
  }
}

function checked(position) {
  const read = typeof position === "string" ? parsePosition(position) : position;
  if (!read || !EPOCH.test(read.epoch) || !Number.isSafeInteger(read.offset)) {
    throw new RangeError(`a position is <epoch>-<offset>, got ${JSON.stringify(position)?.slice(0, 100)}`);
  }
  return { epoch: read.epoch, offset: read.offset };
}

// What a hub sends

const isNumber = (value) => Number.isSafeInteger(value) && value >= 0;
const isName = (value) => typeof value === "string" && value.length > 0;
const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

/** The fields of a message; null if it is no JSON object. */
function fieldsOf(text) {
  try {
    const fields = JSON.parse(text);
    return isObject(fields) ? fields : null;
  } catch {
    return null;
  }
}

/** A foreign event may have a field `control`, too; it has an `event_id`, which no control frame has. */
const isControl = (text, fields) => text.startsWith('{"control": ') && !("event_id" in fields);

/** The event in the fields of a message; null if it is none. */
function eventOf(fields) {
  const valid =
    isName(fields.event_id) && isName(fields.event_type) && isName(fields.source) &&
    isNumber(fields.sequence) && isNumber(fields.published_at_ms) &&
    (fields.published_at_us === undefined || isNumber(fields.published_at_us)) &&
    (fields.severity === undefined || SEVERITIES.includes(fields.severity)) &&
    (fields.data === undefined || isObject(fields.data));
  if (!valid) return null;
  const stored = ["channel", "epoch", "offset"].filter((name) => name in fields).length;
  const position = stored === 3 ? parsePosition(`${fields.epoch}-${fields.offset}`) : null;
  if (stored && (!position || !isName(fields.channel))) return null;
  const now = Date.now();
  return {
    kind: "event",
    id: fields.event_id,
    type: fields.event_type,
    source: fields.source,
    sequence: fields.sequence,
    severity: fields.severity ?? "critical",
    data: fields.data ?? {},
    channel: fields.channel ?? null,
    position,
    publishedAt: fields.published_at_us === undefined ? fields.published_at_ms : fields.published_at_us / 1000,
    receivedAt: now,
    fields,
  };
}

const encoder = new TextEncoder();

/** Whether a message is larger than what was published may be: its place, which was added, does not count. */
function isTooLarge(text, maxBytes) {
  if (text.length * 3 <= maxBytes) return false;
  const place = PLACE.exec(text)?.[0].length ?? 1;
  const stamp = STAMPED.exec(text.slice(place, place + 40))?.[0].length ?? 0;
  return encoder.encode(text).length - place - stamp + 1 > maxBytes;
}

/** A reader of Server-Sent Events: `push` takes text in pieces of any size and calls `each({ event, data, id })`. */
export class EventStreamParser {
  #each;
  #rest = "";
  #fields = { event: "", data: null, id: undefined };

  constructor(each) {
    this.#each = each;
  }

  push(text) {
    const lines = (this.#rest + text).split(/\r\n|\n|\r(?=[^])/); // a \r at the end may be the half of a \r\n
    this.#rest = lines.pop();
    for (const line of lines) this.#line(line);
  }

  #line(line) {
    const fields = this.#fields;
    if (line === "") {
      this.#fields = { event: "", data: null, id: undefined };
      if (fields.data !== null) this.#each({ ...fields, event: fields.event || "message" });
      return;
    }
    const colon = line.indexOf(":");
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (name === "data") fields.data = fields.data === null ? value : `${fields.data}\n${value}`;
    else if (name === "event" || name === "id") fields[name] = value;
  }
}

// Transports: each calls open(), message(text) and, once, lost({ code, reason, hintS, refused, isUnheard })

function base64url(text) {
  const bytes = String.fromCharCode(...encoder.encode(text));
  return btoa(bytes).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

function overWebSocket(WebSocketClass, url, token, timeoutMs, on) {
  let ended = false;
  let opened = false;
  let socket;
  const end = (how) => {
    if (ended) return;
    ended = true;
    clearTimeout(timer);
    on.lost({ code: 1006, reason: "", wasOpen: opened, ...how });
  };
  const timer = setTimeout(() => {
    end({ reason: "no answer in time" });
    socket.close();
  }, timeoutMs);
  try {
    socket = new WebSocketClass(url, token ? [V1, `bearer.${base64url(token)}`] : [V1]);
  } catch (error) {
    queueMicrotask(() => end({ reason: error.message }));
    return () => end({ code: 1000, reason: "closed" });
  }
  socket.onopen = () => {
    if (ended) return;
    clearTimeout(timer);
    opened = true;
    on.open("websocket");
  };
  socket.onmessage = ({ data }) => {
    if (!ended && typeof data === "string") on.message(data);
  };
  socket.onerror = () => {}; // a close follows, which says as much as one is told
  socket.onclose = ({ code, reason }) => end({ code, reason: String(reason) });
  return () => {
    end({ code: 1000, reason: "closed" });
    socket.close();
  };
}

/** One stream for each channel; they are one connection: where one ends, all end. */
function overFetch(fetchFunction, urls, token, timeoutMs, on) {
  const controller = new AbortController();
  let ended = false;
  let opened = 0;
  const end = (how) => {
    if (ended) return;
    ended = true;
    clearTimeout(timer);
    controller.abort();
    on.lost({ code: 1006, reason: "", wasOpen: opened === urls.length, ...how });
  };
  const timer = setTimeout(() => end({ reason: "no answer in time" }), timeoutMs);
  const read = async (url) => {
    // Else the error of what sends it would say all of it.
    if (/[^\t -~\x80-\xff]/.test(token)) throw new Error("the token has characters that a header cannot have");
    const headers = { Accept: "text/event-stream" };
    if (token) headers.Authorization = `Bearer ${token}`;
    const response = await fetchFunction(url, { headers, cache: "no-store", signal: controller.signal });
    if (response.status !== 200 || !(response.headers.get("Content-Type") ?? "").startsWith("text/event-stream")) {
      end(await refusalOf(response));
      return;
    }
    opened += 1;
    if (opened === urls.length) {
      clearTimeout(timer);
      on.open("sse");
    }
    const parser = new EventStreamParser(({ event, data }) => {
      if (ended) return;
      if (event !== "close") {
        on.message(data);
        return;
      }
      const said = fieldsOf(data) ?? {};
      end({ code: Number(said.code) || 1006, reason: String(said.reason ?? "") });
    });
    const reader = response.body.getReader();
    const decoder = new TextDecoder();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      parser.push(decoder.decode(value, { stream: true }));
    }
    end({ reason: "the stream has ended" });
  };
  for (const url of urls) read(url).catch((error) => end({ reason: error.message }));
  return () => end({ code: 1000, reason: "closed" });
}

/** What an answer other than a stream means; only the hub's own words are final. */
async function refusalOf(response) {
  const hintS = retryAfterS(response.headers.get("Retry-After"));
  const text = await response.text().catch(() => "");
  const fields = fieldsOf(text);
  const error = fields?.error;
  const { status } = response;
  if (status === 204) return { refused: { status, reason: "closed for good" }, final: true };
  // Else what answers has no streams, or stands in front of the hub.
  const isOfHub = typeof error === "string" && Object.keys(fields).length === 1 && !error.includes("/sse");
  const isFinal = isOfHub && [400, 401, 403, 404].includes(status);
  return { reason: `${status} ${error ?? ""}`.trim(), hintS, refused: { status, reason: error ?? "" }, final: isFinal };
}

/** Seconds of a `Retry-After`, as a number or as a date; 0 if it does not say. */
export function retryAfterS(value) {
  if (!value) return 0;
  if (/^[0-9]+$/.test(value)) return Number(value);
  return Math.max(0, (Date.parse(value) - Date.now()) / 1000) || 0;
}

// Backoff: full jitter under a bound that doubles; a connection was good once it has lasted, or has brought an event

export class Backoff {
  #random;
  #inVain = 0;
  #bound = RECONNECT_MS;
  #longest;

  constructor(longestMs, random = Math.random) {
    this.#longest = longestMs;
    this.#random = random;
  }

  /** A connection has ended. */
  lost(lastedMs, broughtEvent) {
    this.#inVain = broughtEvent || lastedMs >= LASTED_MS ? 0 : this.#inVain + 1;
    this.#bound = this.#inVain ? Math.min(IN_VAIN_MS * 2 ** Math.min(this.#inVain - 1, 10), IN_VAIN_MAX_MS) : RECONNECT_MS;
  }

  /** Milliseconds before the next attempt. */
  next() {
    const wait = this.#random() * this.#bound;
    this.#bound = Math.max(this.#bound, Math.min(this.#bound * 2, this.#longest));
    return wait;
  }
}

// The subscriber

export class Subscriber {
  #options;
  #state;
  #token;
  #hub = "";
  #backoff;
  #leave = null; // ends the transport there is
  #timer = null; // of the next attempt
  #hintS = 0;
  #openedAt = 0;
  #broughtEvent = false;
  #everConnected = false;
  #refusedToken = null;
  #viaStream = false; // the next attempt is a stream: the WebSocket before it was not even opened
  #pending = [];
  #handed = new Map();
  #taken = null; // the item that the loop body works on
  #iterating = false;
  #waiting = []; // of the iterator: { resolve, reject }
  #handlers = new Map();
  #recent = new Map();
  #maxBytes;
  #beatMs = 2_000;
  #beatAt = 0;
  #beats = new Map(); // per channel: when this connection last heard of it
  #silentAt = 0;
  #wasLate = false;
  #beatTimer = null;
  #staleRounds = 0;
  #attempts = 0;
  #ended = null; // null; or the error with which it has ended, or true
  #paused = false;
  #saveTimer = null;
  #saveNow = () => this.#save();

  constructor(options = {}) {
    const page = globalThis.location?.origin?.startsWith("http") ? globalThis.location.origin : "http://127.0.0.1:8765";
    this.#options = {
      url: `${page}/ws`, storage: null, storageKey: "", token: "", queueEvents: 4_096, connectTimeoutS: 5,
      reconnectMaxS: 5, random: Math.random, maxBytes: null, transports: ["websocket", "sse"],
      WebSocket: globalThis.WebSocket, fetch: globalThis.fetch?.bind(globalThis), ...options,
    };
    const url = new URL(this.#options.url, globalThis.location?.href);
    if (!["ws:", "wss:", "http:", "https:"].includes(url.protocol)) throw new TypeError(`not the URL of a hub: ${url.protocol}`);
    url.protocol = url.protocol.replace(/^ws/, "http");
    url.hash = "";
    url.pathname = url.pathname === "/" ? "/ws" : url.pathname;
    this.#maxBytes = this.#options.maxBytes ?? DEFAULT_MAX_BYTES;
    const saved = this.#load(url.href);
    this.#state = new ResumeState({ ...this.#options, url: url.href, kept: saved });
    for (const [channel, position] of this.#state.positions) if (channel) this.#handed.set(channel, position);
    this.#backoff = new Backoff(this.#options.reconnectMaxS * 1000, this.#options.random);
    this.state = "idle";
    this.transport = null;
    this.stale = false;
    this.received = 0;
    this.duplicates = 0;
    this.gaps = 0;
    this.invalid = 0;
    this.reconnects = 0;
    this.storageError = null;
    for (const kind of ["event", "gap", "stale", "fresh", "state", "lag", "drain", "welcome", "beat"]) {
      const handler = this.#options[`on${kind[0].toUpperCase()}${kind.slice(1)}`];
      if (handler) this.on(kind, handler);
    }
  }

  /** Positions per channel, as `<epoch>-<offset>`: up to where everything was handed out, or announced as a gap. */
  get positions() {
    return Object.fromEntries([...this.#handed].map(([channel, position]) => [channel, positionText(position)]));
  }

  /** The position of the only channel; null before it is known. */
  get position() {
    return positionText(this.#handed.values().next().value ?? null);
  }

  /** How many items wait to be taken. */
  get queued() {
    return this.#pending.length;
  }

  /** Call `handler` with each item of a kind; returns a function that ends this. */
  on(kind, handler) {
    if (!this.#handlers.has(kind)) this.#handlers.set(kind, new Set());
    this.#handlers.get(kind).add(handler);
    return () => this.#handlers.get(kind).delete(handler);
  }

  /** Begin, if it has not begun: what was subscribed to is given to the callbacks. Iterating begins by itself. */
  connect() {
    if (this.state === "idle") {
      this.#expectBeat();
      globalThis.addEventListener?.("pagehide", this.#saveNow);
      this.#attempt();
    }
    return this;
  }

  /** End for good; what was not taken comes again where its position is used. */
  close() {
    this.#end(true);
  }

  /** Events only. */
  [Symbol.asyncIterator]() {
    return this.#iterate((item) => item.kind === "event");
  }

  /** Events, and in their place among them gaps, `stale` and `fresh`. */
  items() {
    return this.#iterate(() => true);
  }

  #iterate(wants) {
    this.#iterating = true;
    this.connect();
    const iterator = {
      next: async () => {
        for (;;) {
          this.#settle();
          const item = await this.#nextItem();
          if (item === null) return { done: true, value: undefined };
          this.#tell(item.kind, item);
          if (wants(item)) return { done: false, value: item };
        }
      },
      return: async () => {
        this.#settle();
        this.#iterating = false;
        this.close();
        return { done: true, value: undefined };
      },
      [Symbol.asyncIterator]: () => iterator,
    };
    return iterator;
  }

  #nextItem() {
    while (this.#pending.length) {
      const [item, channel, position] = this.#pending.shift();
      if (item === null) {
        this.#hand(channel, position);
        continue;
      }
      this.#taken = [channel, position];
      this.#resumeIfDrained();
      return Promise.resolve(item);
    }
    this.#resumeIfDrained();
    if (this.#ended === true) return Promise.resolve(null);
    if (this.#ended) {
      const error = this.#ended;
      this.#ended = true;
      return Promise.reject(error);
    }
    return new Promise((resolve, reject) => this.#waiting.push({ resolve, reject }));
  }

  /** The loop asks for the next one: it is done with the one before. */
  #settle() {
    if (this.#taken) this.#hand(...this.#taken);
    this.#taken = null;
  }

  #hand(channel, position) {
    if (!position || !channel) return;
    this.#handed.set(channel, position);
    if (this.#options.storage && !this.#saveTimer) {
      this.#saveTimer = setTimeout(this.#saveNow, SAVE_MS);
    }
  }

  #put(item, channel = "", position = null) {
    this.#pending.push([item, channel, position]);
    this.#deliver();
    if (this.#pending.length > this.#options.queueEvents && !this.#paused) this.#pause();
  }

  #deliver() {
    if (this.#iterating) {
      while (this.#waiting.length && this.#pending.length) {
        const [item, channel, position] = this.#pending.shift();
        if (item === null) {
          this.#hand(channel, position);
          continue;
        }
        this.#taken = [channel, position];
        this.#waiting.shift().resolve(item);
      }
      return;
    }
    while (this.#pending.length) {
      const [item, channel, position] = this.#pending.shift();
      if (item !== null) this.#tell(item.kind, item);
      this.#hand(channel, position); // only now: what a callback has not seen is not passed over
    }
  }

  #tell(kind, item) {
    for (const handler of this.#handlers.get(kind) ?? []) {
      try {
        handler(item);
      } catch (error) {
        queueMicrotask(() => { throw error; }); // as of any event handler: reported, and the others go on
      }
    }
  }

  // The connection

  #setState(state, more = {}) {
    this.state = state;
    this.#tell("state", { kind: "state", state, transport: this.transport, ...more });
  }

  async #attempt() {
    this.#timer = null;
    const options = this.#options;
    const attempt = (this.#attempts += 1);
    this.#setState("connecting");
    let token;
    try {
      token = String((typeof options.token === "function" ? await options.token() : options.token) ?? "").trim();
    } catch (error) {
      if (attempt === this.#attempts && this.#ended === null) this.#later({ reason: `no token: ${error?.message ?? error}` });
      return;
    }
    if (attempt !== this.#attempts || this.#ended !== null) return;
    this.#token = token;
    const viaStream = this.#viaStream || !options.WebSocket || !options.transports.includes("websocket");
    const on = {
      open: (transport) => this.#onOpen(transport),
      message: (text) => this.#onMessage(text),
      lost: (how) => this.#onLost({ ...how, viaStream }),
    };
    const timeoutMs = options.connectTimeoutS * 1000;
    const base = this.#state.base;
    if (viaStream) {
      const path = new URL(base);
      path.pathname = path.pathname.replace(/\/ws\/?$/, "/sse");
      const urls = this.#state.channels.map((channel) => {
        path.search = this.#state.query([channel]);
        return path.href;
      });
      this.#leave = overFetch(options.fetch, urls, token, timeoutMs, on);
    } else {
      const url = new URL(base);
      url.protocol = url.protocol.replace(/^http/, "ws");
      url.search = this.#state.query();
      this.#leave = overWebSocket(options.WebSocket, url.href, token, timeoutMs, on);
    }
  }

  #onOpen(transport) {
    this.#openedAt = performance.now();
    this.#broughtEvent = false;
    this.#refusedToken = null;
    this.reconnects += this.#everConnected;
    this.#everConnected = true;
    this.transport = transport;
    this.#setState("open");
  }

  #onLost({ code, reason, hintS = 0, refused, final, wasOpen, viaStream }) {
    this.#leave = null;
    this.transport = null;
    this.#beats.clear();
    if (this.#ended !== null || this.#paused) return;
    const lastedMs = wasOpen ? performance.now() - this.#openedAt : 0;
    const canStream = this.#options.fetch && this.#options.transports.includes("sse");
    if (!wasOpen && !viaStream && canStream) {
      this.#viaStream = true; // it says why a WebSocket is refused, which a browser does not; or it gets through
      this.#attempt();
      return;
    }
    this.#viaStream = false;
    if (final && !(refused.status === 401 && this.#mayHaveAnother())) {
      this.#end(new HubRefused(refused.status, refused.reason));
      return;
    }
    if (FINAL_CLOSES.has(code)) {
      this.#end(new HubRefused(code, reason || "the hub has closed for good"));
      return;
    }
    if (code === CLOSE_GAP) {
      for (const gap of this.#state.forget()) this.#announce(gap);
      this.#handed.clear();
      if (this.#paused) return; // by the queue, which that has filled: it goes on when there is room
    }
    if (code === 1013) hintS = Math.max(hintS, TRY_LATER_S);
    if (code === CLOSE_UNAVAILABLE) hintS = Math.max(hintS, 1);
    this.#hintS = Math.max(this.#hintS, Math.min(hintS, LONGEST_HINT_S));
    if (wasOpen) this.#backoff.lost(lastedMs, this.#broughtEvent);
    this.#later({ code, reason, status: refused?.status });
  }

  /** Whether a function may return another token than the one that was refused. */
  #mayHaveAnother() {
    const isNew = typeof this.#options.token === "function" && this.#token !== this.#refusedToken;
    this.#refusedToken = this.#token;
    return isNew;
  }

  #later(why) {
    const waitMs = this.#hintS * 1000 + this.#backoff.next();
    this.#hintS = 0;
    this.#timer = setTimeout(() => this.#attempt(), waitMs);
    this.#setState("waiting", { ...why, waitMs });
  }

  #end(how) {
    if (this.#ended !== null) return;
    this.#ended = how;
    clearTimeout(this.#timer);
    clearTimeout(this.#beatTimer);
    this.#leave?.();
    this.#save();
    globalThis.removeEventListener?.("pagehide", this.#saveNow);
    this.#setState("closed", how === true ? {} : { error: how, reason: how.message, status: how.status });
    for (const waiting of this.#waiting.splice(0)) {
      if (how === true) waiting.resolve(null);
      else {
        this.#ended = true;
        waiting.reject(how);
      }
    }
  }

  /** Too much waits to be taken: a browser cannot stop reading, so leave, and resume when there is room. */
  #pause() {
    this.#paused = true;
    this.#attempts += 1; // one that waits for its token is void
    this.#leave?.();
    this.transport = null;
    clearTimeout(this.#timer);
    clearTimeout(this.#beatTimer);
    this.#setState("paused");
  }

  #resumeIfDrained() {
    if (!this.#paused || this.#pending.length > this.#options.queueEvents / 2 || this.#ended !== null) return;
    this.#paused = false;
    this.#expectBeat();
    this.#attempt();
  }

  // Staleness

  #expectBeat(at = performance.now()) {
    this.#beatAt = at;
    this.#silentAt = this.#beatAt + MISSED_BEATS * this.#beatMs;
    this.#wasLate = false;
    this.#staleRounds = 0;
    this.#watch();
  }

  /** A channel has begun, or had a heartbeat; who is blind believes heartbeats only, and those of all channels. */
  #onBeat(channel, isProof = true) {
    if (this.stale && !isProof) {
      this.#silentAt = performance.now() + MISSED_BEATS * this.#beatMs;
      this.#watch();
      return;
    }
    this.#beats.set(channel, performance.now());
    if (this.#beats.size < new Set(this.#state.channels).size) return;
    this.#expectBeat(Math.min(...this.#beats.values()));
    if (this.stale) {
      this.stale = false;
      this.#put({ kind: "fresh" });
    }
  }

  #watch() {
    clearTimeout(this.#beatTimer);
    if (this.#ended === null) {
      this.#beatTimer = setTimeout(() => this.#onSilence(), Math.max(0, this.#silentAt - performance.now()));
    }
  }

  #onSilence() {
    const now = performance.now();
    const late = now > this.#silentAt + GRACE_MS;
    this.#silentAt = now + MISSED_BEATS * this.#beatMs;
    if (!this.stale && !this.#wasLate && late) {
      this.#wasLate = true;
      this.#silentAt = now + GRACE_MS; // this program was late: heartbeats may be unread
    } else if (!this.stale) {
      this.stale = true;
      this.#beats.clear();
      this.#put({ kind: "stale", silentS: (now - this.#beatAt) / 1000 });
    } else {
      this.#staleRounds += 1;
      // A browser cannot ping. The connection may be half-open, so another one is opened; less and less often, as it may
      // as well be the hub that has nothing to prove.
      const isPowerOfTwo = (this.#staleRounds & (this.#staleRounds - 1)) === 0;
      if (isPowerOfTwo && this.state === "open") this.#renew();
    }
    this.#watch();
  }

  #renew() {
    const leave = this.#leave;
    this.#leave = null;
    leave?.(); // its end is as that of any connection that was lost
  }

  // Incoming messages

  #onMessage(text) {
    const fields = fieldsOf(text);
    if (fields && isControl(text, fields)) {
      this.#onControl(fields);
      return;
    }
    const event = fields && !isTooLarge(text, this.#maxBytes) ? eventOf(fields) : null;
    if (!event) {
      this.invalid += 1;
      this.#refuse(text);
      return;
    }
    this.#broughtEvent = true;
    if (this.#isDuplicate(event)) {
      this.duplicates += 1;
      this.#announce(this.#state.onEvent(event));
      this.#pass(event.channel);
      return;
    }
    this.#remember(event);
    this.#announce(this.#state.onEvent(event));
    this.received += 1;
    this.#put(event, event.channel ?? "", event.position);
  }

  /** A message that is no event for us: a gap at its position, if it has one. */
  #refuse(text) {
    const place = PLACE.exec(text);
    const position = place && parsePosition(`${place[2]}-${place[3]}`);
    if (position) {
      for (const gap of this.#state.onRefused(place[1], position)) this.#announce(gap);
      return;
    }
    const only = this.#state.hasOneChannel ? this.#state.positions.keys().next().value ?? "" : "";
    this.#announce(makeGap(only, "refused"));
  }

  /** Whether it was given before; on another channel it is another delivery. */
  #isDuplicate(event) {
    if (this.#state.has(event)) return true;
    const isKnown = event.channel !== null || this.#state.hasOneChannel;
    return isKnown && this.#recent.has(`${event.channel} ${event.id}`);
  }

  #remember(event) {
    this.#recent.set(`${event.channel} ${event.id}`, true);
    if (this.#recent.size > RECENT_IDS) this.#recent.delete(this.#recent.keys().next().value);
  }

  #onControl(frame) {
    const kind = frame.control;
    if (kind === "welcome") {
      if (frame.beat_interval_s > 0 && frame.beat_interval_s <= 86_400) {
        this.#beatMs = Math.max(frame.beat_interval_s, 0.1) * 1000;
      }
      if (this.#options.maxBytes === null && Number.isInteger(frame.max_bytes)) {
        this.#maxBytes = Math.max(DEFAULT_MAX_BYTES, Math.min(frame.max_bytes, LARGEST_BYTES));
      }
      this.#announce(this.#state.onWelcome(frame));
      this.#pass(frame.channel);
      this.#onBeat(frame.channel, false);
      this.#tell("welcome", { kind, channel: frame.channel, position: parsePosition(frame.position), recovered: frame.recovered ?? null });
    } else if (kind === "beat") {
      this.#announce(this.#state.onBeat(frame));
      this.#pass(frame.channel);
      this.#onBeat(frame.channel);
      this.#tell("beat", { kind, channel: frame.channel, position: parsePosition(frame.position) });
    } else if (kind === "gap") {
      this.#announce(this.#state.onGap(readGap(frame)));
    } else if (kind === "lag") {
      this.#tell("lag", { kind, channel: frame.channel, behindMs: frame.behind_ms, behindEvents: frame.behind_events });
    } else if (kind === "drain") {
      const delayS = frame.reconnect_after_s;
      this.#hintS = delayS > 0 && Number.isFinite(delayS) ? Math.min(delayS, LONGEST_HINT_S) : 0;
      this.#tell("drain", { kind, reconnectAfterS: this.#hintS });
    }
  }

  /** Queue the position of a channel without an item: everything before it has arrived. */
  #pass(channel) {
    const position = this.#state.positions.get(channel);
    if (!position) return;
    const last = this.#pending.at(-1);
    if (last && last[0] === null && last[1] === channel) last[2] = position;
    else this.#put(null, channel, position);
  }

  #announce(gap) {
    if (!gap) return;
    this.gaps += 1;
    this.#put(gap, gap.channel, gap.position);
  }

  // Positions that outlive the page

  #storage() {
    const { storage } = this.#options;
    return storage === "localStorage" ? globalThis.localStorage : storage;
  }

  #load(url) {
    if (!this.#options.storage) return null;
    this.#options.storageKey ||= `broadcaster ${url} ${(this.#options.channels ?? []).join(" ")}`;
    try {
      const saved = fieldsOf(this.#storage().getItem(this.#options.storageKey) ?? "");
      const valid = saved && Object.values(saved).every(parsePosition) && Object.keys(saved).length;
      return valid ? saved : null;
    } catch (error) {
      this.storageError = error;
      return null;
    }
  }

  #save() {
    clearTimeout(this.#saveTimer);
    this.#saveTimer = null;
    if (!this.#options.storage || !this.#handed.size) return;
    try {
      this.#storage().setItem(this.#options.storageKey, JSON.stringify(this.positions));
    } catch (error) {
      this.storageError = error; // full, or forbidden: the position is kept in memory
    }
  }
}

/** The fields of a `gap` frame; a value of another type counts as unknown. */
function readGap(frame) {
  const number = (value) => (Number.isSafeInteger(value) ? value : null);
  const epoch = typeof frame.epoch === "string" && EPOCH.test(frame.epoch) ? frame.epoch : null;
  return makeGap(String(frame.channel), String(frame.cause), epoch, number(frame.first), number(frame.last), parsePosition(frame.position));
}
