// SPDX-License-Identifier: GPL-2.0
//! How the previous version of this crate (layout 1, revision 1) reads a state: frozen, with its own numbers, so that a
//! change of ours cannot change it as well. Revision 0 reads the same but for `discarded_below`. Replace it when a
//! release is made.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

/// What revision 1 finds in a state, or why it refuses it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Previous {
    /// By nodeid: lookups, flags, the rest.
    pub(super) nodes: BTreeMap<u64, (u64, u64, Vec<u64>)>,
    pub(super) handles: BTreeMap<u64, Vec<u64>>,
    /// By id: state, and the part of the slot that goes with it.
    pub(super) journal: BTreeMap<u64, (u64, Vec<u64>)>,
    init_reply: Vec<u64>,
    pub(super) discarded_below: u64,
}

impl Previous {
    pub(super) fn read(fd: &OwnedFd) -> Result<Previous, String> {
        let file = File::from(fd.try_clone().unwrap());
        let size = file.metadata().unwrap().len();
        let mut bytes = vec![0; size as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        let word = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap());
        let words = |at: usize, len: usize| (at..at + len).step_by(8).map(word).collect();
        let half = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());

        if word(0) != u64::from_ne_bytes(*b"FUSErst\x01") {
            return Err("its magic number is another".into());
        }
        let sum = bytes[16..64]
            .iter()
            .fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| {
                (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
            });
        if word(8) != sum {
            return Err("its checksum is wrong".into());
        }
        if half(16) != 1 {
            return Err(format!("layout {}", half(16)));
        }
        let pages = |slots: usize, size: usize| (slots * size).next_multiple_of(4096);
        let [nodes, handles, journal] = [40, 44, 48].map(|at| half(at) as usize);
        let journal_at = 0x12000;
        let handles_at = journal_at + pages(journal, 1280);
        let nodes_at = handles_at + pages(handles, 64);
        if (nodes_at + pages(nodes, 256)) as u64 != size || word(56) != size {
            return Err("its size does not fit its header".into());
        }
        let (stamp, nodes_used, handles_used) = (word(128), word(136), word(144));
        let mut found = Previous {
            nodes: BTreeMap::new(),
            handles: BTreeMap::new(),
            journal: BTreeMap::new(),
            init_reply: words(0x1000, word(160) as usize),
            discarded_below: word(176),
        };
        for slot in 1..nodes.min(nodes_used as usize) {
            let at = nodes_at + slot * 256;
            let nodeid = word(at);
            if nodeid == 0 {
                continue;
            }
            if nodeid as u32 as usize != slot || nodeid >> 32 >= stamp || half(at + 84) > 128 {
                return Err(format!("node {slot}"));
            }
            let rest = words(at + 24, 256 - 24);
            found
                .nodes
                .insert(nodeid, (word(at + 8), word(at + 16), rest));
        }
        for slot in 0..handles.min(handles_used as usize) {
            let at = handles_at + slot * 64;
            let fh = word(at);
            if fh == 0 {
                continue;
            }
            if fh as u32 as usize != slot || fh >> 32 == 0 || fh >> 32 >= stamp || half(at + 20) > 1
            {
                return Err(format!("handle {slot}"));
            }
            found.handles.insert(fh, words(at + 8, 40));
        }
        for slot in 0..journal {
            let at = journal_at + slot * 1280;
            let (id, state) = (word(at) >> 8, word(at) & 0xff);
            let (from, to) = match state {
                0 if id == 0 => continue,
                1 => (8, 8 + 64 + 512 + 480),
                2 => (8 + 64 + 512 + 480, 1216),
                _ => return Err(format!("journal {slot}")),
            };
            if found
                .journal
                .insert(id, (state, words(at + from, to - from)))
                .is_some()
            {
                return Err("its request has another entry".into());
            }
        }
        Ok(found)
    }
}
