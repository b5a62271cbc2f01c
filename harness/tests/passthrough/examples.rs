// SPDX-License-Identifier: GPL-2.0
//! The examples of the crate, under a keeper.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::crash::{conclusively, kill_during, Random};
use crate::served::{Served, BINARY};

/// Cargo builds examples beside the binaries, when it tests the crate that they are of.
fn example(name: &str) -> Option<PathBuf> {
    let path = Path::new(BINARY).with_file_name("examples").join(name);
    if !path.exists() {
        eprintln!("SKIPPED: build it with cargo build -p rust-fuse-notify --examples");
        return None;
    }
    Some(path)
}

#[test]
fn hello_made_restartable() {
    let Some(path) = example("hello") else { return };
    let Some(served) = Served::other(&[path.as_os_str()]) else {
        return;
    };
    let hello = served.mnt().join("hello.txt");
    let open = File::open(&hello).unwrap();
    for n in 1..=5 {
        served.crash();
        let mut text = [0; 32];
        let read = open.read_at(&mut text, 0);
        let read = read.unwrap_or_else(|e| panic!("after {n} crashes: {e}"));
        assert_eq!(text[..read], *b"Hello World!\n");
        assert_eq!(fs::read_dir(served.mnt()).unwrap().count(), 1);
        assert_eq!(fs::read_to_string(&hello).unwrap(), "Hello World!\n");
    }
    assert_eq!(served.starts(), 6);
}

fn every_write_counts_once() -> bool {
    let Some(path) = example("counters") else {
        return true;
    };
    let Some(served) = Served::other(&[path.as_os_str()]) else {
        return true;
    };
    let mut random = Random::new("every_write_counts_once");
    let written: [AtomicU64; 3] = Default::default();
    let conclusive = kill_during(&served, 40, &mut random, |running| {
        std::thread::scope(|scope| {
            for (n, written) in written.iter().enumerate() {
                let path = served.mnt().join(n.to_string());
                scope.spawn(move || {
                    let open = OpenOptions::new().write(true).open(path);
                    let mut file = running.ok("open", open);
                    while running.go_on() {
                        running.ok("write", file.write_all(b"x"));
                        written.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
    });
    if !conclusive {
        return false;
    }
    for (n, written) in written.into_iter().enumerate() {
        let counted = fs::read_to_string(served.mnt().join(n.to_string())).unwrap();
        let written = written.into_inner();
        assert!(written > 0);
        assert_eq!(counted, format!("{written}\n"), "file {n}");
    }
    true
}

#[test]
fn the_example_with_a_journal_counts_every_write_once() {
    conclusively(every_write_counts_once);
}
