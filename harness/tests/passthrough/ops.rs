// SPDX-License-Identifier: GPL-2.0
//! A table of operations: each is done through the mount and, on a copy, in the backing itself.
//! Results, errors and the trees that come out must be the same.

use std::fs::{self, File};
use std::os::unix::fs as unix;
use std::path::Path;

use crate::ops_attributes::ATTRIBUTES;
use crate::ops_data::DATA;
use crate::ops_names::NAMES;
use crate::served::{Kind, Served, KINDS};
use crate::snapshot;

/// What it is, and what it does below a directory that [`prepare`] has laid out.
pub type Op = (&'static str, fn(&Path) -> String);

/// What every operation finds.
fn prepare(base: &Path) {
    fs::create_dir(base).unwrap();
    fs::write(base.join("file"), b"some content").unwrap();
    fs::write(base.join("other"), vec![7; 100_000]).unwrap();
    fs::create_dir(base.join("empty")).unwrap();
    fs::create_dir(base.join("full")).unwrap();
    fs::write(base.join("full/inner"), b"inner").unwrap();
    unix::symlink("file", base.join("link")).unwrap();
    fs::hard_link(base.join("other"), base.join("other2")).unwrap();
}

fn the_same(ops: &[Op], options: &[&str]) {
    for kind in KINDS {
        let Some(served) = Served::start(kind, options) else {
            continue;
        };
        for (n, (name, op)) in ops.iter().enumerate() {
            let via = served.mnt().join(format!("via{n}"));
            let direct = served.back().join(format!("direct{n}"));
            prepare(&via);
            prepare(&direct);
            assert_eq!(
                op(&via),
                op(&direct),
                "{kind:?}, {name}: through the mount and directly"
            );
            let seen = snapshot::of(&via);
            assert_eq!(
                seen,
                snapshot::of(&served.back().join(format!("via{n}"))),
                "{kind:?}, {name}: what the mount shows and what is there"
            );
            assert_eq!(
                seen,
                snapshot::of(&direct),
                "{kind:?}, {name}: what it did and what it does on the backing"
            );
        }
        let scratch = served.unmount();
        let hidden = scratch.path().join(".fuse-restart-graveyard");
        assert!(!hidden.exists(), "{kind:?}: traces after the unmount");
    }
}

#[test]
fn names_are_changed_as_on_the_backing() {
    the_same(NAMES, &["--timeout", "0"]);
}

#[test]
fn data_is_changed_as_on_the_backing() {
    the_same(DATA, &["--timeout", "0"]);
}

#[test]
fn attributes_are_changed_as_on_the_backing() {
    the_same(ATTRIBUTES, &["--timeout", "0"]);
}

#[test]
fn data_is_changed_as_on_the_backing_with_the_writeback_cache() {
    // What the mount shows is ahead of the backing until it is written back.
    let Some(served) = Served::start(Kind::Tmpfs, &["--writeback"]) else {
        return;
    };
    for (n, (name, op)) in DATA.iter().enumerate() {
        let via = served.mnt().join(format!("via{n}"));
        let direct = served.back().join(format!("direct{n}"));
        prepare(&via);
        prepare(&direct);
        assert_eq!(
            op(&via),
            op(&direct),
            "{name}: through the mount and directly"
        );
        nix::unistd::syncfs(File::open(served.mnt()).unwrap()).unwrap();
        assert_eq!(
            snapshot::of(&served.back().join(format!("via{n}"))),
            snapshot::of(&direct),
            "{name}: what it did and what it does on the backing"
        );
    }
}

#[test]
fn a_descriptor_for_each_thread_does_the_same() {
    the_same(NAMES, &["--timeout", "0", "--clone-fd", "--threads", "3"]);
}
