// SPDX-License-Identifier: GPL-2.0
//! The keeper's bad input, as a table: one clear line that says what to do, a non-zero status, nothing left mounted.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};

use crate::keeper::{is_mounted, BINARY};
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::sched::{unshare, CloneFlags};

/// What is wrong with the machine; set up in the child, before exec.
#[derive(Clone, Copy)]
enum Machine {
    Fine,
    /// `/dev` of a mount namespace of its own, and empty.
    NoDevice,
    /// Another user: `/dev/fuse` does not open.
    NotRoot,
    /// Root without CAP_SYS_ADMIN: it opens, but mount(2) refuses.
    NoMountRight,
}

struct Case {
    name: &'static str,
    /// Below the test's directory.
    mountpoint: &'static str,
    machine: Machine,
    server: &'static [&'static str],
    options: &'static [&'static str],
    /// All of these must be in the last line on stderr.
    expect: &'static [&'static str],
    /// How many lines there may be on stderr.
    lines: usize,
}

const SLEEP: &[&str] = &["sleep", "1000"];

#[rustfmt::skip] // a table
const CASES: &[Case] = &[
    Case { name: "missing binary", mountpoint: "dir", machine: Machine::Fine, server: &["/no/such/server"], options: &[],
           expect: &["/no/such/server", "No such file", "full path"], lines: 1 },
    Case { name: "binary not executable", mountpoint: "dir", machine: Machine::Fine, server: &["/etc/passwd"], options: &[],
           expect: &["/etc/passwd", "Permission denied", "executable"], lines: 1 },
    Case { name: "missing mountpoint", mountpoint: "none", machine: Machine::Fine, server: SLEEP, options: &[],
           expect: &["/none", "does not exist", "mkdir -p"], lines: 1 },
    Case { name: "mountpoint is a file", mountpoint: "file", machine: Machine::Fine, server: SLEEP, options: &[],
           expect: &["/file", "not a directory"], lines: 1 },
    Case { name: "mountpoint below a file", mountpoint: "file/x", machine: Machine::Fine, server: SLEEP, options: &[],
           expect: &["/file/x", "Not a directory"], lines: 1 },
    Case { name: "mountpoint busy", mountpoint: "busy", machine: Machine::Fine, server: SLEEP, options: &[],
           expect: &["/busy", "is busy", "tmpfs", "umount"], lines: 1 },
    Case { name: "no /dev/fuse", mountpoint: "dir", machine: Machine::NoDevice, server: SLEEP, options: &[],
           expect: &["/dev/fuse", "No such file", "modprobe fuse"], lines: 1 },
    Case { name: "no permission for /dev/fuse", mountpoint: "dir", machine: Machine::NotRoot, server: SLEEP, options: &[],
           expect: &["/dev/fuse", "Permission denied", "as root"], lines: 1 },
    Case { name: "no permission to mount", mountpoint: "dir", machine: Machine::NoMountRight, server: SLEEP, options: &[],
           expect: &["cannot mount on", "/dir", "CAP_SYS_ADMIN", "as root"], lines: 2 },
    Case { name: "event log nowhere", mountpoint: "dir", machine: Machine::Fine, server: SLEEP, options: &["--json", "/no/such/dir/log"],
           expect: &["/no/such/dir/log", "No such file"], lines: 1 },
    Case { name: "crash loop", mountpoint: "dir", machine: Machine::Fine, server: &["sh", "-c", "echo the reason >&2; exit 3"],
           options: &["--max-restarts", "3"], expect: &["gave up", "4 times in a row", "exited with status 3", "stderr"], lines: 99 },
    Case { name: "crash loop by signal", mountpoint: "dir", machine: Machine::Fine, server: &["sh", "-c", "kill -SEGV $$"],
           options: &["--max-restarts", "0"], expect: &["gave up", "1 times in a row", "killed by SIGSEGV"], lines: 99 },
    Case { name: "no server", mountpoint: "dir", machine: Machine::Fine, server: &[], options: &[],
           expect: &["--help"], lines: 99 },
];

fn prepare(machine: Machine) -> io::Result<()> {
    match machine {
        Machine::Fine => {}
        Machine::NoDevice => {
            unshare(CloneFlags::CLONE_NEWNS)?;
            mount(
                None::<&str>,
                "/",
                None::<&str>,
                MsFlags::MS_REC | MsFlags::MS_PRIVATE,
                None::<&str>,
            )?;
            mount(
                Some("none"),
                "/dev",
                Some("tmpfs"),
                MsFlags::empty(),
                None::<&str>,
            )?;
        }
        Machine::NotRoot => {
            let nobody = nix::unistd::Uid::from_raw(65534);
            nix::unistd::setresuid(nobody, nobody, nobody)?;
        }
        Machine::NoMountRight => {
            const CAP_SYS_ADMIN: libc::c_ulong = 21;
            // SAFETY: plain prctl without pointers.
            if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, CAP_SYS_ADMIN, 0, 0, 0) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    Ok(())
}

fn run(case: &Case, dir: &Path) -> Output {
    let machine = case.machine;
    // Another user must be able to execute it.
    let mut command = Command::new(dir.join("fuse-restart"));
    command
        .args(["keep", "--mountpoint"])
        .arg(dir.join(case.mountpoint))
        .args(case.options);
    if !case.server.is_empty() {
        command.arg("--").args(case.server);
    }
    // SAFETY: system calls only, and a test that dies in between fails.
    unsafe { command.pre_exec(move || prepare(machine)) };
    // Between fork(2) and exec(2) a child of any other test has the copy open for writing, as this process had.
    crate::keeper::wait_for("nobody to have the copy open", || match command.output() {
        Err(e) if e.kind() == io::ErrorKind::ExecutableFileBusy => None,
        other => Some(other.unwrap()),
    })
}

#[test]
fn every_mistake_gets_one_clear_line() {
    crate::skip_if_impossible!();
    let dir = tempfile::Builder::new()
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .tempdir()
        .unwrap();
    let root = dir.path().canonicalize().unwrap();
    fs::copy(BINARY, root.join("fuse-restart")).unwrap();
    fs::create_dir(root.join("dir")).unwrap();
    fs::write(root.join("file"), b"").unwrap();
    fs::create_dir(root.join("busy")).unwrap();
    mount(
        Some("none"),
        &root.join("busy"),
        Some("tmpfs"),
        MsFlags::empty(),
        None::<&str>,
    )
    .unwrap();

    let mut wrong = Vec::new();
    for case in CASES {
        let output = run(case, &root);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        let last = stderr.lines().last().unwrap_or("");
        let mut complain =
            |what: String| wrong.push(format!("{}: {what}; stderr:\n{stderr}", case.name));
        if output.status.code().is_none_or(|c| c == 0) {
            complain(format!("status {:?}", output.status));
        }
        for text in case.expect {
            if !last.contains(text) {
                complain(format!("the last line lacks {text:?}"));
            }
        }
        if stderr.lines().count() > case.lines {
            complain(format!("more than {} line(s)", case.lines));
        }
        if is_mounted(&root.join("dir")) {
            complain("left a mount behind".into());
            let _ = umount2(&root.join("dir"), MntFlags::MNT_DETACH);
        }
    }
    umount2(&root.join("busy"), MntFlags::MNT_DETACH).unwrap();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
