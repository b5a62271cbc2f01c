// SPDX-License-Identifier: GPL-2.0
//! Moments of a change at which the server may die; the tests let it die at each of them.

/// Nothing, outside of this module's tests.
#[cfg(not(test))]
#[inline(always)]
pub fn point(_name: &'static str) {}

#[cfg(test)]
pub use injected::*;

#[cfg(test)]
mod injected {
    use std::cell::Cell;
    use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};

    thread_local! {
        static DIE_AT: Cell<Option<&'static str>> = const { Cell::new(None) };
    }

    /// What a death is unwound with: no destructor of ours writes to the state.
    struct Death;

    pub fn point(name: &'static str) {
        if DIE_AT.get() == Some(name) {
            DIE_AT.set(None);
            resume_unwind(Box::new(Death));
        }
    }

    /// Runs `f` until it reaches `at`; `Err` with its result if it never does.
    pub fn die_at<T>(at: &'static str, f: impl FnOnce() -> T) -> Result<(), T> {
        DIE_AT.set(Some(at));
        let result = catch_unwind(AssertUnwindSafe(f));
        DIE_AT.set(None);
        match result {
            Ok(value) => Err(value),
            Err(payload) if payload.is::<Death>() => Ok(()),
            Err(payload) => resume_unwind(payload),
        }
    }
}
