// A page that listens to Server-Sent Events as anybody would write it.
"use strict";

function listenToStream(source, say) {
  source.onopen = () => say({ opened: "" });
  source.onmessage = (event) => say({ text: event.data, id: event.lastEventId });
  for (const kind of ["welcome", "gap", "beat", "lag", "drain", "close"]) {
    source.addEventListener(kind, (event) => say({ kind, data: event.data, id: event.lastEventId }));
  }
  source.onerror = () => say({ error: `error, state ${source.readyState}` });
}
