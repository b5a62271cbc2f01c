// SPDX-License-Identifier: GPL-2.0
//! Each change of names and attributes, each moment at which the server may die in it, one or two
//! restarts, then the resent request: the tree must be the one that comes out without a crash.

use std::ffi::OsStr;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rust_fuse_notify::std::state::{Config, Slot, State};
use rust_fuse_notify::std::wire::{Identity, FUSE_UNIQUE_RESEND};

use crate::crash_points::{die_at, points_of};

use super::backing::Backing;
use super::creds::Caller;
use super::graveyard::Graveyard;
use super::make::Thing;
use super::nodes::ROOT;
use super::server::{Options, Server};
use super::sys::Res;
use super::wire::{duplicate, Device};

const ID: u64 = 42;
const RESENT: u64 = ID | FUSE_UNIQUE_RESEND | (3 << 48);
const ME: Caller = Caller { uid: 0, gid: 0 };

/// A server without a kernel; dropped and made again it is the next instance.
fn instance(dir: &Path, memfd: &OwnedFd) -> Server {
    let backing = Backing::open(dir).unwrap();
    let fd = duplicate(memfd.as_fd()).unwrap();
    let config = Config::default();
    let state = Arc::new(State::open(fd, Identity(backing.identity), &config).unwrap());
    let yard = Graveyard::open(backing.root()).unwrap();
    let null: OwnedFd = fs::File::open("/dev/null").unwrap().into();
    let opts = Options {
        writeback: false,
        timeout: Duration::from_secs(1),
    };
    let server = Server::new(backing, yard, state, Device::new(null, false), opts, 1024);
    server
        .state
        .nodes()
        .set_root(&server.describe_root().unwrap());
    server
}

fn s(name: &str) -> &OsStr {
    OsStr::new(name)
}

struct Case {
    name: &'static str,
    /// The kernel knows these, as it does of everything that it asks to change.
    known: &'static [&'static str],
    act: fn(&Server, u64) -> Res<()>,
}

/// The request was answered.
fn finish<T>((_, slot): (T, Option<Slot<'_>>)) {
    if let Some(slot) = slot {
        slot.done();
    }
}

fn rename(server: &Server, unique: u64, from: &str, to: &str, flags: u32) -> Res<()> {
    server
        .rename(unique, (ROOT, s(from)), (ROOT, s(to)), flags)
        .map(finish)
}

fn node(server: &Server, name: &str) -> u64 {
    let seen = server.look(ROOT, &std::ffi::CString::new(name).unwrap());
    server.known(&seen.unwrap().expect("it is there").handle)
}

const CASES: &[Case] = &[
    Case {
        name: "mkdir",
        known: &[],
        act: |server, unique| {
            let thing = Thing::Dir { mode: 0o750 };
            server
                .make(unique, ME, (ROOT, s("new")), 0o22, &thing)
                .map(finish)
        },
    },
    Case {
        name: "mknod",
        known: &[],
        act: |server, unique| {
            let thing = Thing::Node {
                mode: libc::S_IFIFO | 0o640,
                rdev: 0,
            };
            server
                .make(unique, ME, (ROOT, s("new")), 0, &thing)
                .map(finish)
        },
    },
    Case {
        name: "symlink",
        known: &[],
        act: |server, unique| {
            let thing = Thing::Symlink {
                target: c"somewhere",
            };
            server
                .make(unique, ME, (ROOT, s("new")), 0, &thing)
                .map(finish)
        },
    },
    Case {
        name: "create",
        known: &[],
        act: |server, unique| {
            let flags = libc::O_CREAT | libc::O_EXCL | libc::O_RDWR;
            server
                .create(unique, ME, (ROOT, s("new")), (0o640, 0), flags)
                .map(finish)
        },
    },
    Case {
        name: "link",
        known: &["one"],
        act: |server, unique| {
            server
                .link(unique, node(server, "one"), (ROOT, s("new")))
                .map(finish)
        },
    },
    Case {
        name: "unlink of the last name",
        known: &["one"],
        act: |server, unique| server.remove(unique, (ROOT, s("one")), false).map(finish),
    },
    Case {
        name: "unlink of one of two names",
        known: &["two"],
        act: |server, unique| server.remove(unique, (ROOT, s("two")), false).map(finish),
    },
    Case {
        name: "unlink of what the kernel does not hold",
        known: &[],
        act: |server, unique| server.remove(unique, (ROOT, s("one")), false).map(finish),
    },
    Case {
        name: "rmdir",
        known: &["empty"],
        act: |server, unique| server.remove(unique, (ROOT, s("empty")), true).map(finish),
    },
    Case {
        name: "rename",
        known: &["one"],
        act: |server, unique| rename(server, unique, "one", "new", 0),
    },
    Case {
        name: "rename of a directory",
        known: &["full"],
        act: |server, unique| rename(server, unique, "full", "new", libc::RENAME_NOREPLACE),
    },
    Case {
        name: "rename over the last name",
        known: &["one", "two"],
        act: |server, unique| rename(server, unique, "two", "one", 0),
    },
    Case {
        name: "rename over one of two names",
        known: &["one", "two"],
        act: |server, unique| rename(server, unique, "one", "two", 0),
    },
    Case {
        name: "rename between two names of a file",
        known: &["two", "two-too"],
        act: |server, unique| rename(server, unique, "two", "two-too", 0),
    },
    Case {
        name: "rename over an empty directory",
        known: &["full", "empty"],
        act: |server, unique| rename(server, unique, "full", "empty", 0),
    },
    Case {
        name: "exchange",
        known: &["one", "full"],
        act: |server, unique| rename(server, unique, "one", "full", libc::RENAME_EXCHANGE),
    },
    Case {
        name: "setxattr with CREATE",
        known: &["one"],
        act: |server, unique| {
            let flags = libc::XATTR_CREATE;
            let name = s("trusted.new");
            let set = server.set_xattr(unique, node(server, "one"), name, b"1", flags);
            set.map(|slot| finish(((), slot)))
        },
    },
    Case {
        name: "removexattr",
        known: &["one"],
        act: |server, unique| {
            let removed = server.remove_xattr(unique, node(server, "one"), s("trusted.old"));
            removed.map(|slot| finish(((), slot)))
        },
    },
];

fn lay_out(dir: &Path) {
    // SAFETY: cannot fail and touches no memory. A change made earlier left the thread its own.
    unsafe { libc::umask(0o22) };
    fs::write(dir.join("one"), b"content of one").unwrap();
    fs::write(dir.join("two"), b"content of two").unwrap();
    fs::hard_link(dir.join("two"), dir.join("two-too")).unwrap();
    fs::create_dir(dir.join("empty")).unwrap();
    fs::create_dir(dir.join("full")).unwrap();
    fs::write(dir.join("full/inner"), b"inner").unwrap();
    let one = fs::File::open(dir.join("one")).unwrap();
    super::sys::set_xattr(one.as_fd(), c"trusted.old", b"old", 0).unwrap();
}

/// Names, types, modes, link counts, contents; graves by number, for their names are nodeids.
fn tree(dir: &Path) -> Vec<String> {
    use std::os::unix::fs::MetadataExt;
    let mut lines = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_owned();
        if name == ".fuse-restart-graveyard" {
            lines.push(format!("{} graves", fs::read_dir(path).unwrap().count()));
            continue;
        }
        let meta = path.symlink_metadata().unwrap();
        let content = if meta.is_file() {
            fs::read(&path).unwrap()
        } else {
            Vec::new()
        };
        let mut xattrs = vec![0; 1024];
        let n = if meta.is_file() {
            let file = fs::File::open(&path).unwrap();
            super::sys::list_xattr(file.as_fd(), &mut xattrs).unwrap()
        } else {
            0
        };
        let xattrs = String::from_utf8_lossy(&xattrs[..n]).into_owned();
        let (mode, nlink) = (meta.mode(), meta.nlink());
        lines.push(format!("{name:?} {mode:o} {nlink} {content:?} {xattrs:?}"));
        if meta.is_dir() {
            lines.extend(tree(&path).into_iter().map(|l| format!("{name:?}/{l}")));
        }
    }
    lines.sort();
    lines
}

/// What is left when a server ran a case to its end, and the points it passed.
fn undisturbed(case: &Case) -> (Vec<String>, Vec<&'static str>) {
    let dir = tempfile::tempdir().unwrap();
    lay_out(dir.path());
    let memfd = State::create_memfd().unwrap();
    let server = instance(dir.path(), &memfd);
    for name in case.known {
        server.lookup(ROOT, s(name)).unwrap();
    }
    let (points, result) = points_of(|| (case.act)(&server, ID));
    result.unwrap_or_else(|e| panic!("{}: {e}", case.name));
    (tree(dir.path()), points)
}

/// What is left when the server dies at point number `at`, `restarts` instances resolve what it left (all but the last
/// die when they have), and the request is resent or not.
fn run(case: &Case, at: usize, restarts: u32, resend: bool) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    lay_out(dir.path());
    let memfd = State::create_memfd().unwrap();
    let server = instance(dir.path(), &memfd);
    for name in case.known {
        server.lookup(ROOT, s(name)).unwrap();
    }
    let point = die_at(at, || (case.act)(&server, ID))
        .unwrap_or_else(|result| panic!("{} ended with {result:?}, no point {at}", case.name));
    drop(server);
    for n in 1..restarts {
        let server = instance(dir.path(), &memfd);
        server
            .resolve_journal()
            .unwrap_or_else(|e| panic!("{} {point} {n}: {e}", case.name));
    }
    let server = instance(dir.path(), &memfd);
    server.resolve_journal().unwrap();
    if resend {
        (case.act)(&server, RESENT)
            .unwrap_or_else(|e| panic!("{}, dead at {at} {point}, resent: {e}", case.name));
        assert!(
            server.state.journal().unresolved().is_empty(),
            "{}, dead at {at} {point}: something is left in the journal",
            case.name
        );
    }
    tree(dir.path())
}

fn possible() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: needs root (CAP_DAC_READ_SEARCH)");
    }
    root
}

#[test]
fn a_resent_change_takes_effect_exactly_once_wherever_the_server_died() {
    if !possible() {
        return;
    }
    for case in CASES {
        let (want, points) = undisturbed(case);
        assert!(points.len() > 4, "{}: {points:?}", case.name);
        for (at, point) in points.iter().enumerate() {
            for restarts in [1, 2] {
                let got = run(case, at, restarts, true);
                assert_eq!(
                    got, want,
                    "{}, dead at {at} of {points:?}, {point}, {restarts} restarts",
                    case.name
                );
            }
        }
    }
}

#[test]
fn a_change_that_nobody_waits_for_any_more_is_whole_or_not_there() {
    if !possible() {
        return;
    }
    for case in CASES {
        let (done, points) = undisturbed(case);
        let idle = Case {
            act: |_, _| Ok(()),
            ..*case
        };
        let (undone, _) = undisturbed(&idle);
        for (at, point) in points.iter().enumerate() {
            let got = run(case, at, 1, false);
            assert!(
                got == done || got == undone,
                "{}, dead at {at}, {point}: neither before nor after but {got:#?}\nbefore {undone:#?}\nafter {done:#?}",
                case.name
            );
        }
    }
}

#[test]
fn a_new_request_is_not_taken_for_an_old_one() {
    if !possible() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let memfd = State::create_memfd().unwrap();
    let server = instance(dir.path(), &memfd);
    let thing = Thing::Dir { mode: 0o755 };
    let make = |server: &Server, unique| {
        server
            .make(unique, ME, (ROOT, s("new")), 0, &thing)
            .map(finish)
    };
    let outcome = {
        let dir = tempfile::tempdir().unwrap();
        let server = instance(dir.path(), &State::create_memfd().unwrap());
        let (points, _) = points_of(|| make(&server, ID));
        points.iter().position(|p| *p == "outcome").unwrap()
    };
    die_at(outcome, || make(&server, ID)).unwrap();
    drop(server);
    let server = instance(dir.path(), &memfd);
    server.resolve_journal().unwrap();
    // Without the RESEND bit, or with another id, it is a mkdir of a name that exists.
    assert_eq!(make(&server, ID + 2), Err(nix::errno::Errno::EEXIST));
    assert_eq!(make(&server, RESENT + 2), Err(nix::errno::Errno::EEXIST));
    assert_eq!(make(&server, RESENT), Ok(()));
    // Answered once: the next one with this id is another request.
    assert_eq!(make(&server, RESENT), Err(nix::errno::Errno::EEXIST));
}

#[test]
fn a_nodeid_that_is_not_that_file_any_more_is_refused() {
    if !possible() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    lay_out(dir.path());
    let memfd = State::create_memfd().unwrap();
    let server = instance(dir.path(), &memfd);
    let one = server.lookup(ROOT, s("one")).unwrap();
    let two = server.lookup(ROOT, s("two")).unwrap();
    let empty = server.lookup(ROOT, s("empty")).unwrap();
    drop(server);
    let server = instance(dir.path(), &memfd);
    let ok = server.confirmed(one.nodeid, one.generation).unwrap();
    assert_eq!(ok.ino, one.attr.ino);
    assert!(server.confirmed(ROOT, 0).is_ok());

    let stale = |nodeid, generation, why: &str| {
        let answer = server.confirmed(nodeid, generation);
        assert_eq!(answer.map(drop), Err(nix::errno::Errno::ESTALE), "{why}");
    };
    stale(one.nodeid, one.generation ^ 1, "another generation");
    stale(one.nodeid, two.generation, "the generation of another file");
    stale(12345, 0, "never given out");
    stale(0, 0, "no nodeid");
    stale(ROOT, 1, "the root has generation 0");
    fs::remove_file(dir.path().join("one")).unwrap();
    fs::write(dir.path().join("one"), b"successor").unwrap();
    stale(one.nodeid, one.generation, "removed and made again");
    // Removed in the backing, but still open somewhere: it has no name to come back to.
    let open = fs::File::open(dir.path().join("empty")).unwrap();
    fs::remove_dir(dir.path().join("empty")).unwrap();
    stale(empty.nodeid, empty.generation, "removed and open elsewhere");
    drop(open);
}

#[test]
fn forget_takes_back_what_lookup_gave_and_no_more() {
    if !possible() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    lay_out(dir.path());
    let memfd = State::create_memfd().unwrap();
    let server = instance(dir.path(), &memfd);
    let nodes = server.state.nodes();
    let start = nodes.len();
    let one = server.lookup(ROOT, s("one")).unwrap().nodeid;
    assert_eq!(server.lookup(ROOT, s("one")).unwrap().nodeid, one);
    assert_eq!(server.lookup(ROOT, s("two")).unwrap().nodeid, {
        server.lookup(ROOT, s("two-too")).unwrap().nodeid
    });
    assert_eq!(nodes.get(one).unwrap().lookups, 2);
    server.forget(one, 1);
    assert_eq!(nodes.get(one).unwrap().lookups, 1);
    server.forget(99_999, 5); // unknown: ignored
    server.forget(ROOT, 5); // the root is not counted
    server.remove(ID, (ROOT, s("one")), false).unwrap();
    assert!(server.yard.contains(one) && server.attr(one).unwrap().nlink == 0);
    let fh = server.open(ID + 2, one, libc::O_RDONLY).unwrap();
    assert!(server.file(one, fh).is_ok());
    server.forget(one, 1);
    assert!(nodes.get(one).is_none() && !server.yard.contains(one));
    assert!(
        server.state.handles().is_empty(),
        "a handle outlives its node"
    );
    assert!(server.file(one, fh).is_err());
    assert_eq!(
        tree(dir.path())
            .iter()
            .filter(|l| l.starts_with("0 graves"))
            .count(),
        1
    );
    let two = server.lookup(ROOT, s("two")).unwrap().nodeid;
    server.forget(two, 3);
    assert_eq!(nodes.len(), start, "nothing is left");
    // A file that is looked up again gets a nodeid that was never used.
    assert_ne!(server.lookup(ROOT, s("two")).unwrap().nodeid, two);
}
