// The charts: events a second by severity, and latency, of the last five minutes.

const SECONDS = 300;
const KINDS = ["critical", "warning", "info"];

export class Charts {
  #rate;
  #latency;
  #buckets = new Map(); // by second

  constructor(rate, latency) {
    this.#rate = rate;
    this.#latency = latency;
  }

  add(item) {
    const second = Math.floor(item.receivedAt / 1000);
    let bucket = this.#buckets.get(second);
    if (!bucket) {
      this.#buckets.set(second, (bucket = { critical: 0, warning: 0, info: 0, latencies: [] }));
      for (const old of this.#buckets.keys()) if (old < second - SECONDS) this.#buckets.delete(old);
    }
    bucket[item.severity] += 1;
    if (item.latency !== null && bucket.latencies.length < 500) bucket.latencies.push(item.latency);
  }

  clear() {
    this.#buckets.clear();
  }

  /** Of the last ten seconds: events a second, and the median and 99th percentile of latency in milliseconds. */
  recent() {
    const now = Math.floor(Date.now() / 1000);
    let events = 0;
    const latencies = [];
    for (let second = now - 10; second < now; second += 1) {
      const bucket = this.#buckets.get(second);
      if (!bucket) continue;
      events += KINDS.reduce((sum, kind) => sum + bucket[kind], 0);
      latencies.push(...bucket.latencies);
    }
    return { rate: events / 10, p50: quantile(latencies, 0.5), p99: quantile(latencies, 0.99) };
  }

  draw() {
    const now = Math.floor(Date.now() / 1000);
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`);
    const buckets = Array.from({ length: SECONDS }, (_, index) => this.#buckets.get(now - SECONDS + index) ?? null);
    const totals = buckets.map((bucket) => (bucket ? KINDS.reduce((sum, kind) => sum + bucket[kind], 0) : 0));
    const most = Math.max(1, ...totals);
    paint(this.#rate, most, colour("dim"), (context, width, height) => {
      const step = width / SECONDS;
      buckets.forEach((bucket, index) => {
        let y = height;
        for (const kind of bucket ? KINDS : []) {
          const size = (bucket[kind] / most) * height;
          context.fillStyle = colour(kind);
          context.fillRect(index * step, y - size, Math.max(1, step - 0.2), size);
          y -= size;
        }
      });
    });
    const middle = buckets.map((bucket) => (bucket ? quantile(bucket.latencies, 0.5) : null));
    const slowest = buckets.map((bucket) => (bucket ? quantile(bucket.latencies, 1) : null));
    const longest = Math.max(1, ...slowest.filter((value) => value !== null));
    paint(this.#latency, longest, colour("dim"), (context, width, height) => {
      for (const [values, name, size] of [[slowest, "warning", 2], [middle, "info", 2.5]]) {
        context.fillStyle = colour(name);
        values.forEach((value, index) => {
          if (value !== null) context.fillRect((index * width) / SECONDS - size / 2, height - (value / longest) * (height - size) - size / 2, size, size);
        });
      }
    });
    const { rate, p50, p99 } = this.recent();
    this.#rate.setAttribute("aria-label", `now ${rate.toFixed(1)} events a second; at most ${most} in the last five minutes`);
    this.#latency.setAttribute("aria-label", p50 === null ? "no live events in the last ten seconds" : `median ${p50.toFixed(1)} ms, 99th percentile ${p99.toFixed(1)} ms`);
  }
}

function quantile(values, share) {
  if (!values.length) return null;
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

function paint(canvas, most, textColour, draw) {
  const ratio = window.devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  if (!width) return;
  if (canvas.width !== Math.round(width * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  context.save();
  context.translate(0, 14);
  draw(context, width, height - 15);
  context.restore();
  context.fillStyle = textColour;
  context.font = "11px system-ui, sans-serif";
  context.fillText(most >= 10 ? Math.round(most).toLocaleString("en") : most.toFixed(1), 0, 10);
  context.fillRect(0, height - 1, width, 1);
}
