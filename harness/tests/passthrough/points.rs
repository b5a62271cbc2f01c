// SPDX-License-Identifier: GPL-2.0
//! The server dies at a chosen moment (cargo feature `crash-points`), and the moment is known to have come.

use std::fs;
use std::path::Path;

use crate::served::{wait_for, Kind, Scratch, Served};

/// Whether the table says that `name` killed, and how often it was reached; parsed as in `src/crash_points/table.rs`.
pub fn seen(table: &Path, name: &str) -> Option<(u64, u64)> {
    let bytes = fs::read(table).unwrap();
    let word =
        |record: &[u8], at: usize| u64::from_ne_bytes(record[at..at + 8].try_into().unwrap());
    let record = bytes.chunks(18 * 8).find(|record| {
        let text = String::from_utf8_lossy(&record[10 * 8..]);
        word(record, 0) == 2 && text.trim_end_matches('\0') == name
    })?;
    Some((word(record, 8), word(record, 24)))
}

#[test]
fn the_server_dies_where_it_is_told_to_and_the_request_is_answered() {
    for (point, nth) in [
        ("start", 1),
        ("intent", 2),
        ("mkdirat", 3),
        ("outcome", 2),
        ("answered", 2),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let table = dir.path().join("points");
        let order = format!("mkdir:{point}:{nth}");
        let variables = [
            ("FUSE_RESTART_CRASH_POINTS", table.to_str().unwrap()),
            ("FUSE_RESTART_CRASH_ARM", &order),
        ];
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: needs root");
            return;
        }
        let served = Served::with_variables(Scratch::new(Kind::Tmpfs), &variables, &[]);
        for n in 1..=4 {
            let at = served.mnt().join(format!("dir{n}"));
            fs::create_dir(&at).unwrap_or_else(|e| panic!("{order}, mkdir {n}: {e}"));
        }
        // All four may have been answered by other threads before the one that dies came so far.
        wait_for("the death of the server", || {
            let (_, killed) = seen(&table, &format!("mkdir.{point}"))?;
            (killed == 1 && served.starts() == 2).then_some(())
        });
        wait_for("the recovery", || {
            seen(&table, "recover.resolved").filter(|(reached, _)| *reached == 1)
        });
        let (reached, _) = seen(&table, &format!("mkdir.{point}")).expect("it was reached");
        assert!(reached >= nth, "{order}: reached {reached} times");
        assert_eq!(seen(&table, "mkdir.no-such-point"), None);
    }
}

#[test]
fn what_was_executed_without_a_trace_gets_eio() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: needs root");
        return;
    }
    for point in ["mkdirat", "start"] {
        let dir = tempfile::tempdir().unwrap();
        let table = dir.path().join("points");
        let order = format!("mkdir:{point}:2");
        let variables = [
            ("FUSE_RESTART_CRASH_POINTS", table.to_str().unwrap()),
            ("FUSE_RESTART_CRASH_ARM", &order),
        ];
        let options = ["--discard-state"];
        let served = Served::with_variables(Scratch::new(Kind::Tmpfs), &variables, &options);
        fs::create_dir(served.mnt().join("one")).unwrap();
        crate::discarded::damage(&served);
        // Executed or not, nobody knows: nothing is guessed.
        let error = fs::create_dir(served.mnt().join("two")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO), "{order}");
        assert_eq!(served.back().join("two").exists(), point == "mkdirat");
        // Nor does that go on for ever.
        fs::create_dir(served.mnt().join("three")).unwrap();
        assert_eq!(seen(&table, &format!("mkdir.{point}")).unwrap().1, 1);
    }
}
