// SPDX-License-Identifier: GPL-2.0
//! Open files and directories: open, data, directory streams.

use std::os::fd::AsFd;

use fuser::FileType;
use nix::errno::Errno;
use rust_fuse_notify::std::state::{HandleKind, Success};

use crate::crash_points;

use super::dents::{self, Entry as Dent};
use super::graveyard::Graveyard;
use super::make::Kept;
use super::nodes::ROOT;
use super::server::Server;
use super::sys::{self, Res};
use super::wire::{attr_from_stat, DirBuf, Dirent, EntryOut};

/// fuser does not tell how much room the kernel has; it has at least a page.
const DIR_REPLY: usize = 4096;

impl Server {
    pub fn open(&self, unique: u64, nodeid: u64, flags: i32) -> Res<u64> {
        if let Some(fh) = self.handle_of_resend(unique, nodeid) {
            return Ok(fh);
        }
        let flags = self.backing_flags(flags);
        let fd = self.open_node(nodeid, flags)?;
        self.new_handle(unique, nodeid, flags, HandleKind::File, fd)
    }

    pub fn open_dir(&self, unique: u64, nodeid: u64) -> Res<u64> {
        if let Some(fh) = self.handle_of_resend(unique, nodeid) {
            return Ok(fh);
        }
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        let fd = self.open_node(nodeid, flags)?;
        self.new_handle(unique, nodeid, flags, HandleKind::Directory, fd)
    }

    /// A copy can be repeated as long as its source is what it was; once it is answered, another request may change
    /// that. So what was copied is entered before it is answered.
    pub fn copy(
        &self,
        unique: u64,
        (node_in, fh_in, offset_in): (u64, u64, u64),
        (node_out, fh_out, offset_out): (u64, u64, u64),
        len: u64,
    ) -> Kept<'_, u32> {
        if let Some((success, slot)) = self.outcome(unique)? {
            let copied = success
                .payload
                .first_chunk()
                .map(|n| u32::from_le_bytes(*n));
            return Ok((copied.ok_or(Errno::EIO)?, Some(slot)));
        }
        let from = self.file(node_in, fh_in)?;
        let to = self.file(node_out, fh_out)?;
        // The reply has 32 bits; whole pages, so that the caller goes on aligned.
        let len = len.min(u64::from(u32::MAX) & !4095) as usize;
        let n = sys::copy_file_range(from.as_fd(), offset_in, to.as_fd(), offset_out, len)?;
        let n = n as u32;
        if !self.opts.journal {
            return Ok((n, None));
        }
        let outcome = Ok(Success {
            payload: n.to_le_bytes().to_vec(),
            ..Success::default()
        });
        let entered = self.state.journal().record(unique, &outcome);
        let slot = entered.inspect_err(|e| {
            tracing::warn!("a copy ({unique:#x}) may be repeated if the server dies now: {e}");
        });
        crash_points::reach("outcome");
        Ok((n, slot.ok()))
    }

    /// What can be repeated: not to collapse or insert a range, which the kernel does not ask for either.
    pub fn allocate(&self, nodeid: u64, fh: u64, mode: i32, offset: u64, length: u64) -> Res<()> {
        const REPEATABLE: i32 =
            libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE;
        if mode & !REPEATABLE != 0 {
            return Err(Errno::EOPNOTSUPP);
        }
        sys::fallocate(self.file(nodeid, fh)?.as_fd(), mode, offset, length)
    }

    /// FLUSH is a close(2): errors that the backing keeps for that moment show now.
    pub fn flush(&self, nodeid: u64, fh: u64) -> Res<()> {
        let fd = self.file(nodeid, fh)?;
        let copy = super::wire::duplicate(fd.as_fd())?;
        nix::unistd::close(copy)
    }

    /// Calls `add` for the entries after `offset` until it says that there is no more room.
    fn each_dent(
        &self,
        nodeid: u64,
        fh: u64,
        mut offset: u64,
        mut add: impl FnMut(&Dent) -> Res<bool>,
    ) -> Res<()> {
        let dir = self.file(nodeid, fh)?;
        loop {
            let some = dents::read_from(dir.as_fd(), offset, DIR_REPLY)?;
            let Some(last) = some.last() else {
                return Ok(());
            };
            offset = last.off;
            for dent in &some {
                if Graveyard::is_reserved(nodeid, dent.name.to_bytes()) {
                    continue;
                }
                if !add(dent)? {
                    return Ok(());
                }
            }
        }
    }

    /// READDIR: `add` gets inode number, position behind, type and name, and says when it is full.
    pub fn read_dir(
        &self,
        nodeid: u64,
        fh: u64,
        offset: u64,
        mut full: impl FnMut(u64, u64, FileType, &std::ffi::OsStr) -> bool,
    ) -> Res<()> {
        self.each_dent(nodeid, fh, offset, |dent| {
            let ino = self.shown_ino(nodeid, dent)?;
            Ok(!full(ino, dent.off, file_type(dent.kind), dent.name()))
        })
    }

    /// READDIRPLUS: entries with attributes, each of them a lookup but `.` and `..`. The nodeids
    /// are returned as well, so that the lookups can be taken back.
    pub fn read_dir_plus(&self, nodeid: u64, fh: u64, offset: u64) -> Res<(DirBuf, Vec<u64>)> {
        let mut buf = DirBuf::new(DIR_REPLY);
        let mut counted = Vec::new();
        let result = self.each_dent(nodeid, fh, offset, |dent| {
            let name = dent.name.to_bytes();
            if !buf.fits(true, name) {
                return Ok(false);
            }
            let entry = self.entry_of_dent(nodeid, dent, &mut counted)?;
            let dirent = Dirent {
                ino: entry.attr.ino,
                off: dent.off,
                namelen: name.len() as u32,
                kind: u32::from(dent.kind),
            };
            buf.push(Some(&entry), &dirent, name);
            Ok(true)
        });
        match result {
            Ok(()) => Ok((buf, counted)),
            Err(e) => {
                self.take_back(&counted);
                Err(e)
            }
        }
    }

    fn entry_of_dent(&self, nodeid: u64, dent: &Dent, counted: &mut Vec<u64>) -> Res<EntryOut> {
        let bare = |ino| {
            EntryOut::uncounted(super::wire::Attr {
                ino,
                ..Default::default()
            })
        };
        if dent.is_dot() {
            return Ok(bare(self.shown_ino(nodeid, dent)?));
        }
        match self.lookup_c(nodeid, &dent.name) {
            Ok(entry) => {
                counted.push(entry.nodeid);
                Ok(self.entry_out(&entry))
            }
            // Removed meanwhile, or a mount point, or one more than can be remembered: the name is shown, a lookup will tell.
            Err(Errno::ENOENT | Errno::EXDEV | Errno::ESTALE | Errno::ENOMEM) => Ok(bare(dent.ino)),
            Err(e) => Err(e),
        }
    }

    pub fn take_back(&self, counted: &[u64]) {
        for nodeid in counted {
            self.forget(*nodeid, 1);
        }
    }

    /// What is above the root is nobody's business.
    fn shown_ino(&self, nodeid: u64, dent: &Dent) -> Res<u64> {
        if nodeid == ROOT && dent.name.to_bytes() == b".." {
            return Ok(attr_from_stat(&sys::fstat(self.backing.root())?).ino);
        }
        Ok(dent.ino)
    }
}

fn file_type(kind: u8) -> FileType {
    match kind {
        libc::DT_DIR => FileType::Directory,
        libc::DT_LNK => FileType::Symlink,
        libc::DT_CHR => FileType::CharDevice,
        libc::DT_BLK => FileType::BlockDevice,
        libc::DT_FIFO => FileType::NamedPipe,
        libc::DT_SOCK => FileType::Socket,
        // fuser has no word for DT_UNKNOWN; programs check with stat(2) what matters to them.
        _ => FileType::RegularFile,
    }
}
