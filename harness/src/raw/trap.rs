// SPDX-License-Identifier: GPL-2.0
//! Named points of the test kernels at which a task stops until it is told to go on (qemu/patches/7.3-tests): the way
//! to hold a window of a few instructions open.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

use super::env::skip;
use super::wait::wait_for;

const PATH: &str = "/sys/module/fuse/parameters/trap";
const SECOND: &str = "/sys/module/fuse/parameters/trap2";
const FAIL_SENDS: &str = "/sys/module/fuse/parameters/fail_sends";

/// An armed trap. Whoever stops in it goes on when this is dropped.
pub struct Trap {
    name: &'static str,
    path: &'static str,
}

impl Trap {
    /// The next task that comes to `name` will stop there. A kernel without traps: the scenario is skipped.
    pub fn arm(name: &'static str) -> Result<Trap> {
        Trap::arm_in(name, PATH)
    }

    /// The same beside another one that is armed, or has stopped somebody.
    pub fn arm_beside(name: &'static str) -> Result<Trap> {
        Trap::arm_in(name, SECOND)
    }

    fn arm_in(name: &'static str, path: &'static str) -> Result<Trap> {
        if fs::metadata(path).is_err() {
            return skip("this kernel has no traps (--kernel mutants has)");
        }
        fs::write(path, name)
            .with_context(|| format!("the kernel does not know the trap {name}"))?;
        Ok(Trap { name, path })
    }

    /// What takes long is left to kernels with traps.
    pub fn if_any_is_there(why: &str) -> Result<()> {
        match fs::metadata(PATH) {
            Ok(_) => Ok(()),
            Err(_) => skip(format!(
                "{why}, and this kernel has no traps (--kernel mutants has)"
            )),
        }
    }

    /// The same, where a kernel without traps shows enough.
    pub fn arm_if_any(name: &'static str) -> Result<Option<Trap>> {
        if fs::metadata(PATH).is_err() {
            return Ok(None);
        }
        Trap::arm(name).map(Some)
    }

    /// Waits until somebody has stopped.
    pub fn wait(&self, patience: Duration) -> Result<()> {
        wait_for(
            &format!("a task to stop at {}", self.name),
            patience,
            || Ok(self.stopped()),
        )
    }

    pub fn stopped(&self) -> bool {
        fs::read_to_string(self.path).is_ok_and(|s| s.trim() == format!("stopped {}", self.name))
    }

    /// Lets it go on.
    pub fn go(self) {}

    /// Lets it go on, and stops whoever comes to `next` first.
    pub fn then(self, next: &'static str) -> Result<Trap> {
        let path = self.path;
        // To arm a trap lets everybody go; dropping this one later would let go who stops in the next.
        std::mem::forget(self);
        Trap::arm_in(next, path).inspect_err(|_| release())
    }
}

impl Drop for Trap {
    fn drop(&mut self) {
        let _ = fs::write(self.path, "go");
    }
}

/// The kernel's engine has no memory for a number of requests, until drop.
pub struct NoMemory;

impl NoMemory {
    /// For the next `sends`.
    pub fn for_sends(sends: u32) -> Result<NoMemory> {
        if fs::metadata(FAIL_SENDS).is_err() {
            return skip("this kernel does not fail on demand (--kernel mutants does)");
        }
        fs::write(FAIL_SENDS, sends.to_string()).context(FAIL_SENDS)?;
        Ok(NoMemory)
    }

    /// How often it is yet to fail.
    pub fn left(&self) -> Result<u32> {
        let text = fs::read_to_string(FAIL_SENDS).context(FAIL_SENDS)?;
        text.trim().parse().context(FAIL_SENDS)
    }
}

impl Drop for NoMemory {
    fn drop(&mut self) {
        let _ = fs::write(FAIL_SENDS, "0");
    }
}

/// Lets whoever has stopped go on; nothing without traps. For the runner, behind a scenario that was killed.
pub fn release() {
    for path in [PATH, SECOND] {
        let _ = fs::write(path, "go");
    }
    drop(NoMemory);
}

/// Has the inodes of what is read and written here in memory, for whoever counts inodes.
pub fn touch() {
    let _ = fs::read_to_string(PATH);
}
