// SPDX-License-Identifier: GPL-2.0
//! Requests that a server dies of, each time, and requests that it never answers.

#[cfg(not(feature = "crash-points"))]
mod none {
    #[inline(always)]
    pub fn poison(_name: &std::ffi::OsStr) {}

    #[inline(always)]
    pub fn poison_replay() {}
}

#[cfg(feature = "crash-points")]
mod switched {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use std::path::Path;
    use std::sync::LazyLock;

    /// Longer than a suspect has at first, see `rust_fuse_notify::std::state::Flights`.
    const LATE: std::time::Duration = std::time::Duration::from_millis(1500);

    static DIR: LazyLock<Option<std::ffi::OsString>> =
        LazyLock::new(|| std::env::var_os("FUSE_RESTART_POISON"));

    pub fn poison(name: &OsStr) {
        if DIR.is_none() {
            return;
        }
        let late = name.as_bytes().starts_with(b"poison-late");
        if late {
            std::thread::sleep(LATE);
        }
        if late || name.as_bytes().starts_with(b"poison-crash") {
            let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
        }
        if name.as_bytes().starts_with(b"poison-hang") {
            hang();
        }
    }

    pub fn poison_replay() {
        let Some(dir) = &*DIR else { return };
        if std::fs::remove_file(Path::new(dir).join("hang-replay")).is_ok() {
            hang();
        }
    }

    fn hang() -> ! {
        loop {
            std::thread::park();
        }
    }
}

#[cfg(not(feature = "crash-points"))]
pub use none::*;
#[cfg(feature = "crash-points")]
pub use switched::*;
