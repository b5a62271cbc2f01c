// SPDX-License-Identifier: GPL-2.0
//! The small file in which a keeper says how it is doing; `fuse-restart status` reads it.

use std::fs::{self, DirBuilder};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::mount::escape;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub mountpoint: String,
    pub keeper_pid: i32,
    /// What the keeper does: `running`, `clearing` (killing remains), `waiting` (back-off), `paused` (SIGUSR1),
    /// `unmounting`.
    pub keeper_state: String,
    /// Restarts are held back (SIGUSR1).
    pub held_back: bool,
    /// None while no instance runs.
    pub server_pid: Option<i32>,
    pub server_command: String,
    /// Instances started after the first.
    pub restarts: u64,
    /// Deaths of instances, planned ones included.
    pub deaths: u64,
    /// How the last instance ended.
    pub last_exit: Option<String>,
    /// The directory in `/sys/fs/fuse/connections`.
    pub connection: u32,
    /// What the kernel was told last: `restarted`, `resent`, `refused`; none before the first death.
    pub last_notification: Option<String>,
}

/// Where status files are looked for, the best place first. A keeper writes to the first that it can.
pub fn directories() -> Vec<PathBuf> {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    // After `su` or `sudo -E` it is another user's, who can put anything there.
    let runtime = runtime.filter(|dir| ensure_private(dir).is_ok());
    let mut dirs: Vec<PathBuf> = runtime.iter().map(|dir| dir.join("fuse-restart")).collect();
    dirs.push("/run/fuse-restart".into());
    dirs.push(format!("/tmp/fuse-restart-{}", nix::unistd::geteuid()).into());
    dirs
}

pub fn file_name(mountpoint: &Path) -> String {
    format!("{}.json", escape(mountpoint))
}

/// The first status file of a mount that there is, and what is in it.
pub fn find(mountpoint: &Path) -> Option<(PathBuf, Vec<u8>)> {
    let name = file_name(mountpoint);
    directories().into_iter().find_map(|dir| {
        let path = dir.join(&name);
        fs::read(&path).ok().map(|text| (path, text))
    })
}

impl Status {
    pub fn keeper_lives(&self) -> bool {
        Path::new("/proc")
            .join(self.keeper_pid.to_string())
            .exists()
    }
}

/// Writes and at the end removes one status file.
pub struct StatusFile {
    path: PathBuf,
    written: Option<Status>,
}

impl StatusFile {
    pub fn create(mountpoint: &Path) -> io::Result<Self> {
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        for dir in directories() {
            match private_directory(&dir) {
                Ok(()) => {
                    return Ok(Self {
                        path: dir.join(file_name(mountpoint)),
                        written: None,
                    })
                }
                Err(e) => last = io::Error::new(e.kind(), format!("{}: {e}", dir.display())),
            }
        }
        Err(last)
    }

    /// Whether another keeper, which lives, tells how this mount is doing.
    pub fn is_of_another(mountpoint: &Path) -> bool {
        find(mountpoint)
            .and_then(|(_, text)| serde_json::from_slice::<Status>(&text).ok())
            .is_some_and(|status| {
                status.keeper_pid != std::process::id() as i32 && status.keeper_lives()
            })
    }

    /// Whether it was written since by a keeper that lives: the mount was detached, and another one has its place.
    fn has_another(&self) -> bool {
        let now = fs::read(&self.path).ok();
        let now = now.and_then(|text| serde_json::from_slice::<Status>(&text).ok());
        let (Some(now), Some(written)) = (now, &self.written) else {
            return false;
        };
        now.keeper_pid != written.keeper_pid && now.keeper_lives()
    }

    /// Atomic: a reader sees the old or the new one.
    pub fn write(&mut self, status: &Status) -> io::Result<()> {
        if self.written.as_ref() == Some(status) || self.has_another() {
            return Ok(());
        }
        let fresh = self.path.with_extension("new");
        let mut file = fs::File::create(&fresh)?;
        serde_json::to_writer(&mut file, status)?;
        file.write_all(b"\n")?;
        fs::rename(&fresh, &self.path)?;
        self.written = Some(status.clone());
        Ok(())
    }
}

impl Drop for StatusFile {
    fn drop(&mut self) {
        if self.written.is_some() && !self.has_another() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Makes the directory, or accepts the one that is there if nobody else could have prepared it for us (`/tmp`).
fn private_directory(dir: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o755).create(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    ensure_private(dir)?;
    // A read-only /run shows only now.
    let probe = dir.join(format!(".{}", std::process::id()));
    fs::write(&probe, b"")?;
    fs::remove_file(&probe)
}

/// A directory of our own, in which nobody else can make anything.
fn ensure_private(dir: &Path) -> io::Result<()> {
    let found = fs::symlink_metadata(dir)?;
    let own = found.uid() == nix::unistd::geteuid().as_raw();
    if found.is_dir() && own && found.mode() & 0o022 == 0 {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::PermissionDenied,
        "not a directory of our own",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn only_our_own_directory_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let fine = dir.path().join("fine");
        private_directory(&fine).unwrap();
        private_directory(&fine).unwrap();
        let open = dir.path().join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(private_directory(&open).is_err());
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&fine, &link).unwrap();
        assert!(private_directory(&link).is_err());
        if nix::unistd::geteuid().is_root() {
            std::os::unix::fs::chown(&fine, Some(1000), None).unwrap();
            assert!(ensure_private(&fine).is_err(), "another user's");
        }
    }

    #[test]
    fn another_keepers_file_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let file = || StatusFile {
            path: dir.path().join("s.json"),
            written: None,
        };
        let path = file().path.clone();
        let read = || serde_json::from_slice::<Status>(&fs::read(&path).unwrap()).unwrap();
        let (mut first, mut second) = (file(), file());
        first.write(&status(1)).unwrap();
        // A keeper that lives: this process.
        let other = status(std::process::id() as i32);
        second.write(&other).unwrap();
        first
            .write(&Status {
                restarts: 9,
                ..status(1)
            })
            .unwrap();
        assert_eq!(read(), other);
        drop(file());
        assert_eq!(read(), other, "who could not mount has written none");
        drop(first);
        assert_eq!(read(), other);
        drop(second);
        assert!(!path.exists());
        // One that was killed leaves its file, which is taken over.
        let mut next = file();
        fs::write(&path, serde_json::to_vec(&status(i32::MAX)).unwrap()).unwrap();
        next.write(&other).unwrap();
        assert_eq!(read(), other);
    }

    #[test]
    fn written_whole_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = StatusFile {
            path: dir.path().join("s.json"),
            written: None,
        };
        let status = status(1);
        file.write(&status).unwrap();
        let read: Status = serde_json::from_slice(&fs::read(&file.path).unwrap()).unwrap();
        assert_eq!(read, status);
        drop(file);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    fn status(keeper_pid: i32) -> Status {
        Status {
            mountpoint: "/m".into(),
            keeper_pid,
            keeper_state: "running".into(),
            held_back: false,
            server_pid: Some(2),
            server_command: "x".into(),
            restarts: 3,
            deaths: 3,
            last_exit: None,
            connection: 4,
            last_notification: None,
        }
    }
}
