"""Free space of a directory: that of its file system, and what quotas leave of it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_fipo.machine.command import output_of

_SECONDS = 30.0
_NETWORK = re.compile(r"nfs|lustre|gpfs|beegfs|ceph|cifs|smb|9p|fuse|glusterfs|panfs|wekafs", re.IGNORECASE)


class Room(NamedTuple):
    """Bytes that may still be written, and what sets the limit."""

    free: int
    limit: str


def room(path: Path) -> Room:
    """Return the least of the file system's and the quotas' free space; the directory need not exist yet."""
    directory = _nearest(path)
    free = Room(shutil.disk_usage(directory).free, "the file system")
    return min([free, *_quotas(directory)], key=lambda found: found.free)


def is_network(path: Path) -> bool:
    """Return whether a file is on a file system that other machines write to, so that its cache may be a minute old."""
    directory = str(_nearest(path).resolve())
    found = ("", "")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split()
        if (directory + "/").startswith(mount.rstrip("/") + "/") and len(mount) >= len(found[0]):
            found = mount, kind
    return bool(_NETWORK.search(found[1]))


def _nearest(path: Path) -> Path:
    """Return the directory, or the first one above it that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def _quotas(directory: Path) -> Iterator[Room]:
    """Yield what quotas of this user and group leave, from the quota tools that are installed."""
    for option, whose in (("-u", "user"), ("-g", "group")):
        for command in (["lfs", "quota", "-q", option, _name(option), str(directory)], ["quota", "-w", "-p", option]):
            for filesystem, used, limit in _read(command):
                if limit and (command[0] == "lfs" or _is_on(directory, filesystem)):
                    yield Room(max(0, limit - used) * 1024, f"the {whose} quota of {filesystem}")


def _read(command: list[str]) -> Iterator[tuple[str, int, int]]:
    """Yield file system, used KiB and the lower limit in KiB (0: no limit) from each line of a quota tool's output."""
    if shutil.which(command[0]) is None:
        return
    for line in output_of(command, _SECONDS)[0].splitlines():  # `*`: above the limit
        if found := re.match(r"\s*(\S*/\S*|\S+:\S+)\s+(\d+)\*?\s+(\d+)\s+(\d+)\s", line):
            limits = [int(found[3]), int(found[4])]
            yield found[1], int(found[2]), min((limit for limit in limits if limit), default=0)


def _is_on(directory: Path, filesystem: str) -> bool:
    """Return whether a directory is on the file system that `quota` names by its device or server."""
    lines = output_of(["df", "-P", str(directory)], _SECONDS)[0].splitlines()
    return any(line.split()[0] == filesystem for line in lines[1:])


def _name(option: str) -> str:
    import grp
    import os
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name if option == "-u" else grp.getgrgid(os.getgid()).gr_name
    except KeyError:  # no name in this container
        return str(os.getuid() if option == "-u" else os.getgid())
