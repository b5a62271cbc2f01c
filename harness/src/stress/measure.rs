// SPDX-License-Identifier: GPL-2.0
//! What a run must give back: slab objects of fuse, descriptors of this process, open files of the system.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::raw::wait::wait_for;

/// Objects that may be left in per-processor caches and the like.
const SLACK: u64 = 64;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Active objects by slab.
    pub slabs: BTreeMap<String, u64>,
    pub descriptors: u64,
    pub files: u64,
}

impl Memory {
    pub fn now() -> Result<Memory> {
        let slabs = fs::read_to_string("/proc/slabinfo").context("/proc/slabinfo")?;
        let files = fs::read_to_string("/proc/sys/fs/file-nr").context("file-nr")?;
        Ok(Memory {
            slabs: parse(&slabs),
            descriptors: fs::read_dir("/proc/self/fd")?.count() as u64,
            files: files
                .split_whitespace()
                .next()
                .and_then(|n| n.parse().ok())
                .unwrap_or(0),
        })
    }

    /// What is more than before.
    pub fn leaks(&self, before: &Memory) -> Vec<String> {
        let mut leaks = Vec::new();
        for (name, now) in &self.slabs {
            let then = before.slabs.get(name).copied().unwrap_or(0);
            if *now > then + SLACK {
                leaks.push(format!("{name}: {then} objects before, {now} now"));
            }
        }
        if self.descriptors > before.descriptors {
            leaks.push(format!(
                "descriptors: {} before, {} now",
                before.descriptors, self.descriptors
            ));
        }
        if self.files > before.files + SLACK {
            leaks.push(format!(
                "open files of the system: {} before, {} now",
                before.files, self.files
            ));
        }
        leaks
    }
}

/// The slabs of fuse: name and active objects.
fn parse(slabinfo: &str) -> BTreeMap<String, u64> {
    let mut slabs = BTreeMap::new();
    for line in slabinfo.lines() {
        let mut words = line.split_whitespace();
        if let (Some(name), Some(Ok(active))) = (words.next(), words.next().map(str::parse)) {
            if name.starts_with("fuse_") {
                slabs.insert(name.to_owned(), active);
            }
        }
    }
    slabs
}

/// Freed objects stay counted until the caches are shrunk.
pub fn settled(before: &Memory, patience: Duration) -> Result<Memory> {
    let mut now = Memory::default();
    let _ = wait_for("memory to come back", patience, || {
        fs::write("/proc/sys/vm/drop_caches", "3")?;
        for slab in before.slabs.keys() {
            let _ = fs::write(format!("/sys/kernel/slab/{slab}/shrink"), "1");
        }
        now = Memory::now()?;
        Ok(now.leaks(before).is_empty())
    });
    Ok(now)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLABS: &str = "slabinfo - version: 2.1
# name            <active_objs> <num_objs> <objsize>
fuse_inode            12     30    900   18    4 : tunables    0    0    0
fuse_request         100    120    150
dentry              9000   9000    200
";

    #[test]
    fn only_slabs_of_fuse_count() {
        let slabs = parse(SLABS);
        assert_eq!(slabs.len(), 2);
        assert_eq!((slabs["fuse_inode"], slabs["fuse_request"]), (12, 100));
    }

    #[test]
    fn what_is_left_is_a_leak() {
        let before = Memory {
            slabs: parse(SLABS),
            descriptors: 5,
            files: 100,
        };
        let mut after = before.clone();
        assert!(after.leaks(&before).is_empty());
        after.slabs.insert("fuse_request".into(), 100 + SLACK);
        assert!(after.leaks(&before).is_empty());
        after.slabs.insert("fuse_request".into(), 101 + SLACK);
        after.descriptors = 6;
        after.files = 1000;
        assert_eq!(after.leaks(&before).len(), 3);
    }
}
