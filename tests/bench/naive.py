"""The hub one writes first: Sanic's own WebSocket route, and `await ws.send` per client in a loop.

Correct while everybody reads, and the reference for what the product has to beat. It takes its
address from the same environment variables as the product.
"""

from __future__ import annotations

import os
from typing import Any

import redis.asyncio
from sanic import Request, Sanic, Websocket, response
from websockets.exceptions import ConnectionClosed

CHANNEL = "events.critical"

app = Sanic("naive-hub")
app.config.WEBSOCKET_PING_INTERVAL = int(os.environ.get("BROADCASTER_HUB__PING_INTERVAL_S", "20"))
clients: set[Websocket] = set()


async def subscribe(request: Request, ws: Websocket) -> None:
    clients.add(ws)
    try:
        async for _ in ws:
            pass
    finally:
        clients.discard(ws)


app.add_websocket_route(subscribe, "/ws")


@app.get("/health/ready")
async def ready(request: Request) -> response.HTTPResponse:
    return response.empty(status=200 if getattr(app.ctx, "subscribed", False) else 503)


@app.after_server_start
async def start(app: Sanic[Any, Any]) -> None:
    app.add_task(broadcast(), name="broadcast")  # named, so that Sanic holds the task


async def broadcast() -> None:
    pubsub = redis.asyncio.Redis.from_url(os.environ["BROADCASTER_REDIS__URL"]).pubsub()
    await pubsub.subscribe(CHANNEL)
    async for message in pubsub.listen():
        if message["type"] == "subscribe":
            app.ctx.subscribed = True
            continue
        text = message["data"].decode()
        for client in list(clients):
            try:
                await client.send(text)
            except ConnectionClosed:
                clients.discard(client)


if __name__ == "__main__":
    app.run(
        host=os.environ["BROADCASTER_HUB__HOST"],
        port=int(os.environ["BROADCASTER_HUB__PORT"]),
        backlog=4096,
        single_process=True,
        access_log=False,
        motd=False,
    )
