// SPDX-License-Identifier: GPL-2.0
//! Which deaths an application can notice when the server lacks something, and why it cannot notice the others.
//!
//! A *cell* is an opcode and a point of it. Without the journal each cell either differs at some draw of the workload, or
//! there is a reason, in [`RULES`], why it cannot: then not one of its cases may differ. What is neither is *unexplained*
//! (too few draws, or a matrix that is too weak), and a reason whose cell differs is *refuted*. Nothing here decides what a
//! case's verdict is; that comes from the comparison alone.
//!
//! A death takes the requests with it that other threads have in their hands. A difference where one of these could be
//! the cause is counted as *beside*: it proves nothing of the cell. With a descriptor for each thread, on a kernel that only sends
//! again, that is any difference at a cell that has a reason.

use super::dim::Mode;
use super::plan::{Case, Kill};

/// What is to be expected of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Differs at some draw.
    Differs,
    /// Never does, and why.
    Cannot(&'static str),
}

use Class::{Cannot, Differs};

/// For these opcodes (none: for any) at these points (none: at any). The first that fits is taken.
struct Rule(&'static [&'static str], &'static [&'static str], Class);

impl Rule {
    fn fits(&self, opcode: &str, point: &str) -> bool {
        let fits = |names: &[&str], name| names.is_empty() || names.contains(&name);
        fits(self.0, opcode) && fits(self.1, point)
    }
}

/// Without the journal. The arguments are about the passthrough server, `harness/src/serve/passthrough`.
const RULES: &[Rule] = &[
    Rule(
        &["adopt", "none"],
        &[],
        Cannot("before the first request, or before the recovery begins: no request is in anybody's hands"),
    ),
    Rule(
        &["recover"],
        &[],
        Cannot("answers no request of an application, and the next instance begins the recovery anew"),
    ),
    Rule(
        &["forget"],
        &[],
        Cannot("not answered and not sent again: a count stays too high, or a grave is left, and nobody can see either"),
    ),
    Rule(
        &[],
        &["start"],
        Cannot("nothing is done yet: executed for the first time when it is sent again"),
    ),
    Rule(
        &[],
        &["end"],
        Cannot("the kernel has the answer: not sent again"),
    ),
    Rule(
        &MAKING,
        &["open_by_handle_at"],
        Cannot("before the change: opens the node of the parent, or of the file to be linked"),
    ),
    Rule(
        &["mkdir", "mknod", "symlink", "link"],
        &[
            "mkdirat",
            "mknodat",
            "symlinkat",
            "linkat",
            "openat",
            "fstatat",
            "name_to_handle_at",
            "reply",
        ],
        Differs, // the name is there: EEXIST
    ),
    Rule(
        &["create"],
        &["openat", "fstatat", "name_to_handle_at", "handle", "reply"],
        Differs, // with O_EXCL: EEXIST; without it the name is opened
    ),
    Rule(
        &["create"],
        &["open", "ftruncate"],
        Cannot(OPENED_INSTEAD),
    ),
    Rule(
        &REMOVING,
        &["open_by_handle_at", "openat", "fstatat", "name_to_handle_at"],
        Cannot("before the change: looks at what has the name"),
    ),
    Rule(&["unlink"], &["renameat2", "unlinkat"], Differs), // ENOENT
    Rule(
        &["rmdir", "rename"],
        &["renameat2", "open", "lseek", "getdents64"],
        Differs, // ENOENT, exchanged back; the last three also look into a directory that has been moved
    ),
    Rule(
        &["rename"],
        &["linkat"],
        Cannot("before the change: a second name in the graveyard, which is taken as it is when it is there already"),
    ),
    Rule(
        &["setxattr", "removexattr"],
        &["open_by_handle_at", "getxattr"],
        Cannot("before the change: opens the node, looks for the attribute"),
    ),
    Rule(&["setxattr"], &["setxattr"], Differs), // with XATTR_CREATE: EEXIST
    Rule(&["removexattr"], &["removexattr"], Differs), // ENODATA
    Rule(
        &["setattr"],
        &[
            "open_by_handle_at",
            "fchownat",
            "chmod",
            "ftruncate",
            "utimensat",
            "fstatat",
            "reply",
        ],
        Cannot("every part is absolute, in a fixed order: made again it ends the same"),
    ),
    Rule(
        &["write"],
        &["open_by_handle_at", "pwrite"],
        Cannot("the offset is in the request: the same bytes in the same place, and the inode is locked meanwhile"),
    ),
    Rule(
        &["fallocate"],
        &["open_by_handle_at", "fallocate"],
        Cannot("the range is in the request, and modes that move data are refused: made again it ends the same"),
    ),
    Rule(
        &["copy_file_range"],
        &["open_by_handle_at", "copy_file_range"],
        Cannot("copies the same bytes again: nobody else writes the source here (names are disjoint, who copies waits)"),
    ),
    Rule(
        &["open", "opendir"],
        &["open_by_handle_at", "handle"],
        Cannot("opened again; `fh` comes from the handle table, which does not belong to the journal"),
    ),
    Rule(
        &["flush", "fsync", "fsyncdir"],
        &["open_by_handle_at", "fsync"],
        Cannot("changes nothing that can be read"),
    ),
    Rule(
        &["lookup", "readdirplus"],
        &[
            "open_by_handle_at",
            "openat",
            "fstatat",
            "name_to_handle_at",
            "lseek",
            "getdents64",
            "reply",
        ],
        Cannot("changes nothing but lookup counts, which the replay sets or which only stay too high"),
    ),
    Rule(
        &[
            "getattr", "getxattr", "listxattr", "readlink", "lseek", "statfs", "read", "readdir",
        ],
        &[
            "open_by_handle_at",
            "fstatat",
            "getxattr",
            "listxattr",
            "readlinkat",
            "lseek",
            "fstatvfs",
            "pread",
            "getdents64",
            "reply",
        ],
        Cannot("changes nothing"),
    ),
];

const MAKING: [&str; 5] = ["mkdir", "mknod", "symlink", "link", "create"];
const REMOVING: [&str; 3] = ["unlink", "rmdir", "rename"];

const OPENED_INSTEAD: &str =
    "only where a name that is there may be opened instead, and nobody has written to that file yet";
const JOURNAL_KNOWS: &str =
    "the journal has the change: answered, not executed, when it is sent again";
const NOBODY_WAITS: &str = "nobody waits for the answer";
const KEEPER: &str = "the keeper dies here, and its server wherever it is a moment later: chance";
const NEITHER: &str = "neither death is at a cell that differs";
const DEATHS_TOGETHER: &str = "many deaths in a case: which of them it was is not known";

/// What the server lacks, as far as a cell depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Lacks {
    pub journal: bool,
    /// Requests of a descriptor that is closed end with `ECONNABORTED`: cloned ones, and a kernel that only sends again.
    pub descriptor: bool,
}

impl Lacks {
    pub fn of(mode: Mode, cloned: bool) -> Lacks {
        Lacks {
            journal: !mode.journal,
            descriptor: cloned && !mode.sign,
        }
    }

    /// `None`: a cell of which nobody has written anything.
    pub fn class(self, opcode: &str, point: &str) -> Option<Class> {
        let class = match point {
            "intent" | "outcome" | "decided" | "resolved-one" if !self.journal => {
                Cannot("the journal has it: executed once, whether it was before or not")
            }
            "answered" if !self.journal => Cannot("the kernel has the answer: not sent again"),
            _ => RULES.iter().find(|rule| rule.fits(opcode, point))?.2,
        };
        if self.descriptor && in_hand(opcode, point) {
            return Some(match opcode {
                "release" | "releasedir" => Cannot(NOBODY_WAITS),
                _ => Differs,
            });
        }
        Some(match class {
            Differs if !self.journal => Cannot(JOURNAL_KNOWS),
            class => class,
        })
    }

    /// Whether a death can be noticed that comes while a request of this opcode is in a server's hands.
    fn noticed(self, opcode: &str) -> bool {
        let of_rules = self.journal
            && RULES
                .iter()
                .any(|rule| rule.2 == Differs && rule.0.contains(&opcode));
        of_rules || self.class(opcode, "start") == Some(Differs)
    }
}

/// Whether somebody waits for a server that is at this point.
fn in_hand(opcode: &str, point: &str) -> bool {
    !["adopt", "none", "recover", "forget"].contains(&opcode)
        && !["end", "answered"].contains(&point)
}

/// What a case can tell of its cell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Expected {
    /// One of its deaths is at a cell that differs, or that nobody has written anything of.
    pub could: bool,
    /// Another thread had a request in its hands whose loss can be noticed.
    pub beside: bool,
    /// Of what differs nobody knows where it comes from: it is counted, and judged by nobody.
    pub chance: bool,
}

impl Expected {
    /// A difference is one that has a reason why it cannot be.
    pub fn surprise(self) -> bool {
        !self.could && !self.beside && !self.chance
    }
}

pub fn expected(mode: Mode, case: &Case, beside: &[String]) -> Expected {
    let lacks = Lacks::of(mode, case.group.dim.cloned);
    let opcode = |name: &String| name.split('.').next().unwrap_or_default().to_owned();
    let could = |kill: &Kill| {
        let (opcode, point) = kill.parts();
        !matches!(lacks.class(opcode, point), Some(Cannot(_)))
    };
    // Whatever the first death was: the request has been executed again, and that went well.
    let opened_instead = |kill: &Kill| {
        let (opcode, point) = kill.parts();
        lacks.class(opcode, point) == Some(Cannot(OPENED_INSTEAD))
    };
    let deaths = case.deaths();
    let could = case.kills.iter().any(could) && !case.kills.iter().any(opened_instead);
    // Who has just read a request is at no point yet, and its descriptor is closed with it.
    let read = lacks.descriptor && !could;
    Expected {
        could,
        beside: read || beside.iter().any(|name| lacks.noticed(&opcode(name))),
        chance: deaths.keeper || deaths.together,
    }
}

/// Whether somebody has written what is to be expected of a cell, by the name that [`super::tally`] gives it.
pub fn listed(lacks: Lacks, name: &str) -> bool {
    name == "many.case" || class_of(lacks, name).is_some()
}

/// The reason of a cell, by the same name; `None`: it should differ.
pub fn reason(lacks: Lacks, name: &str) -> Option<&'static str> {
    if name.contains("keeper.") {
        return Some(KEEPER);
    }
    if name == "many.case" {
        return Some(DEATHS_TOGETHER);
    }
    match class_of(lacks, name)? {
        Cannot(OPENED_INSTEAD) => Some(OPENED_INSTEAD),
        _ if name.starts_with("then ") => Some(NEITHER),
        Cannot(why) => Some(why),
        Differs => None,
    }
}

fn class_of(lacks: Lacks, name: &str) -> Option<Class> {
    let name = name.strip_prefix("then ").unwrap_or(name);
    let name = name.strip_prefix("keeper.").unwrap_or(name);
    let (opcode, point) = name.split_once('.')?;
    lacks.class(opcode, point)
}

#[cfg(test)]
#[path = "cells_tests.rs"]
mod tests;
