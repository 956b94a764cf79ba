"""Free space on a file system: that of statvfs, and of quotas, which it does not include."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_SECONDS = 30.0
_NETWORK = re.compile(r"nfs|lustre|gpfs|beegfs|ceph|cifs|smb|9p|fuse|glusterfs|panfs|wekafs", re.IGNORECASE)


class Room(NamedTuple):
    """Bytes that may still be written, and what sets the limit."""

    free: int
    limit: str


def room(path: Path) -> Room:
    """Return the room in a directory, which need not exist yet: the least of the file system's and the quotas'."""
    place = _nearest(path)
    free = Room(shutil.disk_usage(place).free, "the file system")
    return min([free, *_quotas(place)], key=lambda found: found.free)


def is_network(path: Path) -> bool:
    """Return whether a file is on a file system that other machines write to, of which caches may be a minute old."""
    place = str(_nearest(path).resolve())
    found = ("", "")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split()
        if (place + "/").startswith(mount.rstrip("/") + "/") and len(mount) >= len(found[0]):
            found = mount, kind
    return bool(_NETWORK.search(found[1]))


def _nearest(path: Path) -> Path:
    """Return the directory, or the first one above it that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def _quotas(place: Path) -> Iterator[Room]:
    """Yield what quotas of this user and group leave, as far as the tools that are here know."""
    for option, whose in (("-u", "user"), ("-g", "group")):
        for command in (["lfs", "quota", "-q", option, _name(option), str(place)], ["quota", "-w", "-p", option]):
            for filesystem, used, limit in _read(command):
                if limit and (command[0] == "lfs" or _is_on(place, filesystem)):
                    yield Room(max(0, limit - used) * 1024, f"the {whose} quota of {filesystem}")


def _read(command: list[str]) -> Iterator[tuple[str, int, int]]:
    """Yield file system, KiB used and the lower limit above 0 in KiB (0: none) of each line that is one of a quota."""
    if shutil.which(command[0]) is None:
        return
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return
    for line in done.stdout.splitlines():  # a `*` marks what is above its limit
        if found := re.match(r"\s*(\S*/\S*|\S+:\S+)\s+(\d+)\*?\s+(\d+)\s+(\d+)\s", line):
            limits = [int(found[3]), int(found[4])]
            yield found[1], int(found[2]), min((limit for limit in limits if limit), default=0)


def _is_on(place: Path, filesystem: str) -> bool:
    """Return whether a directory is on the file system that `quota` names by its device or server."""
    done = subprocess.run(["df", "-P", str(place)], capture_output=True, text=True, timeout=_SECONDS, check=False)
    return any(line.split()[0] == filesystem for line in done.stdout.splitlines()[1:])


def _name(option: str) -> str:
    import grp
    import os
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name if option == "-u" else grp.getgrgid(os.getgid()).gr_name
    except KeyError:  # a user that only numbers name, as in containers
        return str(os.getuid() if option == "-u" else os.getgid())
