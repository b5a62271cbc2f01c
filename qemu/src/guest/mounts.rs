// SPDX-License-Identifier: GPL-2.0
//! From a read-only root to a machine that programs feel at home in.

use super::Job;
use anyhow::{Context, Result};
use nix::mount::{mount, MsFlags};
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Kept open across the mounts that hide it.
struct Kept {
    path: PathBuf,
    fd: OwnedFd,
}

/// /proc and /sys: needed before the job can even be found.
pub fn early() -> Result<()> {
    fs_mount("proc", "/proc", "proc", "")?;
    fs_mount("sysfs", "/sys", "sysfs", "")?;
    if !Path::new("/dev/null").exists() || !is_mounted("/dev") {
        fs_mount("devtmpfs", "/dev", "devtmpfs", "")?;
    }
    Ok(())
}

/// Everything else. Returns what could not be had; that is told, and the
/// command decides whether it needs it.
pub fn late(job: &Job) -> Result<Vec<String>> {
    let mut missing = Vec::new();
    for (what, dir, kind, opts) in [
        ("devpts", "/dev/pts", "devpts", "mode=620,ptmxmode=666"),
        ("shm", "/dev/shm", "tmpfs", "mode=1777,inode64"),
        ("debugfs", "/sys/kernel/debug", "debugfs", ""),
        ("tracefs", "/sys/kernel/tracing", "tracefs", ""),
        ("fusectl", "/sys/fs/fuse/connections", "fusectl", ""),
        ("cgroup2", "/sys/fs/cgroup", "cgroup2", ""),
    ] {
        if dir.starts_with("/dev/") {
            let _ = fs::create_dir(dir);
        }
        if let Err(e) = fs_mount(what, dir, kind, opts) {
            missing.push(format!("{e:#}"));
        }
    }
    for (name, to) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        let _ = std::os::unix::fs::symlink(to, Path::new("/dev").join(name));
    }

    // As udev's rules have it everywhere: who may mount in his own namespace may serve.
    if let Err(e) = fs::set_permissions("/dev/fuse", fs::Permissions::from_mode(0o666)) {
        missing.push(format!("/dev/fuse for everybody: {e}"));
    }

    let kept = open_kept(&job.keep);
    fs_mount("run", "/run", "tmpfs", "mode=755,inode64")?;
    fs::create_dir_all("/run/fuse-restart")?;
    fs::create_dir_all("/run/lock")?;
    for dir in writable_dirs(&job.home) {
        if let Err(e) = overlay(&dir) {
            missing.push(format!("{} stays read-only: {e:#}", dir.display()));
        }
    }
    // Last, because a directory to keep may lie below it.
    fs_mount("tmp", "/tmp", "tmpfs", "mode=1777,inode64")?;
    // A home that was below the /tmp that is hidden now.
    if job.home.starts_with("/tmp") {
        fs::create_dir_all(&job.home).with_context(|| job.home.display().to_string())?;
    }
    for k in kept {
        if let Err(e) = restore(&k) {
            missing.push(format!("{} is not visible: {e:#}", k.path.display()));
        }
    }
    let _ = fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+memory +pids");
    Ok(missing)
}

/// Directories of the host that programs expect to write to.
fn writable_dirs(home: &Path) -> Vec<PathBuf> {
    let mut dirs: Vec<PathBuf> = ["/etc", "/var", "/mnt", "/root"]
        .iter()
        .map(PathBuf::from)
        .collect();
    if !dirs.iter().any(|d| d == home) && home != Path::new("/") && !home.starts_with("/tmp") {
        dirs.push(home.to_path_buf());
    }
    dirs.retain(|d| d.is_dir());
    dirs
}

fn overlay(dir: &Path) -> Result<()> {
    let name = dir.display().to_string().replace('/', "_");
    let (upper, work) = (
        format!("/run/overlay/{name}/upper"),
        format!("/run/overlay/{name}/work"),
    );
    fs::create_dir_all(&upper)?;
    fs::create_dir_all(&work)?;
    let opts = format!("lowerdir={},upperdir={upper},workdir={work}", dir.display());
    fs_mount("overlay", dir, "overlay", &opts)
}

/// Opens those that the mounts below would hide.
fn open_kept(keep: &[PathBuf]) -> Vec<Kept> {
    let hidden = ["/tmp", "/run", "/dev", "/sys", "/proc"];
    let mut kept: Vec<Kept> = Vec::new();
    for path in keep {
        let below_kept = kept.iter().any(|k| path.starts_with(&k.path));
        if below_kept
            || !hidden
                .iter()
                .any(|h| path.starts_with(h) && path != Path::new(h))
        {
            continue;
        }
        use nix::fcntl::{open, OFlag};
        if let Ok(fd) = open(
            path,
            OFlag::O_PATH | OFlag::O_CLOEXEC,
            nix::sys::stat::Mode::empty(),
        ) {
            kept.push(Kept {
                path: path.clone(),
                fd,
            });
        }
    }
    kept
}

fn restore(k: &Kept) -> Result<()> {
    let from = format!("/proc/self/fd/{}", k.fd.as_raw_fd());
    if fs::metadata(&from)?.is_dir() {
        fs::create_dir_all(&k.path)?;
    } else {
        fs::create_dir_all(k.path.parent().unwrap_or(Path::new("/")))?;
        fs::File::create(&k.path)?;
    }
    mount(
        Some(from.as_str()),
        &k.path,
        None::<&str>,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        None::<&str>,
    )?;
    Ok(())
}

fn fs_mount(what: &str, dir: impl AsRef<Path>, kind: &str, opts: &str) -> Result<()> {
    let dir = dir.as_ref();
    mount(
        Some(what),
        dir,
        Some(kind),
        MsFlags::empty(),
        (!opts.is_empty()).then_some(opts),
    )
    .with_context(|| format!("cannot mount {kind} on {}", dir.display()))
}

fn is_mounted(dir: &str) -> bool {
    fs::read_to_string("/proc/self/mounts")
        .unwrap_or_default()
        .lines()
        .any(|l| l.split(' ').nth(1) == Some(dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn home_is_writable_once() {
        let dirs = writable_dirs(Path::new("/root"));
        assert_eq!(dirs.iter().filter(|d| *d == Path::new("/root")).count(), 1);
        assert!(!writable_dirs(Path::new("/tmp/home")).contains(&PathBuf::from("/tmp/home")));
        assert!(!writable_dirs(Path::new("/")).contains(&PathBuf::from("/")));
    }

    #[test]
    fn only_what_a_mount_hides_is_kept() {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let sub = dir.path().join("sub");
        fs::create_dir(&sub).unwrap();
        let kept = open_kept(&[
            dir.path().to_path_buf(),
            sub,
            PathBuf::from("/usr"),
            PathBuf::from("/tmp"),
        ]);
        let paths: Vec<_> = kept.iter().map(|k| k.path.clone()).collect();
        assert_eq!(paths, [dir.path().to_path_buf()]);
    }
}
