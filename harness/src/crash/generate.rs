// SPDX-License-Identifier: GPL-2.0
//! Draws workloads from a seed.
//!
//! A *focus* is a kind of operation that a workload is to do most of; each has some variants, among which the seed
//! chooses. The names it starts with are those that [`super::mount`] puts into every process's directory.

use crate::raw::wait::Rng;

use super::op::{Op, Proc, Workload};
use super::{programs, steps};

/// Pieces of workloads: a few operations that belong together.
pub type Step = fn(&mut Draw);

/// What the cases of a group do most of, and which of the server's opcodes they are to die in.
pub struct Focus {
    pub name: &'static str,
    /// Empty: in any.
    pub opcode: &'static str,
    steps: &'static [Step],
}

/// Every opcode of the server, and kinds of it that differ much.
pub const FOCUSES: &[Focus] = &[
    focus("create", "create", &[steps::create]),
    focus("mkdir", "mkdir", &[steps::mkdir]),
    focus("mknod", "mknod", &[steps::mknod]),
    focus("symlink", "symlink", &[steps::symlink]),
    focus("link", "link", &[steps::link]),
    focus("unlink", "unlink", &[steps::unlink, steps::unlink_held]),
    focus("rmdir", "rmdir", &[steps::rmdir, steps::rmdir_held]),
    focus("rename", "rename", &[steps::rename]),
    focus("rename-over", "rename", &[steps::rename_over_file]),
    focus("rename-over-dir", "rename", &[steps::rename_over_dir]),
    focus("rename-noreplace", "rename", &[steps::rename_noreplace]),
    focus("rename-exchange", "rename", &[steps::rename_exchange]),
    focus("rename-whiteout", "rename", &[steps::rename_whiteout]),
    focus("setattr", "setattr", &[steps::attributes, steps::truncate]),
    focus("setxattr", "setxattr", &[steps::set_xattr]),
    focus("removexattr", "removexattr", &[steps::remove_xattr]),
    focus("write", "write", &[steps::write, steps::append]),
    focus("fallocate", "fallocate", &[steps::fallocate]),
    focus("copy", "copy_file_range", &[steps::copy]),
    focus("open", "open", &[steps::open]),
    focus("flush", "flush", &[steps::open]),
    focus("release", "release", &[steps::open, steps::unlink_held]),
    focus("read", "read", &[steps::read]),
    focus("fsync", "fsync", &[steps::fsync]),
    focus("fsyncdir", "fsyncdir", &[steps::fsync_dir]),
    focus("opendir", "opendir", &[steps::stream]),
    focus("readdir", "readdir", &[steps::stream]),
    focus("readdirplus", "readdirplus", &[steps::stream]),
    focus("releasedir", "releasedir", &[steps::stream]),
    focus("lookup", "lookup", &[steps::lookup]),
    focus("forget", "forget", &[steps::rmdir]),
    focus("getattr", "getattr", &[steps::getattr]),
    focus("getxattr", "getxattr", &[steps::get_xattr]),
    focus("listxattr", "listxattr", &[steps::get_xattr]),
    focus("readlink", "readlink", &[steps::readlink]),
    focus("lseek", "lseek", &[steps::seek]),
    focus("statfs", "statfs", &[steps::statfs]),
    focus("tar", "", &[programs::tar]),
    focus("cp", "", &[programs::cp]),
    focus("rsync", "", &[programs::rsync]),
    focus("git", "", &[programs::git]),
    focus("sqlite", "", &[programs::sqlite]),
    focus("compile", "", &[programs::compile]),
    focus("fsx", "", &[programs::fsx]),
];

/// Long workloads of everything.
pub const MIXED: Focus = focus("mixed", "", &EVERYTHING);
/// Longer ones, for many deaths.
pub const MANY: Focus = focus(super::plan::MANY, "", &EVERYTHING);

const NOISE: &[Step] = &[
    steps::create,
    steps::mkdir,
    steps::mknod,
    steps::symlink,
    steps::link,
    steps::unlink,
    steps::unlink_held,
    steps::rmdir,
    steps::rmdir_held,
    steps::rename,
    steps::rename_over_file,
    steps::rename_over_dir,
    steps::rename_noreplace,
    steps::rename_exchange,
    steps::rename_whiteout,
    steps::attributes,
    steps::truncate,
    steps::set_xattr,
    steps::remove_xattr,
    steps::get_xattr,
    steps::write,
    steps::append,
    steps::fallocate,
    steps::copy,
    steps::open,
    steps::read,
    steps::fsync,
    steps::getattr,
    steps::seek,
    steps::map,
];

/// What is no noise for a workload of one kind.
const MORE: &[Step] = &[
    steps::stream,
    steps::lookup,
    steps::readlink,
    steps::fsync_dir,
    steps::statfs,
];

/// All of it.
const EVERYTHING: [Step; NOISE.len() + MORE.len()] = {
    let mut all = [NOISE[0]; NOISE.len() + MORE.len()];
    let mut at = 0;
    while at < all.len() {
        all[at] = if at < NOISE.len() {
            NOISE[at]
        } else {
            MORE[at - NOISE.len()]
        };
        at += 1;
    }
    all
};

/// Changes that the journal knows: what is killed first when recoveries are killed.
pub const JOURNALLED: &[&str] = &[
    "create",
    "mkdir",
    "mknod",
    "symlink",
    "link",
    "unlink",
    "rmdir",
    "rename",
    "rename-over",
    "rename-over-dir",
    "rename-exchange",
    "rename-whiteout",
    "setxattr",
    "removexattr",
    "copy",
];

const fn focus(name: &'static str, opcode: &'static str, steps: &'static [Step]) -> Focus {
    Focus {
        name,
        opcode,
        steps,
    }
}

pub fn find(name: &str) -> Option<&'static Focus> {
    FOCUSES.iter().find(|focus| focus.name == name)
}

/// Owner of what the second of several processes makes.
const OTHER: u32 = 1000;

/// The workload of a focus; `procs` processes.
pub fn workload(focus: &Focus, seed: u64, procs: usize) -> Workload {
    let mut rng = Rng(seed);
    let procs = (0..procs).map(|id| {
        // Not everything is allowed to others; a single one is root in most workloads.
        let other = match procs {
            1 => rng.below(4) == 0 && !ROOT_ONLY.contains(&focus.name),
            _ => id == 1 && !ROOT_ONLY.contains(&focus.name),
        };
        // What it reads must be there, in all workloads that may draw it.
        let many = focus.steps.contains(&(steps::stream as Step));
        let mut draw = Draw {
            rng: Rng(rng.next()),
            ops: Vec::new(),
            names: 0,
            bytes: id as u8 * 80,
        };
        draw.all_of(focus);
        let ops = draw.ops;
        Proc {
            id,
            uid: if other { OTHER } else { 0 },
            many,
            ops,
        }
    });
    Workload {
        procs: procs.collect(),
    }
}

/// Whiteouts are device nodes.
const ROOT_ONLY: &[&str] = &["rename-whiteout"];

pub struct Draw {
    pub rng: Rng,
    ops: Vec<Op>,
    names: usize,
    bytes: u8,
}

impl Draw {
    fn all_of(&mut self, focus: &Focus) {
        let rounds = match (focus.name, focus.opcode) {
            ("mixed", _) => 12,
            (super::plan::MANY, _) => 30,
            (_, "") => 1,
            _ => 2,
        };
        for _ in 0..rounds {
            if rounds == 2 && self.rng.below(2) == 0 {
                let noise = NOISE[self.rng.below(NOISE.len())];
                noise(self);
            }
            let step = focus.steps[self.rng.below(focus.steps.len())];
            step(self);
        }
        self.op(Op::List(".".into()));
    }

    pub fn op(&mut self, op: Op) {
        self.ops.push(op);
    }

    /// A name that nothing has had yet.
    pub fn fresh(&mut self, prefix: &str) -> String {
        self.names += 1;
        // Long ones now and then.
        let tail = if self.rng.below(8) == 0 {
            "x".repeat(100)
        } else {
            String::new()
        };
        format!("{prefix}{}{tail}", self.names)
    }

    /// A pattern for data that nobody else writes.
    pub fn bytes(&mut self) -> u8 {
        self.bytes = self.bytes.wrapping_add(1);
        self.bytes
    }

    pub fn one_of<T: Clone>(&mut self, all: &[T]) -> T {
        all[self.rng.below(all.len())].clone()
    }

    pub fn chance(&mut self, one_in: usize) -> bool {
        self.rng.below(one_in) == 0
    }

    /// A directory of the process, without a slash at the end, or none.
    pub fn place(&mut self, name: String) -> String {
        let dir = self.one_of(&["", "", "d0/", "e2/"]);
        format!("{dir}{name}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_draws_the_same_workload_and_another_does_not() {
        for focus in FOCUSES.iter().chain([&MIXED, &MANY]) {
            assert_eq!(
                workload(focus, 5, 3),
                workload(focus, 5, 3),
                "{}",
                focus.name
            );
            if focus.opcode.is_empty() && ![MIXED.name, MANY.name].contains(&focus.name) {
                continue; // a program does what it does
            }
            let different = (6..12).any(|seed| workload(focus, seed, 3) != workload(focus, 5, 3));
            assert!(different, "{}", focus.name);
        }
    }

    #[test]
    fn everything_that_the_journal_knows_is_a_focus() {
        assert!(JOURNALLED.iter().all(|name| find(name).is_some()));
    }

    #[test]
    fn many_deaths_leave_no_kind_of_step_out() {
        let kinds = FOCUSES.iter().filter(|focus| !focus.opcode.is_empty());
        for step in kinds.flat_map(|focus| focus.steps).chain(NOISE) {
            assert!(EVERYTHING.contains(step));
        }
    }

    #[test]
    fn a_directory_that_is_read_is_there() {
        for focus in FOCUSES.iter().chain([&MIXED, &MANY]) {
            for proc in (0..40).flat_map(|seed| workload(focus, seed, 3).procs) {
                let reads = |op: &Op| matches!(op, Op::OpenDir(_, name) if name == "many");
                assert!(proc.many || !proc.ops.iter().any(reads), "{}", focus.name);
            }
        }
    }

    #[test]
    fn every_kind_of_operation_is_drawn() {
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..60 {
            for focus in FOCUSES.iter().filter(|focus| !focus.opcode.is_empty()) {
                for op in workload(focus, seed, 1)
                    .procs
                    .into_iter()
                    .flat_map(|p| p.ops)
                {
                    let text = format!("{op:?}");
                    seen.insert(text.split('(').next().unwrap().to_owned());
                }
            }
        }
        // As many as `Op` has variants.
        assert_eq!(seen.len(), 41, "{seen:?}");
    }
}
