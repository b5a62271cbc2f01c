// SPDX-License-Identifier: GPL-2.0
//! What the journal says about a change before it is made, and how its fate is read off the
//! backing afterwards.
//!
//! The dead server either made the change or did not; one look at the names (or the attribute)
//! tells, because the kernel keeps everybody else away from them until it has an answer. So an
//! intent holds what was there *before*: a name that was absent and is present now was made by
//! us; a name that had the victim and has it no longer was removed by us.

use std::ffi::{CStr, CString};

use rust_fuse_notify::std::state as journal;

use super::creds::Caller;
use super::handle::Handle;

/// A name in a directory of the node table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Place {
    pub parent: u64,
    pub name: CString,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Intent {
    /// create, mkdir, mknod, symlink: the name was absent.
    Make { place: Place },
    /// link: the name was absent, the file is `source`.
    Link { place: Place, source: Handle },
    /// unlink and rmdir: the name had `victim`, whose nodeid is 0 if the kernel knows none.
    Remove {
        place: Place,
        victim: Handle,
        nodeid: u64,
    },
    /// rename: `from` had `source`; `to` had `target` or nothing.
    Rename {
        from: Place,
        to: Place,
        flags: u32,
        source: Handle,
        target: Option<Handle>,
        /// Of the target, 0 if the kernel knows none.
        nodeid: u64,
        /// Whose a whiteout is.
        caller: Caller,
    },
    /// setxattr with XATTR_CREATE: the attribute was absent.
    SetXattr { node: u64, name: CString },
    /// removexattr: the attribute was present.
    RemoveXattr { node: u64, name: CString },
}

/// What became of an intent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// Nothing happened: the resent request is executed as a new one.
    Undone,
    /// It happened: the resent request is only answered.
    Done,
    /// An overwritten directory sits at the old name and is to be buried: then it is done.
    Bury,
    /// Only the whiteout is missing; earlier versions made it in a step of its own.
    Whiteout,
}

/// Reads the fate of a change of one name: `now` is what the name has.
pub fn fate_of_name(intent: &Intent, now: Option<&Handle>) -> Fate {
    let done = match intent {
        Intent::Make { .. } => now.is_some(),
        Intent::Link { source, .. } => now == Some(source),
        Intent::Remove { victim, .. } => now != Some(victim),
        _ => unreachable!("not a change of one name"),
    };
    if done {
        Fate::Done
    } else {
        Fate::Undone
    }
}

/// Reads the fate of a rename from what both names have now.
pub fn fate_of_rename(
    flags: u32,
    source: &Handle,
    target: Option<&Handle>,
    old: Option<&Handle>,
    new: Option<&Handle>,
) -> Fate {
    if target == Some(source) {
        // Two names of one file: rename(2) does nothing, as often as one likes.
        return Fate::Undone;
    }
    if new != Some(source) || old == Some(source) {
        // The source did not move: nobody but us can have moved it.
        return Fate::Undone;
    }
    if flags & libc::RENAME_EXCHANGE != 0 {
        return Fate::Done;
    }
    match old {
        // A directory is overwritten by exchanging the two and burying the victim.
        Some(_) if old == target => Fate::Bury,
        None if flags & libc::RENAME_WHITEOUT != 0 => Fate::Whiteout,
        _ => Fate::Done,
    }
}

/// Reads the fate of a change of an attribute.
pub fn fate_of_xattr(intent: &Intent, present: bool) -> Fate {
    let done = match intent {
        Intent::SetXattr { .. } => present,
        Intent::RemoveXattr { .. } => !present,
        _ => unreachable!("not a change of an attribute"),
    };
    if done {
        Fate::Done
    } else {
        Fate::Undone
    }
}

/// An intent in the shape in which the journal keeps it.
pub struct Record {
    opcode: u32,
    nodeids: [u64; 2],
    names: [CString; 2],
    args: [u64; 4],
    before: Vec<u8>,
}

impl Record {
    pub fn as_journal(&self) -> journal::Intent<'_> {
        journal::Intent {
            opcode: self.opcode,
            nodeids: self.nodeids,
            names: [self.names[0].to_bytes(), self.names[1].to_bytes()],
            args: self.args,
            before: &self.before,
        }
    }
}

// The opcodes of the protocol; operations with one kind of pre-state share one.
const MAKE: u32 = 35; // FUSE_CREATE, and MKDIR, MKNOD, SYMLINK
const LINK: u32 = 13;
const REMOVE: u32 = 10; // FUSE_UNLINK, and RMDIR
const RENAME: u32 = 45; // FUSE_RENAME2, and RENAME
const SETXATTR: u32 = 21;
const REMOVEXATTR: u32 = 24;

impl Intent {
    pub fn record(&self) -> Record {
        let none = CString::default();
        let one = |opcode, place: &Place, arg, before| Record {
            opcode,
            nodeids: [place.parent, 0],
            names: [place.name.clone(), none.clone()],
            args: [arg, 0, 0, 0],
            before,
        };
        match self {
            Intent::Make { place } => one(MAKE, place, 0, Vec::new()),
            Intent::Link { place, source } => one(LINK, place, 0, handles([Some(source), None])),
            Intent::Remove {
                place,
                victim,
                nodeid,
            } => one(REMOVE, place, *nodeid, handles([Some(victim), None])),
            Intent::Rename {
                from,
                to,
                flags,
                source,
                target,
                nodeid,
                caller,
            } => Record {
                opcode: RENAME,
                nodeids: [from.parent, to.parent],
                names: [from.name.clone(), to.name.clone()],
                args: [
                    *nodeid,
                    u64::from(*flags),
                    u64::from(caller.uid),
                    u64::from(caller.gid),
                ],
                before: handles([Some(source), target.as_ref()]),
            },
            Intent::SetXattr { node, name } => {
                one(SETXATTR, &Place::new(*node, name), 0, Vec::new())
            }
            Intent::RemoveXattr { node, name } => {
                one(REMOVEXATTR, &Place::new(*node, name), 0, Vec::new())
            }
        }
    }

    /// The inverse; `None` for anything that [`Intent::record`] cannot have made.
    pub fn read(record: &journal::IntentRecord) -> Option<Intent> {
        let place = |i: usize| {
            let name = CString::new(record.names[i].as_slice()).ok()?;
            Some(Place {
                parent: record.nodeids[i],
                name,
            })
        };
        let [first, second] = read_handles(&record.before)?;
        let nodeid = record.args[0];
        Some(match record.opcode {
            MAKE => Intent::Make { place: place(0)? },
            LINK => Intent::Link {
                place: place(0)?,
                source: first?,
            },
            REMOVE => Intent::Remove {
                place: place(0)?,
                victim: first?,
                nodeid,
            },
            RENAME => Intent::Rename {
                from: place(0)?,
                to: place(1)?,
                flags: u32::try_from(record.args[1]).ok()?,
                source: first?,
                target: second,
                nodeid,
                caller: Caller {
                    uid: u32::try_from(record.args[2]).ok()?,
                    gid: u32::try_from(record.args[3]).ok()?,
                },
            },
            SETXATTR => Intent::SetXattr {
                node: record.nodeids[0],
                name: place(0)?.name,
            },
            REMOVEXATTR => Intent::RemoveXattr {
                node: record.nodeids[0],
                name: place(0)?.name,
            },
            _ => return None,
        })
    }
}

/// Two handles, each after its length; an absent one has length 0.
fn handles(both: [Option<&Handle>; 2]) -> Vec<u8> {
    let mut out = Vec::new();
    for handle in both {
        let bytes = handle.map(Handle::encode).unwrap_or_default();
        out.extend_from_slice(&(bytes.len() as u16).to_le_bytes());
        out.extend_from_slice(&bytes);
    }
    out
}

fn read_handles(mut data: &[u8]) -> Option<[Option<Handle>; 2]> {
    let mut both = [None, None];
    if data.is_empty() {
        return Some(both);
    }
    for handle in &mut both {
        let (len, rest) = data.split_first_chunk::<2>()?;
        let (bytes, rest) = rest.split_at_checked(usize::from(u16::from_le_bytes(*len)))?;
        if !bytes.is_empty() {
            *handle = Some(Handle::decode(bytes)?);
        }
        data = rest;
    }
    data.is_empty().then_some(both)
}

impl Place {
    pub fn new(parent: u64, name: &CStr) -> Place {
        Place {
            parent,
            name: name.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn h(n: u8) -> Handle {
        Handle::fake(1, &[n; 8])
    }

    fn seen(n: u8) -> Option<Handle> {
        Some(h(n))
    }

    fn place() -> Place {
        Place::new(5, c"name")
    }

    /// What the journal gives back for an intent.
    fn recorded(intent: &Intent) -> journal::IntentRecord {
        let record = intent.record();
        let kept = record.as_journal();
        journal::IntentRecord {
            id: 1,
            opcode: kept.opcode,
            nodeids: kept.nodeids,
            names: kept.names.map(<[u8]>::to_vec),
            args: kept.args,
            before: kept.before.to_vec(),
        }
    }

    #[test]
    fn every_intent_survives_the_journal_and_fits() {
        let long = Place::new(u64::MAX, &CString::new(vec![b'x'; 255]).unwrap());
        let big = Handle::fake(9, &[7; super::super::handle::MAX_BYTES]);
        let all = [
            Intent::Make { place: place() },
            Intent::Link {
                place: place(),
                source: h(1),
            },
            Intent::Remove {
                place: place(),
                victim: h(2),
                nodeid: 77,
            },
            Intent::Rename {
                from: long.clone(),
                to: long.clone(),
                flags: 7,
                source: big.clone(),
                target: Some(big),
                nodeid: 3,
                caller: Caller {
                    uid: u32::MAX,
                    gid: 7,
                },
            },
            Intent::Rename {
                from: place(),
                to: long,
                flags: 0,
                source: h(1),
                target: None,
                nodeid: 0,
                caller: Caller { uid: 0, gid: 0 },
            },
            Intent::SetXattr {
                node: 4,
                name: c"user.a".into(),
            },
            Intent::RemoveXattr {
                node: 4,
                name: c"user.a".into(),
            },
        ];
        for intent in all {
            let record = recorded(&intent);
            assert!(
                record.before.len() <= journal::Journal::MAX_BEFORE,
                "{intent:?}"
            );
            assert_eq!(Intent::read(&record).as_ref(), Some(&intent));
            for cut in 1..record.before.len() {
                let mut short = record.clone();
                short.before.truncate(cut);
                assert_eq!(Intent::read(&short), None, "{intent:?} cut at {cut}");
            }
        }
        let mut unknown = recorded(&Intent::Make { place: place() });
        unknown.opcode = 99;
        assert_eq!(Intent::read(&unknown), None);
        let mut no_victim = recorded(&Intent::Remove {
            place: place(),
            victim: h(2),
            nodeid: 0,
        });
        no_victim.before.clear();
        assert_eq!(Intent::read(&no_victim), None);
    }

    #[test]
    fn the_fate_of_a_change_of_one_name() {
        let make = Intent::Make { place: place() };
        let link = Intent::Link {
            place: place(),
            source: h(1),
        };
        let remove = Intent::Remove {
            place: place(),
            victim: h(1),
            nodeid: 0,
        };
        for (intent, now, want) in [
            (&make, None, Fate::Undone),
            (&make, seen(9), Fate::Done),
            (&link, None, Fate::Undone),
            (&link, seen(1), Fate::Done),
            (&link, seen(9), Fate::Undone), // made outside: the resend gets its EEXIST
            (&remove, seen(1), Fate::Undone),
            (&remove, None, Fate::Done),
            (&remove, seen(9), Fate::Done), // the victim is gone, somebody outside reused the name
        ] {
            assert_eq!(
                fate_of_name(intent, now.as_ref()),
                want,
                "{intent:?} {now:?}"
            );
        }
    }

    #[test]
    fn the_fate_of_a_rename() {
        const EX: u32 = libc::RENAME_EXCHANGE;
        const WH: u32 = libc::RENAME_WHITEOUT;
        const NR: u32 = libc::RENAME_NOREPLACE;
        // flags, target before, old now, new now
        for (flags, target, old, new, want) in [
            (0, None, seen(1), None, Fate::Undone),
            (0, None, None, seen(1), Fate::Done),
            (NR, None, seen(1), None, Fate::Undone),
            (NR, None, None, seen(1), Fate::Done),
            (0, Some(h(2)), seen(1), seen(2), Fate::Undone),
            (0, Some(h(2)), None, seen(1), Fate::Done),
            (0, Some(h(2)), seen(2), seen(1), Fate::Bury),
            (0, Some(h(1)), seen(1), seen(1), Fate::Undone), // one file, two names
            (EX, Some(h(2)), seen(1), seen(2), Fate::Undone),
            (EX, Some(h(2)), seen(2), seen(1), Fate::Done),
            (WH, None, seen(1), None, Fate::Undone),
            (WH, None, seen(8), seen(1), Fate::Done),
            (WH, Some(h(2)), seen(8), seen(1), Fate::Done),
            (WH, Some(h(2)), seen(1), seen(2), Fate::Undone),
            (WH, Some(h(2)), seen(2), seen(1), Fate::Bury),
            (WH, Some(h(2)), None, seen(1), Fate::Whiteout),
            (0, None, seen(9), seen(1), Fate::Done), // the old name was used again outside
            (EX, Some(h(2)), seen(9), seen(1), Fate::Done),
            (0, None, seen(9), None, Fate::Undone), // moved on outside: nothing of ours to see
            (0, None, None, None, Fate::Undone),    // both gone: nothing of ours to see
        ] {
            assert_eq!(
                fate_of_rename(flags, &h(1), target.as_ref(), old.as_ref(), new.as_ref()),
                want,
                "flags {flags} target {target:?} old {old:?} new {new:?}"
            );
        }
    }

    #[test]
    fn the_fate_of_a_change_of_an_attribute() {
        let set = Intent::SetXattr {
            node: 2,
            name: c"user.a".into(),
        };
        let remove = Intent::RemoveXattr {
            node: 2,
            name: c"user.a".into(),
        };
        assert_eq!(fate_of_xattr(&set, false), Fate::Undone);
        assert_eq!(fate_of_xattr(&set, true), Fate::Done);
        assert_eq!(fate_of_xattr(&remove, true), Fate::Undone);
        assert_eq!(fate_of_xattr(&remove, false), Fate::Done);
    }
}
