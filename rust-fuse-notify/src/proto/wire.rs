// SPDX-License-Identifier: GPL-2.0

//! What goes over `/dev/fuse`.
//!
//! The numbers are those of `include/uapi/linux/fuse.h`; the kernel build compares them.

/// INIT flag: another instance of the server may take over the connection.
pub const RESTARTABLE: u64 = 1 << 45;

/// Notification code of RESTARTED.
pub const NOTIFY_RESTARTED: i32 = 12;

/// `getattr_flags`: the request is a replay.
pub const GETATTR_REPLAY: u32 = 1 << 1;

/// Flag of a notification: the second step, release what is held.
pub const COMMIT: u32 = 1 << 0;

/// Set in every cookie, so that it collides with no request id.
pub const COOKIE: u64 = 1 << 62;

/// Offset of the identity in `struct fuse_init_out`, in bytes.
pub const INIT_IDENTITY_OFFSET: usize = 48;

/// `struct fuse_notify_restarted_out`: server to kernel, after `struct fuse_out_header`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RestartedOut {
    /// `unique` of the report; bit 62 must be set.
    pub cookie: u64,
    /// [`COMMIT`] or nothing.
    pub flags: u32,
    /// With [`COMMIT`] the epoch of the report, else zero.
    pub epoch: u32,
    /// The identity from the INIT reply. Without [`COMMIT`] it may be zero: who only keeps the
    /// descriptor knows none.
    pub identity: [u64; 2],
}

/// `struct fuse_notify_restarted_in`: the report, kernel to server, after `struct fuse_in_header`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RestartedIn {
    /// The epoch that COMMIT must name.
    pub epoch: u32,
    /// None yet.
    pub flags: u32,
    /// Inodes that were shown to the server.
    pub replayed: u64,
    /// Those of them that it knew.
    pub confirmed: u64,
    /// Those of them that it did not know, or not as the same file.
    pub revoked: u64,
    /// Requests that wait for COMMIT.
    pub held: u64,
    /// The lowest original id among them; zero if there are none.
    pub lowest_owed: u64,
    /// From RESTARTED until the root was sent, in nanoseconds.
    pub hold_ns: u64,
    /// Until the root was answered, in nanoseconds.
    pub root_ns: u64,
    /// Until the last other inode was answered, in nanoseconds.
    pub replay_ns: u64,
    /// Until requests in transit had settled, in nanoseconds.
    pub settle_ns: u64,
    /// Zero.
    pub spare: [u64; 2],
}

/// What a notification asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Demand {
    /// Begin: a new instance is here.
    Restarted,
    /// Release what is held, if the epoch is this one.
    Commit(u32),
}

/// Why a notification is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// `EINVAL`: unknown flag, a cookie without bit 62, or an epoch without [`COMMIT`].
    Malformed,
    /// `ESTALE`: the server serves another file system.
    WrongIdentity,
    /// `ESTALE`: COMMIT names an epoch that is not prepared.
    WrongEpoch,
    /// `EINVAL`: the connection is gone.
    Gone,
}

impl RestartedOut {
    /// Decides what the notification asks for, before any state is looked at.
    ///
    /// # Errors
    ///
    /// [`Refusal::Malformed`], or [`Refusal::WrongIdentity`] if it names an identity that is not
    /// `known`; COMMIT has to name it.
    pub fn demand(&self, known: [u64; 2]) -> Result<Demand, Refusal> {
        let commit = self.flags & COMMIT != 0;
        if self.flags & !COMMIT != 0 || self.cookie & COOKIE == 0 || (!commit && self.epoch != 0) {
            return Err(Refusal::Malformed);
        }
        if self.identity != known && (commit || self.identity != [0, 0]) {
            return Err(Refusal::WrongIdentity);
        }
        if commit {
            return Ok(Demand::Commit(self.epoch));
        }
        Ok(Demand::Restarted)
    }
}
