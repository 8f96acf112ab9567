// The live page: a client of the hub's public wire, and nothing else. Content of events is text, never markup.

import { HubRefused, Subscriber, parsePosition } from "/client.js";
import { Charts } from "/page/charts.js";
import { HubStatus } from "/page/status.js";
import { Items, List, ago, took } from "/page/list.js";
import { copy, csvOf, curlOf, download, ndjsonOf } from "/page/share.js";

const LAST = 50;
const SUMMARY = 200; // characters
const $ = (id) => document.getElementById(id);

const view = readUrl();
const list = new List($("list"), $("rows"), openDetail);
const charts = new Charts($("rate"), $("latency"));
let token = ""; // in memory only
let subscriber = null;
const waiting = new Items(); // that are not in the list yet
let paused = false;
let drawing = false;
let liveSince = 0;
let gaps = 0;
let unseenGaps = 0;
let critical = 0;
let retryAt = 0;
let drained = 0;
let status = { ready: null, stats: null, status: -1 };
let detail = null;

// The URL holds what is shown

function readUrl() {
  const query = new URLSearchParams(location.search);
  const at = parsePosition(query.get("at"));
  return {
    channel: query.get("channel") ?? "",
    type: query.getAll("type"),
    source: query.getAll("source"),
    severity: query.getAll("severity"),
    kiosk: query.has("kiosk"),
    at,
  };
}

function queryOf(more = {}) {
  const query = new URLSearchParams();
  if (view.channel) query.append("channel", view.channel);
  for (const name of ["type", "source", "severity"]) for (const value of view[name]) query.append(name, value);
  for (const [name, value] of Object.entries(more)) query.set(name, value);
  return query.toString();
}

function writeUrl() {
  const query = queryOf(view.kiosk ? { kiosk: "1" } : {});
  history.replaceState(null, "", query ? `/?${query}` : "/");
}

function showFilters() {
  const form = $("filters").elements;
  form.channel.value = view.channel;
  form.type.value = view.type.join(", ");
  form.source.value = view.source.join(", ");
  form.severity.value = view.severity.join(" ");
}

const words = (text) => text.split(",").map((word) => word.trim()).filter(Boolean);

$("filters").addEventListener("submit", (event) => {
  event.preventDefault();
  const form = event.target.elements;
  Object.assign(view, {
    channel: form.channel.value.trim(), type: words(form.type.value), source: words(form.source.value),
    severity: form.severity.value.split(" ").filter(Boolean), at: null,
  });
  writeUrl();
  subscribe();
});
$("filters").addEventListener("reset", (event) => {
  event.preventDefault();
  Object.assign(view, { channel: "", type: [], source: [], severity: [], at: null });
  showFilters();
  writeUrl();
  subscribe();
});
for (const name of ["severity", "channel"]) {
  $("filters").elements[name].addEventListener("change", () => $("filters").requestSubmit());
}

// Events

function subscribe() {
  subscriber?.close();
  list.clear();
  charts.clear();
  waiting.take();
  gaps = unseenGaps = 0;
  liveSince = Infinity;
  $("blind").hidden = $("missing").hidden = true;
  $("channel-name").textContent = view.channel;
  const { at } = view;
  let mine;
  const unlessOld = (handler) => (item) => mine === subscriber && handler(item);
  try {
    mine = subscriber = new Subscriber({
      channels: view.channel ? [view.channel] : [],
      types: view.type, sources: view.source, severities: view.severity,
      ...(at ? { since: `${at.epoch}-${Math.max(0, at.offset - 1)}` } : { last: LAST }),
      token: () => token,
      onEvent: unlessOld(onEvent), onGap: unlessOld(onGap), onState: unlessOld(onState),
      onStale: unlessOld(() => showState()), onFresh: unlessOld(() => showState()),
      onDrain: unlessOld(() => { drained = Date.now(); }),
      onBeat: unlessOld(({ channel }) => { $("channel-name").textContent = channel; }),
      onWelcome: unlessOld(({ channel }) => {
        liveSince = Math.min(liveSince, Date.now());
        $("channel-name").textContent = channel;
      }),
    });
  } catch (error) {
    toast(error.message);
    return;
  }
  subscriber.connect();
}

function onEvent(event) {
  const isLive = event.publishedAt >= liveSince - 1_000;
  const item = {
    kind: "event", id: event.id, type: event.type, source: event.source, severity: event.severity, channel: event.channel,
    position: event.position ? `${event.position.epoch}-${event.position.offset}` : "",
    publishedAt: event.publishedAt, receivedAt: event.receivedAt,
    latency: isLive ? Math.max(0, event.receivedAt - event.publishedAt) : null,
    json: JSON.stringify(event.fields),
    summary: Object.keys(event.data).length ? JSON.stringify(event.data).slice(0, SUMMARY) : "",
  };
  charts.add(item);
  add(item);
  if (item.severity === "critical" && isLive) alarm(item);
  if (view.at && event.position?.offset === view.at.offset && event.position.epoch === view.at.epoch) {
    view.at = null;
    openDetail(item);
  }
}

function onGap(gap) {
  gaps += 1;
  unseenGaps += 1;
  const many = gap.first !== null && gap.last !== null ? `${(gap.last - gap.first + 1).toLocaleString("en")} events` : "an unknown number of events";
  const where = gap.first === null ? "" : ` (${gap.epoch}-${gap.first} to ${gap.last ?? "?"})`;
  add({ kind: "gap", text: `▲ ${many} missing: ${gap.cause}${where}` });
  $("missing").firstElementChild.textContent = `Events are missing: ${unseenGaps} ${unseenGaps === 1 ? "gap" : "gaps"}, the last one ${many}, ${gap.cause}`;
  $("missing").hidden = false;
}

$("missing").lastElementChild.addEventListener("click", () => {
  unseenGaps = 0;
  $("missing").hidden = true;
});

function add(item) {
  waiting.add([item]);
  if (!drawing && !document.hidden) {
    drawing = true;
    requestAnimationFrame(draw);
  }
}

/** Once a frame at most, and once a second where nothing is drawn: however many events come. */
function draw() {
  drawing = false;
  if (!paused && waiting.all.length) list.add(waiting.take());
  $("pause").textContent = paused ? `Resume (${waiting.all.length.toLocaleString("en")} waiting)` : "Pause";
  $("count").textContent = list.items.length ? `${list.items.length.toLocaleString("en")} shown` : "";
  $("empty").hidden = list.items.length > 0;
}

// What is wrong is said loudly

function onState({ state, reason, waitMs, error }) {
  retryAt = state === "waiting" ? Date.now() + waitMs : 0;
  if (error instanceof HubRefused && error.status === 401) {
    ask(token ? `The hub refuses this token: ${reason}` : "This hub asks for a token.");
  }
  if (state === "waiting" || state === "closed") lastReason = !reason || /fetch/i.test(reason) ? "it does not answer" : reason;
  showState();
}
let lastReason = "";

function showState() {
  const { state, stale } = subscriber;
  const words = {
    open: stale ? "blind" : subscriber.transport === "sse" ? "live over SSE" : "live",
    connecting: "connecting", waiting: "reconnecting", closed: "refused", paused: "catching up", idle: "starting",
  }[state];
  const pill = $("state");
  pill.textContent = words;
  pill.className = `pill ${state === "open" && !stale ? "good" : state === "closed" || stale ? "bad" : ""}`;
  const blind = $("blind");
  let text = "";
  if (state === "closed") text = `Refused: ${lastReason}`;
  else if (stale && state === "open") text = "BLIND: the hub proves nothing any more. Silence does not mean that nothing happens.";
  else if (stale) text = `BLIND: no connection to the hub (${drained > Date.now() - 60_000 ? "it is restarting" : lastReason}). Coming back by itself${retryAt > Date.now() ? ` in ${Math.ceil((retryAt - Date.now()) / 1000)} s` : ""}.`;
  if (status.ready && !status.ready.ready && !text) text = `The hub is not ready: ${status.ready.trouble || (status.ready.stopping ? "it is stopping" : "no reason given")}`;
  if (blind.textContent !== text) blind.textContent = text;
  blind.hidden = !text;
  document.title = text ? `⚠ ${words} – events` : `${paused ? "⏸ " : ""}Events ${$("channel-name").textContent}`;
}

// Tiles

function tile(name, value, kind = "") {
  const box = Object.assign(document.createElement("div"), { className: kind });
  box.append(Object.assign(document.createElement("dt"), { textContent: name }), Object.assign(document.createElement("dd"), { textContent: value }));
  return box;
}

const sum = (counts) => Object.values(counts ?? {}).reduce((total, count) => total + count, 0);

function showTiles() {
  const { rate, p50, p99 } = charts.recent();
  const { ready, stats } = status;
  const tiles = [
    tile("Events a second", rate.toFixed(1)),
    tile("Latency p50 / p99", p50 === null ? "–" : `${took(p50)} / ${took(p99)}`),
    tile("Readiness", ready === null ? "no answer" : ready.ready ? "ready" : `not ready: ${ready.trouble || "stopping"}`, ready?.ready ? "wide" : "wide bad"),
  ];
  if (ready?.ready && ready.trouble) tiles.push(tile("Warning", ready.trouble, "wide warn"));
  tiles.push(
    tile("Redis link", ready === null ? "–" : ready.redis ? "connected" : "lost", ready && !ready.redis ? "bad" : ""),
    tile("Gaps here", String(gaps), gaps ? "warn" : ""),
  );
  if (stats) {
    const dropped = stats.shed + stats.slow_closed;
    const { hubs = [], ready: readyHubs = 0, problems = [], status: colour = "green" } = stats.deployment ?? {};
    if (hubs.length > 1 || problems.length) {
      const words = [`${readyHubs} of ${hubs.length} ready`, ...problems.map(String)].join("; ");
      tiles.push(tile("Hubs", words, `wide ${{ red: "bad", yellow: "warn" }[colour] ?? ""}`));
    }
    tiles.push(
      tile("Subscribers", stats.connected.toLocaleString("en")),
      tile("Behind", stats.behind.toLocaleString("en"), stats.behind ? "warn" : ""),
      tile("Gaps of all hubs", sum(stats.gaps).toLocaleString("en"), sum(stats.gaps) ? "warn" : ""),
      tile("Dropped for slow ones", dropped.toLocaleString("en"), dropped ? "warn" : ""),
      tile("Delivered", stats.deliveries.toLocaleString("en")),
      tile("Version, up for", `${stats.version}, ${ago(stats.uptime_s * 1000)}`),
    );
    const names = Object.keys(stats.channels);
    if ($("channels").childElementCount !== names.length) {
      $("channels").replaceChildren(...names.map((value) => Object.assign(document.createElement("option"), { value })));
    }
  } else if (status.status === 401 || status.status === 403) {
    tiles.push(tile("Counters", "not for this token", "wide"));
  }
  $("tiles").replaceChildren(...tiles);
}

new HubStatus(() => token, (said) => {
  status = said;
  showTiles();
  showState();
});

setInterval(() => {
  draw();
  if (document.hidden) return;
  list.render();
  charts.draw();
  showTiles();
  showState();
  if (critical) {
    $("say").textContent = critical === 1 ? "1 critical event" : `${critical} critical events`;
    critical = 0;
  }
}, 1_000);

// Sound and notifications

let audio = null;
let rangAt = 0;
function alarm(item) {
  critical += 1;
  if (Date.now() - rangAt < 2_000) return; // a burst is one alarm
  rangAt = Date.now();
  if ($("sound").checked && audio) {
    const tone = new OscillatorNode(audio, { frequency: 880 });
    const volume = new GainNode(audio, { gain: 0.2 });
    volume.gain.exponentialRampToValueAtTime(0.001, audio.currentTime + 0.5);
    tone.connect(volume).connect(audio.destination);
    tone.start();
    tone.stop(audio.currentTime + 0.5);
  }
  if ($("notify").checked && window.Notification?.permission === "granted") {
    new Notification(`${item.type} – ${item.source}`, { body: item.summary, tag: "critical", icon: "/page/icon.svg" });
  }
}
$("sound").addEventListener("change", () => {
  audio ??= new AudioContext();
  audio.resume();
});
$("notify").addEventListener("change", async ({ target }) => {
  const right = window.Notification ? await Notification.requestPermission() : "denied";
  if (right !== "granted") {
    target.checked = false;
    toast("This browser does not allow notifications.");
  }
});

// Buttons

function toast(text) {
  $("toast").textContent = text;
  $("toast").hidden = false;
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => { $("toast").hidden = true; }, 4_000);
}
const copied = async (text, what) => toast((await copy(text)) ? `${what} copied` : text);

function pause() {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", String(paused));
  draw();
}
function kiosk(on = !view.kiosk) {
  view.kiosk = on;
  document.body.classList.toggle("is-kiosk", on);
  $("kiosk").setAttribute("aria-pressed", String(on));
  writeUrl();
  list.render();
}
$("pause").addEventListener("click", pause);
$("kiosk").addEventListener("click", () => kiosk());
$("more").addEventListener("click", () => {
  $("tools").hidden = !$("tools").hidden;
  $("more").setAttribute("aria-expanded", String(!$("tools").hidden));
});
$("curl").addEventListener("click", () => copied(curlOf(queryOf({ last: LAST }), Boolean(token)), "The command"));
$("link").addEventListener("click", () => copied(`${location.origin}/?${queryOf()}`, "The link"));
const shown = () => list.items.filter(({ kind }) => kind === "event");
$("ndjson").addEventListener("click", () => download("events.ndjson", "application/x-ndjson", ndjsonOf(shown())));
$("csv").addEventListener("click", () => download("events.csv", "text/csv", csvOf(shown())));
$("test-event").addEventListener("click", async () => {
  const event = { event_type: "TEST", source: "live page", severity: "info", data: { sent_by: "the live page" } };
  if (view.channel) event.channel = view.channel;
  try {
    const response = await fetch("/publish", { method: "POST", headers: { Authorization: `Bearer ${token}` }, body: JSON.stringify(event) });
    const said = await response.json();
    toast(response.status === 201 ? `Sent: ${said.position ?? said.event_id}` : `Not sent: ${said.error}`);
  } catch (error) {
    toast(`Not sent: ${error.message}`);
  }
});
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea, dialog")) return;
  if (event.key === "p") pause();
  else if (event.key === "k") kiosk();
  else if (event.key === "Escape" && view.kiosk) kiosk(false);
  else if (event.key === "/") {
    event.preventDefault();
    $("filters").elements.type.focus();
  }
});

// The whole event

function openDetail(item) {
  detail = item;
  $("detail-title").textContent = `${item.type} – ${item.source}`;
  const time = new Date(item.publishedAt);
  const facts = {
    severity: item.severity, published: Number.isNaN(time.getTime()) ? String(item.publishedAt) : `${time.toISOString()} (${ago(Date.now() - item.publishedAt)} ago)`,
    latency: item.latency === null ? "replayed" : took(item.latency),
    channel: item.channel ?? "not stored", position: item.position || "none: it is not stored", id: item.id,
  };
  $("detail-facts").replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [
    Object.assign(document.createElement("dt"), { textContent: name }), Object.assign(document.createElement("dd"), { textContent: value }),
  ]));
  $("detail-json").textContent = JSON.stringify(JSON.parse(item.json), null, 2);
  $("detail-link").hidden = $("detail-curl").hidden = !item.position;
  if (!$("detail").open) $("detail").showModal();
}
const before = ({ position }) => {
  const { epoch, offset } = parsePosition(position);
  return `${epoch}-${offset - 1}`;
};
$("detail-close").addEventListener("click", () => $("detail").close());
$("detail-copy").addEventListener("click", () => copied($("detail-json").textContent, "The event"));
$("detail-link").addEventListener("click", () => copied(`${location.origin}/?${new URLSearchParams({ channel: detail.channel, at: detail.position })}`, "The link"));
$("detail-curl").addEventListener("click", () => copied(curlOf(new URLSearchParams({ channel: detail.channel, since: before(detail) }), Boolean(token)), "The command"));

// The token

function ask(why) {
  $("ask-why").textContent = `${why} It is kept in the memory of this page only.`;
  if (!$("ask").open) $("ask").showModal();
}
$("token").addEventListener("click", () => ask(token ? "A token is in use; an empty one ends that." : "For hubs with access control."));
$("ask").addEventListener("close", () => {
  const given = $("ask-token").value.trim();
  $("ask-token").value = "";
  if ($("ask").returnValue !== "use") return;
  token = given;
  $("test-event").hidden = !token;
  subscribe();
});

showFilters();
kiosk(view.kiosk);
subscribe();
