// SPDX-License-Identifier: GPL-2.0
//! A server that keeps its mount in systemd's store, and finds another one where it is to mount. (With the real systemd: the
//! tests of `systemd`.)

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::keeper::{is_mounted, wait_for, Keeper, BINARY};
use nix::mount::{umount2, MntFlags};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

/// As a unit's first start does it; nothing is in the store.
fn unit(dir: &Path, mountpoint: &Path) -> Child {
    Command::new(BINARY)
        .args(["serve", "passthrough", "--mountpoint"])
        .arg(mountpoint)
        .arg(dir.join("units"))
        .env("NOTIFY_SOCKET", dir.join("notify"))
        .stdin(Stdio::null())
        .stderr(fs::File::create(dir.join("said")).unwrap())
        .spawn()
        .unwrap()
}

#[test]
fn a_unit_takes_a_dead_mount_away_and_no_other() {
    crate::skip_if_impossible!();
    let dir = tempfile::tempdir().unwrap();
    let manager = UnixDatagram::bind(dir.path().join("notify")).unwrap();
    // Takes what is sent, and closes what comes with it: nothing is stored.
    std::thread::spawn(move || while manager.recv(&mut [0; 4096]).is_ok() {});
    let back = dir.path().join("back");
    for made in [&back, &dir.path().join("units")] {
        fs::create_dir(made).unwrap();
    }
    fs::write(back.join("file"), "of the keeper").unwrap();
    let back = back.to_str().unwrap();
    let mut keeper = Keeper::start(&[], &[BINARY, "serve", "passthrough", back]);
    let server = keeper.event("started", 1)["pid"].as_i64().unwrap() as i32;
    let mountpoint = keeper.mountpoint();
    let read = || fs::read_to_string(mountpoint.join("file")).ok();
    wait_for("the mount", || {
        read().filter(|text| text == "of the keeper")
    });
    // By another name, too.
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(mountpoint.parent().unwrap(), &link).unwrap();

    for path in [&mountpoint, &link.join("mnt")] {
        let refused = unit(dir.path(), path).wait().unwrap();
        let said = fs::read_to_string(dir.path().join("said")).unwrap();
        assert!(!refused.success(), "{said}");
        assert!(said.contains("somebody keeps it"), "{said}");
        assert_eq!(read().as_deref(), Some("of the keeper"));
    }

    // Nobody has its descriptors any more.
    keeper.signal(Signal::SIGKILL);
    wait_for("the keeper's end", || keeper.child.try_wait().unwrap());
    kill(Pid::from_raw(server), Signal::SIGKILL).unwrap();
    wait_for("the connection's end", || {
        let error = fs::metadata(&mountpoint).err()?;
        (error.raw_os_error() == Some(libc::ENOTCONN)).then_some(())
    });
    let mut unit = unit(dir.path(), &link.join("mnt"));
    wait_for("the unit's mount", || {
        let ended = unit.try_wait().unwrap();
        assert_eq!(
            ended,
            None,
            "{}",
            fs::read_to_string(dir.path().join("said")).unwrap()
        );
        // Between the two mounts it would be in the directory below them.
        let _ = fs::write(mountpoint.join("own"), "of the unit");
        dir.path().join("units/own").exists().then_some(())
    });
    assert_eq!(read(), None);
    umount2(&mountpoint, MntFlags::empty()).unwrap();
    wait_for("the unit's end", || unit.try_wait().unwrap());
    assert!(!is_mounted(&mountpoint));
}
