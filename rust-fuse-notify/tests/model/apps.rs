// SPDX-License-Identifier: GPL-2.0

//! Applications, and the lookups they count: the rules of `dir.c` and `inode.c`.

use super::seeds::Seed;
use super::sizes::{Size, Step};
use super::state::{Answer, Fault, Forget, Inode, Key, Op, Req, Rid, State};

impl State {
    /// The next step of an application that waits for nothing.
    pub fn go(&mut self, m: &Size, app: u8) {
        let at = usize::from(app);
        let step = m.scripts[at][usize::from(self.apps[at].step)];
        let inode = self.apps[at].inode;
        match step {
            Step::Lookup(file) => self.send(m, app, Op::Lookup(file), None),
            Step::Create(file) => self.send(m, app, Op::Create(file), None),
            Step::Touch if !self.apps[at].built => {
                self.apps[at].built = inode.is_some() && !self.is_bad(inode);
                self.apps[at].step += u8::from(!self.apps[at].built);
            }
            Step::Touch => {
                self.apps[at].built = false;
                let key = inode.expect("checked above");
                let i = *self.inode(key).expect("a used inode is there");
                let op = Op::Touch {
                    file: i.file,
                    gen: i.gen,
                };
                self.send(m, app, op, inode);
            }
            Step::Close => {
                self.apps[at].inode = None;
                self.apps[at].step += 1;
            }
        }
    }

    fn send(&mut self, m: &Size, app: u8, op: Op, inode: Option<Key>) {
        let unique = self.next_id().into();
        self.apps[usize::from(app)].req = Some(Req {
            unique,
            epoch: 0,
            op,
            inode,
            answer: None,
            was_held: false,
        });
        self.queue(m, Rid::App(app));
    }

    /// An application goes on with what was answered, maybe long ago. `give_back`: it finds that
    /// it has no use for the entry.
    pub fn consume(&mut self, m: &Size, app: u8, give_back: bool) {
        let at = usize::from(app);
        let Some(req) = self.apps[at].req.take() else {
            return;
        };
        let answer = req.answer.expect("consumed when it is answered");
        match (req.op, answer) {
            (Op::Lookup(_) | Op::Create(_), Answer::Entry { file, gen }) => {
                if give_back {
                    let forget = Forget {
                        file,
                        nlookup: 1,
                        epoch: req.epoch,
                    };
                    self.queue_forget(m, forget);
                } else if let Some(key) = self.iget(m, file, gen, req.epoch) {
                    self.apps[at].inode = Some(key);
                } else {
                    // The server that answered is gone: ask the next one.
                    return self.send(m, app, Op::Lookup(file), None);
                }
            }
            (Op::Touch { .. }, Answer::Done) => {}
            (Op::Touch { .. }, Answer::Io) if self.is_bad(req.inode) => {}
            (_, Answer::Aborted) if !self.kernel.connected => {}
            // Nobody has created it yet.
            (Op::Lookup(file), Answer::NoEntry) if m.files[usize::from(file)] == 0 => {}
            _ => self.fail(Fault::WrongError),
        }
        self.apps[at].step += 1;
    }

    /// `fuse_iget()` and `fuse_count_lookup()`: nothing if the server that answered is gone.
    fn iget(&mut self, m: &Size, file: u8, gen: u8, stamp: u32) -> Option<Key> {
        let epoch = self.epoch();
        let late = stamp != epoch;
        let broken = [Seed::CountLate, Seed::BornLate, Seed::StaleLate];
        if late && !m.seed.is_some_and(|seed| broken.contains(&seed)) {
            return None;
        }
        let known = self
            .kernel
            .inodes
            .iter_mut()
            .find(|i| i.hashed && i.file == file);
        if let Some(inode) = known {
            if inode.gen == gen {
                if late && m.seed != Some(Seed::CountLate) {
                    return None;
                }
                if inode.lookup_epoch != epoch && !late {
                    inode.lookup_epoch = epoch;
                    inode.nlookup = 0;
                }
                inode.nlookup += 1;
                return Some(inode.key);
            }
            // fuse_stale_inode()
            inode.bad = true;
            inode.hashed = false;
            // The server that serves has given it out, or confirmed it.
            let served = inode.lookup_epoch == epoch;
            if late && served {
                self.fail(Fault::WrongError);
            }
        }
        if late && m.seed != Some(Seed::BornLate) {
            return None;
        }
        let key = (1..).find(|k| self.inode(*k).is_none())?;
        let inode = Inode {
            key,
            file,
            gen,
            nlookup: 1,
            lookup_epoch: stamp,
            walk_epoch: 0,
            bad: false,
            hashed: true,
            revoked: None,
        };
        self.kernel.inodes.insert(0, inode);
        Some(key)
    }

    /// Whether `consume()` waits for an inode that is just being evicted.
    pub fn waits_for_eviction(&self, req: &Req) -> bool {
        match req.answer {
            Some(Answer::Entry { file, .. }) => self.kernel.evicting.iter().any(|e| e.file == file),
            _ => false,
        }
    }

    /// A fatal signal. Whoever waits for a request that nobody has read takes it back.
    pub fn kill(&mut self, m: &Size, app: u8) -> bool {
        if !self.remove_pending(Rid::App(app)) {
            return false;
        }
        let at = usize::from(app);
        self.apps[at].req = None;
        self.apps[at].inode = None;
        self.apps[at].step = m.scripts[at].len() as u8;
        true
    }

    /// Whether the inode has no user and may be evicted at any time.
    pub fn is_unused(&self, inode: &Inode) -> bool {
        let used = self.apps.iter().any(|a| a.inode == Some(inode.key));
        let shown = self.kernel.slots.iter().any(|s| s.inode == inode.key);
        let place = self.kernel.place == Some(inode.key);
        !used && !shown && !place && inode.revoked.is_none()
    }

    /// `fuse_evict_inode()`, until it queues the FORGET.
    pub fn evict(&mut self, key: Key) {
        let Some(at) = self.kernel.inodes.iter().position(|i| i.key == key) else {
            return;
        };
        let inode = self.kernel.inodes.remove(at);
        if inode.nlookup > 0 {
            self.kernel.evicting.push(Forget {
                file: inode.file,
                nlookup: inode.nlookup,
                epoch: inode.lookup_epoch,
            });
        }
    }

    /// The rest of it.
    pub fn evicted(&mut self, m: &Size, index: usize) {
        let forget = self.kernel.evicting.remove(index);
        self.queue_forget(m, forget);
    }
}
