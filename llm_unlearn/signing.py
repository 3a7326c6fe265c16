"""Signed statements: in-toto statements (v1) in DSSE envelopes, under an Ed25519 key.

The envelope is what other verifiers read (securesystemslib, in-toto, cosign). Ours asks for more: the
file must be the one canonical serialisation of its envelope, so that no byte of it, be it white
space or the spare bits of base64, can be changed without being seen.
"""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_unlearn import files
from llm_unlearn.data.records import canonical
from llm_unlearn.errors import RunError, UserError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PRIVATE_NAME, PUBLIC_NAME = "signing.key", "signing.pub"


class SignatureError(RunError):
    """A statement that is not what its signer signed; the message says why."""


def statement(
    predicate_type: str, subject: Mapping[str, str], predicate: Mapping[str, Any]
) -> dict[str, Any]:
    """An in-toto statement about files.

    Args:
        subject: SHA-256 of every file that it speaks of, by name.
    """
    return {
        "_type": STATEMENT_TYPE,
        "subject": [
            {"name": name, "digest": {"sha256": subject[name]}} for name in sorted(subject)
        ],
        "predicateType": predicate_type,
        "predicate": dict(predicate),
    }


class Signer:
    """An Ed25519 key that signs. The private half is a PKCS#8 PEM file of mode 0600."""

    def __init__(self, private: "Ed25519PrivateKey"):
        self._private = private

    @classmethod
    def of(cls, directory: Path) -> "Signer":
        """The key in a directory; made there, with its public half beside it, if there is none."""
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        path = directory / PRIVATE_NAME
        if not path.exists():
            pem = Ed25519PrivateKey.generate().private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            files.write_bytes(path, pem)
        signer = cls.open(path)
        public = directory / PUBLIC_NAME
        if not public.exists():
            files.write_bytes(public, signer.public.pem.encode(), mode=0o644)
        return signer

    @classmethod
    def open(cls, path: Path) -> "Signer":
        """A private key from a file.

        Raises:
            UserError: it cannot be read, or is not an Ed25519 key without a password.
        """
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            private = load_pem_private_key(path.read_bytes(), password=None)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"cannot read a signing key from {path}: {error}") from None
        if not isinstance(private, Ed25519PrivateKey):
            raise UserError(
                f"{path} holds no Ed25519 key: make one with `openssl genpkey -algorithm ed25519`"
            )
        return cls(private)

    @cached_property
    def public(self) -> "PublicKey":
        return PublicKey(self._private.public_key())

    def sign(self, said: Mapping[str, Any]) -> bytes:
        """A statement as a signed file."""
        from securesystemslib.dsse import Envelope
        from securesystemslib.signer import CryptoSigner

        envelope = Envelope(canonical(said), PAYLOAD_TYPE, {})
        envelope.sign(CryptoSigner(self._private))
        return _to_bytes(envelope.to_dict())


class PublicKey:
    """The half that verifies."""

    def __init__(self, public: "Ed25519PublicKey"):
        from securesystemslib.signer import SSlibKey

        self._public = public
        self._key = SSlibKey.from_crypto(public)

    @classmethod
    def open(cls, path: Path) -> "PublicKey":
        """A public key from a PEM file.

        Raises:
            UserError: it cannot be read, or is no Ed25519 key.
        """
        try:
            return cls.from_pem(path.read_bytes())
        except OSError as error:
            raise UserError(f"cannot read a public key from {path}: {error.strerror}") from None
        except ValueError as error:
            raise UserError(f"{path} is no public key: {error}") from None

    @classmethod
    def from_pem(cls, pem: bytes) -> "PublicKey":
        """Raises ValueError for anything but an Ed25519 public key."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key

        loaded = load_pem_public_key(pem)
        if not isinstance(loaded, Ed25519PublicKey):
            raise ValueError("not an Ed25519 key")
        return cls(loaded)

    @property
    def pem(self) -> str:
        from cryptography.hazmat.primitives import serialization

        return self._public.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ).decode()

    @property
    def fingerprint(self) -> str:
        """What names the key in envelopes: 64 hexadecimal digits."""
        return self._key.keyid

    def read(self, signed: bytes) -> dict[str, Any]:
        """The statement of a signed file.

        Raises:
            SignatureError: the file was changed, or another key signed it.
        """
        from securesystemslib.exceptions import VerificationError

        envelope, said = unverified(signed)
        if set(envelope.signatures) != {self.fingerprint}:
            others = ", ".join(keyid[:16] for keyid in envelope.signatures) or "nobody"
            raise SignatureError(
                f"it was signed by {others}, not by the key {self.fingerprint[:16]}"
            )
        try:
            envelope.verify([self._key], threshold=1)
        except VerificationError:
            raise SignatureError(
                "the signature does not fit: what was signed was changed"
            ) from None
        return said


def unverified(signed: bytes) -> tuple[Any, dict[str, Any]]:
    """The envelope and the statement of a signed file, whoever signed it.

    Raises:
        SignatureError: it is no statement in an envelope, or not in its one canonical form.
    """
    from securesystemslib.dsse import Envelope

    try:
        parsed = json.loads(signed)
        envelope = Envelope.from_dict(parsed)
        said = json.loads(envelope.payload)
        is_canonical = (
            _to_bytes(envelope.to_dict()) == signed and canonical(said) == envelope.payload
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SignatureError(
            f"it is no signed statement ({type(error).__name__}: {error})"
        ) from None
    if not is_canonical:
        raise SignatureError("it is not byte for byte the file that was signed")
    if (
        not isinstance(said, dict)
        or said.get("_type") != STATEMENT_TYPE
        or envelope.payload_type != PAYLOAD_TYPE
    ):
        raise SignatureError("it is no in-toto statement")
    return envelope, said


def _to_bytes(envelope: Mapping[str, Any]) -> bytes:
    return canonical(envelope) + b"\n"
