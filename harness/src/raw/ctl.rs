// SPDX-License-Identifier: GPL-2.0
//! The control file system: what the kernel says about one connection, and the way to end it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::mount::MsFlags;

use super::wait::wait_for;

const ROOT: &str = "/sys/fs/fuse/connections";
const FUSE_CTL_SUPER_MAGIC: i64 = 0x6573_5543;

/// Makes sure that the control file system is mounted where everybody looks for it. Call it in a private mount
/// namespace: whatever it mounts goes with that.
pub fn ensure_mounted() -> Result<()> {
    let stat = nix::sys::statfs::statfs(ROOT).with_context(|| {
        format!("{ROOT} is missing: is FUSE in this kernel, and sysfs mounted?")
    })?;
    if stat.filesystem_type().0 as i64 == FUSE_CTL_SUPER_MAGIC {
        return Ok(());
    }
    nix::mount::mount(
        Some("fusectl"),
        ROOT,
        Some("fusectl"),
        MsFlags::empty(),
        None::<&str>,
    )
    .with_context(|| format!("cannot mount fusectl on {ROOT}"))
}

/// One connection of the kernel.
#[derive(Clone, Debug)]
pub struct Connection {
    pub id: u32,
}

impl Connection {
    fn path(&self, file: &str) -> PathBuf {
        Path::new(ROOT).join(self.id.to_string()).join(file)
    }

    pub fn exists(&self) -> bool {
        self.path("").exists()
    }

    /// Requests that were begun and not ended: queued, held or in a server's hands.
    pub fn waiting(&self) -> Result<u64> {
        let path = self.path("waiting");
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        text.trim()
            .parse()
            .with_context(|| format!("{} says {text:?}", path.display()))
    }

    /// Ends the connection: everybody who waits gets an error.
    pub fn abort(&self) -> io::Result<()> {
        fs::write(self.path("abort"), "1")
    }

    /// What the kernel tells of recoveries; `None` without the series.
    pub fn recovery(&self) -> Result<Option<Recovery>> {
        match fs::read_to_string(self.path("recovery")) {
            Ok(text) => Ok(Some(Recovery::parse(&text)?)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => {
                Err(e).with_context(|| format!("cannot read {}", self.path("recovery").display()))
            }
        }
    }

    /// Waits until `waiting` has the value wanted.
    pub fn wait_waiting(&self, wanted: u64, limit: Duration) -> Result<()> {
        let mut last = None;
        wait_for(&format!("`waiting` to become {wanted}"), limit, || {
            let now = self.waiting()?;
            last = Some(now);
            Ok(now == wanted)
        })
        .with_context(|| format!("`waiting` is {last:?}"))
    }

    /// Waits until the connection's recovery is in one of `states`.
    pub fn wait_state(&self, states: &[&str], limit: Duration) -> Result<()> {
        let mut last = String::new();
        wait_for(&format!("state {}", states.join(" or ")), limit, || {
            let recovery = self
                .recovery()?
                .context("this kernel has no `recovery` file")?;
            last = recovery.state().to_owned();
            Ok(states.contains(&recovery.state()))
        })
        .with_context(|| format!("the state is {last:?}"))
    }
}

/// The `recovery` file: `key value` lines.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    values: BTreeMap<String, String>,
}

impl Recovery {
    pub fn parse(text: &str) -> Result<Recovery> {
        let mut values = BTreeMap::new();
        for line in text.lines() {
            let (key, value) = line
                .split_once(' ')
                .with_context(|| format!("{line:?} is no `key value` pair"))?;
            anyhow::ensure!(
                values
                    .insert(key.to_owned(), value.trim().to_owned())
                    .is_none(),
                "{key} is there twice"
            );
        }
        Ok(Recovery { values })
    }

    pub fn state(&self) -> &str {
        self.values.get("state").map_or("", String::as_str)
    }

    pub fn get(&self, key: &str) -> Result<u64> {
        let text = self
            .values
            .get(key)
            .with_context(|| format!("the `recovery` file has no {key}"))?;
        text.parse().with_context(|| format!("{key} is {text:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_recovery_file_is_pairs() {
        let r = Recovery::parse("state held\nepoch 3\nreplayed 10\n").unwrap();
        assert_eq!(r.state(), "held");
        assert_eq!(r.get("epoch").unwrap(), 3);
        assert!(r.get("nothing").is_err());
        assert!(Recovery::parse("nonsense").is_err());
        assert!(Recovery::parse("epoch 1\nepoch 2").is_err());
    }
}
