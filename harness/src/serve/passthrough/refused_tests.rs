// SPDX-License-Identifier: GPL-2.0
//! A directory is overwritten where the graveyard does not take it, wherever the server dies in that.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{mount, MsFlags};
use nix::sched::{unshare, CloneFlags};
use rust_fuse_notify::std::state::State;

use super::crash_cases::rename;
use super::crash_tests::{instance, lay_out, possible, s, tree, ID, RESENT};
use super::graveyard::NAME;
use super::nodes::ROOT;
use super::server::Server;
use super::sys::Res;
use crate::crash_points::{die_at, points_of};

const WHITEOUT: u32 = libc::RENAME_WHITEOUT;

/// A backing, and what is asked of it.
#[derive(Clone, Copy, Debug)]
struct Case {
    /// The graveyard is another file system.
    apart: bool,
    /// There is no inode left for a whiteout.
    full: bool,
    flags: u32,
    want: Res<()>,
}

const CASES: [Case; 5] = [
    case(false, true, WHITEOUT, Err(Errno::ENOSPC)),
    case(true, true, WHITEOUT, Err(Errno::ENOSPC)),
    case(true, false, WHITEOUT, Ok(())),
    case(true, false, 0, Ok(())),
    case(true, true, 0, Ok(())),
];

const fn case(apart: bool, full: bool, flags: u32, want: Res<()>) -> Case {
    Case {
        apart,
        full,
        flags,
        want,
    }
}

impl Case {
    /// Runs `f` with the backing, which nobody else sees and which goes with the thread.
    fn on<T: Send>(&self, f: impl FnOnce(&Path) -> T + Send) -> T {
        let tmpfs = |at: &Path| {
            mount(
                Some("none"),
                at,
                Some("tmpfs"),
                MsFlags::empty(),
                Some("nr_inodes=20"),
            )
        };
        let run = || {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
            let tmp = tempfile::tempdir().unwrap();
            tmpfs(tmp.path()).unwrap();
            lay_out(tmp.path());
            let yard = tmp.path().join(NAME.to_str().unwrap());
            fs::create_dir(&yard).unwrap();
            if self.apart {
                tmpfs(&yard).unwrap();
            }
            if self.full {
                let fill = |n| fs::write(tmp.path().join(format!("filler{n}")), b"");
                assert!((0..20).any(|n| fill(n).is_err()));
            }
            let result = f(tmp.path());
            nix::mount::umount2(tmp.path(), nix::mount::MntFlags::MNT_DETACH).unwrap();
            result
        };
        std::thread::scope(|scope| scope.spawn(run).join().unwrap())
    }

    /// A server whose kernel knows both directories.
    fn serve(dir: &Path, memfd: &OwnedFd) -> Server {
        let server = instance(dir, memfd);
        for name in ["full", "empty"] {
            server.lookup(ROOT, s(name)).unwrap();
        }
        server
    }

    fn act(&self, server: &Server, unique: u64) -> Res<()> {
        rename(server, unique, "full", "empty", self.flags)
    }

    /// Before and after, and the points passed.
    fn undisturbed(&self) -> (Vec<String>, Vec<String>, Vec<&'static str>) {
        self.on(|dir| {
            let before = tree(dir);
            let server = Case::serve(dir, &State::create_memfd().unwrap());
            let (points, result) = points_of(|| self.act(&server, ID));
            assert_eq!(result, self.want, "{self:?}");
            (before, tree(dir), points)
        })
    }

    /// What is left when the server died at point `at`, and the request was resent or not.
    fn dead_at(&self, at: usize, resend: bool) -> Vec<String> {
        self.on(|dir| {
            let memfd = State::create_memfd().unwrap();
            let server = Case::serve(dir, &memfd);
            let point = die_at(at, || self.act(&server, ID)).unwrap();
            drop(server);
            let server = instance(dir, &memfd);
            server.resolve_journal().unwrap();
            if resend {
                let result = self.act(&server, RESENT);
                assert_eq!(result, self.want, "{self:?}, dead at {at} {point}");
            }
            tree(dir)
        })
    }
}

#[test]
fn a_directory_that_cannot_be_buried_is_overwritten_in_one_step_or_not_at_all() {
    if !possible() {
        return;
    }
    for case in CASES {
        let (before, after, points) = case.undisturbed();
        let changed = before != after;
        assert_eq!(
            changed,
            case.want.is_ok(),
            "{case:?}\n{before:#?}\n{after:#?}"
        );
        for (at, point) in points.iter().enumerate() {
            let context = format!("{case:?}, dead at {at} of {points:?}, {point}");
            assert_eq!(case.dead_at(at, true), after, "{context}");
            let left = case.dead_at(at, false);
            assert!(left == before || left == after, "{context}: {left:#?}");
        }
    }
}

/// Earlier versions removed the directory and then made the whiteout.
#[test]
fn a_whiteout_that_an_earlier_version_did_not_come_to_is_made() {
    if !possible() {
        return;
    }
    let case = case(true, false, WHITEOUT, Ok(()));
    let (_, after, points) = case.undisturbed();
    let at = points.iter().position(|point| *point == "intent").unwrap();
    let left = case.on(|dir| {
        let memfd = State::create_memfd().unwrap();
        let server = Case::serve(dir, &memfd);
        die_at(at, || case.act(&server, ID)).unwrap();
        drop(server);
        fs::remove_dir(dir.join("empty")).unwrap();
        fs::rename(dir.join("full"), dir.join("empty")).unwrap();
        let server = instance(dir, &memfd);
        server.resolve_journal().unwrap();
        assert_eq!(case.act(&server, RESENT), Ok(()));
        tree(dir)
    });
    assert_eq!(left, after);
}
