// SPDX-License-Identifier: GPL-2.0
//! A thread of a server that sleeps in the middle of a copy, and has a request in its hands as long as it does.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{bail, ensure, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use zerocopy::IntoBytes;

use super::app::{state, App};
use super::kit::Kit;
use super::ops::{self, Done};
use super::tree::Answer;
use super::uffd::Abyss;
use super::wait::wait_for;
use super::wire::{op, OutHeader};

/// What it was doing when it fell asleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copying {
    Request,
    Answer,
}

/// It wakes up when this is dropped.
pub struct Sleeper {
    pub copying: Copying,
    app: App<Done<usize>>,
    abyss: Arc<Abyss>,
    /// What it finds when it wakes up.
    bytes: Vec<u8>,
}

impl Sleeper {
    /// Puts a thread of the server to sleep over a READ of the file `name`: one that nobody waits for, and that keeps
    /// no mount busy.
    pub fn over(kit: &mut Kit<'_>, name: &str, copying: Copying) -> Result<Sleeper> {
        let fd = kit.run_on("open", name, |p| ops::open(p, OFlag::O_RDONLY))??;
        let sleeper = match copying {
            Copying::Request => Sleeper::reader(kit, fd)?,
            Copying::Answer => Sleeper::writer(kit, fd)?,
        };
        sleeper.fall_asleep(kit)?;
        kit.run("close", move || ops::close(fd))??;
        Ok(sleeper)
    }

    fn reader(kit: &mut Kit<'_>, fd: RawFd) -> Result<Sleeper> {
        let abyss = Arc::new(Abyss::new(1 << 18)?);
        let (dev, there) = (kit.dev.duplicate()?, abyss.clone());
        let app = kit.app("a read(2) into the abyss", move || there.read(dev.raw()))?;
        app.wait_asleep(kit.patience)?;
        read_ahead(kit, fd)?;
        Ok(Sleeper {
            copying: Copying::Request,
            app,
            abyss,
            bytes: Vec::new(),
        })
    }

    fn writer(kit: &mut Kit<'_>, fd: RawFd) -> Result<Sleeper> {
        let abyss = Arc::new(Abyss::new(1 << 16)?);
        read_ahead(kit, fd)?;
        let read = kit.until_op(op::READ)?;
        let Answer::Ok(bytes) = kit.tree.apply(&read)? else {
            bail!("{read} fails")
        };
        let header = OutHeader {
            len: (16 + bytes.len()) as u32,
            error: 0,
            unique: read.unique(),
        };
        let (dev, there, len) = (kit.dev.duplicate()?, abyss.clone(), bytes.len());
        let app = kit.app("a write(2) out of the abyss", move || {
            there.write(dev.raw(), header.as_bytes(), len)
        })?;
        Ok(Sleeper {
            copying: Copying::Answer,
            app,
            abyss,
            bytes,
        })
    }

    fn fall_asleep(&self, kit: &Kit<'_>) -> Result<()> {
        let call = match self.copying {
            Copying::Request => libc::SYS_read,
            Copying::Answer => libc::SYS_writev,
        };
        let file = format!("/proc/self/task/{}/syscall", self.app.tid);
        wait_for("a server to sleep in its copy", kit.patience, || {
            let text = std::fs::read_to_string(&file).unwrap_or_default();
            let there = text.split(' ').next() == Some(&call.to_string())
                && matches!(state(self.app.tid), Some('S' | 'D'))
                && kit.conn.waiting()? > 0
                && !kit.readable()?;
            Ok(there || !self.sleeps())
        })?;
        ensure!(
            self.sleeps(),
            "{} ended instead of faulting: {:?}",
            self.app.what,
            self.app.take()
        );
        Ok(())
    }

    pub fn sleeps(&self) -> bool {
        !self.app.done()
    }

    /// Lets it go on; what its system call said.
    pub fn wake(self, limit: Duration) -> Result<Done<usize>> {
        self.abyss.fill(&self.bytes)?;
        self.app.finish(limit)
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        // An error: it is awake.
        let _ = self.abyss.fill(&self.bytes);
    }
}

/// Has the kernel read the first page of the file, and does not wait for it.
fn read_ahead(kit: &mut Kit<'_>, fd: RawFd) -> Result<()> {
    let hint = kit.app("readahead", move || {
        // SAFETY: plain numbers.
        let error = unsafe { libc::posix_fadvise(fd, 0, 4096, libc::POSIX_FADV_WILLNEED) };
        Errno::from_raw(error)
    })?;
    let error = hint.finish(kit.patience)?;
    ensure!(error as i32 == 0, "posix_fadvise: {error}");
    Ok(())
}
