"""A ComfyUI server in its own process, driven over HTTP and the websocket like the browser does."""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid

START_TIMEOUT = 180
PORT_ATTEMPTS = 3
FINISHED = ("execution_success", "execution_error", "execution_interrupted")


class PortTaken(AssertionError):
    """Another process took the port between the look for a free one and the server's start."""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def describe_failure(messages):
    """The readable part of a prompt's failure, out of its (event, data) messages; None when it has not failed."""
    for event, data in messages:
        if event == "execution_interrupted":
            return f"interrupted at node {data['node_id']} ({data['node_type']})"
        if event == "execution_error":
            where = f"node {data['node_id']} ({data['node_type']}): {data['exception_type']}: {data['exception_message']}"
            return "\n".join([where.strip(), "".join(data["traceback"])])
    return None


def decode_binary(message):
    """(event, data) of a binary websocket message: a preview image or a text for a node."""
    kind = int.from_bytes(message[:4], "big")
    if kind == 3:
        end = 8 + int.from_bytes(message[4:8], "big")
        return "text", {"node": message[8:end].decode(), "text": message[end:].decode()}
    start = 8 + int.from_bytes(message[4:8], "big") if kind == 4 else 8
    return "preview", {"image": message[start:]}


class ComfyUIServer:
    """Runs main.py on the CPU in `base`; use it as a context manager, or through the fixture `server`."""

    def __init__(self, comfyui, base, extra_args=()):
        self.comfyui = comfyui
        self.base = base
        self.extra_args = extra_args
        self.process = None
        self._choose_port()

    def _choose_port(self):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = self.base / f"server-{self.port}.log"
        self.command = [
            sys.executable, str(self.comfyui / "main.py"), "--cpu", "--listen", "127.0.0.1", "--port", str(self.port),
            "--disable-api-nodes", "--preview-method", "latent2rgb", "--base-directory", str(self.base),
            "--database-url", f"sqlite:///{self.base / f'comfyui-{self.port}.db'}", *self.extra_args,
        ]

    def __enter__(self):
        for attempt in range(1, PORT_ATTEMPTS + 1):
            try:
                return self._start()
            except PortTaken:
                if attempt == PORT_ATTEMPTS:
                    raise
                self._choose_port()

    def _start(self):
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.comfyui, env=environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc_info):
        self.stop()

    def _wait_until_ready(self):
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                kind = PortTaken if f"Port {self.port} is already in use" in self.log() else AssertionError
                raise kind(f"ComfyUI ended with status {self.process.returncode}:\n{self.log()[-5000:]}")
            try:
                answer = self.get("/system_stats")
            except OSError:
                time.sleep(0.1)
                continue
            if str(self.base) not in answer["system"]["argv"]:
                raise PortTaken(f"the server on port {self.port} is another one: {answer['system']['argv']}")
            break
        else:
            raise AssertionError(f"ComfyUI did not answer within {START_TIMEOUT} s:\n{self.log()[-5000:]}")
        if re.search(r"\(IMPORT FAILED\)", self.log()):
            lines = [line for line in self.log().splitlines() if "[INFO]" not in line or "IMPORT FAILED" in line]
            raise AssertionError("\n".join(["a node pack failed to load:", *lines]))

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def log(self):
        """Everything the server has written to its console so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def rss(self):
        """Resident memory of the server process in bytes."""
        import psutil

        return psutil.Process(self.process.pid).memory_info().rss

    def get(self, path, **query):
        """GET a path; JSON is decoded, anything else comes back as bytes. Statuses above 400 raise urllib's HTTPError."""
        if query:
            path = f"{path}?{urllib.parse.urlencode(query)}"
        return self._request(urllib.request.Request(self.url + path))

    def post_json(self, path, body):
        """POST a JSON body to a path and return the decoded answer, None when it is empty."""
        headers = {"Content-Type": "application/json"}
        return self._request(urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)) or None

    @staticmethod
    def _request(request):
        with urllib.request.urlopen(request, timeout=60) as response:
            body = response.read()
            return json.loads(body) if response.headers.get_content_type() == "application/json" else body

    def object_info(self, class_id):
        """The schema of one node as the frontend receives it."""
        info = self.get(f"/object_info/{urllib.parse.quote(class_id)}")
        if class_id not in info:
            raise AssertionError(f"the server knows no node {class_id}")
        return info[class_id]

    def submit(self, prompt, client_id=None, extra_data=None):
        """Queue an API-format prompt and return its id; a prompt with any invalid node raises AssertionError."""
        more = {"client_id": client_id, "extra_data": extra_data}
        body = {"prompt": prompt} | {k: v for k, v in more.items() if v is not None}
        try:
            answer = self.post_json("/prompt", body)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"the prompt was refused: {_refusal(error.read())}") from None
        # An invalid branch is dropped without a failing status as long as another output can run.
        if answer["node_errors"]:
            self.cancel(answer["prompt_id"])
            raise AssertionError(f"the prompt was accepted only in part: {_refusal(answer)}")
        return answer["prompt_id"]

    def wait(self, prompt_id, timeout=120):
        """The history entry of a queued prompt once it is done; a failed or interrupted one raises AssertionError."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                failure = describe_failure(entry["status"]["messages"])
                assert failure is None, failure
                return entry
            if self.process.poll() is not None:
                raise AssertionError(f"ComfyUI ended with status {self.process.returncode}:\n{self.log()[-5000:]}")
            time.sleep(0.05)
        self.cancel(prompt_id)
        raise AssertionError(f"the prompt was not done after {timeout} s")

    def post(self, prompt, timeout=120, extra_data=None):
        """Run an API-format prompt to its end and return its history entry."""
        return self.wait(self.submit(prompt, extra_data=extra_data), timeout)

    def interrupt(self):
        """Stop the running prompt, as the cancel button does."""
        self.post_json("/interrupt", {})

    def cancel(self, prompt_id):
        """Take one prompt out of the queue, or stop it when it is the running one."""
        self.post_json("/queue", {"delete": [prompt_id]})
        self.post_json("/interrupt", {"prompt_id": prompt_id})

    def free(self):
        """Have the idle server unload its models and forget the cached outputs of nodes."""
        self.post_json("/free", {"unload_models": True, "free_memory": True})
        # Another thread does it and reports nothing; a prompt queued at once could still be answered from the cache.
        time.sleep(0.5)

    def images(self, entry, node_id):
        """The images that a saving or previewing node made, as one uint8 array [count, height, width, channels]."""
        import io

        import numpy as np
        from PIL import Image

        files = entry["outputs"][str(node_id)]["images"]
        parts = [self.get("/view", **{key: file[key] for key in ("filename", "subfolder", "type")}) for file in files]
        return np.stack([np.asarray(Image.open(io.BytesIO(part))) for part in parts])

    def follow(self, prompt):
        """A context manager that queues a prompt and follows its websocket events."""
        return FollowedPrompt(self, prompt)


class FollowedPrompt:
    """A prompt whose events can be waited for while it runs; `events` keeps all that were received."""

    def __init__(self, server, prompt):
        self.server = server
        self.prompt = prompt
        self.id = None
        self.events = []

    def __enter__(self):
        import aiohttp

        client_id = uuid.uuid4().hex
        self._loop = asyncio.new_event_loop()
        self._session = self._await(self._open_session(aiohttp))
        try:
            self._socket = self._await(self._session.ws_connect(f"{self.server.url}/ws?clientId={client_id}", max_msg_size=0))
            self.id = self.server.submit(self.prompt, client_id)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *exc_info):
        # What a test left running would delay the next one.
        if not any(event in FINISHED for event, _ in self.events):
            self.server.cancel(self.id)
        self._close()

    @staticmethod
    async def _open_session(aiohttp):
        return aiohttp.ClientSession()

    def _await(self, awaitable):
        return self._loop.run_until_complete(awaitable)

    def _close(self):
        self._await(self._session.close())
        self._loop.close()

    def receive(self, timeout=120):
        """The next event of this prompt as (name, data)."""
        import aiohttp

        deadline = time.monotonic() + timeout
        while True:
            try:
                message = self._await(asyncio.wait_for(self._socket.receive(), max(deadline - time.monotonic(), 0.001)))
            except (TimeoutError, asyncio.TimeoutError):
                raise AssertionError(f"no event within {timeout} s; the last ones: {self.events[-3:]}") from None
            if message.type is aiohttp.WSMsgType.BINARY:
                event = decode_binary(message.data)
            elif message.type is aiohttp.WSMsgType.TEXT:
                decoded = json.loads(message.data)
                event = decoded["type"], decoded.get("data", {})
            else:
                raise AssertionError(f"the server closed the websocket:\n{self.server.log()[-5000:]}")
            if event[1].get("prompt_id", self.id) == self.id:
                self.events.append(event)
                return event

    def wait_for(self, name, condition=None, timeout=120):
        """The data of the first event with this name that meets the condition; the prompt's end before it is a failure."""
        deadline = time.monotonic() + timeout
        while True:
            received, data = self.receive(max(deadline - time.monotonic(), 0.001))
            if received == name and (condition is None or condition(data)):
                return data
            if received in FINISHED:
                raise AssertionError(describe_failure([(received, data)]) or f"the prompt ended without {name}")

    def finish(self, timeout=120):
        """Wait for the end and return the history entry, as ComfyUIServer.post does."""
        self.wait_for("execution_success", timeout=timeout)
        return self.server.wait(self.id, timeout)


def _refusal(answer):
    if isinstance(answer, bytes):
        try:
            answer = json.loads(answer)
        except ValueError:
            return answer.decode(errors="replace")
    lines = []
    if answer.get("error"):
        lines.append(f"{answer['error'].get('message', '')} {answer['error'].get('details', '')}".strip())
    for node_id, node in (answer.get("node_errors") or {}).items():
        for error in node["errors"]:
            lines.append(f"node {node_id} ({node['class_type']}): {error['message']}: {error['details']}")
    return "\n".join(lines)
