// SPDX-License-Identifier: GPL-2.0
//! A kernel that knows FUSE_NOTIFY_RESEND and no more: keeper and servers work with it, and say once what is missing.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;

use crate::served::{Kind, Served, BINARY};

fn servers() -> Vec<Served> {
    let mem = [BINARY, "serve", "mem"].map(OsStr::new);
    let all = [Served::start(Kind::Tmpfs, &[]), Served::other(&mem)];
    all.into_iter().flatten().collect()
}

#[test]
fn what_is_not_guaranteed_is_said_once_and_the_rest_works() {
    for served in servers() {
        let mnt = served.mnt();
        fs::write(mnt.join("file"), b"content").unwrap();
        let old = served.stderr().contains("no FUSE_NOTIFY_RESTARTED");
        let mut open = File::open(mnt.join("file")).unwrap();
        fs::remove_file(mnt.join("file")).unwrap();
        for n in 1..=3 {
            // Nobody asks while there is no server: then even this kernel loses nothing.
            served.crash_and_wait();
            let name = mnt.join(format!("dir{n}"));
            fs::create_dir(&name).unwrap();
            assert_eq!(fs::metadata(&name).unwrap().nlink(), 2);
        }
        let mut text = String::new();
        open.read_to_string(&mut text).unwrap();
        assert_eq!(
            (text.as_str(), open.metadata().unwrap().nlink()),
            ("content", 0)
        );
        let said = served.stderr();
        let times = |what: &str| said.matches(what).count();
        let warnings = usize::from(old);
        assert_eq!(times("lookup counts drift"), warnings, "{said}");
        assert_eq!(times("no FUSE_NOTIFY_RESTARTED"), warnings, "{said}");
        // The keeper, whose server need not use the crate.
        assert_eq!(times("knows no recovery"), warnings, "{said}");
        let (resent, confirmed) = (times("were resent"), times("inodes confirmed"));
        assert_eq!(
            (resent, confirmed),
            if old { (3, 0) } else { (0, 3) },
            "{said}"
        );
    }
}
