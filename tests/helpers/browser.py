"""A headless Chromium, controlled through the DevTools protocol: open a page, run JavaScript, take a screenshot."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import aiohttp

_COMMANDS = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell", "chrome-headless-shell")
CHROMIUM = next(filter(None, map(shutil.which, _COMMANDS)), None)

# Waits in the page until an expression is true and returns its value.
_WAIT = """new Promise((resolve, reject) => {
    const end = Date.now() + 60000;
    const poll = () => {
        const value = (() => { try { return EXPRESSION } catch (error) { return null } })();
        if (value) resolve(value);
        else if (Date.now() > end) reject(new Error('not true within a minute'));
        else setTimeout(poll, 50);
    };
    poll();
})"""


class Browser:
    """A browser with one page. `requests`: the addresses that the page requested."""

    def __init__(self, command: str, folder: Path):
        self.process = subprocess.Popen(
            [command, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder}",
             "--window-size=1440,1000", "about:blank"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            start_new_session=True,
        )  # fmt: skip
        self.requests: list[str] = []
        for line in self.process.stderr:
            if found := re.search(r"DevTools listening on ws://([^/]+)/", line):
                self.address = found[1]
                break

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # the whole group: the command may be a script that starts it
            os.killpg(self.process.pid, signal.SIGTERM)
        self.process.communicate()

    def visit(
        self, address: str, steps: list[str], screenshot: Path | None = None, *, width: int = 0, dark: bool = False
    ) -> list[Any]:
        """Open an address, wait for each JavaScript expression in turn to be true, and return their values.

        width: of the window in CSS pixels (default: the one it has). dark: prefer a dark page.
        """
        return asyncio.run(self._visit(address, steps, screenshot, width, dark))

    async def _visit(
        self, address: str, steps: list[str], screenshot: Path | None, width: int, dark: bool
    ) -> list[Any]:
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://{self.address}/json/list") as answer:
                page = next(row for row in await answer.json(content_type=None) if row["type"] == "page")
            async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                self._socket, self._number = socket, 0
                await self._send("Network.enable")
                await self._send("Page.enable")
                if width:
                    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
                    await self._send("Emulation.setDeviceMetricsOverride", **size)
                theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
                await self._send("Emulation.setEmulatedMedia", features=[theme])
                await self._send("Page.navigate", url=address)
                values = [await self._value(step) for step in steps]
                if screenshot is not None:
                    shot = await self._send("Page.captureScreenshot", captureBeyondViewport=True)
                    screenshot.write_bytes(base64.b64decode(shot["data"]))
                return values

    async def _value(self, expression: str) -> Any:
        script = _WAIT.replace("EXPRESSION", f"({expression})")
        result = await self._send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, f"{expression}: {result['exceptionDetails']}"
        return result["result"].get("value")

    async def _send(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        await self._socket.send_json({"id": number, "method": method, "params": params})
        async for message in self._socket:
            answer = json.loads(message.data)
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
            if answer.get("id") == number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
        raise AssertionError("The browser closed the connection.")
