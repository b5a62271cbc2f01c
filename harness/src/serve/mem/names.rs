// SPDX-License-Identifier: GPL-2.0
//! Names in directories: a record each, and an index of them that is made anew at every start.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;

use super::layout::name as at;
use super::store::{Res, Store};

/// What is known of a directory.
#[derive(Default)]
pub struct Dir {
    /// Nodeid of the directory that has it; itself for the root, 0 once it was removed.
    pub parent: u64,
    by_name: HashMap<Vec<u8>, u32>,
    /// Records by position. Positions are never used twice, so a stream neither repeats nor skips what stays.
    by_position: BTreeMap<u64, u32>,
}

impl Dir {
    pub fn new(parent: u64) -> Dir {
        Dir {
            parent,
            ..Dir::default()
        }
    }

    /// The record of a name.
    pub fn find(&self, name: &[u8]) -> Option<u32> {
        self.by_name.get(name).copied()
    }

    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// `false` if the name or its position was there.
    pub fn add(&mut self, entry: &Entry) -> bool {
        let name = self.by_name.insert(entry.name.clone(), entry.record);
        let position = self.by_position.insert(entry.position, entry.record);
        name.is_none() && position.is_none()
    }

    pub fn remove(&mut self, entry: &Entry) {
        self.by_name.remove(&entry.name);
        self.by_position.remove(&entry.position);
    }

    /// The records after a position, in order.
    pub fn after(&self, position: u64) -> impl Iterator<Item = u32> + '_ {
        let above = (
            std::ops::Bound::Excluded(position),
            std::ops::Bound::Unbounded,
        );
        self.by_position.range(above).map(|(_, record)| *record)
    }
}

/// A copy of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub record: u32,
    /// What has the name; 0: the record is free.
    pub child: u64,
    pub parent: u64,
    pub position: u64,
    pub name: Vec<u8>,
}

/// What may be a name in a directory.
pub fn valid(name: &OsStr) -> Res<&[u8]> {
    match name.as_bytes() {
        b"" => Err(Errno::ENOENT),
        long if long.len() > at::MOST_BYTES => Err(Errno::ENAMETOOLONG),
        name => Ok(name),
    }
}

impl Store {
    pub fn entry(&self, record: u32) -> Entry {
        let place = self.layout.name(record);
        let len = (self.load(place + at::BYTES_LEN) as usize).min(at::MOST_BYTES);
        let mut name = vec![0; len];
        self.read(place + at::BYTES, &mut name);
        Entry {
            record,
            child: self.load(place + at::CHILD),
            parent: self.load(place + at::PARENT),
            position: self.load(place + at::COOKIE),
            name,
        }
    }

    /// Fills a free record; nothing says yet that it is in use.
    pub fn fill_entry(&self, entry: &Entry) {
        let place = self.layout.name(entry.record);
        self.store(place + at::PARENT, entry.parent);
        self.store(place + at::COOKIE, entry.position);
        self.store(place + at::BYTES_LEN, entry.name.len() as u64);
        self.write(place + at::BYTES, &entry.name);
    }

    /// The word that says what has the name.
    pub fn child_at(&self, record: u32) -> usize {
        self.layout.name(record) + at::CHILD
    }
}
