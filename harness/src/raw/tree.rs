// SPDX-License-Identifier: GPL-2.0
//! A toy file system in memory: what the scripted server answers from when a scenario has no wish of its own.
//!
//! It keeps the contract of a restartable server (stable nodeids, handles without state) and counts lookups as
//! exactly as the protocol asks, because its table is what the kernel's replays are compared with.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};

use libc::{S_IFDIR, S_IFLNK, S_IFMT, S_IFREG};
use zerocopy::IntoBytes;

use super::msg::{Message, Replay};
use super::wire::{Attr, AttrOut, EntryOut, ROOT};

#[derive(Clone, Debug, Default)]
pub struct Node {
    pub ino: u64,
    pub generation: u64,
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds; whoever changes a file behind the kernel's back decides whether this shows it.
    pub mtime: u64,
    pub data: Vec<u8>,
    pub children: BTreeMap<OsString, u64>,
    pub xattrs: BTreeMap<OsString, Vec<u8>>,
    /// References the kernel holds, by what was answered and what was given back.
    pub nlookup: u64,
}

#[derive(Clone, Debug)]
pub struct Tree {
    pub nodes: BTreeMap<u64, Node>,
    pub next: u64,
    /// How long the kernel may keep names and attributes, in seconds.
    pub entry_valid: u64,
    pub attr_valid: u64,
    /// FOPEN_* flags given out by OPEN, CREATE and OPENDIR.
    pub open_flags: u32,
    /// The backing file of what is opened with `FOPEN_PASSTHROUGH`.
    pub backing_id: i32,
    /// Whether a missing name is answered with a cacheable negative entry instead of ENOENT.
    pub cache_negative: bool,
    /// Whether OPEN and OPENDIR are answered with ENOSYS: there are no handles.
    pub no_open: bool,
    /// Whether POLL is answered with ENOSYS: files are always ready.
    pub no_poll: bool,
}

/// What to write back for one message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Ok(Vec<u8>),
    Err(i32),
    /// The message has no answer.
    Nothing,
}

impl Answer {
    pub fn of<T: IntoBytes + zerocopy::Immutable>(value: &T) -> Answer {
        Answer::Ok(value.as_bytes().to_vec())
    }
}

impl Default for Tree {
    fn default() -> Self {
        // The kernel makes up number 1 for a root it has not asked for; ours must be told from that.
        let root = Node {
            ino: 555,
            mode: S_IFDIR | 0o755,
            nlink: 2,
            nlookup: 1,
            ..Default::default()
        };
        Tree {
            nodes: BTreeMap::from([(ROOT, root)]),
            next: 100,
            entry_valid: 3600,
            attr_valid: 3600,
            open_flags: 0,
            backing_id: 0,
            cache_negative: false,
            no_open: false,
            no_poll: false,
        }
    }
}

impl Tree {
    /// Adds a node under `parent` without being asked to, before or behind the kernel's back.
    pub fn add(&mut self, parent: u64, name: &str, mode: u32, data: &[u8]) -> u64 {
        let nodeid = self.new_node(mode);
        self.node_mut(nodeid).data = data.to_vec();
        self.insert(parent, OsStr::new(name), nodeid);
        nodeid
    }

    pub fn file(&mut self, parent: u64, name: &str, data: &[u8]) -> u64 {
        self.add(parent, name, S_IFREG | 0o644, data)
    }

    pub fn dir(&mut self, parent: u64, name: &str) -> u64 {
        self.add(parent, name, S_IFDIR | 0o755, &[])
    }

    pub fn symlink(&mut self, parent: u64, name: &str, target: &str) -> u64 {
        self.add(parent, name, S_IFLNK | 0o777, target.as_bytes())
    }

    /// Node ids and inode numbers differ on purpose: whoever confuses the two must fail.
    pub(super) fn new_node(&mut self, mode: u32) -> u64 {
        let nodeid = self.next;
        self.next += 1;
        let nlink = if mode & S_IFMT == S_IFDIR { 2 } else { 1 };
        let node = Node {
            ino: nodeid + 1_000_000,
            generation: nodeid + 7,
            mode,
            nlink,
            ..Default::default()
        };
        self.nodes.insert(nodeid, node);
        nodeid
    }

    pub fn insert(&mut self, parent: u64, name: &OsStr, nodeid: u64) {
        self.node_mut(parent)
            .children
            .insert(name.to_owned(), nodeid);
    }

    /// The node with this id; scenarios name only nodes they made.
    pub fn node(&self, nodeid: u64) -> &Node {
        self.nodes
            .get(&nodeid)
            .unwrap_or_else(|| panic!("the toy tree has no node {nodeid}"))
    }

    pub fn node_mut(&mut self, nodeid: u64) -> &mut Node {
        self.nodes
            .get_mut(&nodeid)
            .unwrap_or_else(|| panic!("the toy tree has no node {nodeid}"))
    }

    pub fn child(&self, parent: u64, name: &str) -> Option<u64> {
        self.nodes
            .get(&parent)?
            .children
            .get(OsStr::new(name))
            .copied()
    }

    pub fn attr(&self, nodeid: u64) -> Option<Attr> {
        let node = self.nodes.get(&nodeid)?;
        Some(Attr {
            ino: node.ino,
            size: node.data.len() as u64,
            blocks: node.data.len().div_ceil(512) as u64,
            mode: node.mode,
            nlink: node.nlink,
            uid: node.uid,
            gid: node.gid,
            mtime: node.mtime,
            blksize: 4096,
            ..Default::default()
        })
    }

    pub fn attr_out(&self, nodeid: u64) -> Option<AttrOut> {
        Some(AttrOut {
            attr_valid: self.attr_valid,
            attr: self.attr(nodeid)?,
            ..Default::default()
        })
    }

    /// The entry for a node, counted as one lookup.
    pub fn entry(&mut self, nodeid: u64) -> Option<EntryOut> {
        let attr = self.attr(nodeid)?;
        let node = self.nodes.get_mut(&nodeid)?;
        node.nlookup += 1;
        Some(EntryOut {
            nodeid,
            generation: node.generation,
            entry_valid: self.entry_valid,
            attr_valid: self.attr_valid,
            attr,
            ..Default::default()
        })
    }

    pub fn forget(&mut self, nodeid: u64, nlookup: u64) -> anyhow::Result<()> {
        let Some(node) = self.nodes.get_mut(&nodeid) else {
            anyhow::bail!("FORGET of node {nodeid}, which the server never gave out");
        };
        anyhow::ensure!(
            node.nlookup >= nlookup,
            "FORGET of node {nodeid} gives back {nlookup} lookups, the server counts only {}",
            node.nlookup
        );
        node.nlookup -= nlookup;
        if node.nlookup == 0 && node.nlink == 0 {
            self.nodes.remove(&nodeid);
        }
        Ok(())
    }

    /// The answer an honest server gives to a replay.
    pub fn replay(&self, replay: &Replay) -> Answer {
        match self.nodes.get(&replay.nodeid) {
            Some(node) if node.generation as u32 == replay.generation => {
                let out = self
                    .attr_out(replay.nodeid)
                    .expect("the node was just found");
                Answer::of(&out)
            }
            _ => Answer::Err(libc::ESTALE),
        }
    }

    /// At COMMIT the table is the replayed set with the replayed counts; everything else has count 0, also what was
    /// answered with an error.
    pub fn adopt<'r>(&mut self, replayed: impl IntoIterator<Item = &'r Replay>) {
        for node in self.nodes.values_mut() {
            node.nlookup = 0;
        }
        for replay in replayed {
            if let Some(node) = self.nodes.get_mut(&replay.nodeid) {
                node.nlookup = replay.nlookup;
            }
        }
        self.nodes
            .retain(|id, node| *id == ROOT || node.nlookup > 0 || node.nlink > 0);
    }

    /// What the kernel must still hold: (nodeid, generation, count) of every node with a count.
    pub fn held(&self) -> Vec<(u64, u32, u64)> {
        let held = self.nodes.iter().filter(|(_, n)| n.nlookup > 0);
        held.map(|(id, n)| (*id, n.generation as u32, n.nlookup))
            .collect()
    }

    /// Undoes the count of an answer that the kernel did not take.
    pub fn undo(&mut self, message: &Message, answer: &Answer) {
        let Answer::Ok(payload) = answer else { return };
        if !super::answer::is_entry_reply(message.opcode()) {
            return;
        }
        let Some(Ok(nodeid)) = payload
            .get(..8)
            .map(|b| b.try_into().map(u64::from_ne_bytes))
        else {
            return;
        };
        if let Some(node) = self.nodes.get_mut(&nodeid) {
            node.nlookup = node.nlookup.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_go_up_with_entries_and_down_with_forgets() {
        let mut tree = Tree::default();
        let a = tree.file(ROOT, "a", b"x");
        tree.entry(a).unwrap();
        tree.entry(a).unwrap();
        assert_eq!(tree.held().last().unwrap().2, 2);
        tree.forget(a, 2).unwrap();
        assert_eq!(tree.held().len(), 1, "only the root is left");
        assert!(
            tree.forget(a, 1).is_err(),
            "nobody can give back what he does not have"
        );
        assert!(tree.forget(4711, 1).is_err());
    }

    #[test]
    fn an_unlinked_node_goes_with_its_last_lookup() {
        let mut tree = Tree::default();
        let a = tree.file(ROOT, "a", b"");
        tree.entry(a).unwrap();
        tree.node_mut(a).nlink = 0;
        tree.node_mut(ROOT).children.clear();
        tree.forget(a, 1).unwrap();
        assert!(!tree.nodes.contains_key(&a));
    }

    #[test]
    fn a_replay_is_confirmed_only_with_its_generation() {
        let mut tree = Tree::default();
        let a = tree.file(ROOT, "a", b"");
        let generation = tree.node(a).generation as u32;
        let replay = Replay {
            unique: 1,
            nodeid: a,
            generation,
            nlookup: 3,
        };
        assert!(matches!(tree.replay(&replay), Answer::Ok(_)));
        assert_eq!(
            tree.replay(&Replay {
                generation: generation + 1,
                ..replay
            }),
            Answer::Err(libc::ESTALE)
        );
        assert_eq!(
            tree.replay(&Replay {
                nodeid: 9999,
                ..replay
            }),
            Answer::Err(libc::ESTALE)
        );
    }

    #[test]
    fn adopting_replaces_every_count() {
        let mut tree = Tree::default();
        let a = tree.file(ROOT, "a", b"");
        let b = tree.file(ROOT, "b", b"");
        tree.entry(a).unwrap();
        tree.entry(b).unwrap();
        tree.adopt(&[Replay {
            unique: 0,
            nodeid: b,
            generation: 0,
            nlookup: 5,
        }]);
        assert_eq!(tree.node(a).nlookup, 0);
        assert_eq!(tree.node(b).nlookup, 5);
    }
}
