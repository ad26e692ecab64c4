"""Boots the machine's own systemd as in a container: in namespaces, on a copy of / that nobody else sees.

Needs root, overlayfs and a mounted cgroup2. The network is the machine's, so that services reach private
servers; everything else ends with the block: processes, mounts, files. Nothing of the machine is changed.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

SYSTEMD = "/lib/systemd/systemd"
BOOTS_WITHIN_S = 30

# Of the machine's units these have nothing to do here, or would touch what the kernel has only once.
MASKED = (
    "console-getty.service",
    "dbus.service",
    "dbus.socket",
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "getty.target",
    "proc-sys-fs-binfmt_misc.automount",
    "remote-fs.target",
    "swap.target",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-binfmt.service",
    "systemd-logind.service",
    "systemd-modules-load.service",
    "systemd-network-generator.service",
    "systemd-random-seed.service",
    "systemd-sysctl.service",
    "systemd-timesyncd.service",
    "systemd-udev-trigger.service",
    "systemd-udevd-control.socket",
    "systemd-udevd-kernel.socket",
    "systemd-udevd.service",
    "systemd-update-utmp.service",
)

# Run as the first process of the new namespaces; becomes systemd. $1: the folder.
BOOT = r"""
mkdir "$1/layers" "$1/root"
mount -t tmpfs -o mode=755 tmpfs "$1/layers"
mkdir "$1/layers/upper" "$1/layers/work"
mount -t overlay -o "lowerdir=/,upperdir=$1/layers/upper,workdir=$1/layers/work" overlay "$1/root"
cd "$1/root"
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs dev
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
mount -t tmpfs -o mode=1777 tmpfs dev/shm
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
for name in null zero full random urandom tty; do
  touch dev/$name
  mount --bind /dev/$name dev/$name
done
touch dev/console
mount --bind "$1/console" dev/console
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
rm -rf etc/systemd/system etc/fstab var/log/journal
while read -r from to; do
  mkdir -p ".$to"
  mount --bind "$from" ".$to"
  mount -o remount,bind,ro ".$to"
done <"$1/bound"
mkdir -p etc/systemd/system old
for unit in $MASKED; do
  ln -s /dev/null etc/systemd/system/$unit
done
pivot_root . old
umount -l /old
mount --make-rshared /  # systemd relies on it, and in a container leaves it to others
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin container=trial """


class BootedSystemd:
    """A running systemd. Used in a `with` block."""

    def __init__(self, folder: Path, bound: Mapping[str, str | Path]) -> None:
        """folder: an empty one, removed at the end.

        bound: folders of the machine that are seen at other places, read only; by those places.
        """
        self._folder = folder
        (folder / "bound").write_text("".join(f"{where} {place}\n" for place, where in bound.items()))
        self._console = folder / "console"
        self._console.touch()

    def __enter__(self) -> Self:
        """Boot, and return when systemd takes commands."""
        self._cgroup = _cgroup2() / f"retry-scheduler-trial-{os.getpid()}"
        self._cgroup.mkdir()
        # What is below the cgroup that it is in, systemd takes for its own.
        join = f'echo $$ >"{self._cgroup}/cgroup.procs"'
        unshare = "exec unshare --mount --pid --fork --kill-child --ipc --uts --cgroup --propagation private"
        boot = f"{BOOT} {SYSTEMD} --system --unit=basic.target"
        with self._console.open("ab") as console:
            self._process = subprocess.Popen(
                ["bash", "-euc", f'{join}; {unshare} bash -euc "$BOOT" boot "$1"', "boot", str(self._folder)],
                env={"PATH": os.environ["PATH"], "BOOT": boot, "MASKED": " ".join(MASKED)},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
            )
        try:
            deadline_s = time.monotonic() + BOOTS_WITHIN_S
            while self.systemctl("is-system-running", check=False).stdout.strip() not in (
                "running",
                "degraded",
            ):
                assert self._process.poll() is None, f"it ended: {self.console()}"
                assert time.monotonic() < deadline_s, f"it does not come up: {self.console()}"
                time.sleep(0.2)  # noqa: TID251  each look starts a process
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End systemd and everything in it at once."""
        self._end()

    def run(self, *command: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """Run a command inside, as root."""
        inside = [
            "nsenter",
            f"--target={self.first_process}",
            "--mount",
            "--pid",
            "--ipc",
            "--uts",
            "--cgroup",
        ]
        done = subprocess.run([*inside, *command], capture_output=True, text=True, timeout=90, check=False)
        if check and done.returncode != 0:
            journal = [*inside, "journalctl", "--no-pager", "--lines=40"]
            said = subprocess.run(journal, capture_output=True, text=True, timeout=90, check=False).stdout
            raise AssertionError(f"{command}: {done.returncode}\n{done.stdout}{done.stderr}{said}")
        return done

    def systemctl(self, *arguments: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """Run systemctl inside."""
        return self.run("systemctl", *arguments, check=check)

    def shown(self, unit: str, name: str) -> str:
        """Return one property of a unit."""
        return self.systemctl("show", "--value", f"--property={name}", unit).stdout.strip()

    def journal(self, unit: str) -> list[str]:
        """Return the journal's lines of a unit, and what systemd says about it."""
        return self.run("journalctl", f"--unit={unit}", "--output=cat", "--no-pager").stdout.splitlines()

    def console(self) -> str:
        """Return the end of what was written while booting."""
        return self._console.read_text(errors="replace")[-4000:]

    @property
    def first_process(self) -> int:
        """Systemd's own process id, as the machine outside numbers it."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        return int((children.read_text().split() or ["0"])[0])

    def _end(self) -> None:
        self._process.kill()  # unshare takes its child with it, and the kernel all that is inside
        self._process.wait(timeout=10)
        for _ in range(50):
            for path in sorted(self._cgroup.glob("**/"), key=lambda path: -len(path.parts)):
                try:
                    path.rmdir()
                except OSError:  # the last processes are still on their way out
                    time.sleep(0.1)  # noqa: TID251  fifty looks at most, then it is given up
            if not self._cgroup.exists():
                break
        shutil.rmtree(self._folder)


def _cgroup2() -> Path:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(place)
    raise AssertionError("no cgroup2 is mounted")
