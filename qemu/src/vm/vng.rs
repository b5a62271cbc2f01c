// SPDX-License-Identifier: GPL-2.0
//! virtme-ng: what many kernel developers have at hand. It boots our x86
//! kernels its own way; our init is only a command to it, and the line is a
//! virtio port that QEMU is told to add.

use super::{virtio_channel, Backend, Guest, FIFO};
use crate::guest::{Channel, JOB_KEY, PORT};
use crate::paths::Paths;
use crate::ui;
use anyhow::Result;
use std::path::PathBuf;
use std::process::Command;

const VERSION: &str = "1.42";

pub struct Vng {
    program: PathBuf,
}

impl Vng {
    /// Into a virtual environment in the cache, on first use.
    pub fn set_up(paths: &Paths) -> Result<Vng> {
        crate::setup::need_qemu()?;
        let venv = paths.cache.join(format!("tools/vng-{VERSION}"));
        let program = venv.join("bin/vng");
        if !program.exists() {
            ui::step(format!(
                "installing virtme-ng {VERSION} (PyPI) into the cache"
            ));
            let log = paths.cache.join("logs/vng.log");
            ui::run_logged(
                Command::new("python3").args(["-m", "venv"]).arg(&venv),
                &log,
                "python3 -m venv",
            )?;
            let mut pip = Command::new(venv.join("bin/pip"));
            pip.args(["install", "--quiet", &format!("virtme-ng=={VERSION}")]);
            ui::run_logged(&mut pip, &log, "pip install virtme-ng")?;
        }
        Ok(Vng { program })
    }
}

impl Backend for Vng {
    fn describe(&self) -> String {
        "vng".into()
    }

    fn channel(&self) -> Channel {
        virtio_channel()
    }

    fn power_off(&self) -> bool {
        false
    }

    /// Its helpers inherit no descriptor.
    fn fifo(&self) -> bool {
        true
    }

    fn command(&self, g: &Guest) -> Result<Command> {
        let mut c = Command::new(&self.program);
        // It calls its own helpers by name.
        let bin = self
            .program
            .parent()
            .map(|p| p.display().to_string())
            .unwrap_or_default();
        let path = std::env::var("PATH").unwrap_or_default();
        c.env("PATH", format!("{bin}:{path}"));
        c.arg("--run")
            .arg(g.image)
            // KVM is only for who has seen a guest boot with it; see accel.rs.
            .args(["--disable-kvm", "--verbose", "--force-9p"])
            .args([
                "--memory",
                &format!("{}M", g.mem),
                "--cpus",
                &g.cpus.to_string(),
            ])
            .args(["--user", "root"])
            .arg(format!(
                "--qemu-opts=-chardev file,id=line,path={}",
                g.run_dir.join(FIFO).display()
            ))
            .arg(format!(
                "--qemu-opts=-device virtserialport,chardev=line,name={PORT}"
            ))
            .args([
                "--append",
                &format!(
                    "no_timer_check loglevel=7 panic=-1 {JOB_KEY}={}",
                    g.run_dir.join("job.json").display()
                ),
            ]);
        for a in g.append {
            c.args(["--append", a]);
        }
        c.args(["--exec", &format!("'{}' guest", g.exe.display())]);
        Ok(c)
    }
}
