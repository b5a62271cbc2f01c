// SPDX-License-Identifier: GPL-2.0
//! Moments at which a server can be made to die. For tests only.
//!
//! A *point* is a moment in the work of the server, named `OPCODE.POINT`:
//!
//! * after every system call that an operation makes, named after the call: `mkdir.mkdirat`, `rename.renameat2`. They
//!   are in the one layer through which all system calls go ([`crate::serve`]'s `sys`, `handle` and `wire`), so there
//!   is one between any two system calls of every operation, also of those that are yet to be written. (Calls that
//!   change nothing but the thread or a descriptor, setfsuid(2), umask(2), close(2) and the like, have none.)
//! * `start`: the request was read, nothing was done yet;
//! * `intent`, `outcome`: the journal has just been told; `handle`: an `fh` was entered in the handle table;
//! * `reply`: the answer is complete and about to be written; `answered`: the kernel has it, the journal still holds
//!   the outcome; `end`: everything is done;
//! * for the pseudo-opcode `recover`, in the order of a recovery: `start`, `restarted` (said, nothing resolved),
//!   `decided` (the fate of the n-th intent is known, not written), `resolved-one`, `resolved`, `replay` (asked for the
//!   n-th inode, not answered), `reported` (the report came, nothing settled), `settled`, `swept`, `init` (INIT is
//!   about to be played, then comes COMMIT), `end` (COMMIT was said), and the system calls in between. The first
//!   instance on a mount passes `adopt.start`, `adopt.init`, `adopt.end` instead.
//!
//! A call that an operation makes more than once is one point, reached more than once: the n-th of them is chosen by
//! counting.
//!
//! # Unit tests
//!
//! A death is a panic that runs no code of ours but destructors, which write nothing to the state: `points_of` lists
//! what an operation passes, `die_at` runs it to the n-th.
//!
//! # The crash matrix (cargo feature `crash-points`)
//!
//! The server looks for `FUSE_RESTART_CRASH_POINTS=FILE` in its environment (a keeper passes it on), maps FILE and
//! counts there how often each point was reached, by all instances together. Whoever made the file ([`Table`]) can
//! *arm* a point, also while the server runs: at the n-th reach from then on the process kills itself with SIGKILL,
//! once. So the next instance does not die of the same order, and the table tells afterwards:
//!
//! * [`Seen::reached`]: a point that was never reached is a test that tested nothing;
//! * [`Seen::killed`]: whether the server died of it, and [`Seen::left`]: how many reaches were missing.
//!
//! For use by hand: `FUSE_RESTART_CRASH_ARM=mkdir:mkdirat:3` arms in the file at the start of an instance, if this
//! point has not killed before. Without the feature none of this is compiled in.

//!
//! # Poison
//!
//! With `FUSE_RESTART_POISON=DIR` the server dies whenever it is asked for a name that begins with `poison-crash`, after
//! a while if it begins with `poison-late`, and one that begins with `poison-hang` is never answered. If `DIR/hang-replay` exists, a replay removes it and is never
//! answered. See [`poison`].

mod poison;
#[cfg(feature = "crash-points")]
mod table;

pub use poison::{poison, poison_replay};

#[cfg(feature = "crash-points")]
#[allow(unused_imports)] // For the crash matrix.
pub use table::{Seen, Table};

/// The server begins to work on a request (or a recovery): points from here on are `opcode`'s. Dropping what it gives
/// back is the point `end`.
#[inline(always)]
pub fn begin(opcode: &'static str) -> Work {
    #[cfg(any(test, feature = "crash-points"))]
    OPCODE.set(opcode);
    let _ = opcode;
    reach("start");
    Work
}

/// See [`begin`].
#[must_use]
pub struct Work;

#[cfg(any(test, feature = "crash-points"))]
impl Drop for Work {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            reach("end");
        }
    }
}

/// A point.
#[cfg(not(any(test, feature = "crash-points")))]
#[inline(always)]
pub fn reach(_point: &'static str) {}

#[cfg(any(test, feature = "crash-points"))]
thread_local! {
    static OPCODE: std::cell::Cell<&'static str> = const { std::cell::Cell::new("none") };
}

/// A point.
#[cfg(all(feature = "crash-points", not(test)))]
pub fn reach(point: &'static str) {
    table::reach(OPCODE.get(), point);
}

#[cfg(test)]
pub use unwound::*;

#[cfg(test)]
mod unwound {
    use std::cell::RefCell;
    use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};

    #[derive(Default)]
    struct Trace {
        passed: Vec<&'static str>,
        /// Index in `passed` of the point to die at.
        die_at: Option<usize>,
    }

    thread_local! {
        static TRACE: RefCell<Option<Trace>> = const { RefCell::new(None) };
    }

    /// What a death is unwound with: no destructor of ours writes to the state.
    struct Death;

    pub fn reach(point: &'static str) {
        let dead = TRACE.with_borrow_mut(|trace| {
            let Some(trace) = trace else { return false };
            trace.passed.push(point);
            if trace.die_at != Some(trace.passed.len() - 1) {
                return false;
            }
            trace.die_at = None;
            true
        });
        if dead {
            resume_unwind(Box::new(Death));
        }
    }

    /// The points that `f` passes, in order, and its result.
    pub fn points_of<T>(f: impl FnOnce() -> T) -> (Vec<&'static str>, T) {
        TRACE.set(Some(Trace::default()));
        let result = f();
        let trace = TRACE.take().unwrap_or_default();
        (trace.passed, result)
    }

    /// Runs `f` until it has passed as many points as `index`, and dies at the next; `Err` with its result if it
    /// never gets there.
    pub fn die_at<T>(index: usize, f: impl FnOnce() -> T) -> Result<&'static str, T> {
        TRACE.set(Some(Trace {
            die_at: Some(index),
            ..Trace::default()
        }));
        let result = catch_unwind(AssertUnwindSafe(f));
        let trace = TRACE.take().unwrap_or_default();
        match result {
            Ok(value) => Err(value),
            Err(payload) if payload.is::<Death>() => Ok(trace.passed[index]),
            Err(payload) => resume_unwind(payload),
        }
    }
}
