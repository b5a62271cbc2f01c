// SPDX-License-Identifier: GPL-2.0
//! Who keeps a mount busy.
//!
//! Found by the paths that `/proc` shows, never by asking the mounted file system.  Even so it may wait for the server:
//! reading `/proc/PID/maps` takes a reference on a process's memory, and whoever drops the last one unmaps it, which for
//! a shared mapping means writing it back.  So this is for a thread that may wait.

use std::fs;
use std::path::Path;

/// A process with the mount in use, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    pub pid: i32,
    pub name: String,
    pub how: String,
}

/// All processes (that we may look into) with a working directory, root, open file or mapping below `mountpoint`.
pub fn holders(mountpoint: &Path) -> Vec<Holder> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut found: Vec<Holder> = entries
        .filter_map(|e| {
            let pid: i32 = e.file_name().to_str()?.parse().ok()?;
            let how = how_held(&e.path(), mountpoint)?;
            let name = fs::read_to_string(e.path().join("comm"))
                .unwrap_or_default()
                .trim()
                .to_owned();
            Some(Holder { pid, name, how })
        })
        .collect();
    found.sort_by_key(|h| h.pid);
    found
}

fn how_held(process: &Path, mountpoint: &Path) -> Option<String> {
    // readlink(2) on these shows the path as the kernel has it; it does not walk it.
    let inside = |link: &Path| {
        fs::read_link(link)
            .ok()
            .filter(|t| t.starts_with(mountpoint))
    };
    for what in ["cwd", "root"] {
        if let Some(target) = inside(&process.join(what)) {
            return Some(format!("{what} {}", target.display()));
        }
    }
    let descriptors = fs::read_dir(process.join("fd"))
        .into_iter()
        .flatten()
        .flatten();
    for fd in descriptors {
        if let Some(target) = inside(&fd.path()) {
            return Some(format!("has {} open", target.display()));
        }
    }
    let maps = fs::read(process.join("maps")).ok()?;
    let mapped = maps
        .split(|b| *b == b'\n')
        .find_map(|line| mapped_file(line).filter(|p| p.starts_with(mountpoint)))?;
    Some(format!("has {} mapped", mapped.display()))
}

/// The last field of a line of `/proc/PID/maps`, which may hold spaces.
fn mapped_file(line: &[u8]) -> Option<&Path> {
    use std::os::unix::ffi::OsStrExt;
    let slash = line.iter().position(|b| *b == b'/')?;
    Some(Path::new(std::ffi::OsStr::from_bytes(&line[slash..])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_descriptor_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let us = std::process::id() as i32;
        assert!(!holders(&dir).iter().any(|h| h.pid == us));
        let _open = fs::File::create(dir.join("a file")).unwrap();
        let found = holders(&dir);
        let ours = found.iter().find(|h| h.pid == us).expect("we hold it");
        assert!(ours.how.contains("a file"), "{ours:?}");
    }

    #[test]
    fn mapped_files() {
        let line = b"7f0-7f1 r-xp 00000000 08:01 1234    /mnt/a b (deleted)";
        assert_eq!(mapped_file(line), Some(Path::new("/mnt/a b (deleted)")));
        assert_eq!(mapped_file(b"7f0-7f1 rw-p 0 00:00 0 [stack]"), None);
    }
}
