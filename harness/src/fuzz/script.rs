// SPDX-License-Identifier: GPL-2.0
//! What one case does, decided from its seed before anything happens: two runs of a case differ only by how the
//! kernel's tasks interleave.

use crate::raw::wait::Rng;

/// Whether the server keeps the contract. The oracle is stricter if it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Dies at any moment, is late, is repeated, writes rubbish that must be refused; but never lies.
    Honest,
    /// Anything.
    Hostile,
}

/// The identity in a RESTARTED.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    Right,
    Nobody,
    Stranger,
}

/// The epoch in a COMMIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    Now,
    Last,
    Next,
    Zero,
    Far(u32),
}

/// How a message is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    Truth,
    /// The truth, and once more.
    Twice,
    /// The truth in several pieces of memory, some of them empty.
    Pieces,
    /// The truth through a pipe.
    Splice,
    /// Only the header and a part of the payload arrives.
    Short(u16),
    Longer(u16),
    Error(i32),
    /// An errno that is none.
    Code(i32),
    /// Random bytes of this length.
    Noise(u16),
    /// The truth with some bytes changed.
    Flip(u8),
    Lie(Lie),
    /// The truth under another id: these bits are changed.
    Id(u64),
    /// `len` in the header is off by this.
    Length(i16),
    /// The payload lies at an address that does not exist.
    Fault,
    /// Written by a process that is killed at once.
    Forked,
    /// Written by a process that is killed while the kernel copies the answer.
    Drown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    Kind,
    Ino,
    Size,
    Mode,
    Invalid,
    Node(u64),
    Generation,
}

/// A notification that is not RESTARTED.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Note {
    pub code: i32,
    /// Chooses the node, and everything else in the payload.
    pub seed: u64,
    /// What is added to the right length.
    pub extra: i16,
}

/// One step of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Read and answer so many messages, whatever they are.
    Serve(u8),
    /// Read so many messages and keep them.
    Take(u8),
    /// Execute a kept message; the answer is for later.
    Execute(u8),
    Answer(u8, How),
    Restarted(Who, u64),
    /// RESTARTED so many times in a row.
    Flood(u8),
    Commit(Which),
    /// Read and answer so many replays and the report, this way.
    Replays(u8, How),
    /// A whole recovery.
    Recover,
    Notify(Note),
    /// Bytes of this length whose header is made from the number.
    Raw(u16, u64),
    /// Read into memory that is too small (true), or not there.
    BadRead(bool),
    Clone,
    CloseClone(u8),
    /// A process that waits in read(2) is killed.
    KilledReader,
    Kill(u8),
    Signal(u8),
    /// Start an application in the place of one that has ended.
    Spawn(u8),
    /// Wait until something can be read, so many milliseconds at most.
    Wait(u8),
    Shrink,
    Probe,
    Look,
}

/// How a case ends, after the fuzzing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// A good server takes over and everything must be right again.
    TakeOver,
    Abort,
    /// `umount -l` while applications are inside, then a good server.
    Detach,
    /// `umount -l`, and nobody ever answers: the last descriptor is closed.
    Close,
}

/// One step of an application; names are chosen from a few by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AppOp {
    Stat(u8),
    Missing(u8),
    Mkdir(u8),
    Rmdir(u8),
    /// Write, close, open, read: what was written must come back.
    RoundTrip(u8, u16),
    Unlink(u8),
    Rename(u8, u8),
    Exchange(u8, u8),
    Link(u8, u8),
    Symlink(u8),
    List,
    Truncate(u8, u16),
    Chmod(u8),
    Xattr(u8),
    Map(u8),
    Fsync(u8),
    Seek(u8),
    Lock(u8),
    Splice(u8),
    CopyRange(u8, u8),
    Allocate(u8),
    Statfs,
    /// Keep a file open over the next operations.
    Keep(u8),
    Poll,
    Chdir(u8),
    SharedStat(u8),
    SharedWrite(u8),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppScript {
    pub ops: Vec<AppOp>,
    /// A timer interrupts its system calls every so many microseconds.
    pub alarm: Option<u32>,
    /// A second thread does the same backwards.
    pub twin: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Script {
    pub mode: Mode,
    pub writeback: bool,
    pub cached_names: bool,
    pub readdirplus: bool,
    pub max_background: u16,
    pub server: Vec<Op>,
    /// What a second server thread does meanwhile, on a descriptor of its own.
    pub rival: Vec<Op>,
    pub apps: Vec<AppScript>,
    pub end: End,
}

const ERRNOS: [i32; 14] = [
    libc::ENOENT,
    libc::EIO,
    libc::ESTALE,
    libc::ENOTCONN,
    libc::EINTR,
    libc::EAGAIN,
    libc::ENOMEM,
    libc::EPERM,
    libc::EEXIST,
    libc::ENOSYS,
    libc::ECONNABORTED,
    libc::ENODEV,
    libc::ELOOP,
    511,
];

impl Script {
    pub fn of(seed: u64, case: u64, ops: usize, only: Option<Mode>) -> Script {
        let mut rng = Rng(seed ^ case.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        // The first numbers of neighbouring seeds look alike.
        rng.next();
        let drawn = if rng.below(2) == 0 {
            Mode::Honest
        } else {
            Mode::Hostile
        };
        let mode = only.unwrap_or(drawn);
        let r = &mut rng;
        let apps = (0..2 + r.below(5)).map(|_| app(r)).collect();
        let server = (0..ops).map(|_| op(r, mode, false)).collect();
        let rival = if mode == Mode::Hostile && r.below(2) == 0 {
            (0..ops / 2).map(|_| op(r, mode, true)).collect()
        } else {
            Vec::new()
        };
        let end = match r.below(10) {
            0 => End::Abort,
            1 => End::Detach,
            2 => End::Close,
            _ => End::TakeOver,
        };
        Script {
            mode,
            writeback: r.below(2) == 0,
            cached_names: r.below(3) > 0,
            readdirplus: r.below(2) == 0,
            max_background: [1, 2, 12][r.below(3)],
            server,
            rival,
            apps,
            end,
        }
    }
}

fn byte(r: &mut Rng) -> u8 {
    r.next() as u8
}

fn op(r: &mut Rng, mode: Mode, rival: bool) -> Op {
    let hostile = mode == Mode::Hostile;
    match r.below(100) {
        0..20 => Op::Serve(1 + r.below(60) as u8),
        20..29 => Op::Take(1 + r.below(6) as u8),
        29..33 => Op::Execute(byte(r)),
        33..47 => Op::Answer(byte(r), how(r, mode)),
        47..55 => Op::Restarted(
            [Who::Right, Who::Right, Who::Nobody, Who::Stranger][r.below(4)],
            r.next(),
        ),
        55 => Op::Flood(1 + r.below(40) as u8),
        56..62 => Op::Commit(
            [
                Which::Now,
                Which::Now,
                Which::Last,
                Which::Next,
                Which::Zero,
                Which::Far(r.next() as u32),
            ][r.below(6)],
        ),
        62..70 => Op::Replays(1 + r.below(40) as u8, how(r, mode)),
        70..74 if !rival => Op::Recover,
        70..78 => Op::Notify(Note {
            // STORE and DELETE change what applications see, which an honest server has no reason to do.
            code: match hostile {
                true => [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, -1, 0][r.below(14)],
                false => [1, 2, 3, 5, 7, 8, 9, 10, 11, 13, -1, 0][r.below(12)],
            },
            seed: r.next(),
            extra: [0, 0, 0, -1, 1, -8, 100, 4000][r.below(8)],
        }),
        78..81 => Op::Raw(
            [0, 1, 15, 16, 17, 47, 48, 49, 104, 120, 5000][r.below(11)],
            r.next(),
        ),
        81 if hostile => Op::BadRead(r.below(2) == 0),
        81 | 82 => Op::Probe,
        83 | 84 => Op::Clone,
        85 | 86 => Op::CloseClone(byte(r)),
        87 if !rival => Op::KilledReader,
        88..90 if !rival => Op::Kill(byte(r)),
        90..92 if !rival => Op::Signal(byte(r)),
        92..95 if !rival => Op::Spawn(byte(r)),
        95..98 => Op::Wait(1 + r.below(4) as u8),
        98 => Op::Shrink,
        _ => Op::Look,
    }
}

fn how(r: &mut Rng, mode: Mode) -> How {
    if mode == Mode::Honest {
        // What is refused, or means the same.
        return match r.below(12) {
            0 => How::Twice,
            1 => How::Pieces,
            2 => How::Splice,
            3 => How::Id(1 << (48 + r.below(8))),
            4 => How::Id(1 << 63),
            5 => How::Length([-1, 1, 100, -16][r.below(4)]),
            6 => How::Drown,
            _ => How::Truth,
        };
    }
    match r.below(20) {
        0 => How::Twice,
        1 => How::Pieces,
        2 => How::Splice,
        3 => How::Short(r.below(200) as u16),
        4 => How::Longer(1 + r.below(5000) as u16),
        5 | 6 => How::Error(ERRNOS[r.below(ERRNOS.len())]),
        7 => How::Code([1, -512, -1000, i32::MIN, i32::MAX, -511][r.below(6)]),
        8 => How::Noise(r.below(300) as u16),
        9 => How::Flip(1 + r.below(4) as u8),
        10..13 => How::Lie(
            [
                Lie::Kind,
                Lie::Ino,
                Lie::Size,
                Lie::Mode,
                Lie::Invalid,
                Lie::Node([0, 1, 2, u64::MAX, 101, 103, 110, 150][r.below(8)]),
                Lie::Generation,
            ][r.below(7)],
        ),
        13 => How::Id(1 << r.below(64)),
        14 => How::Length([-1, 1, 100, -16, -32000][r.below(5)]),
        15 => How::Fault,
        16 => How::Forked,
        17 => How::Drown,
        _ => How::Truth,
    }
}

fn app(r: &mut Rng) -> AppScript {
    let ops = (0..8 + r.below(24)).map(|_| app_op(r)).collect();
    AppScript {
        ops,
        alarm: (r.below(3) == 0).then(|| 500 + r.below(5000) as u32),
        twin: r.below(3) == 0,
    }
}

fn app_op(r: &mut Rng) -> AppOp {
    let (a, b, n) = (r.below(6) as u8, r.below(6) as u8, r.next() as u16);
    match r.below(34) {
        0 | 1 => AppOp::Stat(a),
        2 => AppOp::Missing(a),
        3 | 4 => AppOp::Mkdir(a),
        5 => AppOp::Rmdir(a),
        6..11 => AppOp::RoundTrip(a, n % 20_000),
        11 => AppOp::Unlink(a),
        12 => AppOp::Rename(a, b),
        13 => AppOp::Exchange(a, b),
        14 => AppOp::Link(a, b),
        15 => AppOp::Symlink(a),
        16 => AppOp::List,
        17 => AppOp::Truncate(a, n),
        18 => AppOp::Chmod(a),
        19 => AppOp::Xattr(a),
        20 | 21 => AppOp::Map(a),
        22 => AppOp::Fsync(a),
        23 => AppOp::Seek(a),
        24 => AppOp::Lock(a),
        25 => AppOp::Splice(a),
        26 => AppOp::CopyRange(a, b),
        27 => AppOp::Allocate(a),
        28 => AppOp::Statfs,
        29 => AppOp::Keep(a),
        30 => AppOp::Poll,
        31 => AppOp::Chdir(a),
        32 => AppOp::SharedStat(a),
        _ => AppOp::SharedWrite(a),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_case_is_decided_by_its_seed_and_number() {
        assert_eq!(Script::of(7, 3, 50, None), Script::of(7, 3, 50, None));
        assert_ne!(Script::of(7, 3, 50, None), Script::of(7, 4, 50, None));
        assert_ne!(Script::of(7, 3, 50, None), Script::of(8, 3, 50, None));
    }

    #[test]
    fn an_honest_server_never_lies() {
        for case in 0..200 {
            let script = Script::of(1, case, 100, Some(Mode::Honest));
            assert!(script.rival.is_empty());
            for op in script.server {
                let how = match op {
                    Op::Answer(_, how) | Op::Replays(_, how) => how,
                    Op::BadRead(_) => panic!("a failed read costs a request its life"),
                    _ => continue,
                };
                let tame = matches!(
                    how,
                    How::Truth
                        | How::Twice
                        | How::Pieces
                        | How::Splice
                        | How::Id(_)
                        | How::Length(_)
                        | How::Drown
                );
                assert!(tame, "{how:?}");
            }
        }
    }

    #[test]
    fn every_kind_of_step_occurs() {
        let mut seen = std::collections::HashSet::new();
        for case in 0..50 {
            for op in Script::of(1, case, 200, Some(Mode::Hostile)).server {
                seen.insert(std::mem::discriminant(&op));
            }
        }
        assert_eq!(seen.len(), 22);
    }
}
