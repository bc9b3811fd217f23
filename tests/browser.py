"""A headless chromium, driven by its own protocol: opened on a page, asked what is on it, clicked, photographed."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import aiohttp

# Waits in the page until an expression is true, and gives its value.
_WAIT = """new Promise((done, failed) => {
    const end = Date.now() + 60000;
    const look = () => {
        const found = (() => { try { return EXPRESSION } catch (error) { return null } })();
        if (found) done(found);
        else if (Date.now() > end) failed(new Error('not in a minute'));
        else setTimeout(look, 50);
    };
    look();
})"""


class Browser:
    """One page. `requests` are the addresses that it asked for."""

    def __init__(self, command: str, folder: Path):
        self.process = subprocess.Popen(
            [command, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder}",
             "--window-size=1440,1000", "about:blank"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.requests: list[str] = []
        for line in self.process.stderr:
            if found := re.search(r"DevTools listening on ws://([^/]+)/", line):
                self.address = found[1]
                break

    def close(self) -> None:
        self.process.terminate()
        self.process.communicate()

    def visit(self, address: str, steps: list[str], photograph: Path | None = None) -> list[Any]:
        """Opens an address and waits, one after another, until each JavaScript expression is true; their values."""
        return asyncio.run(self._visit(address, steps, photograph))

    async def _visit(self, address: str, steps: list[str], photograph: Path | None) -> list[Any]:
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://{self.address}/json/list") as answer:
                page = next(row for row in await answer.json(content_type=None) if row["type"] == "page")
            async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as line:
                self._line, self._number = line, 0
                await self._send("Network.enable")
                await self._send("Page.enable")
                await self._send("Page.navigate", url=address)
                found = [await self._value(step) for step in steps]
                if photograph is not None:
                    shot = await self._send("Page.captureScreenshot", captureBeyondViewport=True)
                    photograph.write_bytes(base64.b64decode(shot["data"]))
                return found

    async def _value(self, expression: str) -> Any:
        told = await self._send("Runtime.evaluate", expression=_WAIT.replace("EXPRESSION", f"({expression})"),
                                awaitPromise=True, returnByValue=True)  # fmt: skip
        assert "exceptionDetails" not in told, f"{expression}: {told['exceptionDetails']}"
        return told["result"].get("value")

    async def _send(self, method: str, **given: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        await self._line.send_json({"id": number, "method": method, "params": given})
        async for message in self._line:
            told = json.loads(message.data)
            if told.get("method") == "Network.requestWillBeSent":
                self.requests.append(told["params"]["request"]["url"])
            if told.get("id") == number:
                assert "error" not in told, told["error"]
                return told["result"]
        raise AssertionError("the browser has gone")
