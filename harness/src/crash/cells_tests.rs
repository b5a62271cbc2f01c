// SPDX-License-Identifier: GPL-2.0
//! Every cell that the passthrough server can be killed in, and what is to be expected of it.

use super::*;

const NO_JOURNAL: Mode = Mode {
    journal: false,
    sign: true,
};
const RESEND_ONLY: Mode = Mode {
    journal: true,
    sign: false,
};
const NEITHER_OF_BOTH: Mode = Mode {
    journal: false,
    sign: false,
};

/// An opcode, its points that differ without the journal, and those that have a reason why they cannot. `start` and `end`
/// are points of all.
type Known = (
    &'static str,
    &'static [&'static str],
    &'static [&'static str],
);

const MADE: &[&str] = &["openat", "fstatat", "name_to_handle_at", "reply"];
const LOOKED_AT: &[&str] = &[
    "open_by_handle_at",
    "openat",
    "fstatat",
    "name_to_handle_at",
];
const FOUND: &[&str] = &[
    "open_by_handle_at",
    "openat",
    "fstatat",
    "name_to_handle_at",
    "reply",
];
const NODE: &[&str] = &["open_by_handle_at"];

/// All of them: what runs of the matrix have met. A new one is `unexplained` there until it is in [`RULES`], and belongs here.
const KNOWN: &[Known] = &[
    ("mkdir", MADE, NODE),
    ("mkdir", &["mkdirat"], &[]),
    ("mknod", MADE, NODE),
    ("mknod", &["mknodat"], &[]),
    ("symlink", MADE, NODE),
    ("symlink", &["symlinkat"], &[]),
    ("link", MADE, NODE),
    ("link", &["linkat"], &[]),
    ("create", MADE, NODE),
    ("create", &["handle"], &["open", "ftruncate"]),
    ("unlink", &["renameat2", "unlinkat"], LOOKED_AT),
    (
        "rmdir",
        &["renameat2", "open", "lseek", "getdents64"],
        LOOKED_AT,
    ),
    (
        "rename",
        &["renameat2", "open", "lseek", "getdents64"],
        LOOKED_AT,
    ),
    ("rename", &[], &["linkat"]),
    ("setxattr", &["setxattr"], NODE),
    ("removexattr", &["removexattr"], NODE),
    ("setattr", &[], &["open_by_handle_at", "fstatat", "reply"]),
    (
        "setattr",
        &[],
        &["fchownat", "chmod", "ftruncate", "utimensat"],
    ),
    ("write", &[], &["open_by_handle_at", "pwrite"]),
    ("fallocate", &[], &["open_by_handle_at", "fallocate"]),
    (
        "copy_file_range",
        &[],
        &["open_by_handle_at", "copy_file_range"],
    ),
    ("open", &[], &["open_by_handle_at", "handle"]),
    ("opendir", &[], &["open_by_handle_at", "handle"]),
    ("release", &[], &[]),
    ("releasedir", &[], &[]),
    ("flush", &[], NODE),
    ("fsync", &[], &["open_by_handle_at", "fsync"]),
    ("fsyncdir", &[], &["open_by_handle_at", "fsync"]),
    ("lookup", &[], FOUND),
    ("readdirplus", &[], FOUND),
    ("readdirplus", &[], &["lseek", "getdents64"]),
    (
        "readdir",
        &[],
        &["open_by_handle_at", "lseek", "getdents64"],
    ),
    ("getattr", &[], &["open_by_handle_at", "fstatat", "reply"]),
    ("getxattr", &[], &["open_by_handle_at", "getxattr"]),
    ("listxattr", &[], &["open_by_handle_at", "listxattr"]),
    ("readlink", &[], &["open_by_handle_at", "readlinkat"]),
    ("lseek", &[], &["open_by_handle_at", "lseek"]),
    ("read", &[], &["open_by_handle_at", "pread"]),
    ("statfs", &[], &["fstatvfs"]),
    ("forget", &[], &["unlinkat"]),
    ("adopt", &[], &["init"]),
    (
        "none",
        &[],
        &["openat", "mkdirat", "fstatat", "name_to_handle_at"],
    ),
    ("none", &[], &["open_by_handle_at", "lseek", "getdents64"]),
    (
        "recover",
        &[],
        &["restarted", "resolved", "reported", "settled", "swept"],
    ),
    (
        "recover",
        &[],
        &["replay", "init", "fstatat", "open_by_handle_at"],
    ),
];

/// Points of the journal, which are there with it only.
const JOURNALLED: &[(&str, &[&str])] = &[
    ("mkdir", &["fstatat", "intent", "outcome", "answered"]),
    ("rename", &["intent", "outcome", "answered"]),
    (
        "removexattr",
        &["getxattr", "intent", "outcome", "answered"],
    ),
    ("setxattr", &["getxattr", "intent", "outcome", "answered"]),
    ("copy_file_range", &["outcome", "answered"]),
    ("recover", &["decided", "resolved-one"]),
];

fn known() -> impl Iterator<Item = (&'static str, &'static str, bool)> {
    KNOWN.iter().flat_map(|(opcode, differ, cannot)| {
        let differ = differ.iter().map(|point| (*point, true));
        let cannot = cannot.iter().map(|point| (*point, false));
        let all = differ
            .chain(cannot)
            .chain([("start", false), ("end", false)]);
        all.map(|(point, differs)| (*opcode, point, differs))
    })
}

#[test]
fn without_the_journal_every_cell_differs_or_has_a_reason() {
    for (opcode, point, differs) in known() {
        let class = Lacks::of(NO_JOURNAL, false).class(opcode, point);
        match class {
            Some(Differs) => assert!(differs, "{opcode}.{point} differs, so it has no reason"),
            Some(Cannot(why)) => assert!(!differs && !why.is_empty(), "{opcode}.{point}: {why}"),
            None => panic!("{opcode}.{point} is neither"),
        }
        // The signature has to do with this only where descriptors are closed.
        assert_eq!(
            class,
            Lacks::of(NEITHER_OF_BOTH, false).class(opcode, point)
        );
    }
    let many = known().filter(|(.., differs)| *differs).count();
    assert_eq!(many, 37, "as many as the document says");
}

#[test]
fn with_the_journal_no_cell_differs_unless_its_descriptor_is_closed() {
    let one = Lacks::of(RESEND_ONLY, false);
    let journalled = JOURNALLED
        .iter()
        .flat_map(|(opcode, points)| points.iter().map(move |point| (*opcode, *point)));
    for (opcode, point) in known().map(|(o, p, _)| (o, p)).chain(journalled) {
        let name = format!("{opcode}.{point}");
        assert!(
            matches!(one.class(opcode, point), Some(Cannot(_))),
            "{name}"
        );
        assert!(listed(one, &name) && reason(one, &name).is_some(), "{name}");
        let cloned = Lacks::of(RESEND_ONLY, true);
        let waits = in_hand(opcode, point) && !opcode.starts_with("release");
        assert_eq!(
            cloned.class(opcode, point) == Some(Differs),
            waits,
            "{name}"
        );
    }
}

#[test]
fn a_cell_that_nobody_has_thought_of_is_neither() {
    let lacks = Lacks::of(NO_JOURNAL, false);
    for name in [
        "mkdir.chmod",
        "rename.intent",
        "bmap.ioctl",
        "then mkdir.chmod",
        "oracle.run",
    ] {
        assert!(!listed(lacks, name), "{name}");
    }
}

#[test]
fn every_rule_is_the_first_that_fits_something() {
    let first = |opcode: &str, point: &str| RULES.iter().position(|r| r.fits(opcode, point));
    let used: Vec<Option<usize>> = known().map(|(o, p, _)| first(o, p)).collect();
    for (n, rule) in RULES.iter().enumerate() {
        assert!(used.contains(&Some(n)), "{:?} {:?}", rule.0, rule.1);
    }
}

#[test]
fn a_case_could_differ_if_one_of_its_deaths_could() {
    let could = |text: &str, beside: &[&str]| {
        let case: Case = text.parse().unwrap();
        let beside: Vec<String> = beside.iter().map(|name| (*name).to_owned()).collect();
        let expected = expected(NO_JOURNAL, &case, &beside);
        (expected.could, expected.beside, expected.chance)
    };
    assert_eq!(
        could("t1-wt/mkdir/0/mkdir.mkdirat:1", &[]),
        (true, false, false)
    );
    assert_eq!(
        could("t1-wt/mkdir/0/mkdir.start:1", &[]),
        (false, false, false)
    );
    assert_eq!(
        could("t1-wt/mkdir/0/mkdir.chmod:1", &[]),
        (true, false, false)
    );
    let twice = "t1-wt/twice/0/mkdir.start:1+mkdir.reply:1";
    assert_eq!(could(twice, &[]), (true, false, false));
    let twice = "t1-wt/twice/0/mkdir.start:1+recover.start:1";
    assert_eq!(could(twice, &[]), (false, false, false));
    let twice = "t1-wt/twice/0/create.reply:1+create.open:1";
    assert_eq!(could(twice, &[]), (false, false, false));
    // What another thread had in its hands, wherever it was with it.
    let case = "t4-wt/read/0/read.pread:1";
    assert_eq!(could(case, &["rename.start"]), (false, true, false));
    assert_eq!(
        could(case, &["write.pwrite", "none.openat"]),
        (false, false, false)
    );
    assert_eq!(
        could("t1-wt/keeper/0/read.pread:1", &[]),
        (false, false, true)
    );
    assert_eq!(
        could("t1-wt/many/0/read.pread:1", &[]),
        (false, false, true)
    );
}
