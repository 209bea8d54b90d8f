"""The studio's page without a browser: who gets an answer, and what a page is told and may send."""

import asyncio
import json
import threading

import pytest

pytest.importorskip("tornado", reason="the studio needs tornado: pip install .[studio]")
pytest.importorskip("anywidget")

import comm
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest
from tornado.websocket import websocket_connect

from mlxdiff.widgets import Studio, server
from mlxdiff.widgets.worker import Worker
from tests import fakes


class Page:
    """What a browser would be."""

    def __init__(self, address: str, made: Studio):
        self.url, _, self.token = address.partition("?token=")
        self.cookie = f"mlxdiff-{self.url.rsplit(':', 1)[1].strip('/')}={self.token}"
        self.studio = made

    async def get(self, path: str = "", **headers) -> tuple[int, dict, bytes]:
        request = HTTPRequest(self.url + path, headers=headers, follow_redirects=False)
        try:
            answer = await AsyncHTTPClient().fetch(request)
        except HTTPClientError as e:
            answer = e.response
        return answer.code, dict(answer.headers), answer.body

    async def join(self, **headers):
        url = self.url.replace("http", "ws") + "wire"
        return await websocket_connect(HTTPRequest(url, headers={"Cookie": self.cookie} | headers))


async def told(socket, method: str, ident: str | None = None) -> tuple[dict, list[bytes]]:
    """The next message of this kind, of one widget."""
    while True:
        head = json.loads(await asyncio.wait_for(socket.read_message(), 30))
        parts = [await socket.read_message() for _ in range(head["buffers"])]
        if head["data"]["method"] == method and ident in (None, head["id"]):
            return head, parts


@pytest.fixture
def visit(tmp_path, monkeypatch):
    """visit(act) serves a studio while `act(page)` runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(comm, "create_comm", comm.create_comm)  # to be put back

    def visited(act) -> None:
        async def both() -> None:
            made, there = [], asyncio.Event()
            addresses: list[str] = []

            def make() -> Studio:
                made.append(Studio("fake", worker=Worker(fakes.load), steps=3))
                return made[0]

            def tell(address: str) -> None:
                addresses.append(address)
                there.set()

            serving = asyncio.create_task(server._serve(make, tell))
            await asyncio.wait_for(there.wait(), 30)
            try:
                await act(Page(addresses[0], made[0]))
            finally:
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)

        asyncio.run(both())

    return visited


def test_only_who_knows_the_token_gets_an_answer(visit):
    async def act(page: Page) -> None:
        port = page.url.rsplit(":", 1)[1].strip("/")
        for path, headers in (
            ("", {}),
            ("page.js", {}),
            ("?token=", {}),
            ("?token=" + 32 * "0", {}),
            ("", {"Cookie": page.cookie[:-1]}),
            ("", {"Cookie": page.cookie, "Host": f"elsewhere.example:{port}"}),  # a name that was made to lead here
        ):
            code, _, body = await page.get(path, **headers)
            assert (code, body) == (403, server._NOT_YOURS.encode()), path
        code, headers, _ = await page.get(f"?token={page.token}")
        assert (code, headers["Location"]) == (302, "/")
        assert "HttpOnly" in headers["Set-Cookie"]
        assert "SameSite=Lax" in headers["Set-Cookie"]
        for path in ("", "page.js", "page.css", "studio.js", "studio.css"):
            code, headers, body = await page.get(path, Cookie=page.cookie)
            assert code == 200
            assert body
            assert headers["Content-Security-Policy"] == server._POLICY
        for path in ("server.py", "nothing.js", "../pyproject.toml"):
            assert (await page.get(path, Cookie=page.cookie))[0] == 404

    visit(act)


def test_no_other_site_joins(visit):
    async def act(page: Page) -> None:
        for headers in ({"Origin": "http://elsewhere.example"}, {"Cookie": "a=b"}, {"Host": "elsewhere.example"}):
            with pytest.raises(HTTPClientError, match="403"):
                await page.join(**headers)

    visit(act)


def test_a_page_draws_and_a_second_one_sees_it(visit, tmp_path):
    async def act(page: Page) -> None:
        first = await page.join()
        head, _ = await told(first, "show")
        assert head["id"] == page.studio.model_id
        prompt, view = page.studio.controls.prompt.model_id, page.studio.view.model_id
        state = {"method": "update", "state": {"value": "a boat"}, "buffer_paths": []}
        await first.write_message(json.dumps({"id": prompt, "data": state, "buffers": 0}))
        ask = {"method": "custom", "content": {"do": "generate", "settings": {"steps": 4}}}
        await first.write_message(json.dumps({"id": view, "data": ask, "buffers": 0}))
        head, parts = await told(first, "custom", view)
        assert head["data"]["content"] == {"do": "frame", "title": "Preview of a boat"}
        assert parts[0][:2] == b"\xff\xd8"  # a JPEG
        while "Done" not in page.studio.status:
            await asyncio.sleep(0.02)
        (picture,) = page.studio.images
        assert (picture.request.prompt, picture.request.steps) == ("a boat", 4)
        second = await page.join()  # as after a reload
        seen = {}
        while True:
            head = json.loads(await second.read_message())
            parts = [await second.read_message() for _ in range(head["buffers"])]
            if head["data"]["method"] == "show":
                break
            seen[head["id"]] = head["data"], parts
        assert seen[prompt][0]["state"]["value"] == "a boat"
        data, parts = seen[view]
        assert [entry["title"] for entry in data["state"]["history"]] == [f"a boat, seed {picture.request.seed}"]
        assert picture.path.read_bytes() in parts
        # What one page types the other hears, and itself not again.
        state["state"]["value"] = "a fox"
        await second.write_message(json.dumps({"id": prompt, "data": state, "buffers": 0}))
        head, _ = await told(first, "echo_update", prompt)
        assert head["data"]["state"]["value"] == "a fox"

    visit(act)


def test_nonsense_from_a_page_ends_nothing(visit, capsys):
    async def act(page: Page) -> None:
        socket = await page.join()
        view = page.studio.view.model_id
        for message in ({"id": "gone", "data": {"method": "custom"}}, {"id": view, "data": {"method": "custom"}}):
            await socket.write_message(json.dumps(message | {"buffers": 0}))
        ask = {"method": "custom", "content": {"do": "view", "key": 99}}
        await socket.write_message(json.dumps({"id": view, "data": ask, "buffers": 0}))
        while page.studio.status != "KeyError: 99":
            await asyncio.sleep(0.02)
        capsys.readouterr()
        good = {"id": view, "data": {"method": "custom"}, "buffers": 0}
        wrong = ({"id": 3}, {"id": [view]}, {"data": None}, {"data": []}, {"buffers": -1}, {"buffers": 10**9})
        wrong = ["[]", "3", "{}", *(json.dumps(good | w) for w in (*wrong, {"buffers": 0.0}, {"buffers": True}))]
        for nonsense in ("not json", *wrong, "[" * 100_000, "9" * 5000, b"stray"):
            (lone := await page.join())
            await lone.write_message(nonsense, binary=isinstance(nonsense, bytes))
            while await lone.read_message() is not None:  # until it is closed
                pass
            assert lone.close_code == 1008, nonsense[:80]
        assert capsys.readouterr().err == ""
        assert (await page.get("", Cookie=page.cookie))[0] == 200
        assert threading.current_thread() is threading.main_thread()

    visit(act)
    capsys.readouterr()
