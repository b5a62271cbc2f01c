// SPDX-License-Identifier: GPL-2.0
//! A state that cannot be used: refused with what to do, or discarded.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use crate::served::{wait_for, Kind, Served};

/// The memfd of the running server.
fn state(served: &Served) -> File {
    let fds = PathBuf::from(format!("/proc/{}/fd", served.server_pid()));
    let fd = fs::read_dir(&fds).unwrap().flatten().find(|fd| {
        fs::read_link(fd.path()).is_ok_and(|to| to.to_string_lossy().contains("memfd:fusestate"))
    });
    let path = fd.expect("it has its state").path();
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap()
}

/// Puts something into the last slot of the journal, at which a running server does not look.
pub fn damage(served: &Served) {
    let file = state(served);
    let mut slots = [0; 4];
    file.read_exact_at(&mut slots, 48).unwrap();
    let last = 0x12000 + 1280 * (u64::from(u32::from_ne_bytes(slots)) - 1);
    file.write_all_at(&[0xff; 8], last).unwrap();
}

#[test]
fn a_damaged_state_is_refused_and_says_what_can_be_done() {
    let Some(served) = Served::start(Kind::Tmpfs, &[]) else {
        return;
    };
    fs::write(served.mnt().join("file"), b"x").unwrap();
    damage(&served);
    served.crash();
    let text = wait_for("the refusal", || {
        Some(served.stderr()).filter(|text| text.contains("the state is damaged"))
    });
    let line = text
        .lines()
        .find(|l| l.contains("the state is damaged"))
        .unwrap();
    for word in [
        "--discard-state",
        "unmount",
        "EIO",
        "slot 1023 of the journal",
    ] {
        assert!(line.contains(word), "no {word:?} in {line}");
    }
}

#[test]
fn a_damaged_state_is_discarded_and_the_mount_lives_on() {
    for options in [
        &["--discard-state"][..],
        &["--discard-state", "--threads", "1"],
    ] {
        let Some(served) = Served::start(Kind::Tmpfs, options) else {
            return;
        };
        let mnt = served.mnt();
        fs::write(mnt.join("file"), b"content").unwrap();
        fs::create_dir(mnt.join("dir")).unwrap();
        fs::write(mnt.join("dir/inner"), b"inner").unwrap();
        let open = File::open(mnt.join("file")).unwrap();
        let unlinked = File::open(mnt.join("dir/inner")).unwrap();
        fs::remove_file(mnt.join("dir/inner")).unwrap();
        // A state that can be used is used.
        served.crash_and_wait();
        assert_eq!(open.read_at(&mut [0; 16], 0).unwrap(), 7);
        damage(&served);
        served.crash_and_wait();
        wait_for("the next instance", || {
            let text = served.stderr();
            let (_, after) = text.split_once("so it was discarded")?;
            after.contains(" again: ").then_some(())
        });
        // Whoever is answered is so after everything was revoked, which is not done inside of the server's COMMIT.
        assert!(!mnt.join("nobody").exists());
        // Without replays the kernel goes on with what it has cached.
        if !served.stderr().contains("no FUSE_NOTIFY_RESTARTED") {
            for file in [&open, &unlinked] {
                let error = file.read_at(&mut [0; 16], 0).expect_err("it is revoked");
                assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
            }
        }
        // By name everything is there again, once what the kernel knew has timed out.
        wait_for("the names", || fs::read(mnt.join("file")).ok());
        assert_eq!(fs::read(mnt.join("file")).unwrap(), b"content");
        fs::write(mnt.join("dir/new"), b"new").unwrap();
        assert_eq!(fs::read_dir(mnt.join("dir")).unwrap().count(), 1);
        let new = File::open(mnt.join("dir/new")).unwrap();
        let graves = served.back().join(".fuse-restart-graveyard");
        assert_eq!(fs::read_dir(graves).unwrap().count(), 0);
        // And it is a state like any other.
        served.crash_and_wait();
        assert_eq!(new.read_at(&mut [0; 16], 0).unwrap(), 3);
        let discarded = served.stderr().matches("so it was discarded").count();
        assert_eq!(discarded, 1, "{}", served.stderr());
        drop((open, unlinked));
    }
}
