// SPDX-License-Identifier: GPL-2.0
//! What the author of a FUSE server uses.
//!
//! A keeper opens `/dev/fuse`, mounts, and starts the server with two descriptors: the device, and a memfd. When
//! the server dies, the keeper starts it again with the same two, and the server says so to the kernel, which holds
//! all requests meanwhile and shows what it caches. This module is everything of that but the file system itself:
//!
//! * [`listen`]: the two descriptors, as the keeper (or systemd) passes them.
//! * [`state`]: tables in the memfd that survive: nodes, open files, a journal of changes, memory of the server's own.
//! * [`adopt`]: taking the connection over, the first time and every later one. [`adopt::Recover`] is the part that
//!   only the author of the server can know.
//! * `watched` (feature `fuser`): a file system of which a poisonous request cannot take the mount.
//! * [`notify`], [`message`], [`wire`]: the protocol below that, for keepers and for servers with a loop of their own.
//!
//! Is my server restartable, and what does it take? `Documentation/server-authors.md` has the questions;
//! `examples/counters.rs` is a new server that changes state, `examples/hello.rs` an existing one made restartable.
//!
//! # What a server promises
//!
//! By asking for [`wire::FUSE_RESTARTABLE`] in its reply to INIT a server signs that
//!
//! 1. a nodeid it gave names the same file in every later instance, and no other file while the kernel may hold it
//!    ([`state::NodeTable`] gives out such nodeids, if files are found by a handle that is theirs for ever);
//! 2. at COMMIT its table is the replayed set, with the replayed counts ([`state::State::settle`]);
//! 3. every `fh` stays valid ([`state::HandleTable`]); so do directory offsets; it asks neither for remote locks nor
//!    for `FUSE_ATOMIC_O_TRUNC`;
//! 4. it answers replays without waiting for a lock that an application holds, after it has finished or undone what
//!    was half done ([`state::Journal`], [`adopt::Recover::resolve`]).
//!
//! # A whole server
//!
//! This one serves its root and nothing else, over and over.
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use fuser::{Filesystem, InitFlags, KernelConfig, Request, Session, SessionACL};
//! use rust_fuse_notify::std::adopt::{Adopt, Recover};
//! use rust_fuse_notify::std::message::Replay;
//! use rust_fuse_notify::std::state::{Config, FileHandle, NewNode, NodeFlags, State};
//! use rust_fuse_notify::std::wire::{Attr, Identity, FUSE_RESTARTABLE};
//! use rust_fuse_notify::std::listen;
//!
//! /// A UUID of the file system; the same in every instance.
//! const IDENTITY: Identity = Identity([0x6e1f_0f6c_2d0a_4c5e, 0x9b1b_7a3f_50c2_8d11]);
//!
//! struct Empty(Arc<State>);
//!
//! impl Filesystem for Empty {
//!     fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
//!         // An error means that this kernel does not offer it; the server then works without.
//!         let _ = config.add_capabilities(InitFlags::from_bits_retain(FUSE_RESTARTABLE));
//!         Ok(())
//!     }
//!     // lookup: self.0.nodes().lookup(..) before reply.entry(..)
//!     // forget: if self.0.nodes().forget(..) gives the node back, self.0.remove_node(..)
//!     // mkdir and other changes: self.0.journal().begin(..), change, outcome(..), reply, done()
//! }
//!
//! struct Recovery;
//!
//! impl Recover for Recovery {
//!     // resolve: here nothing changes anything, so nothing is ever half done.
//!     fn replay(&mut self, state: &State, replay: &Replay) -> Result<Attr, i32> {
//!         let node = state.nodes().replayed(replay)?;
//!         Ok(Attr::new(node.info.ino, node.info.mode))
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let inherited = listen::adopt_from_environment()?;
//! let state = Arc::new(State::open(inherited.state, IDENTITY, &Config::default())?);
//! state.nodes().set_root(&NewNode {
//!     handle: FileHandle::new(0, b"root").ok_or("too long")?,
//!     domain: 0,
//!     generation: 0,
//!     ino: 1,
//!     mode: libc::S_IFDIR | 0o755,
//!     flags: NodeFlags::NONE,
//!     aux: [0; 4],
//! });
//! let adopted = Adopt::new(inherited.device, state.clone()).run(&mut Recovery, |fd| {
//!     // Replays and resent requests carry other users' ids.
//!     Session::from_fd(Empty(state), fd, SessionACL::All, fuser::Config::default())
//! })?;
//! eprintln!("serving: {:?}", adopted.how);
//! adopted.session.run()?;
//! # Ok(())
//! # }
//! ```
#![deny(missing_docs)]

pub mod adopt;
mod device;
pub mod listen;
pub mod message;
pub mod notify;
pub mod state;
#[cfg(feature = "fuser")]
pub mod watched;
pub mod wire;
