// SPDX-License-Identifier: GPL-2.0
//! An answer to CREATE that its application comes to only after the next recovery (cargo feature `crash-points`).

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::sys::signal::{kill, Signal};

use crate::points::seen;
use crate::served::{wait_for, Kind, Scratch, Served};

/// A cgroup (version 1) of the freezer: it stops a task where it waits for its answer. One of version 2 waits until the
/// task has it.
struct Freezer {
    mnt: tempfile::TempDir,
}

impl Freezer {
    /// `None`: this kernel has none, and that was said.
    fn new() -> Option<Freezer> {
        let mnt = tempfile::tempdir().unwrap();
        let (name, flags) = (Some("freezer"), MsFlags::empty());
        if let Err(e) = mount(name, mnt.path(), Some("cgroup"), flags, name) {
            eprintln!("SKIPPED: no cgroup freezer: {e}");
            return None;
        }
        let freezer = Freezer { mnt };
        fs::create_dir(freezer.group()).unwrap();
        Some(freezer)
    }

    fn group(&self) -> PathBuf {
        let own = format!("late-create-{}", std::process::id());
        self.mnt.path().join(own)
    }

    fn freeze(&self, pid: u32) {
        fs::write(self.group().join("cgroup.procs"), pid.to_string()).unwrap();
        self.set("FROZEN");
    }

    fn set(&self, state: &str) {
        let file = self.group().join("freezer.state");
        fs::write(&file, state).unwrap();
        wait_for(&format!("the application to be {state}"), || {
            (fs::read_to_string(&file).ok()?.trim() == state).then_some(())
        });
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        // What a failed test leaves frozen could not be killed.
        let _ = fs::write(self.group().join("freezer.state"), "THAWED");
        let _ = fs::remove_dir(self.group());
        let _ = umount2(self.mnt.path(), MntFlags::MNT_DETACH);
    }
}

#[test]
fn an_answer_to_create_may_be_taken_after_the_next_recovery() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: needs root");
        return;
    }
    let Some(freezer) = Freezer::new() else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let table = dir.path().join("points");
    let variables = [
        ("FUSE_RESTART_CRASH_POINTS", table.to_str().unwrap()),
        ("FUSE_RESTART_CRASH_ARM", "create:start:1"),
    ];
    let served = Served::with_variables(Scratch::new(Kind::Tmpfs), &variables, &[]);
    served.crash_and_wait();
    if served.stderr().contains("knows no recovery") {
        return eprintln!("SKIPPED: this kernel knows no recovery, and freezes nobody who waits");
    }
    let reached = |point: &str| seen(&table, point).map_or(0, |(reached, _)| reached);
    wait_for("the first recovery", || {
        (reached("recover.end") == 1).then_some(())
    });

    // The server reads CREATE and dies, and has no successor until the application is frozen.
    kill(served.keeper_pid(), Signal::SIGSTOP).unwrap();
    let file = served.mnt().join("file");
    let mut app = Command::new("sh")
        .args(["-c", r#"echo content > "$0""#])
        .arg(&file)
        .spawn()
        .unwrap();
    wait_for("the death of the server", || {
        seen(&table, "create.start").filter(|(_, killed)| *killed == 1)
    });
    freezer.freeze(app.id());
    kill(served.keeper_pid(), Signal::SIGCONT).unwrap();

    // The next one answers, and dies as well; the third recovers without an inode for what was created.
    wait_for("the answer", || {
        (reached("create.end") == 1 && reached("recover.end") == 2).then_some(())
    });
    served.crash();
    wait_for("the recovery", || {
        (reached("recover.end") == 3).then_some(())
    });
    freezer.set("THAWED");
    assert!(app.wait().unwrap().success(), "{}", served.stderr());
    assert_eq!(fs::read_to_string(&file).unwrap(), "content\n");
    // That one goes with its descriptor, as any other.
    served.crash_and_wait();
    assert_eq!(fs::read_to_string(&file).unwrap(), "content\n");
    served.unmount();
}
