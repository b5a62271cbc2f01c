// SPDX-License-Identifier: GPL-2.0
//! Without a keeper: the descriptors lie in systemd's store (`FileDescriptorStoreMax=`), see Documentation/systemd.md.
//!
//! The first instance mounts, and the store has both descriptors before INIT is answered, so before anybody could
//! notice that the server dies. Every later instance finds them in `LISTEN_FDS`.

use std::io::{IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use anyhow::{bail, ensure, Context, Result};
use nix::sys::socket::{sendmsg, ControlMessage, MsgFlags, UnixAddr};
use rust_fuse_notify::std::listen::{self, Inherited, ListenError, NAME_DEVICE, NAME_STATE};
use rust_fuse_notify::std::state::State;

use crate::keep::mount::{self, MountOptions};

const SOCKET: &str = "NOTIFY_SOCKET";

/// The two descriptors: handed on, or else made and stored. `mountpoint`: where to mount if there are none.
pub fn inherit_or_mount(mountpoint: Option<&Path>) -> Result<Inherited> {
    let Some(mountpoint) = mountpoint else {
        return listen::adopt_from_environment().context(
            "this server takes /dev/fuse from a keeper; start it with \
             `fuse-restart keep --mountpoint DIR -- fuse-restart serve passthrough BACKING`, \
             or in a systemd unit with --mountpoint DIR",
        );
    };
    let manager = Manager::from_environment()?;
    match listen::adopt_from_environment() {
        Ok(found) if !mount::connection_gone(&found.device) => return Ok(found),
        Ok(_) => {
            tracing::warn!(
                "the stored connection has ended: mounting {} afresh",
                mountpoint.display()
            );
            manager.forget()?;
        }
        Err(ListenError::NotSet(_)) => {}
        Err(ListenError::Missing { name, .. }) => {
            tracing::warn!("only a part of the mount is in the store ({name} is missing)");
            manager.forget()?;
        }
        Err(other) => return Err(other.into()),
    }
    take_dead_mount_away(&mount::resolve(mountpoint)?)?;
    let mountpoint = mount::check_mountpoint(mountpoint)?;
    let state = State::create_memfd().context("memfd for the server's state")?;
    let device = mount::open_device()?;
    let options = MountOptions {
        fsname: "fuse-restart".into(),
        allow_other: true,
    };
    mount::mount_fuse(&device, &mountpoint, &options)?;
    // Both or none: a server that dies in between leaves a mount that the next one takes away.
    manager
        .store(NAME_STATE, &state)
        .and_then(|()| manager.store(NAME_DEVICE, &device))
        .and_then(|()| manager.barrier())
        .inspect_err(|_| {
            let _ = mount::unmount_by_force(&mountpoint);
        })
        .context("cannot put the mount into systemd's descriptor store")?;
    Ok(Inherited { device, state })
}

/// A mount of ours whose descriptors nobody has any more. One that somebody has is not ours to take away.
fn take_dead_mount_away(mountpoint: &Path) -> Result<()> {
    let shown = mountpoint.display();
    let there = mount::mount_at(mountpoint).context("reading /proc/self/mountinfo")?;
    let Some(there) = there.filter(|m| m.fstype == "fuse.fuse-restart") else {
        return Ok(());
    };
    ensure!(
        mount::is_dead(mountpoint),
        "{shown} is mounted already, and somebody keeps it (connection {}): stop that keeper or unit, or use another directory",
        there.connection()
    );
    tracing::warn!("{shown} is left from an earlier life");
    mount::unmount_lazily(mountpoint).with_context(|| shown.to_string())
}

/// Says that requests are answered.
pub fn ready() {
    if std::env::var_os(SOCKET).is_some() {
        let said = Manager::from_environment().and_then(|m| m.send("READY=1", None));
        if let Err(e) = said {
            tracing::warn!("cannot tell systemd that the server is ready: {e:#}");
        }
    }
}

/// The service manager, as sd_notify(3) reaches it.
struct Manager(OwnedFd, UnixAddr);

impl Manager {
    fn from_environment() -> Result<Manager> {
        let Some(name) = std::env::var_os(SOCKET) else {
            bail!(
                "--mountpoint is for systemd units, and {SOCKET} is not set: use `fuse-restart keep`, or set \
                 NotifyAccess=main and FileDescriptorStoreMax= in the unit"
            );
        };
        let name = name.to_string_lossy().into_owned();
        let address = match name.strip_prefix('@') {
            Some(hidden) => UnixAddr::new_abstract(hidden.as_bytes()),
            None => UnixAddr::new(name.as_str()),
        }
        .with_context(|| format!("{SOCKET}={name}"))?;
        let socket = UnixDatagram::unbound().context("cannot make a socket")?;
        Ok(Manager(socket.into(), address))
    }

    fn send(&self, text: &str, fd: Option<&OwnedFd>) -> Result<()> {
        let fds: Vec<_> = fd.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
        let text = [IoSlice::new(text.as_bytes())];
        let flags = MsgFlags::MSG_NOSIGNAL;
        sendmsg(self.0.as_raw_fd(), &text, rights, flags, Some(&self.1))
            .context("cannot talk to systemd")?;
        Ok(())
    }

    /// FDPOLL=0: otherwise systemd drops a descriptor on which poll(2) ever says POLLERR.
    fn store(&self, name: &str, fd: &OwnedFd) -> Result<()> {
        self.send(&format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0"), Some(fd))
    }

    fn forget(&self) -> Result<()> {
        for name in [NAME_DEVICE, NAME_STATE] {
            self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), None)?;
        }
        self.barrier()
    }

    /// Returns when systemd has dealt with all that was sent.
    fn barrier(&self) -> Result<()> {
        let (mut until, closed) = std::io::pipe().context("cannot make a pipe")?;
        self.send("BARRIER=1", Some(&closed.into()))?;
        nix::poll::poll(
            &mut [nix::poll::PollFd::new(
                until.as_fd(),
                nix::poll::PollFlags::POLLIN,
            )],
            30_000u16,
        )
        .ok()
        .filter(|n| *n > 0)
        .context("systemd did not answer within 30 s")?;
        let _ = until.read(&mut [0]);
        Ok(())
    }
}
