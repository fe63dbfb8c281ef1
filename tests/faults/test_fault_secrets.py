"""Passwords in addresses: refused, since logs and config.json would repeat them."""

from pathlib import Path

import pytest

from distributed_inr.data import storage
from distributed_inr.data.cache import Cache
from distributed_inr.data.shards import load_index


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(str(tmp_path / "cache"), gib=1.0)


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:pass-word@bucket/set",
        "s3://key:pa/ss-word@bucket/set/x.tar",
        "https://user:pass-word@host/set",
        "https://user:pass-word@host:8080/{000000..000003}.tar",
        "https://user:pass-word@169.254.169.254/x.tar",
        "ftp://user:pass-word@host/x.tar",
        "S3://key:pass-word@bucket/set",
    ],
)
def test_fault_64_passwords_in_addresses_are_refused_and_not_repeated(tmp_path: Path, cache: Cache, url: str) -> None:
    """address with a user name and a password: refused in one line that does not repeat the password."""
    for action in (lambda: load_index(url, cache=cache), lambda: cache.fetch(url, "0" * 64)):
        with pytest.raises(ValueError, match="holds a user name and a password.*leave them out") as refused:
            action()
        assert "word" not in str(refused.value).replace("a password", "")


def test_fault_64_addresses_without_a_password_pass() -> None:
    """addresses whose at sign or colon is no password: read as before."""
    for url in ("abfs://container@account.dfs.core.windows.net/set", "http://host:8080/a@b.tar", "s3://b/a:b@c.tar"):
        storage.check_url(url)
