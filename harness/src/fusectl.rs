// SPDX-License-Identifier: GPL-2.0
//! What the kernel says about a connection: `/sys/fs/fuse/connections/N/`.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{mount, MsFlags};
use serde::{Deserialize, Serialize};

const CONNECTIONS: &str = "/sys/fs/fuse/connections";

/// The file `recovery`: the state, and every number under its own name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recovery {
    pub state: String,
    #[serde(flatten)]
    pub numbers: BTreeMap<String, u64>,
}

impl Recovery {
    pub fn get(&self, key: &str) -> u64 {
        self.numbers.get(key).copied().unwrap_or(0)
    }

    pub fn serving(&self) -> bool {
        self.state == "serving"
    }

    /// The kernel has the series and this server signed the contract.
    pub fn supported(&self) -> bool {
        self.state != "unsupported"
    }

    /// `key value` pairs, one a line. Unknown keys are kept: a newer kernel may say more.
    pub fn parse(text: &str) -> Option<Self> {
        let mut recovery = Recovery::default();
        for line in text.lines() {
            let (key, value) = line.split_once(' ')?;
            match key {
                "state" => recovery.state = value.trim().to_owned(),
                _ => drop(
                    recovery
                        .numbers
                        .insert(key.to_owned(), value.trim().parse().ok()?),
                ),
            }
        }
        (!recovery.state.is_empty()).then_some(recovery)
    }
}

/// The directory of a connection.
pub fn directory(connection: u32) -> PathBuf {
    Path::new(CONNECTIONS).join(connection.to_string())
}

/// `Ok(None)`: this kernel has no such file.
pub fn recovery(connection: u32) -> io::Result<Option<Recovery>> {
    let path = directory(connection).join("recovery");
    match fs::read_to_string(&path) {
        Ok(text) => Recovery::parse(&text).map(Some).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{}: not understood: {text:?}", path.display()),
            )
        }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(io::Error::new(e.kind(), format!("{}: {e}", path.display()))),
    }
}

/// Requests that applications wait for now (sent or queued).
pub fn waiting(connection: u32) -> io::Result<u64> {
    let text = fs::read_to_string(directory(connection).join("waiting"))?;
    text.trim()
        .parse()
        .map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Sees that the control file system is mounted; mounts it if it is not.
pub fn ensure_mounted() -> Result<(), String> {
    let mounted = || {
        crate::keep::mount::mount_at(Path::new(CONNECTIONS))
            .ok()
            .flatten()
    };
    if mounted().is_some_and(|m| m.fstype == "fusectl") {
        return Ok(());
    }
    mount(Some("fusectl"), CONNECTIONS, Some("fusectl"), MsFlags::empty(), None::<&str>).map_err(|e| {
        format!("{CONNECTIONS} is not mounted, and mounting it failed: {e}; as root: mount -t fusectl fusectl {CONNECTIONS}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_reads_as_key_value() {
        let r =
            Recovery::parse("state serving\nepoch 4\nreplayed 12\ntotal_void 0\nsomething_new 3\n")
                .unwrap();
        assert!(r.serving() && r.supported());
        assert_eq!(
            (
                r.get("epoch"),
                r.get("replayed"),
                r.get("something_new"),
                r.get("none")
            ),
            (4, 12, 3, 0)
        );
        assert!(!Recovery::parse("state unsupported\n").unwrap().supported());
    }

    #[test]
    fn rubbish_is_not_taken_for_zeros() {
        for text in [
            "",
            "state",
            "epoch 3\n",
            "state serving\nepoch x\n",
            "state serving\nepoch -1\n",
        ] {
            assert_eq!(Recovery::parse(text), None, "{text:?}");
        }
    }
}
