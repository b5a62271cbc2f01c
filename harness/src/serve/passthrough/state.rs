// SPDX-License-Identifier: GPL-2.0
//! The state of the mount: opened, or discarded if it cannot be used and the operator said so.

use std::os::fd::OwnedFd;

use anyhow::{bail, Context};
use rust_fuse_notify::std::state::{Config, State};
use rust_fuse_notify::std::wire::Identity;

pub fn open(memfd: OwnedFd, identity: Identity, discard: bool) -> anyhow::Result<State> {
    let config = Config::default();
    let again = memfd.try_clone().context("cannot duplicate a descriptor")?;
    let refused = match State::open(memfd, identity, &config) {
        Ok(state) => {
            // To close any descriptor of a file is to give up the locks on it, and the state is locked.
            std::mem::forget(again);
            return Ok(state);
        }
        Err(refused) if !refused.is_discardable() => return Err(refused.into()),
        Err(refused) => refused,
    };
    if !discard {
        bail!("{refused}; --discard-state goes on without it");
    }
    let state = State::discard(again, identity, &config)
        .with_context(|| format!("{refused}; it cannot be discarded either"))?;
    tracing::warn!(
        "{refused}; so it was discarded: what is open is revoked, and what was asked of the dead \
         server gets EIO"
    );
    Ok(state)
}

#[cfg(test)]
mod tests {
    use rust_fuse_notify::std::state::StateError;

    use super::*;

    #[test]
    fn a_state_that_was_opened_stays_locked() {
        let memfd = State::create_memfd().unwrap();
        let identity = Identity([1, 2]);
        let _state = open(memfd.try_clone().unwrap(), identity, true).unwrap();
        // SAFETY: the child calls nothing that another thread of this process could hold a lock of.
        match unsafe { nix::unistd::fork() }.unwrap() {
            nix::unistd::ForkResult::Child => {
                let again = State::open(memfd, identity, &Config::default());
                let refused = matches!(again, Err(StateError::InUse { .. }));
                // SAFETY: ends the child without running anything of the test harness.
                unsafe { libc::_exit(i32::from(!refused)) }
            }
            nix::unistd::ForkResult::Parent { child } => {
                let status = nix::sys::wait::waitpid(child, None).unwrap();
                assert_eq!(status, nix::sys::wait::WaitStatus::Exited(child, 0));
            }
        }
    }

    #[test]
    fn the_operator_is_told_what_can_be_done() {
        use std::os::unix::fs::FileExt;
        let memfd = State::create_memfd().unwrap();
        let identity = Identity([1, 2]);
        drop(open(memfd.try_clone().unwrap(), identity, false).unwrap());
        std::fs::File::from(memfd.try_clone().unwrap())
            .write_all_at(&[9], 16)
            .unwrap();
        let refused = open(memfd.try_clone().unwrap(), identity, false).unwrap_err();
        assert!(refused.to_string().contains("--discard-state"), "{refused}");
        assert!(open(memfd, identity, true).unwrap().nodes().is_empty());
        // Not even with the option: this is not a state.
        let other = State::create_memfd().unwrap();
        std::fs::File::from(other.try_clone().unwrap())
            .write_all_at(&[9; 8192], 0)
            .unwrap();
        let refused = format!("{:#}", open(other, identity, true).unwrap_err());
        assert!(refused.contains("unmount"), "{refused}");
    }
}
