// SPDX-License-Identifier: GPL-2.0
//! Each change of names and attributes, each moment at which the server may die in it, one or two
//! restarts, then the resent request: the tree must be the one that comes out without a crash.

use std::ffi::OsStr;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rust_fuse_notify::std::adopt::Recover;
use rust_fuse_notify::std::message::Replay;
use rust_fuse_notify::std::state::{Config, State};
use rust_fuse_notify::std::wire::{Identity, FUSE_UNIQUE_RESEND};

use crate::crash_points::{die_at, points_of};

use super::backing::Backing;
use super::crash_cases::{finish, Case, CASES};
use super::creds::Caller;
use super::graveyard::Graveyard;
use super::make::Thing;
use super::nodes::ROOT;
use super::server::{Options, Server};
use super::wire::{duplicate, Device};

pub const ID: u64 = 42;
pub const RESENT: u64 = ID | FUSE_UNIQUE_RESEND | (3 << 48);
pub const ME: Caller = Caller { uid: 0, gid: 0 };

/// A server without a kernel; dropped and made again it is the next instance.
pub fn instance(dir: &Path, memfd: &OwnedFd) -> Server {
    instance_with(dir, memfd, true)
}

fn instance_with(dir: &Path, memfd: &OwnedFd, journal: bool) -> Server {
    instance_of(dir, memfd, journal, &Config::default())
}

pub fn instance_of(dir: &Path, memfd: &OwnedFd, journal: bool, config: &Config) -> Server {
    let backing = Backing::open(dir).unwrap();
    let fd = duplicate(memfd.as_fd()).unwrap();
    let state = Arc::new(State::open(fd, Identity(backing.identity), config).unwrap());
    let yard = Graveyard::open(backing.root()).unwrap();
    let null: OwnedFd = fs::File::open("/dev/null").unwrap().into();
    let opts = Options {
        writeback: false,
        timeout: Duration::from_secs(1),
        discard: false,
        journal,
        sign: true,
    };
    let server = Server::new(backing, yard, state, Device::new(null, false), opts, 1024);
    server
        .state
        .nodes()
        .set_root(&server.describe_root().unwrap());
    server
}

pub fn s(name: &str) -> &OsStr {
    OsStr::new(name)
}

pub fn lay_out(dir: &Path) {
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
pub fn tree(dir: &Path) -> Vec<String> {
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

pub fn possible() -> bool {
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
        assert!(points.len() > 1, "{}: {points:?}", case.name);
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
    for case in CASES.iter().filter(|case| case.whole) {
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
    let state = server.state.clone();
    let mut recovery = super::recover::Recovery::new(Arc::new(server));
    let mut confirmed = |nodeid, generation| {
        let replay = Replay {
            unique: 9,
            nodeid,
            generation,
            nlookup: 1,
        };
        recovery.replay(&state, &replay)
    };
    let ok = confirmed(one.nodeid, one.generation).unwrap();
    assert_eq!(ok.ino, one.attr.ino);
    assert!(confirmed(ROOT, 0).is_ok());

    let mut stale = |nodeid, generation, why: &str| {
        let answer = confirmed(nodeid, generation);
        assert_eq!(answer.map(drop), Err(libc::ESTALE), "{why}");
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

/// Kills `act` at the first point of this name.
fn die_at_point<T: std::fmt::Debug>(name: &str, act: impl Fn() -> T) {
    let found = (0..).any(|at| match die_at(at, &act) {
        Ok(point) => point == name,
        Err(result) => panic!("{result:?}, and no point {name}"),
    });
    assert!(found);
}

#[test]
fn what_was_entered_as_copied_is_not_copied_again() {
    if !possible() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    lay_out(dir.path());
    let memfd = State::create_memfd().unwrap();
    let server = instance(dir.path(), &memfd);
    let [from, to] = ["one", "two"].map(|name| server.lookup(ROOT, s(name)).unwrap().nodeid);
    let from = (from, server.open(ID + 2, from, libc::O_RDONLY).unwrap(), 0);
    let to = (to, server.open(ID + 4, to, libc::O_RDWR).unwrap(), 0);
    die_at_point("outcome", || server.copy(ID, from, to, 7).map(finish));
    drop(server);
    fs::write(dir.path().join("one"), b"something else").unwrap();
    let server = instance(dir.path(), &memfd);
    server.resolve_journal().unwrap();
    let (copied, slot) = server.copy(RESENT, from, to, 7).unwrap();
    assert_eq!(copied, 7);
    assert_eq!(fs::read(dir.path().join("two")).unwrap(), b"content of two");
    slot.unwrap().done();
    assert_eq!(server.copy(ID + 6, from, to, 9).unwrap().0, 9);
    assert_eq!(fs::read(dir.path().join("two")).unwrap(), b"somethingf two");

    let (nodeid, fh, _) = to;
    for mode in [libc::FALLOC_FL_COLLAPSE_RANGE, libc::FALLOC_FL_INSERT_RANGE] {
        let refused = server.allocate(nodeid, fh, mode, 0, 4096);
        assert_eq!(refused, Err(nix::errno::Errno::EOPNOTSUPP));
    }
}

#[test]
fn what_was_truncated_for_a_request_is_not_truncated_for_it_again() {
    if !possible() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    lay_out(dir.path());
    let memfd = State::create_memfd().unwrap();
    let server = instance(dir.path(), &memfd);
    server.lookup(ROOT, s("one")).unwrap();
    let create = |server: &Server, unique| {
        let flags = libc::O_CREAT | libc::O_TRUNC | libc::O_WRONLY;
        let created = server.create(unique, ME, (ROOT, s("one")), (0o640, 0), flags);
        created.map(|(created, _)| created.fh)
    };
    die_at_point("handle", || create(&server, ID));
    drop(server);
    let one = dir.path().join("one");
    assert_eq!(fs::read(&one).unwrap(), b"");
    fs::write(&one, b"written through another name").unwrap();
    let server = instance(dir.path(), &memfd);
    let fh = create(&server, RESENT).unwrap();
    assert_eq!(fs::read(&one).unwrap(), b"written through another name");
    assert_eq!(server.state.handles().len(), 1, "the same {fh:#x}");
    create(&server, ID + 2).unwrap();
    assert_eq!(fs::read(&one).unwrap(), b"", "another request");
}

#[test]
fn an_error_that_is_owed_is_answered_as_often_as_it_is_asked_for() {
    if !possible() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = instance(dir.path(), &State::create_memfd().unwrap());
    drop(
        server
            .state
            .journal()
            .record(ID, &Err(libc::EDQUOT))
            .unwrap(),
    );
    let thing = Thing::Dir { mode: 0o755 };
    for _ in 0..2 {
        let made = server.make(RESENT, ME, (ROOT, s("new")), 0, &thing);
        assert_eq!(made.map(drop), Err(nix::errno::Errno::EDQUOT));
    }
    assert!(!dir.path().join("new").exists());
}

#[test]
fn an_entry_of_another_version_is_not_guessed_at() {
    if !possible() {
        return;
    }
    use rust_fuse_notify::std::state::Intent;
    let dir = tempfile::tempdir().unwrap();
    let memfd = State::create_memfd().unwrap();
    let server = instance(dir.path(), &memfd);
    let unknown = Intent {
        opcode: 9999,
        ..Intent::default()
    };
    drop(server.state.journal().begin(ID, &unknown).unwrap());
    drop(server);
    let mut server = instance(dir.path(), &memfd);
    let refused = server.resolve_journal().unwrap_err();
    assert!(refused.contains("--discard-state"), "{refused}");
    server.opts.discard = true;
    server.resolve_journal().unwrap();
    let thing = Thing::Dir { mode: 0o755 };
    let made = server.make(RESENT, ME, (ROOT, s("new")), 0, &thing);
    assert_eq!(made.map(drop), Err(nix::errno::Errno::EIO));
}

#[test]
fn without_the_journal_a_resent_change_is_executed_again() {
    if !possible() {
        return;
    }
    let mkdir = CASES.iter().find(|case| case.name == "mkdir").unwrap();
    for journal in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let memfd = State::create_memfd().unwrap();
        let server = instance_with(dir.path(), &memfd, journal);
        die_at(point_after(mkdir, "mkdirat", journal), || {
            (mkdir.act)(&server, ID)
        })
        .unwrap();
        drop(server);
        let server = instance_with(dir.path(), &memfd, journal);
        server.resolve_journal().unwrap();
        let want = if journal {
            Ok(())
        } else {
            Err(nix::errno::Errno::EEXIST)
        };
        assert_eq!((mkdir.act)(&server, RESENT), want, "journal: {journal}");
    }
}

/// Index of the first point of this name.
fn point_after(case: &Case, name: &str, journal: bool) -> usize {
    let dir = tempfile::tempdir().unwrap();
    let server = instance_with(dir.path(), &State::create_memfd().unwrap(), journal);
    let (points, result) = points_of(|| (case.act)(&server, ID));
    result.unwrap();
    points.iter().position(|point| *point == name).unwrap()
}

/// What a replay costs here, without the kernel's part of it: `cargo test --release -p fuse-restart --bins --
/// --ignored --nocapture replays_a_second`.
#[test]
#[ignore = "measures"]
fn replays_a_second() {
    const FILES: u32 = 20_000;
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let memfd = State::create_memfd().unwrap();
    let server = instance(dir.path(), &memfd);
    let replays: Vec<Replay> = (0..FILES)
        .map(|n| {
            let name = format!("file{n}");
            fs::write(dir.path().join(&name), b"").unwrap();
            let entry = server.lookup(ROOT, s(&name)).unwrap();
            Replay {
                unique: u64::from(n),
                nodeid: entry.nodeid,
                generation: entry.generation,
                nlookup: 1,
            }
        })
        .collect();
    drop(server);
    let server = Arc::new(instance(dir.path(), &memfd));
    let state = server.state.clone();
    let mut recovery = super::recover::Recovery::new(server);
    for round in 0..5 {
        let began = std::time::Instant::now();
        for replay in &replays {
            recovery.replay(&state, replay).unwrap();
        }
        let each = began.elapsed() / FILES;
        let began = std::time::Instant::now();
        for replay in &replays {
            std::hint::black_box(state.nodes().get(replay.nodeid).unwrap());
        }
        let get = began.elapsed() / FILES;
        println!("round {round}: {each:?} a replay; {get:?} a look into the node table");
    }
}

#[test]
fn a_change_that_fails_fails_in_the_same_way_wherever_the_server_died() {
    if !possible() {
        return;
    }
    let set = |server: &Server, unique| {
        let one = server.lookup(ROOT, s("one"))?.nodeid;
        let name = s("foo.no-such-kind");
        let set = server.set_xattr(unique, one, name, b"1", libc::XATTR_CREATE);
        set.map(|slot| finish(((), slot)))
    };
    let begin = |memfd: &OwnedFd| {
        let dir = tempfile::tempdir().unwrap();
        lay_out(dir.path());
        (instance(dir.path(), memfd), dir)
    };
    let (server, _dir) = begin(&State::create_memfd().unwrap());
    let (points, result) = points_of(|| set(&server, ID));
    assert!(points.len() > 1, "{points:?}");
    assert_eq!(result, Err(nix::errno::Errno::EOPNOTSUPP));
    for (at, point) in points.iter().enumerate() {
        let memfd = State::create_memfd().unwrap();
        let (server, dir) = begin(&memfd);
        die_at(at, || set(&server, ID)).unwrap();
        drop(server);
        let server = instance(dir.path(), &memfd);
        server.resolve_journal().unwrap();
        assert_eq!(set(&server, RESENT), result, "dead at {at}, {point}");
    }
}

#[test]
fn who_forgot_a_file_does_not_bury_it_when_it_was_looked_up_again() {
    if !possible() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    lay_out(dir.path());
    let server = instance(dir.path(), &State::create_memfd().unwrap());
    let one = server.lookup(ROOT, s("one")).unwrap().nodeid;
    let forgotten = server.state.nodes().forget(one, 1).unwrap();
    // Another thread, before this one has done what a FORGET is to do.
    assert_eq!(server.lookup(ROOT, s("one")).unwrap().nodeid, one);
    let fh = server.open(ID + 200, one, libc::O_RDWR).unwrap();
    server
        .remove(ID, (ROOT, s("one")), false)
        .map(finish)
        .unwrap();
    server.bury_node(forgotten.nodeid);
    assert!(server.yard.contains(one), "a file that is open is lost");
    server.files.remove(fh);
    let file = server.file(one, fh).expect("it can be opened again");
    assert_eq!(super::sys::fstat(file.as_fd()).unwrap().st_size, 14);
}
