// What leaves the page: links, commands for a shell, files.

/** A text as one word of a POSIX shell. */
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** The command that shows in a terminal what the page shows. */
export function curlOf(query, needsToken) {
  const token = needsToken ? ' -H "Authorization: Bearer $TOKEN"' : "";
  return `curl -N -H 'Accept: text/event-stream'${token} ${quoted(`${location.origin}/sse?${query}`)}`;
}

const COLUMNS = ["published", "severity", "type", "source", "channel", "position", "event_id", "data"];

/** A cell as a spreadsheet takes it for a text, whatever it begins with. */
function cell(value) {
  const text = String(value ?? "");
  const safe = /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
  return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

export function csvOf(items) {
  const lines = items.map((item) => {
    const published = new Date(item.publishedAt);
    const time = Number.isNaN(published.getTime()) ? item.publishedAt : published.toISOString();
    const data = JSON.stringify(JSON.parse(item.json).data ?? {});
    return [time, item.severity, item.type, item.source, item.channel, item.position, item.id, data].map(cell).join(",");
  });
  return `${[COLUMNS.join(","), ...lines].join("\r\n")}\r\n`;
}

export const ndjsonOf = (items) => items.map(({ json }) => `${json}\n`).join("");

export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = Object.assign(document.createElement("a"), { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Copy a text; without the right to (http:// to another machine) it is selected for who copies by hand. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = Object.assign(document.createElement("textarea"), { value: text });
    (document.querySelector("dialog[open]") ?? document.body).append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}
