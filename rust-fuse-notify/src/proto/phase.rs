// SPDX-License-Identifier: GPL-2.0

//! The states of a recovery.
//!
//! ```text
//! SERVING -> HELD -> ROOT -> REPLAY -> SETTLE -> PREPARED -(COMMIT)-> RELEASE -> SERVING
//!                      \-> REFUSED
//! ```
//!
//! A new RESTARTED leads from any of them to HELD, with the next epoch; abort and unmount lead to
//! GONE, which nothing leaves.
//!
//! 1. *Serving*: nothing is held.
//! 2. *Held*: what was unanswered is held, nothing was sent to the new server yet.
//! 3. *Root*: the root is being replayed, alone. It is the fence: a server that does not know it
//!    learns no other nodeid.
//! 4. *Refused*: the root was not confirmed. Everything stays held, nothing was revoked.
//! 5. *Replay*: the other inodes are being replayed.
//! 6. *Settle*: all are answered; requests that an old reader still copies are waited for, since
//!    the report names the lowest id that is owed.
//! 7. *Prepared*: the report is on its way, COMMIT is awaited.
//! 8. *Release*: committed; what failed is being revoked before anything is delivered.

use super::wire::Refusal;

/// Where a recovery stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// No recovery is under way.
    Serving,
    /// The sweep is done.
    Held,
    /// The root was sent.
    Root,
    /// The root was not confirmed.
    Refused,
    /// The other inodes are being sent.
    Replay,
    /// Requests in transit are waited for.
    Settle,
    /// COMMIT is awaited.
    Prepared,
    /// COMMIT was accepted.
    Release,
    /// The connection was aborted or unmounted.
    Gone,
}

impl Phase {
    /// The name that `recovery` in the control file system shows.
    pub const fn name(self) -> &'static str {
        match self {
            Phase::Serving => "serving",
            Phase::Held => "held",
            Phase::Root => "root",
            Phase::Refused => "refused",
            Phase::Replay => "replay",
            Phase::Settle => "settle",
            Phase::Prepared => "prepared",
            Phase::Release => "release",
            Phase::Gone => "dead",
        }
    }
}

/// The state machine of one connection.
///
/// # Invariants
///
/// `epoch` never decreases, and everything that was sent or learned under a smaller one is void.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Machine {
    phase: Phase,
    epoch: u32,
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

impl Machine {
    /// A connection whose first server is serving.
    pub const fn new() -> Self {
        Self {
            phase: Phase::Serving,
            epoch: 0,
        }
    }

    /// Where the recovery stands.
    pub const fn phase(&self) -> Phase {
        self.phase
    }

    /// The number of RESTARTEDs that were accepted.
    pub const fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Whether something that was sent under `epoch` still counts.
    pub fn is_current(&self, epoch: u32) -> bool {
        self.epoch == epoch && self.phase != Phase::Gone
    }

    /// RESTARTED was accepted and the sweep of `epoch` is done.
    ///
    /// # Errors
    ///
    /// [`Refusal::Gone`] after [`Machine::end`].
    pub fn restarted(&mut self, epoch: u32) -> Result<(), Refusal> {
        if self.phase == Phase::Gone {
            return Err(Refusal::Gone);
        }
        // INVARIANT: The caller counts epochs upwards, under its lock.
        self.epoch = epoch;
        self.phase = Phase::Held;
        Ok(())
    }

    /// The root was sent. Returns whether that was expected.
    pub fn root_sent(&mut self) -> bool {
        self.step(Phase::Held, Phase::Root)
    }

    /// The root was answered. Returns whether that was expected.
    pub fn root_answered(&mut self, confirmed: bool) -> bool {
        let next = if confirmed {
            Phase::Replay
        } else {
            Phase::Refused
        };
        self.step(Phase::Root, next)
    }

    /// All inodes were sent and answered. Returns whether that was expected.
    pub fn replayed(&mut self) -> bool {
        self.step(Phase::Replay, Phase::Settle)
    }

    /// The report was queued. Returns whether that was expected.
    pub fn prepared(&mut self) -> bool {
        self.step(Phase::Settle, Phase::Prepared)
    }

    /// The server says COMMIT.
    ///
    /// # Errors
    ///
    /// [`Refusal::WrongEpoch`] unless the recovery of `epoch` is prepared; [`Refusal::Gone`] after
    /// [`Machine::end`]. Neither changes anything.
    pub fn commit(&mut self, epoch: u32) -> Result<(), Refusal> {
        if self.phase == Phase::Gone {
            return Err(Refusal::Gone);
        }
        if self.phase != Phase::Prepared || self.epoch != epoch {
            return Err(Refusal::WrongEpoch);
        }
        self.phase = Phase::Release;
        Ok(())
    }

    /// Everything held was handed to the server. Returns whether that was expected.
    pub fn released(&mut self) -> bool {
        self.step(Phase::Release, Phase::Serving)
    }

    /// The connection was aborted or unmounted.
    pub fn end(&mut self) {
        self.phase = Phase::Gone;
    }

    fn step(&mut self, from: Phase, to: Phase) -> bool {
        let expected = self.phase == from;
        if expected {
            self.phase = to;
        }
        expected
    }
}
