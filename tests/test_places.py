"""A place holds objects under safe names, in its own folder, and nothing else is ever touched."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sae_harvest.common.errors import StoreError
from sae_harvest.store.objects import LocalObjects

pytestmark = pytest.mark.usefixtures("unflushed")


@pytest.mark.parametrize(
    "key", ["../x", "/x", "a/../../x", "a\0b", "", "a//b", "\ud800", "a" * 300][:]
)
def test_a_place_refuses_a_key_that_leads_out_of_it(tmp_path: Path, key: str) -> None:
    objects = LocalObjects(tmp_path / "s")
    objects.publish("a", [b"1"])
    uses: tuple[Callable[[], object], ...] = (
        lambda: objects.publish(key, [b"1"]),
        lambda: objects.replace(key, [b"1"]),
        lambda: objects.read(key),
        lambda: objects.read_range(key, 0, 1),
        lambda: objects.size(key),
        lambda: objects.remove(key),
    )
    for use in uses:
        with pytest.raises(StoreError, match="holds no such object"):
            use()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "s"]


def test_nothing_is_written_or_removed_through_a_link_to_another_folder(tmp_path: Path) -> None:
    objects = LocalObjects(tmp_path / "s")
    objects.publish("a/b", [b"1"])
    (tmp_path / "s" / "a").rename(tmp_path / "other")
    (tmp_path / "s" / "a").symlink_to(tmp_path / "other")
    assert objects.read("a/b") == b"1"
    uses: tuple[Callable[[], object], ...] = (
        lambda: objects.publish("a/c", [b"2"]),
        lambda: objects.replace("a/b", [b"2"]),
        lambda: objects.remove("a/b"),
    )
    for use in uses:
        with pytest.raises(StoreError, match=r"is a link to .*other, outside of"):
            use()
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["b"]
    (tmp_path / "link").symlink_to(tmp_path / "s")  # all of a place may be elsewhere
    LocalObjects(tmp_path / "link").replace("d", [b"3"])
    assert objects.read("d") == b"3"


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    objects = LocalObjects(tmp_path / "s")
    objects.publish("a", [b"1"])
    os.mkfifo(tmp_path / "s" / "pipe")
    (tmp_path / "s" / "zeros").symlink_to("/dev/zero")
    (tmp_path / "s" / "folder").mkdir()
    for key in ("pipe", "zeros", "folder"):
        with pytest.raises(StoreError, match=rf"^Cannot read {key} of .*: It is not a file\.$"):
            objects.read(key)
        with pytest.raises(StoreError, match=rf"^Cannot read {key} of "):
            objects.read_range(key, 0, 4)
