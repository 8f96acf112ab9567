// What the hub says of itself: /health/ready and /stats, asked every two seconds while somebody can see it.

const EVERY_MS = 2_000;

export class HubStatus {
  #token;
  #tell;
  #timer = null;

  /** `token` is called before each question; `tell` gets { ready, stats, refused } after each round. */
  constructor(token, tell) {
    this.#token = token;
    this.#tell = tell;
    document.addEventListener("visibilitychange", () => this.#round());
    this.#round();
  }

  async #round() {
    clearTimeout(this.#timer);
    if (document.hidden) return;
    const [ready, stats] = await Promise.all([this.#ask("/health/ready"), this.#ask("/stats")]);
    this.#tell({ ready: ready.body, stats: stats.status === 200 ? stats.body : null, status: stats.status });
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#round(), EVERY_MS);
  }

  async #ask(path) {
    const token = this.#token();
    try {
      const headers = token ? { Authorization: `Bearer ${token}` } : {};
      const response = await fetch(path, { headers, cache: "no-store", signal: AbortSignal.timeout(EVERY_MS * 2) });
      return { status: response.status, body: await response.json() };
    } catch {
      return { status: 0, body: null };
    }
  }
}
