// SPDX-License-Identifier: GPL-2.0
//! A second process of a hostile server: it reads, answers and notifies at the same time as the first, on a device of
//! its own, and knows nothing of a tree.

use std::time::Duration;

use anyhow::Result;
use nix::poll::PollFlags;

use super::hand;
use super::script::{How, Op};
use super::shared::Shared;
use crate::raw::answer::is_entry_reply;
use crate::raw::app::Proc;
use crate::raw::ctl::Connection;
use crate::raw::dev::{Device, Read1};
use crate::raw::kit::Kit;
use crate::raw::msg::Message;
use crate::raw::tree::{Answer, Tree};
use crate::raw::wait::Rng;
use crate::raw::wire::*;

struct Rival {
    dev: Device,
    conn: Connection,
    identity: [u64; 2],
    rng: Rng,
    kept: Vec<Message>,
    shared: &'static Shared,
}

pub fn start(kit: &Kit<'_>, ops: &[Op], seed: u64, shared: &'static Shared) -> Result<Proc> {
    let mut rival = Rival {
        dev: kit.dev.clone_queue()?,
        conn: kit.conn.clone(),
        identity: kit.config.identity,
        rng: Rng(seed ^ 0x5151),
        kept: Vec::new(),
        shared,
    };
    Proc::spawn("the rival", &[], || {
        while !shared.stopped() {
            for op in ops {
                shared.server_op();
                if shared.stopped() || rival.step(*op).is_err() {
                    return 0;
                }
            }
        }
        0
    })
}

impl Rival {
    fn step(&mut self, op: Op) -> Result<()> {
        match op {
            Op::Serve(n) => self.serve(n, How::Truth)?,
            Op::Replays(n, how) => self.serve(n, how)?,
            Op::Take(n) => {
                for _ in 0..n {
                    if let Some(m) = self.read()? {
                        self.kept.push(m);
                    }
                }
                self.kept.truncate(100);
            }
            Op::Answer(which, how) if !self.kept.is_empty() => {
                let m = self.kept.remove(usize::from(which) % self.kept.len());
                self.answer(&m, how);
            }
            Op::Restarted(who, salt) => {
                self.shared.write();
                let _ = self.dev.restarted(RestartedOut {
                    cookie: COOKIE_BIT | salt,
                    identity: hand::identity(who, self.identity),
                    ..Default::default()
                });
            }
            Op::Flood(n) => {
                for i in 0..n {
                    self.shared.write();
                    let _ = self.dev.restarted(RestartedOut {
                        cookie: COOKIE_BIT | u64::from(i),
                        ..Default::default()
                    });
                }
            }
            Op::Commit(which) => {
                self.shared.write();
                let now = self
                    .conn
                    .recovery()?
                    .map_or(0, |r| r.get("epoch").unwrap_or(0));
                let _ = self.dev.restarted(RestartedOut {
                    cookie: COOKIE_BIT,
                    flags: RESTARTED_COMMIT,
                    epoch: hand::epoch(which, now as u32),
                    ..Default::default()
                });
            }
            Op::Notify(note) => {
                self.shared.write();
                let nodes: Vec<u64> = (ROOT..4).chain(100..160).collect();
                let _ = self.dev.write_raw(&hand::note(note, &nodes));
            }
            Op::Raw(len, seed) => drop(hand::raw(&self.dev, len, seed)),
            Op::BadRead(small) => hand::bad_read(&self.dev, small),
            Op::Clone => drop(self.dev.clone_queue()),
            Op::Wait(ms) => drop(
                self.dev
                    .poll(PollFlags::POLLIN, Duration::from_millis(ms.into()))?,
            ),
            Op::Look => drop(self.conn.recovery()?),
            _ => {}
        }
        Ok(())
    }

    fn read(&mut self) -> Result<Option<Message>> {
        match self.dev.read(Duration::from_micros(200))? {
            Read1::Message(m) if !m.wants_no_reply() => {
                self.shared.message();
                Ok(Some(m))
            }
            _ => Ok(None),
        }
    }

    fn serve(&mut self, n: u8, how: How) -> Result<()> {
        for _ in 0..n {
            match self.read()? {
                Some(m) => self.answer(&m, how),
                None => break,
            }
        }
        Ok(())
    }

    fn answer(&mut self, m: &Message, how: How) {
        self.shared.write();
        let truth = self.invent(m);
        let _ = hand::answer(&self.dev, m, &truth, how, &mut self.rng);
    }

    /// Something that looks like an answer.
    fn invent(&mut self, m: &Message) -> Answer {
        if m.nodeid() == ROOT && m.is(op::GETATTR) {
            return Tree::default()
                .attr_out(ROOT)
                .map_or(Answer::Err(libc::EIO), |a| Answer::of(&a));
        }
        let kind = [libc::S_IFREG, libc::S_IFREG, libc::S_IFDIR][self.rng.below(3)];
        let node = 100 + self.rng.next() % 60;
        let attr = Attr {
            ino: node + 1_000_000,
            size: self.rng.next() % 10_000,
            mode: kind | 0o755,
            nlink: 1,
            ..Default::default()
        };
        let entry = EntryOut {
            nodeid: node,
            generation: node + 7,
            entry_valid: self.rng.next() % 2 * 3600,
            attr_valid: 3600,
            attr,
            ..Default::default()
        };
        match m.opcode() {
            op::CREATE => Answer::Ok([entry.as_bytes(), OpenOut::default().as_bytes()].concat()),
            opcode if is_entry_reply(opcode) => Answer::of(&entry),
            op::GETATTR | op::SETATTR => Answer::of(&AttrOut {
                attr_valid: 3600,
                attr,
                ..Default::default()
            }),
            op::OPEN | op::OPENDIR => Answer::of(&OpenOut::default()),
            op::READ => Answer::Ok(vec![0x33; self.rng.below(200)]),
            op::WRITE => Answer::of(&WriteOut {
                size: 1,
                padding: 0,
            }),
            _ => Answer::Ok(Vec::new()),
        }
    }
}

use zerocopy::IntoBytes;
