// SPDX-License-Identifier: GPL-2.0
//! Descriptors that stay open for the whole demo, and what becomes of them when files change behind a dead server.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

const ORDINARY: [&str; 4] = ["one", "two", "three", "four"];
const DELETED: &str = "to-be-deleted";
const REPLACED: &str = "to-be-replaced";
const UNLINKED: &str = "unlinked-but-open";
const SUCCESSOR: &str = "the successor";

/// An open file whose content we know.
struct Open {
    name: &'static str,
    file: File,
    content: Vec<u8>,
}

pub struct Held {
    dir: PathBuf,
    /// The directory itself, open.
    opened_dir: File,
    files: Vec<Open>,
    deleted: Open,
    replaced: Open,
}

impl Held {
    /// How many inodes are pinned by what is open here: the files, the directory, and the root above it.
    pub const PINNED: u64 = 9;
    /// What the second act must revoke, and nothing else.
    pub const TO_BE_REVOKED: u64 = 2;

    /// On the mount.
    pub fn open(dir: PathBuf) -> Result<Self> {
        fs::create_dir(&dir)?;
        let mut files = ORDINARY
            .iter()
            .map(|n| Open::create(&dir, n))
            .collect::<io::Result<Vec<_>>>()?;
        files.push(Open::create(&dir, UNLINKED)?);
        fs::remove_file(dir.join(UNLINKED))?;
        Ok(Self {
            opened_dir: File::open(&dir)?,
            deleted: Open::create(&dir, DELETED)?,
            replaced: Open::create(&dir, REPLACED)?,
            files,
            dir,
        })
    }

    /// Appends to every file by its old descriptor, and reads everything back. What is wrong, if anything.
    pub fn check(&mut self, round: &str, victims_too: bool) -> Vec<String> {
        let victims = [&mut self.deleted, &mut self.replaced]
            .into_iter()
            .filter(|_| victims_too);
        let mut wrong: Vec<String> = self
            .files
            .iter_mut()
            .chain(victims)
            .filter_map(|f| {
                f.go_on(round)
                    .err()
                    .map(|e| format!("{} ({round}): {e}", f.name))
            })
            .collect();
        let names = nix::dir::Dir::openat(
            self.opened_dir.as_fd(),
            ".",
            nix::fcntl::OFlag::O_RDONLY,
            nix::sys::stat::Mode::empty(),
        )
        .and_then(|mut d| d.iter().collect::<nix::Result<Vec<_>>>());
        match names {
            Err(e) => wrong.push(format!("the open directory ({round}): {e}")),
            Ok(names) => {
                let has = |n: &str| {
                    names
                        .iter()
                        .any(|e| e.file_name().to_bytes() == n.as_bytes())
                };
                if !ORDINARY.iter().all(|n| has(n)) || has(UNLINKED) {
                    wrong.push(format!(
                        "the open directory ({round}) lists the wrong names"
                    ));
                }
            }
        }
        wrong
    }

    /// The second act, while no server runs: in the backing directory one open file is deleted, another replaced.
    pub fn tamper(&self, backing: &Path) -> Result<()> {
        let dir = backing.join(self.dir.file_name().expect("it has a name"));
        fs::remove_file(dir.join(DELETED)).context("deleting in the backing directory")?;
        let fresh = dir.join(".fresh");
        fs::write(&fresh, SUCCESSOR)?;
        fs::rename(&fresh, dir.join(REPLACED)).context("replacing in the backing directory")
    }

    /// What applications see after it: `(what was done, what was expected, what came)`.
    pub fn after_tampering(&self) -> Vec<(String, String, String)> {
        let eio = || "EIO".to_owned();
        let mut seen = Vec::new();
        for open in [&self.deleted, &self.replaced] {
            let mut buffer = [0; 16];
            seen.push((
                format!("{}: read by the old descriptor", open.name),
                eio(),
                errno(open.file.read_at(&mut buffer, 0)),
            ));
            seen.push((
                format!("{}: write by the old descriptor", open.name),
                eio(),
                errno(open.file.write_at(b"x", 0)),
            ));
            seen.push((
                format!("{}: fstat by the old descriptor", open.name),
                eio(),
                errno(open.file.metadata()),
            ));
        }
        seen.push((
            format!("{DELETED}: open by name"),
            "ENOENT".into(),
            errno(File::open(self.dir.join(DELETED))),
        ));
        let content =
            fs::read(self.dir.join(REPLACED)).map(|c| String::from_utf8_lossy(&c).into_owned());
        seen.push((
            format!("{REPLACED}: read by name"),
            SUCCESSOR.into(),
            content.unwrap_or_else(|e| errno::<()>(Err(e))),
        ));
        seen
    }
}

impl Open {
    fn create(dir: &Path, name: &'static str) -> io::Result<Self> {
        let path = dir.join(name);
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create_new(true)
            .open(path)?;
        let content = format!("{name}\n").repeat(500).into_bytes();
        file.write_all(&content)?;
        Ok(Self {
            name,
            file,
            content,
        })
    }

    fn go_on(&mut self, round: &str) -> io::Result<()> {
        let line = format!("{round}\n").into_bytes();
        self.content.extend_from_slice(&line);
        self.file.write_all(&line)?;
        self.file.sync_all()?;
        let length = self.file.metadata()?.len();
        if length != self.content.len() as u64 {
            return Err(io::Error::other(format!(
                "{length} bytes instead of {}",
                self.content.len()
            )));
        }
        let mut read = vec![0; self.content.len()];
        self.file.read_exact_at(&mut read, 0)?;
        match read == self.content {
            true => Ok(()),
            false => Err(io::Error::other("its content changed")),
        }
    }
}

/// The name of the error, or "ok".
fn errno<T>(result: io::Result<T>) -> String {
    match result {
        Ok(_) => "ok".into(),
        Err(e) => e.raw_os_error().map_or_else(
            || e.to_string(),
            |n| format!("{:?}", nix::errno::Errno::from_raw(n)),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn on_an_ordinary_file_system_all_goes_on_and_nothing_is_revoked() {
        let dir = tempfile::tempdir().unwrap();
        let mut held = Held::open(dir.path().join("held")).unwrap();
        assert_eq!(held.check("first", true), Vec::<String>::new());
        held.tamper(dir.path()).unwrap();
        assert_eq!(held.check("second", false), Vec::<String>::new());
        let seen = held.after_tampering();
        assert_eq!(seen.len(), 8);
        // The descriptors still lead to the old files: exactly what must not happen on the mount.
        assert!(
            seen[..6]
                .iter()
                .all(|(_, expected, came)| expected == "EIO" && came != "EIO"),
            "{seen:?}"
        );
        assert!(
            seen[6..].iter().all(|(_, expected, came)| expected == came),
            "{seen:?}"
        );
    }

    #[test]
    fn a_lost_append_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let mut held = Held::open(dir.path().join("held")).unwrap();
        fs::write(dir.path().join("held/two"), "shorter").unwrap();
        let wrong = held.check("first", true);
        assert_eq!(wrong.len(), 1, "{wrong:?}");
        assert!(wrong[0].starts_with("two"));
    }
}
