// SPDX-License-Identifier: GPL-2.0
//! What an application of the matrix does: one system call each, as data, so that it can be drawn, printed, left out and
//! done again.
//!
//! Paths are relative to the process's own directory. Open files, directory streams and holders have small numbers; a
//! number that nothing is behind gives `EBADF`, so a workload from which operations were left out is still one.

pub type Path = String;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    Mkdir(Path, u32),
    /// With the type in the mode, and a device number.
    Mknod(Path, u32, u64),
    /// Target, then name.
    Symlink(Path, Path),
    Link(Path, Path),
    Unlink(Path),
    Rmdir(Path),
    Rename(Path, Path, u32),
    Chmod(Path, u32),
    Chown(Path, u32, u32),
    Truncate(Path, u64),
    Ftruncate(u8, u64),
    /// Access time in seconds, modification time some more.
    Utimes(Path, i64),
    UtimesNow(Path),
    /// Name, attribute, length and pattern of the value, flags.
    SetXattr(Path, &'static str, usize, u8, i32),
    GetXattr(Path, &'static str),
    ListXattr(Path),
    RemoveXattr(Path, &'static str),
    Stat(Path),
    /// The same, asking the server whatever is cached.
    StatSync(Path),
    Readlink(Path),
    Statfs,
    Open(u8, Path, i32, u32),
    Close(u8),
    Fstat(u8),
    /// File, offset, length, pattern.
    Write(u8, u64, usize, u8),
    /// write(2) where the file's own offset is (a file with `O_APPEND`).
    Append(u8, usize, u8),
    Read(u8, u64, usize),
    Fsync(u8, bool),
    Fallocate(u8, i32, u64, u64),
    /// From, offset, to, offset, length.
    Copy(u8, u64, u8, u64, usize),
    Seek(u8, i64, i32),
    MapRead(u8, usize),
    MapWrite(u8, usize, usize, u8),
    OpenDir(u8, Path),
    /// One getdents64(2) with a small buffer.
    ReadSome(u8),
    /// All that is left; tells every entry that the stream gave but those called `t*`, which change meanwhile.
    ReadRest(u8),
    CloseDir(u8),
    List(Path),
    /// A thread makes it its current directory and stays there.
    HoldCwd(u8, Path),
    AskCwd(u8),
    LetCwd(u8),
    /// A shell script; tells its status and what it said.
    Run(&'static str),
}

/// All that the processes of a case do; each has a directory of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    pub procs: Vec<Proc>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proc {
    /// Number of its directory and log; stays when others are left out.
    pub id: usize,
    pub uid: u32,
    /// Whether its directory has the large directory `many` in it.
    pub many: bool,
    pub ops: Vec<Op>,
}

impl Workload {
    pub fn len(&self) -> usize {
        self.procs.iter().map(|p| p.ops.len()).sum()
    }
}

impl std::fmt::Display for Workload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for proc in &self.procs {
            writeln!(f, "    process {} (uid {}):", proc.id, proc.uid)?;
            for op in &proc.ops {
                writeln!(f, "      {op:?}")?;
            }
        }
        Ok(())
    }
}

/// What a process writes: no two of a workload write the same.
pub fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|at| (usize::from(seed) * 31 + at * 7 + at / 251) as u8)
        .collect()
}

/// What is told of data.
pub fn sum(data: &[u8]) -> u64 {
    data.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    })
}
