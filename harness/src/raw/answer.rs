// SPDX-License-Identifier: GPL-2.0
//! The honest answer of the toy tree to one request.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use anyhow::Result;
use libc::{S_IFDIR, S_IFLNK, S_IFMT};
use zerocopy::IntoBytes;

use super::msg::Message;
use super::tree::{Answer, Tree};
use super::wire::*;

const FATTR_MODE: u32 = 1 << 0;
const FATTR_UID: u32 = 1 << 1;
const FATTR_GID: u32 = 1 << 2;
const FATTR_SIZE: u32 = 1 << 3;
const RENAME_NOREPLACE: u32 = 1;
const RENAME_EXCHANGE: u32 = 2;

/// Opcodes whose successful answer starts with an entry, and so counts as a lookup.
pub fn is_entry_reply(opcode: u32) -> bool {
    matches!(
        opcode,
        op::LOOKUP | op::MKDIR | op::MKNOD | op::SYMLINK | op::LINK | op::CREATE | op::TMPFILE
    )
}

impl Tree {
    /// Executes the request on the tree and says what to answer. An error means the message itself is malformed.
    pub fn apply(&mut self, m: &Message) -> Result<Answer> {
        let parent = m.nodeid();
        if m.opcode() != op::FORGET
            && !m.wants_no_reply()
            && !matches!(m.opcode(), op::STATFS | op::DESTROY)
            && !self.nodes.contains_key(&parent)
        {
            return Ok(Answer::Err(libc::ESTALE));
        }
        Ok(match m.opcode() {
            op::FORGET | op::BATCH_FORGET => {
                for one in m.forgets()? {
                    self.forget(one.nodeid, one.nlookup)?;
                }
                Answer::Nothing
            }
            op::INTERRUPT | op::NOTIFY_REPLY => Answer::Nothing,
            op::DESTROY => Answer::Ok(Vec::new()),
            op::LOOKUP => match self.lookup(parent, m.name()?) {
                Some(id) => self.entry_answer(id),
                None if self.cache_negative => Answer::of(&EntryOut {
                    entry_valid: self.entry_valid,
                    ..Default::default()
                }),
                None => Answer::Err(libc::ENOENT),
            },
            op::GETATTR => Answer::of(&self.attr_out(parent).expect("checked above")),
            op::SETATTR => {
                let arg: SetattrIn = m.arg()?;
                let node = self.node_mut(parent);
                if arg.valid & FATTR_MODE != 0 {
                    node.mode = (node.mode & S_IFMT) | (arg.mode & !S_IFMT);
                }
                if arg.valid & FATTR_UID != 0 {
                    node.uid = arg.uid;
                }
                if arg.valid & FATTR_GID != 0 {
                    node.gid = arg.gid;
                }
                if arg.valid & FATTR_SIZE != 0 {
                    node.data.resize(arg.size as usize, 0);
                }
                Answer::of(&self.attr_out(parent).expect("checked above"))
            }
            op::READLINK => Answer::Ok(self.node(parent).data.clone()),
            op::MKDIR => self.make(parent, m.name()?, S_IFDIR | m.arg::<MkdirIn>()?.mode),
            op::MKNOD => self.make(parent, m.name()?, m.arg::<MknodIn>()?.mode),
            op::SYMLINK => {
                let names = m.names()?;
                anyhow::ensure!(names.len() == 2, "{m} does not carry a name and a target");
                let target = names[1].as_bytes().to_vec();
                match self.make(parent, names[0], S_IFLNK | 0o777) {
                    Answer::Ok(_) => {
                        let id = self.lookup(parent, names[0]).expect("just made");
                        self.node_mut(id).data = target;
                        self.node_mut(id).nlookup -= 1;
                        self.entry_answer(id)
                    }
                    other => other,
                }
            }
            op::CREATE => {
                let arg: CreateIn = m.arg()?;
                match self.make(parent, m.name()?, arg.mode) {
                    Answer::Ok(mut bytes) => {
                        let id = self.lookup(parent, m.name()?).expect("just made");
                        bytes.extend_from_slice(self.open_out(id).as_bytes());
                        Answer::Ok(bytes)
                    }
                    other => other,
                }
            }
            op::TMPFILE => {
                let id = self.new_node(m.arg::<CreateIn>()?.mode);
                self.node_mut(id).nlink = 0;
                let mut bytes = self.entry(id).expect("just made").as_bytes().to_vec();
                bytes.extend_from_slice(self.open_out(id).as_bytes());
                Answer::Ok(bytes)
            }
            op::LINK => {
                let arg: LinkIn = m.arg()?;
                let name = m.name()?;
                if !self.nodes.contains_key(&arg.oldnodeid) {
                    Answer::Err(libc::ESTALE)
                } else if self.lookup(parent, name).is_some() {
                    Answer::Err(libc::EEXIST)
                } else {
                    self.node_mut(arg.oldnodeid).nlink += 1;
                    self.insert(parent, name, arg.oldnodeid);
                    self.entry_answer(arg.oldnodeid)
                }
            }
            op::UNLINK | op::RMDIR => match self.lookup(parent, m.name()?) {
                Some(id) if m.is(op::RMDIR) && !self.node(id).children.is_empty() => {
                    Answer::Err(libc::ENOTEMPTY)
                }
                Some(_) => {
                    let name = m.name()?.to_owned();
                    self.unlink(parent, &name);
                    Answer::Ok(vec![])
                }
                None => Answer::Err(libc::ENOENT),
            },
            op::RENAME => self.rename(m, m.arg::<RenameIn>()?.newdir, 0)?,
            op::RENAME2 => {
                let arg: Rename2In = m.arg()?;
                self.rename(m, arg.newdir, arg.flags)?
            }
            op::OPEN | op::OPENDIR if self.no_open => Answer::Err(libc::ENOSYS),
            op::OPEN | op::OPENDIR => Answer::of(&self.open_out(parent)),
            op::READ => {
                let arg: ReadIn = m.arg()?;
                let data = &self.node(parent).data;
                let start = (arg.offset as usize).min(data.len());
                let end = (start + arg.size as usize).min(data.len());
                Answer::Ok(data[start..end].to_vec())
            }
            op::WRITE => {
                let (arg, bytes) = m.split::<WriteIn>()?;
                let bytes = bytes.to_vec();
                let data = &mut self.node_mut(parent).data;
                // Somebody else may have appended, too.
                let start = match arg.flags as i32 & libc::O_APPEND {
                    0 => arg.offset as usize,
                    _ => data.len(),
                };
                if data.len() < start + bytes.len() {
                    data.resize(start + bytes.len(), 0);
                }
                data[start..start + bytes.len()].copy_from_slice(&bytes);
                Answer::of(&WriteOut {
                    size: bytes.len() as u32,
                    padding: 0,
                })
            }
            op::STATFS => Answer::of(&StatfsOut {
                bsize: 4096,
                frsize: 4096,
                namelen: 255,
                ..Default::default()
            }),
            op::READDIR => self.readdir(m, false)?,
            op::READDIRPLUS => self.readdir(m, true)?,
            op::FLUSH
            | op::RELEASE
            | op::RELEASEDIR
            | op::FSYNC
            | op::FSYNCDIR
            | op::FALLOCATE
            | op::SYNCFS => Answer::Ok(vec![]),
            op::SETLK | op::SETLKW => Answer::Ok(vec![]),
            op::LSEEK => Answer::of(&LseekOut { offset: 0 }),
            op::POLL if self.no_poll => Answer::Err(libc::ENOSYS),
            op::POLL => Answer::of(&PollOut {
                revents: 0,
                padding: 0,
            }),
            op::COPY_FILE_RANGE => Answer::of(&WriteOut {
                size: 0,
                padding: 0,
            }),
            op::SETXATTR => {
                let (_, rest) = m.split::<u64>()?;
                let nul = rest.iter().position(|b| *b == 0).unwrap_or(rest.len());
                let (name, value) = (
                    OsStr::from_bytes(&rest[..nul]).to_owned(),
                    rest.get(nul + 1..).unwrap_or(&[]).to_vec(),
                );
                self.node_mut(parent).xattrs.insert(name, value);
                Answer::Ok(vec![])
            }
            op::GETXATTR => {
                let size: u32 = m.arg()?;
                match self.node(parent).xattrs.get(m.name()?) {
                    None => Answer::Err(libc::ENODATA),
                    Some(value) if size == 0 => Answer::of(&WriteOut {
                        size: value.len() as u32,
                        padding: 0,
                    }),
                    Some(value) => Answer::Ok(value.clone()),
                }
            }
            op::REMOVEXATTR => match self.node_mut(parent).xattrs.remove(m.name()?) {
                Some(_) => Answer::Ok(vec![]),
                None => Answer::Err(libc::ENODATA),
            },
            _ => Answer::Err(libc::ENOSYS),
        })
    }

    fn lookup(&self, parent: u64, name: &OsStr) -> Option<u64> {
        let node = self.nodes.get(&parent)?;
        // Asked for only by whoever has a file handle and no dentry.
        match name.as_bytes() {
            b"." => Some(parent),
            b".." => self.parent_of(parent),
            _ => node.children.get(name).copied(),
        }
    }

    fn parent_of(&self, nodeid: u64) -> Option<u64> {
        let has = |n: &super::tree::Node| n.children.values().any(|id| *id == nodeid);
        self.nodes.iter().find(|(_, n)| has(n)).map(|(id, _)| *id)
    }

    fn entry_answer(&mut self, nodeid: u64) -> Answer {
        self.entry(nodeid)
            .map_or(Answer::Err(libc::ESTALE), |e| Answer::of(&e))
    }

    fn open_out(&self, nodeid: u64) -> OpenOut {
        // The handle is the node id: nothing to lose when the server dies.
        OpenOut {
            fh: nodeid,
            open_flags: self.open_flags,
            backing_id: self.backing_id,
        }
    }

    fn make(&mut self, parent: u64, name: &OsStr, mode: u32) -> Answer {
        if self.lookup(parent, name).is_some() {
            return Answer::Err(libc::EEXIST);
        }
        let id = self.new_node(mode);
        self.insert(parent, name, id);
        self.entry_answer(id)
    }

    fn unlink(&mut self, parent: u64, name: &OsStr) {
        let Some(id) = self.node_mut(parent).children.remove(name) else {
            return;
        };
        let node = self.node_mut(id);
        node.nlink = if node.mode & S_IFMT == S_IFDIR {
            0
        } else {
            node.nlink - 1
        };
        if node.nlink == 0 && node.nlookup == 0 {
            self.nodes.remove(&id);
        }
    }

    fn rename(&mut self, m: &Message, newdir: u64, flags: u32) -> Result<Answer> {
        let names = m.names()?;
        anyhow::ensure!(names.len() == 2, "{m} does not carry two names");
        let (from, to) = (names[0].to_owned(), names[1].to_owned());
        let Some(id) = self.lookup(m.nodeid(), &from) else {
            return Ok(Answer::Err(libc::ENOENT));
        };
        if !self.nodes.contains_key(&newdir) {
            return Ok(Answer::Err(libc::ESTALE));
        }
        let target = self.lookup(newdir, &to);
        if flags & RENAME_EXCHANGE != 0 {
            let Some(other) = target else {
                return Ok(Answer::Err(libc::ENOENT));
            };
            self.insert(m.nodeid(), &from, other);
            self.insert(newdir, &to, id);
            return Ok(Answer::Ok(vec![]));
        }
        if target.is_some() {
            if flags & RENAME_NOREPLACE != 0 {
                return Ok(Answer::Err(libc::EEXIST));
            }
            self.unlink(newdir, &to);
        }
        self.node_mut(m.nodeid()).children.remove(&from);
        self.insert(newdir, &to, id);
        Ok(Answer::Ok(vec![]))
    }

    fn readdir(&mut self, m: &Message, plus: bool) -> Result<Answer> {
        let arg: ReadIn = m.arg()?;
        let mut entries = vec![(".".into(), m.nodeid()), ("..".into(), m.nodeid())];
        entries.extend(
            self.node(m.nodeid())
                .children
                .iter()
                .map(|(n, id)| (n.clone(), *id)),
        );
        let mut out = Vec::new();
        for (index, (name, id)) in entries.iter().enumerate().skip(arg.offset as usize) {
            let mut record = Vec::new();
            let dots = index < 2;
            if plus {
                let size = (128 + 24 + name.len()).next_multiple_of(8);
                if out.len() + size > arg.size as usize {
                    break;
                }
                let entry = if dots {
                    EntryOut::default()
                } else {
                    self.entry(*id).unwrap_or_default()
                };
                record.extend_from_slice(entry.as_bytes());
            }
            let node = self.node(*id);
            let kind = (node.mode & S_IFMT) >> 12;
            let head = DirentHead {
                ino: node.ino,
                off: index as u64 + 1,
                namelen: name.len() as u32,
                kind,
            };
            record.extend_from_slice(head.as_bytes());
            record.extend_from_slice(name.as_bytes());
            record.resize(record.len().next_multiple_of(8), 0);
            if out.len() + record.len() > arg.size as usize {
                break;
            }
            out.extend_from_slice(&record);
        }
        Ok(Answer::Ok(out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(opcode: u32, nodeid: u64, body: &[u8]) -> Message {
        let header = InHeader {
            len: (40 + body.len()) as u32,
            opcode,
            unique: 2,
            nodeid,
            ..Default::default()
        };
        Message {
            header,
            body: body.to_vec(),
        }
    }

    fn ok(answer: Answer) -> Vec<u8> {
        match answer {
            Answer::Ok(bytes) => bytes,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn made_renamed_and_removed() {
        let mut tree = Tree::default();
        let mkdir = request(op::MKDIR, ROOT, &[&[0u8; 8][..], b"d\0"].concat());
        assert_eq!(ok(tree.apply(&mkdir).unwrap()).len(), 128);
        assert_eq!(tree.apply(&mkdir).unwrap(), Answer::Err(libc::EEXIST));
        let rename = request(
            op::RENAME2,
            ROOT,
            &[ROOT.as_bytes(), &[0; 8], b"d\0e\0"].concat(),
        );
        ok(tree.apply(&rename).unwrap());
        assert!(tree.child(ROOT, "d").is_none());
        let id = tree.child(ROOT, "e").unwrap();
        ok(tree.apply(&request(op::RMDIR, ROOT, b"e\0")).unwrap());
        assert_eq!(
            tree.node(id).nlink,
            0,
            "still held by the kernel's one lookup"
        );
        tree.forget(id, 1).unwrap();
        assert!(!tree.nodes.contains_key(&id));
    }

    #[test]
    fn what_is_written_is_read() {
        let mut tree = Tree::default();
        let f = tree.file(ROOT, "f", b"hello");
        let write = WriteIn {
            offset: 4,
            size: 3,
            ..Default::default()
        };
        ok(tree
            .apply(&request(op::WRITE, f, &[write.as_bytes(), b"abc"].concat()))
            .unwrap());
        let read = ReadIn {
            offset: 1,
            size: 100,
            ..Default::default()
        };
        assert_eq!(
            ok(tree.apply(&request(op::READ, f, read.as_bytes())).unwrap()),
            b"ellabc"
        );
    }

    #[test]
    fn an_unknown_node_is_stale_and_an_unknown_opcode_is_not_supported() {
        let mut tree = Tree::default();
        assert_eq!(
            tree.apply(&request(op::GETATTR, 4711, &[0; 16])).unwrap(),
            Answer::Err(libc::ESTALE)
        );
        assert_eq!(
            tree.apply(&request(9999, ROOT, b"")).unwrap(),
            Answer::Err(libc::ENOSYS)
        );
    }

    #[test]
    fn readdirplus_counts_what_it_shows() {
        let mut tree = Tree::default();
        let a = tree.file(ROOT, "a", b"");
        let read = ReadIn {
            size: 4096,
            ..Default::default()
        };
        ok(tree
            .apply(&request(op::READDIRPLUS, ROOT, read.as_bytes()))
            .unwrap());
        assert_eq!(tree.node(a).nlookup, 1);
        ok(tree
            .apply(&request(op::READDIR, ROOT, read.as_bytes()))
            .unwrap());
        assert_eq!(tree.node(a).nlookup, 1);
        let short = ReadIn {
            size: 64,
            ..Default::default()
        };
        ok(tree
            .apply(&request(op::READDIRPLUS, ROOT, short.as_bytes()))
            .unwrap());
        assert_eq!(
            tree.node(a).nlookup,
            1,
            "an entry that did not fit was not given out"
        );
    }
}
