// SPDX-License-Identifier: GPL-2.0
//! One message read from the device: header, body, and typed views of the body.
//!
//! The kernel is trusted no more than any other peer here: a body that is too short is an error that names the
//! opcode, not a panic.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use anyhow::{bail, ensure, Context, Result};
use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::wire::{self, op, ForgetOne, GetattrIn, InHeader, Report};

#[derive(Clone, Debug)]
pub struct Message {
    pub header: InHeader,
    pub body: Vec<u8>,
}

/// A replay: the GETATTR with which the kernel shows one cached inode to the new server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replay {
    pub unique: u64,
    pub nodeid: u64,
    pub generation: u32,
    pub nlookup: u64,
}

impl Message {
    pub fn parse(bytes: &[u8]) -> Result<Message> {
        let (header, body) = InHeader::read_from_prefix(bytes).map_err(|_| {
            anyhow::anyhow!(
                "a message of {} bytes is shorter than its header",
                bytes.len()
            )
        })?;
        ensure!(
            header.len as usize == bytes.len(),
            "{} says it has {} bytes, {} were read",
            op::name(header.opcode),
            header.len,
            bytes.len()
        );
        Ok(Message {
            header,
            body: body.to_vec(),
        })
    }

    pub fn opcode(&self) -> u32 {
        self.header.opcode
    }

    pub fn unique(&self) -> u64 {
        self.header.unique
    }

    pub fn nodeid(&self) -> u64 {
        self.header.nodeid
    }

    pub fn original(&self) -> u64 {
        wire::original_id(self.header.unique)
    }

    pub fn is(&self, opcode: u32) -> bool {
        self.header.opcode == opcode
    }

    /// The fixed structure at the start of the body, and what follows it.
    pub fn split<T: FromBytes + KnownLayout + Immutable>(&self) -> Result<(T, &[u8])> {
        T::read_from_prefix(&self.body)
            .map_err(|_| anyhow::anyhow!("the body of {self} has only {} bytes", self.body.len()))
    }

    pub fn arg<T: FromBytes + KnownLayout + Immutable>(&self) -> Result<T> {
        Ok(self.split()?.0)
    }

    /// The names in the body: after the opcode's own structure, each ended by a NUL.
    pub fn names(&self) -> Result<Vec<&OsStr>> {
        let skip = match self.opcode() {
            op::LOOKUP | op::UNLINK | op::RMDIR | op::SYMLINK | op::REMOVEXATTR => 0,
            op::MKNOD | op::CREATE | op::TMPFILE | op::RENAME2 => 16,
            op::MKDIR | op::RENAME | op::LINK | op::GETXATTR | op::SETXATTR => 8,
            // Not `{self}`: displaying a message asks for its names.
            other => bail!("{} carries no name", op::name(other)),
        };
        let rest = self
            .body
            .get(skip..)
            .with_context(|| format!("the body of {} is too short", op::name(self.opcode())))?;
        let mut names: Vec<&OsStr> = rest.split(|b| *b == 0).map(OsStr::from_bytes).collect();
        ensure!(
            names.len() > 1,
            "the name in {} is not terminated",
            op::name(self.opcode())
        );
        names.pop();
        Ok(names)
    }

    /// The first name of the body.
    pub fn name(&self) -> Result<&OsStr> {
        Ok(self.names()?[0])
    }

    pub fn is_named(&self, opcode: u32, name: &str) -> bool {
        self.is(opcode) && self.name().is_ok_and(|n| n == name)
    }

    /// A message that nobody waits for an answer to.
    pub fn wants_no_reply(&self) -> bool {
        matches!(
            self.opcode(),
            op::FORGET | op::BATCH_FORGET | op::INTERRUPT | op::NOTIFY_REPLY
        )
    }

    /// The replay in this message, if it is one.
    pub fn replay(&self) -> Option<Replay> {
        if !self.is(op::GETATTR) {
            return None;
        }
        let arg: GetattrIn = self.arg().ok()?;
        if arg.getattr_flags & wire::GETATTR_REPLAY == 0 {
            return None;
        }
        Some(Replay {
            unique: self.unique(),
            nodeid: self.nodeid(),
            generation: arg.dummy,
            nlookup: arg.fh,
        })
    }

    /// The report in this message, if it is the answer to the RESTARTED with `cookie`.
    pub fn report(&self, cookie: u64) -> Option<Report> {
        if !self.is(op::NOTIFY_REPLY) || self.unique() != cookie {
            return None;
        }
        Report::read_from_bytes(&self.body).ok()
    }

    /// What a FORGET or BATCH_FORGET gives back.
    pub fn forgets(&self) -> Result<Vec<ForgetOne>> {
        match self.opcode() {
            op::FORGET => {
                let nlookup: u64 = self.arg()?;
                Ok(vec![ForgetOne {
                    nodeid: self.nodeid(),
                    nlookup,
                }])
            }
            op::BATCH_FORGET => {
                let (head, mut rest) = self.split::<wire::BatchForgetIn>()?;
                let mut all = Vec::new();
                for _ in 0..head.count {
                    let (one, tail) = ForgetOne::read_from_prefix(rest).map_err(|_| {
                        anyhow::anyhow!("{self} announces {} entries and is too short", head.count)
                    })?;
                    all.push(one);
                    rest = tail;
                }
                Ok(all)
            }
            _ => bail!("{self} is no FORGET"),
        }
    }
}

impl std::fmt::Display for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} of node {} (id {:#x})",
            op::name(self.opcode()),
            self.nodeid(),
            self.unique()
        )?;
        if let Ok(names) = self.names() {
            write!(f, " {names:?}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    fn message(opcode: u32, body: &[u8]) -> Message {
        let header = InHeader {
            len: (40 + body.len()) as u32,
            opcode,
            unique: 7,
            nodeid: 3,
            ..Default::default()
        };
        let bytes = [header.as_bytes(), body].concat();
        Message::parse(&bytes).unwrap()
    }

    #[test]
    fn names_follow_the_fixed_part() {
        let m = message(op::RENAME2, &[&[0u8; 16][..], b"from\0to\0"].concat());
        assert_eq!(m.names().unwrap(), ["from", "to"]);
        assert!(
            message(op::LOOKUP, b"").names().is_err(),
            "an empty body has no name"
        );
        assert!(
            message(op::MKDIR, b"abc").names().is_err(),
            "too short for its structure"
        );
    }

    #[test]
    fn every_message_can_be_shown() {
        assert_eq!(
            message(op::LSEEK, b"").to_string(),
            "LSEEK of node 3 (id 0x7)"
        );
        assert_eq!(
            message(op::LOOKUP, b"").to_string(),
            "LOOKUP of node 3 (id 0x7)"
        );
        assert_eq!(
            message(op::LOOKUP, b"a\0").to_string(),
            "LOOKUP of node 3 (id 0x7) [\"a\"]"
        );
    }

    #[test]
    fn a_length_that_lies_is_refused() {
        let header = InHeader {
            len: 48,
            opcode: op::LOOKUP,
            ..Default::default()
        };
        assert!(Message::parse(header.as_bytes()).is_err());
        assert!(Message::parse(&[0; 39]).is_err());
    }

    #[test]
    fn a_replay_is_told_from_a_plain_getattr() {
        let plain = GetattrIn {
            getattr_flags: 1,
            dummy: 0,
            fh: 9,
        };
        assert_eq!(message(op::GETATTR, plain.as_bytes()).replay(), None);
        let replay = GetattrIn {
            getattr_flags: 2,
            dummy: 5,
            fh: 9,
        };
        let got = message(op::GETATTR, replay.as_bytes()).replay().unwrap();
        assert_eq!(
            got,
            Replay {
                unique: 7,
                nodeid: 3,
                generation: 5,
                nlookup: 9
            }
        );
    }

    #[test]
    fn forgets_of_both_kinds() {
        assert_eq!(
            message(op::FORGET, 4u64.as_bytes()).forgets().unwrap(),
            [ForgetOne {
                nodeid: 3,
                nlookup: 4
            }]
        );
        let two = [
            &2u32.to_ne_bytes()[..],
            &[0; 4],
            10u64.as_bytes(),
            1u64.as_bytes(),
            11u64.as_bytes(),
            2u64.as_bytes(),
        ];
        let all = message(op::BATCH_FORGET, &two.concat()).forgets().unwrap();
        assert_eq!(
            all,
            [
                ForgetOne {
                    nodeid: 10,
                    nlookup: 1
                },
                ForgetOne {
                    nodeid: 11,
                    nlookup: 2
                }
            ]
        );
        assert!(
            message(op::BATCH_FORGET, &two[..4].concat())
                .forgets()
                .is_err(),
            "the second entry is missing"
        );
    }
}
