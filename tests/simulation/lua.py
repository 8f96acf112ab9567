"""The scripts of Redis: Lua 5.1 with `redis.call`, as Redis 7 runs it. Knows no script, and no key."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from lupa.lua51 import LuaRuntime, lua_type

from tests.simulation.memory import Failure, Status

Call = Callable[[list[bytes]], Any]
"""Runs a command; a reply is bytes, int, None, a list of these, a Status or a Failure."""

_PRELUDE = """
local dispatch = ...
redis = {
  call = function(...)
    local reply = dispatch(...)
    if type(reply) == 'table' and reply.err then error(reply, 0) end
    return reply
  end,
  pcall = function(...) return dispatch(...) end,
  error_reply = function(text) return {err = text} end,
  status_reply = function(text) return {ok = text} end,
  replicate_commands = function() return true end,
  setresp = function() end,
  log = function() end,
}
os, io, require, dofile, loadfile, package, python = nil, nil, nil, nil, nil, nil, nil
KEYS, ARGV = {}, {}
setmetatable(_G, {
  __newindex = function(_, name) error("Script attempted to create global variable '" .. name .. "'", 2) end,
})
return function(script, keys, arguments)
  KEYS, ARGV = keys, arguments
  return pcall(script)
end
"""


class Scripts:
    """Runs scripts. Each is compiled once, in one Lua for all."""

    def __init__(self) -> None:
        self._lua = LuaRuntime(encoding=None, unpack_returned_tuples=True, register_eval=False)
        self._call: Call | None = None
        compiled = self._lua.execute(b"return function(...) " + _PRELUDE.encode() + b" end")
        self._run = compiled(self._dispatch)
        self._compiled: dict[str, Any] = {}

    def load(self, text: bytes) -> str:
        """The SHA-1 of a script, which can be run from now on.

        Raises:
            ValueError: It is no Lua.
        """
        sha = hashlib.sha1(text).hexdigest()
        if sha not in self._compiled:
            try:
                self._compiled[sha] = self._lua.execute(b"return function() " + text + b"\nend")
            except Exception as error:
                raise ValueError(str(error)) from None
        return sha

    def run(self, sha: str, keys: Sequence[bytes], arguments: Sequence[bytes], call: Call) -> Any:
        """The reply of a script; `call` runs its commands."""
        before, self._call = self._call, call
        try:
            table = self._lua.table_from
            sound, result = self._run(self._compiled[sha], table(list(keys)), table(list(arguments)))
        finally:
            self._call = before
        if sound:
            return _to_reply(result)
        if lua_type(result) == "table" and result[b"err"] is not None:
            return Failure(result[b"err"].decode("utf-8", "replace"))
        said = result.decode("utf-8", "replace") if isinstance(result, bytes) else str(result)
        return Failure(f"ERR {said} script: {sha}, on @user_script:1.")

    def _dispatch(self, *words: Any) -> Any:
        assert self._call is not None
        if not words or not all(isinstance(word, bytes | int | float) for word in words):
            return self._table({b"err": b"ERR Lua redis lib command arguments must be strings or integers"})
        return self._to_lua(self._call([_word(word) for word in words]))

    def _to_lua(self, reply: Any) -> Any:
        if reply is None:
            return False
        if isinstance(reply, Failure):
            return self._table({b"err": str(reply).encode()})
        if isinstance(reply, Status):
            return self._table({b"ok": str(reply).encode()})
        if isinstance(reply, list):
            return self._lua.table_from([self._to_lua(each) for each in reply])
        return reply

    def _table(self, items: dict[bytes, bytes]) -> Any:
        return self._lua.table_from(items)


def _word(word: bytes | int | float) -> bytes:
    if isinstance(word, bytes):
        return word
    return b"%.17g" % word


def _to_reply(value: Any) -> Any:
    if value is None or value is False:
        return None
    if value is True:
        return 1
    if isinstance(value, bytes):
        return value
    if isinstance(value, int | float):
        return int(value)
    if lua_type(value) != "table":
        return None
    if (error := value[b"err"]) is not None:
        return Failure(error.decode("utf-8", "replace"))
    if (status := value[b"ok"]) is not None:
        return Status(status.decode("utf-8", "replace"))
    replies = []
    for index in range(1, len(value) + 1):
        if (each := value[index]) is None:
            break
        replies.append(_to_reply(each))
    return replies
