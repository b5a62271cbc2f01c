// SPDX-License-Identifier: GPL-2.0
//! From nodeids to files: what every operation begins with.

use std::ffi::{CStr, OsStr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use rust_fuse_notify::std::state::{NewNode, Node, NodeFlags};
use rust_fuse_notify::std::wire::FUSE_ROOT_ID;

use super::graveyard::Graveyard;
use super::handle::Handle;
use super::server::Server;
use super::sys::{self, Res};
use super::wire::{attr_from_stat, Attr, EntryOut};

pub const ROOT: u64 = FUSE_ROOT_ID;

/// A file that the kernel is about to be told of; its lookup is counted already.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    pub nodeid: u64,
    pub generation: u32,
    pub attr: Attr,
}

impl Server {
    /// The node, or `ESTALE` for a nodeid that was never given out or has been taken back.
    pub fn node(&self, nodeid: u64) -> Res<Node> {
        self.state.nodes().get(nodeid).ok_or(Errno::ESTALE)
    }

    /// An `O_PATH` descriptor of the node.
    pub fn node_fd(&self, nodeid: u64) -> Res<Arc<OwnedFd>> {
        if let Some(fd) = self.paths.get(nodeid) {
            return Ok(fd);
        }
        let fd = Arc::new(self.open_node(nodeid, libc::O_PATH)?);
        self.paths.insert(nodeid, fd.clone());
        Ok(fd)
    }

    /// Opens the node's file; never another one in its place.
    pub fn open_node(&self, nodeid: u64, flags: i32) -> Res<OwnedFd> {
        let handle = Handle(self.node(nodeid)?.info.handle);
        self.backing.open_handle(&handle, flags)
    }

    /// The attributes that the kernel is told: links in the graveyard do not count.
    pub fn attr(&self, nodeid: u64) -> Res<Attr> {
        let st = sys::fstat(self.node_fd(nodeid)?.as_fd())?;
        Ok(self.visible(nodeid, &st))
    }

    pub fn visible(&self, nodeid: u64, st: &libc::stat) -> Attr {
        let mut attr = attr_from_stat(st);
        let dir = attr.mode & libc::S_IFMT == libc::S_IFDIR;
        if nodeid == ROOT {
            // The graveyard is a subdirectory of the root; file systems that count them have > 2.
            if self.yard.exists() && attr.nlink > 2 {
                attr.nlink -= 1;
            }
        } else if self.yard.contains(nodeid) {
            attr.nlink = if dir { 0 } else { attr.nlink.saturating_sub(1) };
        }
        attr
    }

    /// Finds a name and counts the lookup.
    pub fn lookup(&self, parent: u64, name: &OsStr) -> Res<Entry> {
        self.lookup_c(parent, &self.name_in(parent, name, Errno::ENOENT)?)
    }

    pub fn lookup_c(&self, parent: u64, name: &CStr) -> Res<Entry> {
        let dir = self.node_fd(parent)?;
        let fd = sys::open_at(dir.as_fd(), name, libc::O_PATH, 0)?;
        let entry = self.count(&fd)?;
        self.paths.insert(entry.nodeid, Arc::new(fd));
        Ok(entry)
    }

    /// One lookup more for the file behind a descriptor.
    pub fn count(&self, fd: &OwnedFd) -> Res<Entry> {
        let st = sys::fstat(fd.as_fd())?;
        if st.st_dev != self.backing.dev {
            // Something is mounted there: its files have no handles that are valid here.
            return Err(Errno::EXDEV);
        }
        let (handle, _) = Handle::of(fd.as_fd())?;
        let new = self.describe(&handle, &st);
        let node = self.state.nodes().lookup(&new).map_err(|e| {
            tracing::error!("cannot remember another file: {e}");
            Errno::ENOMEM
        })?;
        Ok(Entry {
            nodeid: node.nodeid,
            generation: node.info.generation,
            attr: self.visible(node.nodeid, &st),
        })
    }

    fn describe(&self, handle: &Handle, st: &libc::stat) -> NewNode {
        NewNode {
            handle: handle.0,
            domain: self.domain,
            generation: handle.generation(),
            ino: st.st_ino,
            mode: st.st_mode,
            flags: NodeFlags::default(),
            aux: [0; 4],
        }
    }

    /// What the table says of the root. The kernel makes the root inode itself, with generation 0.
    pub fn describe_root(&self) -> Res<NewNode> {
        let st = sys::fstat(self.backing.root())?;
        let mut root = self.describe(&self.backing.root_handle, &st);
        root.generation = 0;
        Ok(root)
    }

    /// The node of a file that the kernel holds now; 0 if it holds none.
    pub fn known(&self, handle: &Handle) -> u64 {
        match self.state.nodes().find(self.domain, &handle.0) {
            Some(node) if node.lookups > 0 => node.nodeid,
            _ => 0,
        }
    }

    /// The kernel gives lookups back; the last one removes the node and what was kept for it.
    pub fn forget(&self, nodeid: u64, lookups: u64) {
        if nodeid == ROOT {
            return;
        }
        if let Some(node) = self.state.nodes().forget(nodeid, lookups) {
            self.bury_node(node.nodeid);
        }
    }

    pub fn bury_node(&self, nodeid: u64) {
        // A handle that is left was opened for an application that was killed before it knew.
        let handles = self.state.handles().of_node(nodeid);
        // The node first, for another thread may have looked the file up again, and removed it. If this is the last
        // we do, the next start finds a grave without a node and cleans up.
        if !self.state.remove_node(nodeid) {
            return;
        }
        self.paths.remove(nodeid);
        self.yard.release(nodeid);
        for handle in handles {
            self.files.remove(handle.fh);
        }
    }

    /// `name` as one component that may be used in `parent`; `reserved` if it is the hidden one.
    pub fn name_in(&self, parent: u64, name: &OsStr, reserved: Errno) -> Res<std::ffi::CString> {
        let name = sys::component(name)?;
        if Graveyard::is_reserved(parent, name.to_bytes()) {
            return Err(reserved);
        }
        Ok(name)
    }

    pub fn entry_out(&self, entry: &Entry) -> EntryOut {
        EntryOut::new(
            entry.nodeid,
            u64::from(entry.generation),
            entry.attr,
            self.opts.timeout,
        )
    }
}
