"""An S3 server with faults: passes requests on to a real one, and spoils those that a rule names."""

import asyncio
import re
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import ClientSession, ClientTimeout, DummyCookieJar, web
from yarl import URL

Pass = Callable[[], Awaitable[web.Response]]
Fault = Callable[[web.Request, Pass], Awaitable[web.StreamResponse]]

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


@dataclass
class Rule:
    """Spoil requests of `method` whose path matches `path`: the first `skip` pass, then `times` are spoilt."""

    method: str
    path: str
    fault: Fault
    times: int = 1_000_000
    skip: int = 0

    def applies(self, request: web.Request) -> bool:
        """Whether this request is one to spoil; counts it."""
        if request.method != self.method or not re.search(self.path, request.rel_url.raw_path):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return self.times >= 0


class FaultProxy:
    """Listens on loopback until closed. `rules` may be changed at any time; the first that applies is used."""

    def __init__(self, upstream: str) -> None:
        self.rules: list[Rule] = []
        self.requests: list[tuple[str, str]] = []
        self.bodies: list[tuple[str, str, int]] = []
        """Method, path and bytes of every body that went back from the store."""
        self.ranges: list[tuple[str, int, int]] = []
        """Path, first byte and the one after the last of every part of an object that went back."""
        self.url = ""
        self._upstream = upstream
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(20)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _start(self) -> None:
        self._session = ClientSession(
            auto_decompress=False, timeout=ClientTimeout(total=60), cookie_jar=DummyCookieJar()
        )
        self._runner = web.AppRunner(
            web.Application(client_max_size=1 << 30), access_log=None, handle_signals=False, shutdown_timeout=0.1
        )
        self._runner.app.router.add_route("*", "/{path:.*}", self._handle)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.rel_url.raw_path_qs))
        body = await request.read()

        async def pass_on() -> web.Response:
            # The Host header is signed, so the store is shown the one that the client signed: ours.
            url = URL(self._upstream + request.rel_url.raw_path_qs, encoded=True)
            async with self._session.request(
                request.method, url, headers=request.headers, data=body, allow_redirects=False
            ) as answer:
                headers = {name: value for name, value in answer.headers.items() if name.lower() not in HOP_BY_HOP}
                if request.method == "HEAD":
                    headers["Content-Length"] = answer.headers.get("Content-Length", "0")
                headers["Date"] = answer.headers.get("Date", "")
                content = await answer.read()
                self.bodies.append((request.method, request.rel_url.raw_path_qs, len(content)))
                if answer.status == 206:
                    start = int(answer.headers["Content-Range"].removeprefix("bytes ").partition("-")[0])
                    self.ranges.append((request.rel_url.raw_path, start, start + len(content)))
                return web.Response(status=answer.status, headers=headers, body=content)

        for rule in self.rules:
            if rule.applies(request):
                return await rule.fault(request, pass_on)
        return await pass_on()

    def bytes_of(self, method: str, path: str) -> int:
        """Bytes of the bodies that went back for requests whose path matches."""
        return sum(size for asked, where, size in self.bodies if asked == method and re.search(path, where))

    def close(self) -> None:
        """Stop listening."""

        async def end() -> None:
            await self._session.close()
            await self._runner.cleanup()

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)


# ------------------------------------------------------------------------------------------------ faults


def answer(status: int, code: str) -> Fault:
    """The store says no, and why."""

    async def fault(request: web.Request, pass_on: Pass) -> web.StreamResponse:
        body = "" if request.method == "HEAD" else f"<Error><Code>{code}</Code><Message>as told</Message></Error>"
        return web.Response(status=status, text=body, content_type="application/xml")

    return fault


async def reset(request: web.Request, pass_on: Pass) -> web.StreamResponse:
    """The connection breaks before an answer."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def lose_answer(request: web.Request, pass_on: Pass) -> web.StreamResponse:
    """The store does as it was told, and the answer never arrives."""
    await pass_on()
    return await reset(request, pass_on)


async def truncate(request: web.Request, pass_on: Pass) -> web.StreamResponse:
    """The connection closes in mid-body: Content-Length promised more."""
    return await _begin_body(request, await pass_on())


async def stall(request: web.Request, pass_on: Pass) -> web.StreamResponse:
    """Half of a body, then silence."""
    response = await _begin_body(request, await pass_on(), close=False)
    await asyncio.sleep(30)
    return response


async def drip(request: web.Request, pass_on: Pass) -> web.StreamResponse:
    """A body that moves, so slowly that it is no use: never silent for long."""
    whole = await pass_on()
    response = await _begin_body(request, whole, close=False)
    for _ in range(300):
        await asyncio.sleep(0.1)
        await response.write(b"x")
    return response


async def flip(request: web.Request, pass_on: Pass) -> web.StreamResponse:
    """One byte of a body is another one."""
    whole = await pass_on()
    assert isinstance(whole.body, bytes)
    body = bytearray(whole.body)
    body[len(body) // 2] ^= 1
    headers = {name: value for name, value in whole.headers.items() if name != "Content-Length"}
    return web.Response(status=whole.status, headers=headers, body=bytes(body))


def after(action: Callable[[], object]) -> Fault:
    """Something else happens in the store just before the request arrives."""

    async def fault(request: web.Request, pass_on: Pass) -> web.StreamResponse:
        await asyncio.get_running_loop().run_in_executor(None, action)
        return await pass_on()

    return fault


async def _begin_body(request: web.Request, whole: web.Response, *, close: bool = True) -> web.StreamResponse:
    assert isinstance(whole.body, bytes)
    assert request.transport is not None
    headers = {name: value for name, value in whole.headers.items() if name != "Content-Length"}
    response = web.StreamResponse(status=whole.status, headers=headers)
    response.content_length = len(whole.body)
    await response.prepare(request)
    await response.write(whole.body[: len(whole.body) // 2])
    if close:
        request.transport.close()
    return response
