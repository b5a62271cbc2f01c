// SPDX-License-Identifier: GPL-2.0
//! A backing that has no room for another file.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use crate::calls::{rename2, say};
use crate::served::{run, Kind, Served};

#[test]
fn a_rename_without_room_for_its_whiteout_leaves_both_directories() {
    let Some(served) = Served::start(Kind::Tmpfs, &[]) else {
        return;
    };
    let (mnt, back) = (served.mnt(), served.back());
    let limit = ["-o", "remount,nr_inodes=20"].map(OsStr::new);
    run("mount", &[limit[0], limit[1], back.as_os_str()]);
    let [from, to] = ["from", "to"].map(|name| mnt.join(name));
    fs::create_dir(&from).unwrap();
    fs::create_dir(&to).unwrap();
    fs::write(from.join("inner"), b"").unwrap();
    let mut fillers: Vec<PathBuf> = (0..20).map(|n| mnt.join(format!("filler{n}"))).collect();
    fillers.retain(|name| fs::write(name, b"").is_ok());
    assert!((1..20).contains(&fillers.len()));

    let whiteout = || say(rename2(&from, &to, libc::RENAME_WHITEOUT));
    let inodes = |dir: PathBuf| {
        ["from", "from/inner", "to", "to/inner"]
            .map(|name| fs::symlink_metadata(dir.join(name)).ok())
            .map(|meta| meta.map(|meta| meta.ino()))
    };
    let before = inodes(back.clone());
    for _ in 0..2 {
        assert_eq!(whiteout(), format!("errno Some({})", libc::ENOSPC));
        assert_eq!(inodes(mnt.clone()), before);
        assert_eq!(inodes(back.clone()), before);
        served.crash_and_wait();
        assert_eq!(inodes(mnt.clone()), before);
    }
    fs::remove_file(&fillers[0]).unwrap();
    // FORGET takes it from the graveyard.
    crate::served::wait_for("room", || (whiteout() == "0").then_some(()));
    let [_, _, to, inner] = inodes(mnt.clone());
    assert_eq!([to, inner], before[..2]);
    assert_eq!(fs::symlink_metadata(&from).unwrap().rdev(), 0);
    served.unmount();
}
