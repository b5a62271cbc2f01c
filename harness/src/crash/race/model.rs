// SPDX-License-Identifier: GPL-2.0
//! The sequential model: a small directory tree, and what each call does to it in how many steps.
//!
//! A call that Linux executes under the locks of its directories is one step. One that first finds a file by its name
//! and then does something to the file is two: in between the name may go to another file. That is all that a local
//! file system promises, so nothing more is asked for.

use std::fmt;

use super::op::{Got, How, Kind, Name, Op, NAMES, REGISTERS};

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Node {
    pub kind: Kind,
    /// None: nobody has been told yet.
    pub ino: Option<u64>,
    pub data: Vec<u8>,
    pub xattr: Option<u8>,
    /// Of a symbolic link.
    pub target: u32,
}

/// The tree at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    names: [Option<u8>; NAMES],
    /// Those that a name or a call under way refers to, in the order of [`State::tidy`].
    nodes: Vec<Node>,
    registers: [u8; REGISTERS.len()],
}

/// What the model says that a call gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expected {
    Exactly(Got),
    /// Type and inode number of this node.
    Node(u8),
}

/// After a step.
pub enum Stepped {
    /// It found this file, and goes on with it.
    Found(u8),
    Ended(Expected),
}

fn failed(errno: i32) -> Stepped {
    Stepped::Ended(Expected::Exactly(Got::Failed(errno)))
}

fn gives(got: Got) -> Stepped {
    Stepped::Ended(Expected::Exactly(got))
}

impl State {
    /// Both directories are empty and both registers are 0.
    pub fn empty() -> State {
        State {
            names: [None; NAMES],
            nodes: Vec::new(),
            registers: [0; REGISTERS.len()],
        }
    }

    fn at(&self, name: Name) -> Option<u8> {
        self.names[usize::from(name.0)]
    }

    fn set(&mut self, name: Name, node: Option<u8>) {
        self.names[usize::from(name.0)] = node;
    }

    fn node(&mut self, node: u8) -> &mut Node {
        &mut self.nodes[usize::from(node)]
    }

    pub fn known(&self, node: u8) -> &Node {
        &self.nodes[usize::from(node)]
    }

    fn kind(&self, node: u8) -> Kind {
        self.known(node).kind
    }

    fn has_a_name(&self, node: u8) -> bool {
        self.names.contains(&Some(node))
    }

    fn make(&mut self, name: Name, kind: Kind, target: u32) -> Result<u8, Stepped> {
        if self.at(name).is_some() {
            return Err(failed(libc::EEXIST));
        }
        let node = self.nodes.len() as u8;
        self.nodes.push(Node {
            kind,
            ino: None,
            data: Vec::new(),
            xattr: None,
            target,
        });
        self.set(name, Some(node));
        Ok(node)
    }

    /// The next step of a call; `found` is what its first step found, if that is behind it.
    pub fn step(&mut self, op: &Op, found: Option<u8>) -> Stepped {
        match (*op, found) {
            (Op::Create(name), _) => match self.make(name, Kind::File, 0) {
                Ok(node) => Stepped::Ended(Expected::Node(node)),
                Err(failed) => failed,
            },
            (Op::Mknod(name), _) => self.made(name, Kind::File, 0),
            (Op::Mkdir(name), _) => self.made(name, Kind::Dir, 0),
            (Op::Symlink(name, target), _) => self.made(name, Kind::Symlink, target),
            (Op::Rmdir(name), _) => match self.at(name).map(|node| self.kind(node)) {
                None => failed(libc::ENOENT),
                Some(Kind::Dir) => self.removed(name),
                Some(_) => failed(libc::ENOTDIR),
            },
            (Op::Unlink(name), _) => match self.at(name).map(|node| self.kind(node)) {
                None => failed(libc::ENOENT),
                Some(Kind::Dir) => failed(libc::EISDIR),
                Some(_) => self.removed(name),
            },
            (Op::Rename(from, to, how), _) => self.rename(from, to, how),
            (Op::Stat(name), _) => match self.at(name) {
                None => failed(libc::ENOENT),
                Some(node) => Stepped::Ended(Expected::Node(node)),
            },
            (Op::Readlink(name), _) => match self.at(name) {
                None => failed(libc::ENOENT),
                Some(node) if self.kind(node) != Kind::Symlink => failed(libc::EINVAL),
                Some(node) => gives(Got::Target(self.node(node).target)),
            },
            (Op::List(dir), _) => gives(Got::Entries(
                Name::all()
                    .filter(|name| name.dir() == dir)
                    .filter_map(|name| Some((name, self.kind(self.at(name)?))))
                    .collect(),
            )),
            (Op::Put(register, value), _) => {
                self.registers[usize::from(register)] = value;
                gives(Got::Done)
            }
            (Op::Get(register), _) => {
                gives(Got::Bytes(vec![self.registers[usize::from(register)]]))
            }
            (_, None) => self.find(op),
            (_, Some(node)) => self.on(op, node),
        }
    }

    fn made(&mut self, name: Name, kind: Kind, target: u32) -> Stepped {
        match self.make(name, kind, target) {
            Ok(_) => gives(Got::Done),
            Err(failed) => failed,
        }
    }

    fn removed(&mut self, name: Name) -> Stepped {
        self.set(name, None);
        gives(Got::Done)
    }

    fn rename(&mut self, from: Name, to: Name, how: How) -> Stepped {
        let Some(source) = self.at(from) else {
            return failed(libc::ENOENT);
        };
        let target = self.at(to);
        match (how, target) {
            (How::NoReplace, Some(_)) => return failed(libc::EEXIST),
            (How::Exchange, None) => return failed(libc::ENOENT),
            _ => {}
        }
        if target == Some(source) {
            return gives(Got::Done);
        }
        if how == How::Exchange {
            self.set(from, target);
            self.set(to, Some(source));
            return gives(Got::Done);
        }
        let is_dir = |node| self.kind(node) == Kind::Dir;
        match target.map(is_dir) {
            Some(false) if is_dir(source) => return failed(libc::ENOTDIR),
            Some(true) if !is_dir(source) => return failed(libc::EISDIR),
            _ => {}
        }
        self.set(from, None);
        self.set(to, Some(source));
        gives(Got::Done)
    }

    /// The first of two steps.
    fn find(&mut self, op: &Op) -> Stepped {
        let Some(node) = op.names().first().and_then(|name| self.at(*name)) else {
            return failed(libc::ENOENT);
        };
        match (op, self.kind(node)) {
            (Op::Append(..), Kind::Dir) => failed(libc::EISDIR),
            (Op::Append(..) | Op::Read(_), Kind::Symlink) => failed(libc::ELOOP),
            _ => Stepped::Found(node),
        }
    }

    /// The second.
    fn on(&mut self, op: &Op, node: u8) -> Stepped {
        let kind = self.kind(node);
        match *op {
            Op::Link(_, to) => {
                if self.at(to).is_some() {
                    failed(libc::EEXIST)
                } else if kind == Kind::Dir {
                    failed(libc::EPERM)
                } else if !self.has_a_name(node) {
                    failed(libc::ENOENT)
                } else {
                    self.set(to, Some(node));
                    gives(Got::Done)
                }
            }
            Op::Append(_, value) => {
                self.node(node).data.push(value);
                gives(Got::Done)
            }
            Op::Read(_) if kind == Kind::Dir => failed(libc::EISDIR),
            Op::Read(_) => gives(Got::Bytes(self.node(node).data.clone())),
            // Symbolic links have no attributes of users.
            Op::GetXattr(_) if kind == Kind::Symlink => failed(libc::ENODATA),
            _ if kind == Kind::Symlink => failed(libc::EPERM),
            _ => self.attribute(op, node),
        }
    }

    fn attribute(&mut self, op: &Op, node: u8) -> Stepped {
        let xattr = &mut self.node(node).xattr;
        match (*op, *xattr) {
            (Op::SetNew(..), Some(_)) => return failed(libc::EEXIST),
            (Op::SetNew(_, value), None) | (Op::SetOld(_, value), Some(_)) => *xattr = Some(value),
            (Op::RemoveXattr(_), Some(_)) => *xattr = None,
            (Op::GetXattr(_), Some(value)) => return gives(Got::Bytes(vec![value])),
            _ => return failed(libc::ENODATA),
        }
        gives(Got::Done)
    }

    /// Whether a call may have given this. What it tells of an inode number holds from now on.
    pub fn allows(&mut self, expected: &Expected, got: &Got) -> bool {
        match (expected, got) {
            (Expected::Exactly(expected), got) => expected == got,
            (Expected::Node(node), Got::Node(kind, ino)) => {
                let known = self.nodes.iter().position(|n| n.ino == Some(*ino));
                let node = *node;
                if self.kind(node) != *kind || known.is_some_and(|at| at != usize::from(node)) {
                    return false;
                }
                let known = self.node(node).ino.get_or_insert(*ino);
                known == ino
            }
            _ => false,
        }
    }

    pub fn told(&self, expected: &Expected) -> String {
        match expected {
            Expected::Exactly(got) => got.to_string(),
            Expected::Node(node) => {
                let Node { kind, ino, .. } = self.known(*node);
                let ino = ino.map_or(String::new(), |ino| format!(" with inode {ino}"));
                format!("{kind:?}{ino}")
            }
        }
    }

    /// Forgets the files that nothing refers to, and numbers the others in the order of their names, then of `held`:
    /// so equal trees are equal.
    pub fn tidy(&mut self, held: &mut [Option<u8>]) {
        let mut order: Vec<u8> = Vec::new();
        for slot in self.names.iter_mut().chain(held.iter_mut()) {
            let Some(node) = slot else { continue };
            let at = order.iter().position(|known| known == node);
            let at = at.unwrap_or_else(|| {
                order.push(*node);
                order.len() - 1
            });
            *slot = Some(at as u8);
        }
        let nodes = order.iter().map(|node| self.known(*node).clone());
        self.nodes = nodes.collect();
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        for name in Name::all() {
            let Some(node) = self.at(name) else { continue };
            let Node {
                kind,
                ino,
                data,
                xattr,
                ..
            } = self.known(node);
            let mut part = format!("{name} is #{node} {kind:?}");
            part += &ino.map_or(String::new(), |ino| format!(" inode {ino}"));
            if !data.is_empty() {
                part += &format!(" {data:?}");
            }
            part += &xattr.map_or(String::new(), |value| format!(" attribute {value}"));
            parts.push(part);
        }
        for (register, value) in self.registers.iter().enumerate() {
            parts.push(format!("{} is {value}", REGISTERS[register]));
        }
        f.write_str(&parts.join(", "))
    }
}
