"""The example of a proxy in front, as it stands in recipes/deploy, where nginx is installed."""

import asyncio
import json
import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path

import pytest
import trustme
from served import LIMIT_S, serving, write_checkpoint

EXAMPLE = Path(__file__).parents[2] / "recipes" / "deploy" / "nginx.conf"
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, old
    return text.replace(old, new)


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed here")
def test_the_example_works(tmp_path: Path):
    assert NGINX is not None
    cert, key, port = tmp_path / "cert.pem", tmp_path / "key.pem", free_port()
    authority, trusted = trustme.CA(), tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(trusted))
    served = authority.issue_cert("api.example")
    served.cert_chain_pems[0].write_to_path(str(cert))
    served.private_key_pem.write_to_path(str(key))
    flags = ("--forwarded-allow-ips", "127.0.0.1", "--allowed-hosts", "api.example")
    flags += ("--log-requests",)
    with serving(write_checkpoint(tmp_path), *flags, engine="--pause-ms 5") as (server, url):
        text = EXAMPLE.read_text()
        text = replaced(text, "server 127.0.0.1:8000;", f"server {url.removeprefix('http://')};")
        text = replaced(text, "listen 443 ssl;", f"listen 127.0.0.1:{port} ssl;")
        text = replaced(text, "/etc/ssl/api.example.pem", str(cert))
        text = replaced(text, "/etc/ssl/api.example.key", str(key))
        whole = f"daemon off; pid {tmp_path}/pid; error_log stderr warn; worker_processes 1;\n"
        whole += f"events {{}}\nhttp {{ access_log off; client_body_temp_path {tmp_path}/body;\n"
        for kind in ("proxy", "fastcgi", "uwsgi", "scgi"):
            whole += f"{kind}_temp_path {tmp_path}/{kind};\n"
        (tmp_path / "nginx.conf").write_text(f"{whole}{text}\n}}")
        command = [NGINX, "-p", str(tmp_path), "-e", "stderr", "-c", str(tmp_path / "nginx.conf")]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as nginx:
            try:
                asyncio.run(ask(port, trusted))
            finally:
                nginx.terminate()
        server.process.terminate()
        server.wait_for_end()
        # The address that nginx saw, not the one that the client claimed.
        asked = [line for line in server.log if "POST /v1/completions" in line]
        assert asked and all("127.0.0.1:" in line for line in asked)


async def ask(port: int, cert: Path) -> None:
    context = ssl.create_default_context(cafile=str(cert))

    async def send(path: str, body: object = None) -> tuple[int, list[bytes], list[float]]:
        begin = time.perf_counter()
        while True:
            try:
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", port, ssl=context, server_hostname="api.example"
                )
                break
            except ConnectionError:
                # nginx starts.
                assert time.perf_counter() - begin < LIMIT_S
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nhost: api.example\r\n"
        head += (
            "x-forwarded-for: 6.6.6.6\r\nconnection: close\r\ncontent-type: application/json\r\n"
        )
        writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        status = int((await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1])
        chunks, times = [], []
        while chunk := await reader.read(1 << 16):
            chunks.append(chunk)
            times.append(time.perf_counter())
        writer.close()
        return status, chunks, times

    assert (await send("/health"))[0] == 200
    for path in ("/metrics", "/config", "/debug/speculation", "/page/data"):
        assert (await send(path))[0] == 403
    body = {"prompt": [1, 2], "max_tokens": 100, "stream": True}
    status, chunks, times = await send("/v1/completions", body)
    assert status == 200 and b"[DONE]" in b"".join(chunks)
    # Not held back: 100 tokens take the engine 250 ms.
    assert len(chunks) > 10 and times[-1] - times[0] > 0.1
    large = {"prompt": "x" * (17 << 20)}
    assert (await send("/v1/completions", large))[0] == 413
