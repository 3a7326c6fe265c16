"""Signed statements: other verifiers read them, and no byte can be changed."""

import base64
import json
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey

from llm_unlearn.errors import UserError
from llm_unlearn.signing import PAYLOAD_TYPE, PublicKey, SignatureError, Signer, statement

SAID = statement("https://example.org/v1", {"b": "1" * 64, "a": "0" * 64}, {"x": 1, "é": "ü"})


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return Signer.of(tmp_path_factory.mktemp("keys"))


def test_the_key_is_private_and_found_again(tmp_path: Path) -> None:
    made = Signer.of(tmp_path)
    assert (tmp_path / "signing.key").stat().st_mode & 0o777 == 0o600
    assert Signer.of(tmp_path).public.fingerprint == made.public.fingerprint
    public = PublicKey.open(tmp_path / "signing.pub")
    assert public.fingerprint == made.public.fingerprint
    assert public.read(made.sign(SAID)) == SAID
    (tmp_path / "signing.pub").unlink()  # what a crash can leave
    assert Signer.of(tmp_path) and (tmp_path / "signing.pub").read_text() == public.pem


def test_other_verifiers_read_it(signer: Signer) -> None:
    """By the library of the in-toto project, and by hand from the DSSE specification."""
    signed = json.loads(signer.sign(SAID))
    key = load_pem_public_key(signer.public.pem.encode())
    assert isinstance(key, Ed25519PublicKey)
    payload = base64.b64decode(signed["payload"], validate=True)
    assert json.loads(payload) == SAID and signed["payloadType"] == PAYLOAD_TYPE
    encoded = b"DSSEv1 %d %s %d %s" % (
        len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload,
    )  # fmt: skip
    key.verify(base64.b64decode(signed["signatures"][0]["sig"]), encoded)
    Envelope.from_dict(signed).verify([SSlibKey.from_crypto(key)], threshold=1)
    assert [entry["name"] for entry in SAID["subject"]] == ["a", "b"]


def test_every_change_of_one_byte_is_seen(signer: Signer) -> None:
    signed = signer.sign(SAID)
    public = signer.public
    for position in range(len(signed)):
        for value in {*range(32, 127), 0, 10, 128, 255, signed[position] ^ 1} - {signed[position]}:
            changed = signed[:position] + bytes([value]) + signed[position + 1 :]
            with pytest.raises(SignatureError):
                public.read(changed)


@pytest.mark.parametrize(
    "change",
    [
        lambda signed: signed + b"\n",
        lambda signed: signed[:-1],
        lambda signed: json.dumps(json.loads(signed)).encode(),
        lambda signed: signed.replace(b'"signatures":[', b'"signatures":[],"more":['),
        lambda _: b"",
        lambda _: b"[" * 100_000,
        lambda _: b"null",
        lambda _: b'{"payload":1,"payloadType":2,"signatures":3}',
        lambda _: b"\x80\x04",
    ],
)
def test_what_is_no_statement_is_refused_with_a_reason(signer: Signer, change) -> None:
    with pytest.raises(SignatureError, match=r"it is no|not byte for byte|nobody"):
        signer.public.read(change(signer.sign(SAID)))


def test_another_key_is_named(signer: Signer, tmp_path: Path) -> None:
    other = Signer.of(tmp_path)
    with pytest.raises(SignatureError, match=f"signed by {other.public.fingerprint[:16]}, not by"):
        signer.public.read(other.sign(SAID))
    forged = other.sign(SAID).replace(
        other.public.fingerprint.encode(), signer.public.fingerprint.encode()
    )
    with pytest.raises(SignatureError, match="the signature does not fit"):
        signer.public.read(forged)


def test_keys_of_other_kinds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rsa.pem"
    subprocess.run(["openssl", "genrsa", "-out", path, "2048"], check=True, capture_output=True)
    with pytest.raises(UserError, match="no Ed25519 key"):
        Signer.open(path)
    path.write_text("garbage")
    with pytest.raises(UserError, match="cannot read a signing key"):
        Signer.open(path)
    with pytest.raises(UserError, match="is no public key"):
        PublicKey.open(path)
    with pytest.raises(UserError, match="cannot read a public key"):
        PublicKey.open(tmp_path / "nothing")
