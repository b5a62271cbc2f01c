// SPDX-License-Identifier: GPL-2.0
//! `--self-test`: whether a server can be replaced by another is known before it is ended.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use nix::sys::signal::{kill, Signal};

use crate::served::{wait_for, Kind, Scratch, Served, BINARY};

fn self_test(pid: i32, options: &[&str], backing: &Path) -> Output {
    Command::new(BINARY)
        .args(["serve", "passthrough", "--self-test", "--replacing"])
        .arg(pid.to_string())
        .args(options)
        .arg(backing)
        .env("RUST_LOG", "error")
        .output()
        .unwrap()
}

fn passes(out: &Output) {
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
}

/// It says in one line why not, and has changed nothing.
fn refused(served: &Served, out: &Output, why: &[&str]) {
    let text = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{text}");
    assert_eq!(text.trim_end().lines().count(), 1, "not one line: {text}");
    for part in why {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
    goes_on(served);
}

fn goes_on(served: &Served) {
    let file = served.mnt().join("file");
    fs::write(&file, "written").unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), "written");
    assert_eq!(served.starts(), 1, "the server was replaced");
}

#[test]
fn who_would_answer_otherwise_or_is_of_another_directory_does_not_pass() {
    let Some(served) = Served::start(Kind::Tmpfs, &[]) else {
        return;
    };
    let (server, back) = (served.server_pid(), served.back());
    let same_as_at_the_mount = [
        (&["--writeback"][..], "the set of flags"),
        (&["--writeback", "--threads", "1"], "the set of flags"),
    ];
    for (options, why) in same_as_at_the_mount {
        let out = self_test(server.as_raw(), options, &back);
        refused(&served, &out, &["answers INIT otherwise", why]);
    }
    let other = Scratch::new(Kind::Tmpfs);
    let out = self_test(server.as_raw(), &[], &other.path());
    refused(&served, &out, &["start the server that made it"]);
    let nobody = std::process::id() as i32;
    let out = self_test(nobody, &[], &back);
    refused(&served, &out, &["has no state of a mount", "keeper"]);
    served.unmount();
}

#[test]
fn who_passes_replaces_the_server_and_nothing_is_lost() {
    let Some(served) = Served::start(Kind::Tmpfs, &["--writeback"]) else {
        return;
    };
    let open = fs::File::create(served.mnt().join("open")).unwrap();
    let (server, back) = (served.server_pid(), served.back());
    // Options that the kernel is not told of may change.
    let (old, new) = (&["--writeback"][..], &["--writeback", "--threads", "1"][..]);
    for options in [old, new] {
        passes(&self_test(server.as_raw(), options, &back));
        goes_on(&served);
    }
    passes(&self_test(served.keeper_pid().as_raw(), old, &back));
    kill(served.keeper_pid(), Signal::SIGHUP).unwrap();
    wait_for("the next instance", || (served.starts() == 2).then_some(()));
    open.set_len(7).unwrap();
    drop(open);
    assert_eq!(fs::metadata(served.mnt().join("open")).unwrap().len(), 7);
    // It is looked for afresh: the pid of the old one has nothing.
    passes(&self_test(served.server_pid().as_raw(), old, &back));
    served.unmount();
}
