// Run by `node --test` (test_javascript.py): the parts of the JavaScript client that need no hub.
import assert from "node:assert/strict";
import { afterEach, test } from "node:test";
import { Backoff, EventStreamParser, ResumeState, Subscriber as Client, parsePosition, retryAfterS } from "../../broadcaster/hub/web/client/client.js";

// One that a test has left open would keep node from ending.
const opened = [];
class Subscriber extends Client {
  constructor(options) {
    super(options);
    opened.push(this);
  }
}
afterEach(() => opened.splice(0).forEach((subscriber) => subscriber.close()));

const until = async (probe) => {
  for (const deadline = Date.now() + 10_000; !probe(); ) {
    assert.ok(Date.now() < deadline, `never: ${probe}`);
    await new Promise((done) => setTimeout(done, 5));
  }
};

const URL_ = "http://hub.example/ws";
const OLD = "T0000000010a0b0c";
const NEW = "T0000000020a0b0c";
const at = (epoch, offset) => ({ channel: "c", position: { epoch, offset } });
const gap = (epoch, first, last, position, cause = "expired") => ({ kind: "gap", channel: "c", cause, epoch, first, last, position });

test("a position is <epoch>-<offset>, and nothing else", () => {
  assert.deepEqual(parsePosition("T1-17"), { epoch: "T1", offset: 17 });
  for (const wrong of ["", "T1", "T1-", "-1", "T1--1", "T1-9007199254740992", "T 1-1", null, 7, {}]) assert.equal(parsePosition(wrong), null);
});

test("the query resumes each channel where it was, and keeps the filters", () => {
  const state = new ResumeState({ url: `${URL_}?type=A&since=x-1&_=1`, channels: ["a", "b"], since: { b: "e-5" }, severities: ["critical"] });
  assert.equal(state.query(), "channel=a&channel=b&since=e-5&type=A&_=1&severity=critical");
  assert.equal(state.query(["a"]), "channel=a&type=A&_=1&severity=critical");
});

test("where to begin is said until a welcome says which position that is", () => {
  const state = new ResumeState({ url: URL_, last: 50 });
  assert.equal(state.query(), "last=50");
  state.onWelcome({ channel: "c", position: "e-40", recovered: false });
  assert.equal(state.query(), "last=50", "its gap has not come");
  state.onGap(gap("e", 1, 40, { epoch: "e", offset: 40 }));
  assert.equal(state.query(), "since=e-40");
});

test("who begins again has missed nothing", () => {
  for (const begin of [{ since: "10m" }, { last: 50 }]) {
    const state = new ResumeState({ url: URL_, channels: ["c"], ...begin });
    assert.equal(state.onWelcome({ channel: "c", position: "e-40", recovered: false }), null);
    assert.equal(state.onWelcome({ channel: "c", position: "e-60", recovered: false }), null, "its gap has not come");
  }
});

test("where to begin may stand in the address", () => {
  assert.equal(new ResumeState({ url: `${URL_}?last=50` }).query(), "last=50");
  assert.equal(new ResumeState({ url: `${URL_}?last=50`, last: 7 }).query(), "last=7");
  assert.equal(new ResumeState({ url: URL_, channels: ["a", "b"], since: { a: "e-1" }, last: 7 }).query(), "channel=a&since=e-1&channel=b&last=7");
  assert.equal(new ResumeState({ url: URL_, since: "e-1", last: 7 }).query(), "since=e-1");
  assert.throws(() => new ResumeState({ url: `${URL_}?last=some` }), RangeError);
});

test("a time is asked for until it is a position, and without history once", () => {
  const state = new ResumeState({ url: URL_, channels: ["c", "d"], since: "10m" });
  assert.equal(state.query(), "channel=c&since=10m&channel=d&since=10m");
  state.onWelcome({ channel: "c", position: "e-40", recovered: false });
  state.onGap(gap("e", null, 40, { epoch: "e", offset: 40 }));
  assert.equal(state.query(), "channel=c&since=e-40&channel=d&since=10m");
  state.onWelcome({ channel: "d", position: null, recovered: false });
  state.onGap({ ...gap(null, null, null, null, "no_history"), channel: "d" });
  assert.equal(state.query(), "channel=c&since=e-40&channel=d");
});

test("one position cannot be that of several channels", () => {
  assert.throws(() => new ResumeState({ url: URL_, channels: ["a", "b"], since: "e-1" }), RangeError);
  assert.throws(() => new ResumeState({ url: URL_, since: { a: "nonsense" } }), RangeError);
});

test("events move forward only, and a hole that was not announced is a gap", () => {
  const state = new ResumeState({ url: URL_, since: { c: "e-5" } });
  assert.equal(state.onEvent(at("e", 6)), null);
  assert.ok(state.has(at("e", 6)));
  assert.ok(state.has(at("e", 3)));
  assert.deepEqual(state.onEvent(at("e", 9)), gap("e", 7, 8, { epoch: "e", offset: 8 }, "unexplained"));
});

test("with a filter a hole is no loss", () => {
  const state = new ResumeState({ url: URL_, since: { c: "e-5" }, types: ["A"] });
  assert.equal(state.onEvent(at("e", 9)), null);
});

test("of two epochs with a time the later name is the later one; any other is older", () => {
  const state = new ResumeState({ url: URL_, since: { c: `${NEW}-5` } });
  assert.ok(state.has(at(OLD, 99)));
  assert.ok(state.has(at("old", 99)));
  assert.ok(!state.has(at("T0000000030a0b0c", 1)));
});

test("a gap holds nothing from before the position", () => {
  const state = new ResumeState({ url: URL_, since: { c: "e-5" } });
  assert.equal(state.onGap(gap("e", 2, 4, { epoch: "e", offset: 4 })), null);
  assert.deepEqual(state.onGap(gap("e", 3, 8, { epoch: "e", offset: 8 })), gap("e", 6, 8, { epoch: "e", offset: 8 }));
  assert.equal(state.query(), "channel=c&since=e-8");
});

test("a beat says what should have arrived", () => {
  const state = new ResumeState({ url: URL_, since: { c: "e-5" } });
  assert.equal(state.onBeat({ channel: "c", position: "e-5" }), null);
  assert.equal(state.onBeat({ channel: "c", position: "e-7" }).cause, "unexplained");
});

test("without history a lost connection is a gap; the first one is none", () => {
  const state = new ResumeState({ url: URL_ });
  assert.equal(state.onWelcome({ channel: "c", position: null, recovered: null }), null);
  assert.equal(state.onWelcome({ channel: "c", position: null, recovered: null }).cause, "no_history");
});

test("what is refused is a gap at its place, once", () => {
  const state = new ResumeState({ url: URL_, since: { c: "e-5" } });
  assert.deepEqual(state.onRefused("c", { epoch: "e", offset: 6 }), [gap("e", 6, 6, { epoch: "e", offset: 6 }, "refused")]);
  assert.deepEqual(state.onRefused("c", { epoch: "e", offset: 6 }), []);
});

test("after a close that cannot be resumed from it begins anew", () => {
  const state = new ResumeState({ url: URL_, since: "e-5" });
  assert.deepEqual(state.forget().map(({ cause, first, last }) => [cause, first, last]), [["closed", 6, null]]);
  assert.equal(state.query(), "");
});

const STREAM = "retry: 1000\n\n:\n\nid: e-1\ndata: {\"a\":\ndata: 1}\n\nevent: gap\r\nid: e-2\r\ndata: {}\r\n\r\ndata:x\r\rdata: ü\n\n";
test("a stream is read alike in whatever pieces it comes", () => {
  for (let size = 1; size <= STREAM.length; size += 1) {
    const got = [];
    const parser = new EventStreamParser(({ event, data, id }) => got.push([event, data, id]));
    for (let begin = 0; begin < STREAM.length; begin += size) parser.push(STREAM.slice(begin, begin + size));
    assert.deepEqual(got, [["message", '{"a":\n1}', "e-1"], ["gap", "{}", "e-2"], ["message", "x", undefined], ["message", "ü", undefined]], `${size}`);
  }
});

test("connections in vain are opened ever more seldom, a good one at once", () => {
  const bounds = (backoff, count) => Array.from({ length: count }, () => backoff.next());
  const backoff = new Backoff(5_000, () => 1);
  assert.deepEqual(bounds(backoff, 7), [200, 400, 800, 1_600, 3_200, 5_000, 5_000]);
  for (const bound of [1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000]) {
    backoff.lost(100, false);
    assert.equal(backoff.next(), bound);
  }
  backoff.lost(100, true);
  assert.equal(backoff.next(), 200);
});

test("Retry-After is a number or a date", () => {
  assert.equal(retryAfterS("7"), 7);
  assert.equal(retryAfterS("soon"), 0);
  assert.equal(retryAfterS(null), 0);
  const wait = retryAfterS(new Date(Date.now() + 30_000).toUTCString());
  assert.ok(wait > 25 && wait <= 30, `${wait}`);
});

// A WebSocket in which the test speaks for the hub.
function speaking() {
  const sockets = [];
  class Fake {
    constructor(url, protocols) {
      Object.assign(this, { url, protocols });
      sockets.push(this);
      queueMicrotask(() => this.onopen());
    }
    say(...frames) {
      for (const frame of frames) this.onmessage({ data: typeof frame === "string" ? frame : JSON.stringify(frame).replace('{"control":', '{"control": ') });
    }
    close(code = 1000, reason = "") {
      queueMicrotask(() => this.onclose({ code, reason }));
    }
  }
  return [Fake, sockets];
}
const event = (offset, more = {}) => ({ channel: "c", epoch: "e", offset, event_id: `id-${offset}`, event_type: "T", source: "s", sequence: offset, published_at_ms: 1, ...more });
const soon = (ms = 5) => new Promise((done) => setTimeout(done, ms));
const welcome = (position, recovered = null) => ({ control: "welcome", channel: "c", position, recovered, beat_interval_s: 2, max_bytes: 65536 });

test("a token is shown as a subprotocol; a function is asked before each connection", async () => {
  const [Fake, sockets] = speaking();
  let asked = 0;
  const subscriber = new Subscriber({ url: URL_, WebSocket: Fake, random: () => 0, token: async () => `tök?n-${(asked += 1)}` }).connect();
  await soon();
  sockets[0].close(1012);
  await until(() => sockets.length === 2);
  assert.deepEqual(sockets.map(({ protocols }) => Buffer.from(protocols[1].slice(7), "base64url").toString()), ["tök?n-1", "tök?n-2"]);
  subscriber.close();
});

test("a position counts once the callback, or the body of the loop, is done with its event", async () => {
  const [Fake, sockets] = speaking();
  const subscriber = new Subscriber({ url: URL_, WebSocket: Fake });
  const iterator = subscriber[Symbol.asyncIterator]();
  const first = iterator.next();
  await soon();
  sockets[0].say(welcome("e-0"), event(1), event(2));
  assert.equal((await first).value.id, "id-1");
  assert.equal(subscriber.position, "e-0");
  await iterator.next();
  assert.equal(subscriber.position, "e-1");
  await iterator.return();
  assert.equal(subscriber.position, "e-2");
  const seen = [];
  const [Other, others] = speaking();
  const called = new Subscriber({ url: URL_, WebSocket: Other, onEvent: ({ id }) => seen.push([id, called.position]) }).connect();
  await soon();
  others[0].say(welcome("e-0"), event(1), event(1), event(2));
  assert.deepEqual(seen, [["id-1", "e-0"], ["id-2", "e-1"]]);
  assert.equal(called.duplicates, 1);
  called.close();
});

test("a loop that is slow makes it leave, and resume when there is room; nothing is lost", async () => {
  const [Fake, sockets] = speaking();
  const subscriber = new Subscriber({ url: URL_, WebSocket: Fake, queueEvents: 4, random: () => 0 });
  const iterator = subscriber[Symbol.asyncIterator]();
  const first = iterator.next();
  await soon();
  sockets[0].say(welcome("e-0"), ...[1, 2, 3, 4, 5, 6, 7].map((offset) => event(offset)));
  assert.equal(subscriber.state, "paused");
  const got = [(await first).value.id];
  while (subscriber.state === "paused") got.push((await iterator.next()).value.id);
  await until(() => sockets.length === 2);
  assert.equal(new URL(sockets[1].url).search, "?since=e-6");
  sockets[1].say(welcome("e-6", true), event(7));
  while (got.length < 7) got.push((await iterator.next()).value.id);
  assert.deepEqual(got, [1, 2, 3, 4, 5, 6, 7].map((offset) => `id-${offset}`));
  subscriber.close();
});

test("what is no event, or too large, is a gap in its place", async () => {
  const [Fake, sockets] = speaking();
  const items = [];
  const subscriber = new Subscriber({ url: URL_, WebSocket: Fake, onGap: (found) => items.push(found), onEvent: ({ id }) => items.push(id) }).connect();
  await soon();
  sockets[0].say(welcome("e-0"), event(1), event(2, { source: 5 }), event(3, { data: { text: "ä".repeat(40_000) } }), event(4));
  assert.deepEqual(items.map((item) => item.first ?? item), ["id-1", 2, 3, "id-4"]);
  assert.equal(subscriber.invalid, 2);
  subscriber.close();
});

test("the place that Redis has put in front of an event does not count in its size", async () => {
  const [Fake, sockets] = speaking();
  const got = [];
  const subscriber = new Subscriber({ url: URL_, WebSocket: Fake, onEvent: ({ sequence }) => got.push(sequence) }).connect();
  await soon();
  sockets[0].say(welcome("e-0"));
  for (const [offset, size] of [[1, 65_536], [2, 65_537]]) {
    const { channel, epoch, offset: _, ...published } = event(offset, { data: { text: "" } });
    published.data.text = "x".repeat(size - JSON.stringify(published).length);
    sockets[0].say(`{"channel":"c","epoch":"e","offset":${offset},"stored_at_us":1795747444734299,${JSON.stringify(published).slice(1)}`);
  }
  assert.deepEqual(got, [1]);
  assert.equal(subscriber.position, "e-2");
});

test("an event with a field control is an event", async () => {
  const [Fake, sockets] = speaking();
  const got = [];
  const subscriber = new Subscriber({ url: URL_, WebSocket: Fake, onEvent: ({ id }) => got.push(id) }).connect();
  await soon();
  sockets[0].say({ control: "gap", ...event(1) });
  assert.deepEqual(got, ["id-1"]);
  subscriber.close();
});

test("positions are kept where it is told to, and begun from; what is kept wrongly is ignored", async () => {
  const kept = new Map();
  const storage = { getItem: (key) => kept.get(key) ?? null, setItem: (key, value) => kept.set(key, value) };
  for (const [before, expected] of [[null, ""], ["{nonsense", ""], ['{"c":7}', ""], ['{"c":"e-5"}', "?channel=c&since=e-5"]]) {
    if (before) kept.set("k", before);
    const [Fake, sockets] = speaking();
    const subscriber = new Subscriber({ url: URL_, WebSocket: Fake, storage, storageKey: "k" }).connect();
    await soon();
    assert.equal(new URL(sockets[0].url).search, expected);
    sockets[0].say(welcome("e-5", true), event(6));
    subscriber.close();
    assert.equal(kept.get("k"), '{"c":"e-6"}');
  }
});

test("close codes say whether to come back", async () => {
  for (const [code, comesBack] of [[1000, true], [1001, true], [1006, true], [1011, true], [1012, true], [4001, true], [4008, true], [1002, false], [1007, false], [1008, false], [1009, false]]) {
    const [Fake, sockets] = speaking();
    const subscriber = new Subscriber({ url: URL_, WebSocket: Fake, random: () => 0, fetch: null }).connect();
    await soon();
    sockets[0].close(code);
    await until(() => sockets.length > 1 || subscriber.state === "closed");
    assert.equal(subscriber.state !== "closed", comesBack, `${code}`);
    subscriber.close();
  }
});

test("it waits as long as a drain asks, and after 4009 begins anew with a gap", async () => {
  const [Fake, sockets] = speaking();
  const waits = [];
  const gaps = [];
  const subscriber = new Subscriber({
    url: URL_, WebSocket: Fake, random: () => 0, onGap: (found) => gaps.push(found),
    onState: ({ state, waitMs }) => state === "waiting" && waits.push(waitMs),
  }).connect();
  await soon();
  sockets[0].say(welcome("e-3"), { control: "drain", channel: "c", reconnect_after_s: 0.05 });
  sockets[0].close(1012);
  await until(() => sockets.length === 2);
  assert.deepEqual(waits, [50]);
  await soon();
  sockets[1].close(4009);
  await until(() => sockets.length === 3);
  assert.deepEqual(gaps.map(({ cause, first, last }) => [cause, first, last]), [["closed", 4, null]]);
  assert.equal(new URL(sockets[2].url).search, "");
  subscriber.close();
});

test("without heartbeats it says that it is blind, opens another connection, and says when it sees again", async () => {
  const [Fake, sockets] = speaking();
  const items = [];
  const subscriber = new Subscriber({ url: URL_, WebSocket: Fake, random: () => 0, onStale: () => items.push("stale"), onFresh: () => items.push("fresh") }).connect();
  await soon();
  sockets[0].say({ ...welcome("e-0"), beat_interval_s: 0.1 });
  await until(() => items.length);
  assert.equal(sockets.length, 1);
  await until(() => sockets.length === 2);
  assert.deepEqual(items, ["stale"]);
  sockets[1].say({ ...welcome("e-0", true), beat_interval_s: 0.1 });
  assert.deepEqual(items, ["stale"], "a hub that proves nothing welcomes, too");
  sockets[1].say({ control: "beat", channel: "c", position: "e-0" });
  assert.deepEqual(items, ["stale", "fresh"]);
  subscriber.close();
});

test("who hears of one of its channels only is blind", async () => {
  const [Fake, sockets] = speaking();
  const items = [];
  const subscriber = new Subscriber({ url: URL_, channels: ["a", "b"], WebSocket: Fake, random: () => 0, onStale: () => items.push("stale"), onFresh: () => items.push("fresh") }).connect();
  await soon();
  const beat = (...channels) => sockets[0].say(...channels.map((channel) => ({ control: "beat", channel, position: "e-0" })));
  for (const channel of ["a", "b"]) sockets[0].say({ ...welcome("e-0"), channel, beat_interval_s: 0.1 });
  const beating = setInterval(() => beat("a"), 30);
  await until(() => items.length);
  clearInterval(beating);
  beat("a");
  assert.deepEqual(items, ["stale"]);
  beat("b");
  assert.deepEqual(items, ["stale", "fresh"]);
  subscriber.close();
});

/** A `fetch` whose streams never say anything; the channels in `refused` are answered with that status. */
function silentStreams(refused) {
  return async (url, { signal }) => {
    const status = refused[new URL(url).searchParams.get("channel")];
    if (status !== undefined) return new Response("bad gateway", { status });
    const body = new ReadableStream({ start: (control) => signal.addEventListener("abort", () => control.error(new Error("aborted"))) });
    return new Response(body, { status: 200, headers: { "Content-Type": "text/event-stream" } });
  };
}

test("several streams of which one is refused are a failed attempt, and each wait is longer", async () => {
  const waits = [];
  const fetch = silentStreams({ b: 502 });
  const subscriber = new Subscriber({ url: URL_, channels: ["a", "b"], transports: ["sse"], fetch, random: () => 1, onState: ({ state, waitMs }) => state === "waiting" && waits.push(waitMs) });
  await soon(Math.max(0, 5_200 - performance.now())); // on a page that is there for a while
  subscriber.connect();
  await until(() => waits.length === 3);
  subscriber.close();
  assert.ok(waits[0] < waits[1] && waits[1] < waits[2], `${waits}`);
});

test("a token that cannot be sent is not said in a reason", async () => {
  const reasons = [];
  const fetch = () => assert.fail("it is sent");
  const subscriber = new Subscriber({ url: URL_, transports: ["sse"], fetch, token: "secret\u0000", onState: ({ reason }) => reason && reasons.push(reason) }).connect();
  await until(() => reasons.length);
  subscriber.close();
  assert.equal(reasons[0], "the token has characters that a header cannot have");
});

test("a token function that rejects with nothing is asked again", async () => {
  const [Fake] = speaking();
  let asked = 0;
  const token = () => Promise.reject((asked += 1) && undefined);
  const subscriber = new Subscriber({ url: URL_, WebSocket: Fake, random: () => 0, token }).connect();
  await until(() => asked > 1);
  subscriber.close();
});

test("what a gateway says of a stream does not end it", async () => {
  class Blip {
    constructor() {
      queueMicrotask(() => this.onclose({ code: 1006, reason: "" }));
    }
  }
  let asked = 0;
  const fetch = async () => new Response(JSON.stringify({ status: 404, error: "Not Found", path: "/sse" }), { status: (asked += 1) && 404 });
  const subscriber = new Subscriber({ url: URL_, WebSocket: Blip, fetch, random: () => 0 }).connect();
  await until(() => asked > 1);
  assert.notEqual(subscriber.state, "closed");
  subscriber.close();
});

test("a channel whose position was not kept begins where it was to begin", async () => {
  const storage = { getItem: () => '{"a":"e-5"}', setItem() {} };
  for (const [begin, expected] of [[{ since: "all" }, "&since=all"], [{ last: 50 }, "&last=50"], [{}, ""], [{ since: { a: "e-1" } }, ""]]) {
    const [Fake, sockets] = speaking();
    const subscriber = new Subscriber({ url: URL_, channels: ["a", "b"], WebSocket: Fake, storage, storageKey: "k", ...begin }).connect();
    await soon();
    subscriber.close();
    assert.equal(new URL(sockets[0].url).search, `?channel=a&since=e-5&channel=b${expected}`);
  }
});

test("a hub that refuses for good ends it, one that cannot serve now does not", async () => {
  class Blocked {
    constructor() {
      queueMicrotask(() => this.onclose({ code: 1006, reason: "" }));
    }
  }
  const answers = [[503, { error: "full" }], [401, { error: "access denied: expired" }]];
  const asked = [];
  const fetch = async (url, { headers }) => {
    asked.push([url, headers.Authorization]);
    const [status, body] = answers[asked.length - 1];
    return new Response(JSON.stringify(body), { status });
  };
  const subscriber = new Subscriber({ url: `${URL_}?type=A`, WebSocket: Blocked, fetch, token: "t", random: () => 0 });
  await assert.rejects(async () => { for await (const _ of subscriber); }, { name: "HubRefused", status: 401, message: "401 access denied: expired" });
  assert.deepEqual(asked, Array(2).fill(["http://hub.example/sse?type=A", "Bearer t"]));
});

test("what is taken away from the page: in CSV no cell is a formula, a command is one word of a shell", async () => {
  globalThis.location = { origin: "http://hub.example" };
  const { csvOf, curlOf, ndjsonOf } = await import("../../broadcaster/hub/web/page/share.js");
  const item = { publishedAt: 0, severity: "info", type: "=HYPERLINK(1)", source: 'a,"b"', channel: "c", position: "e-1", id: "i", json: '{"data":{"text":"x"}}' };
  assert.equal(csvOf([item]).split("\r\n")[1], '1970-01-01T00:00:00.000Z,info,\'=HYPERLINK(1),"a,""b""",c,e-1,i,"{""text"":""x""}"');
  assert.equal(ndjsonOf([item, item]), '{"data":{"text":"x"}}\n'.repeat(2));
  assert.equal(curlOf("type=it's", true), `curl -N -H 'Accept: text/event-stream' -H "Authorization: Bearer $TOKEN" 'http://hub.example/sse?type=it'\\''s'`);
  delete globalThis.location;
});
