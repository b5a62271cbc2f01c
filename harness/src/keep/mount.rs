// SPDX-License-Identifier: GPL-2.0
//! The mount: checks before it, mount(2), what the mount table says, umount2(2).
//!
//! Nothing here may ask the file system a question (`stat` on the mount point, say): the server may be dead, and
//! the keeper would wait for the server that only it can start. (But for [`is_dead`], which does not wait for long.)

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{anyhow, bail, Context, Result};
use nix::errno::Errno;
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

use crate::fusectl;

pub const FUSE_DEVICE: &str = "/dev/fuse";

/// The kernel takes no time to say that a connection has ended, if the machine has any.
const DEAD_WITHIN: Duration = Duration::from_secs(5);

/// One line of `/proc/self/mountinfo`, as far as we need it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    pub major: u32,
    pub minor: u32,
    /// What of the file system is mounted there ("/" but for bind mounts).
    pub root: PathBuf,
    pub mountpoint: PathBuf,
    pub fstype: String,
}

impl MountEntry {
    /// The directory of a FUSE connection carries the device number of its superblock; the major is 0.
    pub fn connection(&self) -> u32 {
        (self.major << 20) | self.minor
    }
}

/// All mounts of our namespace, in the order in which they were mounted.
pub fn mount_table() -> io::Result<Vec<MountEntry>> {
    let text = fs::read("/proc/self/mountinfo")?;
    Ok(text
        .split(|b| *b == b'\n')
        .filter_map(parse_mountinfo_line)
        .collect())
}

/// The topmost mount at exactly this path.
pub fn mount_at(path: &Path) -> io::Result<Option<MountEntry>> {
    Ok(mount_table()?.into_iter().rfind(|m| m.mountpoint == path))
}

/// Resolves symbolic links above a mount point, but does not look at the mount point itself: nobody may serve it.
pub fn resolve(mountpoint: &Path) -> Result<PathBuf> {
    let plain =
        std::path::absolute(mountpoint).with_context(|| format!("{}", mountpoint.display()))?;
    if mount_at(&plain)?.is_some() {
        return Ok(plain);
    }
    match (plain.parent().map(fs::canonicalize), plain.file_name()) {
        (Some(Ok(parent)), Some(name)) => Ok(parent.join(name)),
        _ => Ok(plain),
    }
}

fn parse_mountinfo_line(line: &[u8]) -> Option<MountEntry> {
    // 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw
    let mut fields = line.split(|b| *b == b' ');
    let dev = std::str::from_utf8(fields.nth(2)?).ok()?;
    let (major, minor) = dev.split_once(':')?;
    let root = unescape(fields.next()?);
    let mountpoint = unescape(fields.next()?);
    let fstype = fields.skip_while(|f| *f != b"-").nth(1)?;
    Some(MountEntry {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        root,
        mountpoint,
        fstype: String::from_utf8_lossy(fstype).into_owned(),
    })
}

/// The kernel writes space, tab, newline and backslash of a path as `\ooo`.
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&b, tail)) = rest.split_first() {
        let octal = |d: &[u8]| -> Option<u8> {
            d.iter()
                .try_fold(0u32, |v, c| {
                    c.is_ascii_digit().then(|| v * 8 + u32::from(c - b'0'))
                })
                .map(|v| v as u8)
        };
        match (b, tail.get(..3).and_then(octal)) {
            (b'\\', Some(v)) => {
                out.push(v);
                rest = &tail[3..];
            }
            _ => {
                out.push(b);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(out))
}

/// Checks that a file system can be mounted at `path` and gives back its canonical name.
pub fn check_mountpoint(path: &Path) -> Result<PathBuf> {
    let shown = path.display();
    // A dead FUSE mount answers every question with ENOTCONN, so ask the mount table before the directory.
    let absolute = std::path::absolute(path).with_context(|| format!("mount point {shown}"))?;
    refuse_mounted(&absolute)?;
    let canonical = fs::canonicalize(path).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => {
            anyhow!("mount point {shown} does not exist; create it with: mkdir -p {shown}")
        }
        _ => anyhow!("mount point {shown}: {e}"),
    })?;
    refuse_mounted(&canonical)?;
    let kind = fs::metadata(&canonical).map_err(|e| anyhow!("mount point {shown}: {e}"))?;
    if !kind.is_dir() {
        bail!("mount point {shown} is not a directory; name an existing, empty directory");
    }
    Ok(canonical)
}

fn refuse_mounted(path: &Path) -> Result<()> {
    let table = mount_at(path).context("reading /proc/self/mountinfo")?;
    if let Some(there) = table {
        bail!(
            "mount point {} is busy: a file system of type {} is mounted there already; unmount it (umount {0}, or umount -l {0} if its server is dead) or choose another directory",
            path.display(),
            there.fstype
        );
    }
    Ok(())
}

/// Opens `/dev/fuse`: blocking (fuser spins on a non-blocking descriptor), close-on-exec.
pub fn open_device() -> Result<OwnedFd> {
    let opened: io::Result<File> = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC)
        .open(FUSE_DEVICE);
    opened.map(OwnedFd::from).map_err(|e| match e.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            anyhow!("cannot open {FUSE_DEVICE}: {e}; this kernel or container has no FUSE: load it (modprobe fuse) or pass the device in")
        }
        Some(libc::EACCES | libc::EPERM) => {
            anyhow!("cannot open {FUSE_DEVICE}: {e}; run the keeper as root")
        }
        _ => anyhow!("cannot open {FUSE_DEVICE}: {e}"),
    })
}

/// What mount(2) is told.
#[derive(Debug, Clone)]
pub struct MountOptions {
    pub fsname: OsString,
    pub allow_other: bool,
}

/// Mounts the connection behind `device` and gives back its number (as in `/sys/fs/fuse/connections`).
pub fn mount_fuse(device: &OwnedFd, mountpoint: &Path, options: &MountOptions) -> Result<u32> {
    // default_permissions: the kernel checks modes, so a server that runs as root cannot be talked into more.
    let mut data = format!(
        "fd={},rootmode=40000,user_id={},group_id={},default_permissions",
        device.as_raw_fd(),
        nix::unistd::geteuid(),
        nix::unistd::getegid()
    );
    if options.allow_other {
        data.push_str(",allow_other");
    }
    let shown = mountpoint.display();
    mount(
        Some(options.fsname.as_os_str()),
        mountpoint,
        Some("fuse.fuse-restart"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some(data.as_str()),
    )
    .map_err(|e| match e {
        Errno::EPERM => anyhow!("cannot mount on {shown}: {e}; mounting needs CAP_SYS_ADMIN: run the keeper as root"),
        Errno::ENODEV => anyhow!("cannot mount on {shown}: this kernel has no FUSE file system; load it with: modprobe fuse"),
        Errno::EBUSY => anyhow!("cannot mount on {shown}: {e}; something is mounted there already: unmount it first"),
        _ => anyhow!("cannot mount on {shown}: {e}"),
    })?;
    let entry = mount_at(mountpoint).context("reading /proc/self/mountinfo")?;
    match entry {
        Some(m) => Ok(m.connection()),
        None => {
            let _ = umount2(mountpoint, MntFlags::MNT_DETACH);
            bail!("mounted on {shown}, but /proc/self/mountinfo does not show it; is /proc of another namespace?")
        }
    }
}

/// A mount that is ours: its connection, by number and by the device. Somebody may have unmounted it, and mounted something else in
/// its place or over it, which is not ours to take away; with the same number, for that is free again then.
#[derive(Clone, Copy)]
pub struct Ours<'a> {
    pub mountpoint: &'a Path,
    pub connection: u32,
    pub device: &'a OwnedFd,
}

impl Ours<'_> {
    /// Is it mounted there, be it under something else?
    pub fn is_there(self) -> bool {
        // A connection that has ended leaves its mount, or is what its mount's end has left.
        still_mounted(self.mountpoint, self.connection)
            && (!connection_gone(self.device) || is_dead(self.mountpoint))
    }

    /// Is it what would be unmounted there?
    ///
    /// # Errors
    /// As umount2(2): `EINVAL` if it is not mounted there any more, `EBUSY` if something is mounted over it.
    fn ensure_on_top(self) -> nix::Result<()> {
        if !self.is_there() {
            return Err(Errno::EINVAL);
        }
        match mount_at(self.mountpoint) {
            Ok(Some(m)) if m.connection() == self.connection => Ok(()),
            Ok(_) => Err(Errno::EBUSY),
            Err(_) => Err(Errno::EIO),
        }
    }

    /// Unmounts it if nobody uses it. Waits for writeback, so never call this from the thread that restarts servers.
    pub fn unmount(self) -> nix::Result<()> {
        self.ensure_on_top()?;
        umount2(self.mountpoint, MntFlags::UMOUNT_NOFOLLOW)
    }

    /// Takes the mount out of the tree at once; whoever has files open keeps them until the last descriptor is gone.
    pub fn unmount_lazily(self) -> nix::Result<()> {
        self.ensure_on_top()?;
        unmount_lazily(self.mountpoint)
    }

    /// [`unmount_by_force`]. The connection is aborted even if it cannot be unmounted, for something else is there.
    pub fn end(self) -> nix::Result<()> {
        let Err(e) = self.ensure_on_top() else {
            return unmount_by_force(self.mountpoint);
        };
        if !connection_gone(self.device) {
            let _ = fs::write(fusectl::directory(self.connection).join("abort"), "1");
        }
        Err(e)
    }
}

/// Takes whatever is mounted there out of the tree.
pub fn unmount_lazily(mountpoint: &Path) -> nix::Result<()> {
    umount2(mountpoint, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
}

/// Has the connection of what is mounted there ended? The kernel answers that by itself, and at once. Else the server does, or
/// nobody as long as there is none: then this takes five seconds.
pub fn is_dead(mountpoint: &Path) -> bool {
    let (tell, told) = std::sync::mpsc::channel();
    let path = mountpoint.to_owned();
    // It may wait for as long as this process lives.
    std::thread::spawn(move || tell.send(nix::sys::statvfs::statvfs(&path).err()));
    told.recv_timeout(DEAD_WITHIN) == Ok(Some(Errno::ENOTCONN))
}

/// Aborts the connection of whatever is mounted there (everybody who waits gets an error) and takes the mount away. Cannot hang.
pub fn unmount_by_force(mountpoint: &Path) -> nix::Result<()> {
    umount2(
        mountpoint,
        MntFlags::MNT_FORCE | MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW,
    )
}

/// Is the connection (number `connection`) still mounted at `mountpoint`?
pub fn still_mounted(mountpoint: &Path, connection: u32) -> bool {
    mount_table().is_ok_and(|t| {
        t.iter()
            .any(|m| m.mountpoint == mountpoint && m.connection() == connection)
    })
}

/// Has the kernel ended this connection (unmounted, or aborted)?
///
/// POLLERR together with POLLIN is something else: a recovery in which the root was refused, see the design.
pub fn connection_gone(device: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(device.as_fd(), PollFlags::POLLIN)];
    match poll(&mut fds, PollTimeout::ZERO) {
        Ok(_) => {
            let seen = fds[0].revents().unwrap_or(PollFlags::empty());
            seen.contains(PollFlags::POLLERR) && !seen.contains(PollFlags::POLLIN)
        }
        Err(_) => false,
    }
}

/// A file name that stands for a path: no `/`, reversible by eye, never longer than a directory entry may be.
pub fn escape(path: &Path) -> String {
    let bytes = path.as_os_str().as_bytes();
    let mut out = String::new();
    for &b in bytes {
        match b {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => out.push(b as char),
            b'.' if !out.is_empty() => out.push('.'),
            _ => out.push_str(&format!("%{b:02X}")),
        }
    }
    if out.len() > 200 {
        // Too long for a name: keep the end, which tells most, and a hash (FNV-1a) of the whole.
        let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325u64, |h, b| {
            (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3)
        });
        let tail = &out[out.len() - 150..];
        out = format!("{hash:016x}~{tail}");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_lines() {
        let line = b"36 35 0:98 /sub /mnt/a\\040b rw,noatime master:1 shared:2 - fuse.fuse-restart src rw,user_id=0";
        let m = parse_mountinfo_line(line).unwrap();
        assert_eq!(m.minor, 98);
        assert_eq!(m.root, Path::new("/sub"));
        assert_eq!(m.mountpoint, Path::new("/mnt/a b"));
        assert_eq!(m.fstype, "fuse.fuse-restart");
    }

    #[test]
    fn mountinfo_rubbish_is_skipped() {
        for line in [
            &b""[..],
            b"1 2",
            b"1 2 3 4 5 6",
            b"a b c:d e f - x y",
            b"36 35 0:98 / /mnt rw",
        ] {
            assert_eq!(
                parse_mountinfo_line(line),
                None,
                "{:?}",
                String::from_utf8_lossy(line)
            );
        }
    }

    #[test]
    fn unescaping() {
        assert_eq!(unescape(b"/a\\040b\\134c"), Path::new("/a b\\c"));
        assert_eq!(unescape(b"/a\\04"), Path::new("/a\\04"));
        assert_eq!(unescape(b"\\"), Path::new("\\"));
    }

    #[test]
    fn names_of_status_files() {
        assert_eq!(escape(Path::new("/mnt/a b")), "%2Fmnt%2Fa%20b");
        assert_ne!(escape(Path::new("/a-b")), escape(Path::new("/a/b")));
        assert_eq!(escape(Path::new("..")), "%2E.");
        let long = PathBuf::from(format!("/{}", "x/".repeat(300)));
        let longer = PathBuf::from(format!("/y{}", "x/".repeat(300)));
        assert!(escape(&long).len() < 250);
        assert_ne!(escape(&long), escape(&longer));
    }

    #[test]
    fn our_own_table_has_a_root() {
        assert!(mount_at(Path::new("/")).unwrap().is_some());
        assert!(mount_at(Path::new("/no/such/mount")).unwrap().is_none());
    }

    #[test]
    fn mountpoints_are_checked() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, b"x").unwrap();
        let message = |p: &Path| format!("{:#}", check_mountpoint(p).unwrap_err());
        assert!(message(&dir.path().join("none")).contains("does not exist"));
        assert!(message(&file).contains("not a directory"));
        assert!(message(Path::new("/proc")).contains("is busy"));
        assert_eq!(
            check_mountpoint(dir.path()).unwrap(),
            fs::canonicalize(dir.path()).unwrap()
        );
    }
}
