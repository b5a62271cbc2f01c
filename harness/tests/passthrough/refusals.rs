// SPDX-License-Identifier: GPL-2.0
//! What the server says when it cannot serve: one line that says what to do, a failure, no trace.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nix::sys::memfd::{memfd_create, MFdFlags};

use crate::served::BINARY;

/// What a failing command said; panics if it succeeds or says more than a line.
fn refusal(command: &mut Command) -> String {
    let out = command.env("RUST_LOG", "error").output().unwrap();
    let text = String::from_utf8(out.stderr).unwrap();
    assert!(!out.status.success(), "it succeeded: {text}");
    assert_eq!(out.status.code(), Some(1), "it crashed: {text}");
    assert_eq!(text.trim_end().lines().count(), 1, "not one line: {text}");
    text
}

fn serve(backing: &Path) -> Command {
    let mut command = Command::new(BINARY);
    command.args(["serve", "passthrough"]).arg(backing);
    command
}

/// The server with descriptors as from a keeper: a device, and `state`.
fn serve_with(backing: &Path, device: &File, state: &OwnedFd) -> Command {
    let mut command = Command::new("sh");
    command
        .args([
            "-c",
            r#"LISTEN_PID=$$ exec "$@""#,
            "sh",
            BINARY,
            "serve",
            "passthrough",
        ])
        .arg(backing)
        .env("LISTEN_FDS", "2")
        .env("LISTEN_FDNAMES", "fusedev:fusestate");
    let (device, state) = (device.as_raw_fd(), state.as_raw_fd());
    // SAFETY: only async-signal-safe calls between fork and exec. The copies to high numbers keep
    // the two from overwriting each other.
    unsafe {
        command.pre_exec(move || {
            let device = libc::fcntl(device, libc::F_DUPFD_CLOEXEC, 100);
            let state = libc::fcntl(state, libc::F_DUPFD_CLOEXEC, 100);
            if libc::dup2(device, 3) == 3 && libc::dup2(state, 4) == 4 {
                Ok(())
            } else {
                Err(std::io::Error::last_os_error())
            }
        })
    };
    command
}

fn memfd() -> OwnedFd {
    memfd_create(
        c"state",
        MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
    )
    .unwrap()
}

fn device() -> Option<File> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: needs root");
        return None;
    }
    match File::options().read(true).write(true).open("/dev/fuse") {
        Ok(file) => Some(file),
        Err(e) => {
            eprintln!("SKIPPED: needs /dev/fuse: {e}");
            None
        }
    }
}

#[test]
fn a_backing_that_is_none() {
    let dir = tempfile::tempdir().unwrap();
    let missing = refusal(&mut serve(&dir.path().join("missing")));
    assert!(
        missing.contains("missing") && missing.contains("No such file"),
        "{missing}"
    );
    let file = dir.path().join("file");
    fs::write(&file, b"").unwrap();
    let text = refusal(&mut serve(&file));
    assert!(text.contains("is not a directory"), "{text}");
}

#[test]
fn a_file_system_without_handles() {
    let text = refusal(&mut serve(Path::new("/proc/self")));
    assert!(
        text.contains("no file handles") && text.contains("ext4"),
        "{text}"
    );
}

#[test]
fn no_keeper() {
    if device().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let text = refusal(&mut serve(dir.path()));
    assert!(text.contains("fuse-restart keep --mountpoint"), "{text}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "no trace");
}

#[test]
fn no_capability() {
    if device().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    const CAP_DAC_READ_SEARCH: libc::c_ulong = 2;
    let mut command = serve(dir.path());
    // SAFETY: one async-signal-safe call between fork and exec.
    unsafe {
        command.pre_exec(|| {
            match libc::prctl(libc::PR_CAPBSET_DROP, CAP_DAC_READ_SEARCH, 0, 0, 0) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        })
    };
    let text = refusal(&mut command);
    assert!(text.contains("CAP_DAC_READ_SEARCH"), "{text}");
}

#[test]
fn a_damaged_or_foreign_state() {
    let Some(device) = device() else { return };
    let dir = tempfile::tempdir().unwrap();
    let state = memfd();
    // SAFETY: a duplicate of an open descriptor.
    let mut file = unsafe { File::from_raw_fd(libc::dup(state.as_raw_fd())) };
    file.write_all(&[0x5a; 8192]).unwrap();
    let text = refusal(&mut serve_with(dir.path(), &device, &state));
    assert!(text.contains("cannot use the state"), "{text}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "no trace");
}

#[test]
fn the_state_of_another_backing() {
    let Some(device) = device() else { return };
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let state = memfd();
    // The first lays the state out, and then fails for the device is not mounted.
    refusal(&mut serve_with(one.path(), &device, &state));
    let text = refusal(&mut serve_with(two.path(), &device, &state));
    assert!(text.contains("cannot use the state"), "{text}");
    let again = refusal(&mut serve_with(one.path(), &device, &state));
    assert!(!again.contains("cannot use the state"), "{again}");
}

#[test]
fn a_backing_that_is_served_already() {
    let Some(device) = device() else { return };
    let dir = tempfile::tempdir().unwrap();
    let yard = dir.path().join(".fuse-restart-graveyard");
    fs::create_dir(&yard).unwrap();
    let lock = File::open(&yard).unwrap();
    // SAFETY: no memory is involved.
    assert_eq!(unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX) }, 0);
    let text = refusal(&mut serve_with(dir.path(), &device, &memfd()));
    assert!(
        text.contains("another server serves this backing"),
        "{text}"
    );
}

/// They may be those of the mount that the device is of.
#[test]
fn a_start_that_is_refused_removes_no_grave() {
    let Some(device) = device() else { return };
    let dir = tempfile::tempdir().unwrap();
    let grave = dir.path().join(".fuse-restart-graveyard/n0000000000000007");
    fs::create_dir(grave.parent().unwrap()).unwrap();
    fs::write(&grave, b"open somewhere").unwrap();
    let state = memfd();
    for _ in 0..2 {
        let text = refusal(&mut serve_with(dir.path(), &device, &state));
        assert!(text.contains("cannot take over the mount"), "{text}");
        assert_eq!(fs::read(&grave).unwrap(), b"open somewhere");
    }
}
