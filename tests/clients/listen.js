// A subscriber as anybody would write it, for whatever has the interface of the browsers' WebSocket.
"use strict";

function listen(socket, say) {
  socket.onopen = () => say({ opened: socket.protocol, extensions: socket.extensions });
  socket.onmessage = (event) => say({ text: event.data });
  socket.onerror = (event) => say({ error: event.message || "error" });
  socket.onclose = (event) => say({ closed: event.code, reason: event.reason });
}

// In node: `node listen.js URL OPTIONS`, with the package `ws` or with node's own WebSocket; one line per happening.
if (typeof process !== "undefined") {
  const { own, protocols, headers } = JSON.parse(process.argv[3]);
  const socket = own
    ? new WebSocket(process.argv[2], protocols)
    : new (require("ws"))(process.argv[2], protocols, { headers });
  listen(socket, (happening) => console.log(JSON.stringify(happening)));
}
