// SPDX-License-Identifier: GPL-2.0
//! How results become answers, and what the journal is told once they were given.

use fuser::{ReplyAttr, ReplyEmpty, ReplyEntry, ReplyXattr, Request};
use rust_fuse_notify::std::state::Slot;
use zerocopy::IntoBytes;

use crate::crash_points;

use super::fs::{errno, Passthrough};
use super::nodes::Entry;
use super::sys::Res;
use super::wire::{attr_out, Attr};

/// The request was answered: nobody will ask again.
pub fn answered(slot: Option<Slot<'_>>) {
    if let Some(slot) = slot {
        crash_points::reach("answered");
        slot.done();
    }
}

pub fn empty(reply: ReplyEmpty, result: Res<()>) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(errno(e)),
    }
}

impl Passthrough {
    /// Answers what the journal may have with `body`. If nobody takes it, the outcome stays for the next instance.
    pub fn kept<R>(&self, req: &Request, reply: R, body: &[u8], slot: Option<Slot<'_>>) {
        if self.taken(req, reply, &[body]) {
            answered(slot);
        }
    }

    pub fn empty_kept(&self, req: &Request, reply: ReplyEmpty, result: Res<Option<Slot<'_>>>) {
        match result {
            Ok(slot) => self.kept(req, reply, &[], slot),
            Err(e) => reply.error(errno(e)),
        }
    }

    /// Answers by hand what fuser cannot say, see [`super::wire`].
    pub fn raw<R>(&self, req: &Request, reply: R, parts: &[&[u8]]) -> bool {
        crash_points::reach("reply");
        self.taken(req, reply, parts)
    }

    /// Answers by hand, and says whether the answer was taken, which fuser does not. fuser's own reply is leaked (a
    /// counter, no memory): dropping it would answer the request once more, with an error.
    fn taken<R>(&self, req: &Request, reply: R, parts: &[&[u8]]) -> bool {
        std::mem::forget(reply);
        match self.0.device.reply(req.unique().0, parts) {
            Ok(()) => true,
            Err(e) => {
                // Unmounted or aborted, or another instance was declared.
                tracing::warn!(
                    "nobody took the answer to {:#x}: {}",
                    req.unique().0,
                    e.desc()
                );
                false
            }
        }
    }

    pub fn entry(&self, req: &Request, reply: ReplyEntry, result: Res<(Entry, Option<Slot<'_>>)>) {
        match result {
            Ok((entry, slot)) => {
                if self.raw(req, reply, &[self.0.entry_out(&entry).as_bytes()]) {
                    answered(slot);
                } else {
                    self.0.forget(entry.nodeid, 1);
                }
            }
            Err(e) => reply.error(errno(e)),
        }
    }

    pub fn attr(&self, req: &Request, reply: ReplyAttr, result: Res<Attr>) {
        match result {
            Ok(attr) => {
                self.raw(
                    req,
                    reply,
                    &[attr_out(attr, self.0.opts.timeout).as_bytes()],
                );
            }
            Err(e) => reply.error(errno(e)),
        }
    }

    pub fn xattr(reply: ReplyXattr, size: u32, get: impl Fn(&mut [u8]) -> Res<usize>) {
        let mut buf = vec![0; size as usize];
        match get(&mut buf) {
            Ok(n) if size == 0 => reply.size(n as u32),
            Ok(n) => reply.data(&buf[..n]),
            Err(e) => reply.error(errno(e)),
        }
    }
}
