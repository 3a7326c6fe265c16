"""Keys in HashiCorp Vault (or OpenBao): its key-value engine, version 2, through `hvac`.

    vault+https://HOST[:PORT]/MOUNT/PATH    each key is a secret at MOUNT: PATH/<run>/<key id>

The token comes from `VAULT_TOKEN` and is never stored; `VAULT_CACERT` and `VAULT_NAMESPACE` are
heeded. Destroying a key deletes the metadata and all versions of its secret, and asks again whether it is gone. The
token needs create and read on MOUNT/data/PATH/*, and list and delete on MOUNT/metadata/PATH/*.

Endpoints: https://developer.hashicorp.com/vault/api-docs/secret/kv/kv-v2
"""

import base64
import contextlib
import os
import secrets
from collections.abc import Collection, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from llm_unlearn.errors import UserError
from llm_unlearn.exact.key_stores import (
    ID_BYTES,
    KEY_BYTES,
    SERVICE_PREFIX,
    KeyMissing,
    KeysUnavailable,
)

if TYPE_CHECKING:
    import hvac

TIMEOUT_SECONDS = 10
LOOPBACK = ("localhost", "127.0.0.1", "::1")
FIELD = "key"


class KeyService:
    """Keys of one run as secrets of a key service.

    Raises:
        UserError: the address is none, or would send keys over the network in clear.
    """

    def __init__(self, address: str, identity: str):
        self.place = address
        parts = urlsplit(address.removeprefix(SERVICE_PREFIX))
        mount, _, path = parts.path.strip("/").partition("/")
        if (
            not (parts.hostname and mount and path)
            or parts.query
            or parts.fragment
            or "@" in parts.netloc
        ):
            raise UserError(
                f"--key_store {address!r} is not of the form vault+https://HOST/MOUNT/PATH"
            )
        if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOOPBACK):
            raise UserError(f"--key_store {address!r}: keys travel over https only")
        self._url = f"{parts.scheme}://{parts.netloc}"
        self._mount = mount
        self._folder = f"{path}/{identity}"
        self._known: dict[
            bytes, bytes
        ] = {}  # a run reads a key several times; one request is enough

    @cached_property
    def _client(self) -> "hvac.Client":
        try:
            import hvac
        except ImportError:
            raise UserError(
                f"{self.place} needs the client of the key service: pip install 'llm-unlearn[vault]'"
            ) from None
        token = os.environ.get("VAULT_TOKEN")
        if not token:
            raise KeysUnavailable(f"set VAULT_TOKEN: the keys are in {self.place}")
        namespace = os.environ.get("VAULT_NAMESPACE")
        return hvac.Client(self._url, token, timeout=TIMEOUT_SECONDS, namespace=namespace)

    @property
    def _secrets(self) -> Any:
        return self._client.secrets.kv.v2

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """Whatever the service answers instead of what was asked for, in one line."""
        client = self._client
        from hvac import exceptions
        from requests import RequestException

        try:
            yield
        except (exceptions.Forbidden, exceptions.Unauthorized):
            raise KeysUnavailable(
                f"{self.place} refuses the token in VAULT_TOKEN: it needs create and read on "
                f"{self._mount}/data/{self._folder}/*, list and delete on {self._mount}/metadata/{self._folder}/*"
            ) from None
        except (exceptions.VaultError, RequestException) as error:
            answered = error.args[0] if isinstance(error, exceptions.VaultError) else None
            reason = (str(answered or "") or type(error).__name__).splitlines()[0][:200]
            raise KeysUnavailable(
                f"the key service at {client.url} cannot be used ({reason}); "
                "what was acknowledged is carried out by the next command: try again when it answers"
            ) from None
        except (KeyError, TypeError, ValueError):
            raise KeysUnavailable(
                f"{self.place} gives answers that are not a key service's"
            ) from None

    def prepare(self) -> None:
        """Nothing to make; but a run is not started where no key could be kept."""
        made = self.create(1)
        self.destroy([key_id for key_id, _ in made])

    def abandon(self) -> None:
        self.destroy(self.ids())

    def create(self, count: int) -> list[tuple[bytes, bytes]]:
        made = [
            (secrets.token_bytes(ID_BYTES), secrets.token_bytes(KEY_BYTES)) for _ in range(count)
        ]
        for key_id, key in made:
            with self._asking():
                answer = self._secrets.create_or_update_secret(
                    self._path(key_id),
                    {FIELD: base64.b64encode(key).decode()},
                    cas=0,  # never over another
                    mount_point=self._mount,
                )
                if answer["data"]["version"] != 1:
                    raise ValueError("it was not kept")
        self._known.update(made)
        return made

    def key(self, key_id: bytes) -> bytes:
        if key_id not in self._known:
            with self._asking(), self._missing_is(KeyMissing(f"its key is not in {self.place}")):
                answer = self._secrets.read_secret_version(
                    self._path(key_id), mount_point=self._mount, raise_on_deleted_version=True
                )
                key = base64.b64decode(answer["data"]["data"][FIELD])
                if len(key) != KEY_BYTES:
                    raise ValueError("not a key of ours")
                self._known[key_id] = key
        return self._known[key_id]

    def ids(self) -> set[bytes]:
        with self._asking(), contextlib.suppress(KeyMissing), self._missing_is(KeyMissing()):
            answer = self._secrets.list_secrets(self._folder, mount_point=self._mount)
            return {bytes.fromhex(name) for name in answer["data"]["keys"]}
        return set()

    def destroy(self, ids: Collection[bytes]) -> None:
        for key_id in ids:
            self._known.pop(key_id, None)
            with self._asking():
                self._secrets.delete_metadata_and_all_versions(
                    self._path(key_id), mount_point=self._mount
                )
        if ids and (left := self.ids().intersection(ids)):
            raise KeysUnavailable(
                f"{len(left)} keys are still in {self.place} after their deletion: is "
                f"{self._mount!r} a key-value engine of version 2?"
            )

    def problems(self) -> list[str]:
        return []

    def _path(self, key_id: bytes) -> str:
        return f"{self._folder}/{key_id.hex()}"

    @contextlib.contextmanager
    def _missing_is(self, missing: KeyMissing) -> Iterator[None]:
        """An answer that says that nothing is there; one that names errors is about the mount."""
        from hvac import exceptions

        try:
            yield
        except exceptions.InvalidPath as error:
            if error.errors:
                raise
            raise missing from None
