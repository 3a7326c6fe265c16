"""Timestamps of a real authority: openssl behind a loopback server."""

import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from llm_unlearn.errors import RunError, UserError
from llm_unlearn.timestamps import stamp, stamp_path, verify_stamp

pytest.importorskip("rfc3161_client")

CONFIGURATION = """
[tsa]
default_tsa = one
[one]
dir = .
serial = serial
signer_digest = sha256
default_policy = 1.2.3.4.1
digests = sha256
ess_cert_id_alg = sha256
"""


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """URL of a timestamp authority, and the certificate of its root."""
    folder = tmp_path_factory.mktemp("authority")
    (folder / "tsa.cnf").write_text(CONFIGURATION)
    (folder / "serial").write_text("01\n")
    (folder / "leaf.ext").write_text(
        "extendedKeyUsage=critical,timeStamping\nkeyUsage=critical,digitalSignature\n"
    )
    openssl(folder, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "root.key", "-out", "root.pem",
            "-subj", "/CN=root", "-days", "30")  # fmt: skip
    openssl(folder, "req", "-newkey", "rsa:2048", "-nodes", "-keyout", "leaf.key", "-out", "leaf.csr",
            "-subj", "/CN=tsa")  # fmt: skip
    openssl(folder, "x509", "-req", "-in", "leaf.csr", "-CA", "root.pem", "-CAkey", "root.key", "-CAcreateserial",
            "-out", "leaf.pem", "-days", "30", "-extfile", "leaf.ext")  # fmt: skip

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/broken":
                answer = b"not a timestamp"
            else:
                (folder / "query").write_bytes(body)
                openssl(folder, "ts", "-reply", "-config", "tsa.cnf", "-queryfile", "query", "-signer", "leaf.pem",
                        "-inkey", "leaf.key", "-out", "reply")  # fmt: skip
                answer = (folder / "reply").read_bytes()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder / "root.pem"
    server.shutdown()


def test_a_stamp_holds_for_its_file_only(authority: tuple[str, Path], tmp_path: Path) -> None:
    url, root = authority
    path = tmp_path / "certificate.json"
    path.write_bytes(b"said")
    assert verify_stamp(path, None, []) == []
    assert verify_stamp(path, root, []) == [f"{stamp_path(path)} is missing"]
    assert stamp(path, url) == stamp_path(path)
    notes: list[str] = []
    assert verify_stamp(path, root, notes) == [] and "UTC" in notes[0]
    openssl(
        tmp_path,
        "ts",
        "-verify",
        "-data",
        str(path),
        "-in",
        str(stamp_path(path)),
        "-CAfile",
        str(root),
    )
    assert verify_stamp(path, None, notes) == [] and "was not checked" in notes[-1]
    path.write_bytes(b"said otherwise")
    assert "does not hold" in verify_stamp(path, root, [])[0]


def test_a_changed_stamp_is_seen(authority: tuple[str, Path], tmp_path: Path) -> None:
    url, root = authority
    path = tmp_path / "certificate.json"
    path.write_bytes(b"said")
    stamp(path, url)
    whole = stamp_path(path).read_bytes()
    stamp_path(path).write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    assert verify_stamp(path, root, [])
    stamp_path(path).write_bytes(whole[:50])
    assert verify_stamp(path, root, [])


def test_an_authority_that_fails_is_one_line(authority: tuple[str, Path], tmp_path: Path) -> None:
    url, _ = authority
    path = tmp_path / "certificate.json"
    path.write_bytes(b"said")
    with pytest.raises(RunError, match="did not answer with a timestamp"):
        stamp(path, url + "/broken")
    with pytest.raises(RunError, match="cannot be asked"):
        stamp(path, "http://127.0.0.1:1")
    with pytest.raises(UserError, match="no http or https URL"):
        stamp(path, "file:///etc/passwd")
    with pytest.raises(UserError, match="cannot read"):
        stamp(tmp_path / "nothing", url)
    assert not stamp_path(path).exists()
