// SPDX-License-Identifier: GPL-2.0
//! User-mode Linux: the kernel is a program. hostfs is the root, read-only;
//! the kernel's log is its standard error, one serial line is ours.

use super::{append, Backend, Guest};
use crate::guest::Channel;
use anyhow::Result;
use std::process::Command;

pub struct Uml;

impl Backend for Uml {
    fn describe(&self) -> String {
        "uml".into()
    }

    fn channel(&self) -> Channel {
        Channel::Tty("/dev/ttyS0".into())
    }

    fn power_off(&self) -> bool {
        true
    }

    fn command(&self, g: &Guest) -> Result<Command> {
        let mut c = Command::new(g.image);
        c.arg(format!("mem={}M", g.mem))
            .arg(format!("ncpus={}", g.cpus))
            // SMP is only to be had with system calls trapped by seccomp.
            .arg("seccomp=on")
            .args(["root=none", "rootfstype=hostfs", "hostfs=/", "ro"])
            // The whole log: the "stderr" console ends when the real one begins.
            .args(["con0=null,fd:1", "console=tty0"])
            .arg(format!("uml_dir={}", g.run_dir.display()))
            .arg(format!("ssl0=fd:{},fd:{}", g.channel_fd, g.channel_fd))
            .args(append(g).split(' '));
        Ok(c)
    }
}
