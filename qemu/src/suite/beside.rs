// SPDX-License-Identifier: GPL-2.0
//! The parts of `scripts/test` that run beside the scenarios in UML, in processes of their own: their output is kept back
//! until the end, or it would be mixed.

use super::test::Tally;
use crate::paths::Paths;
use crate::ui;
use anyhow::{Context, Result};
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// What runs in a process of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// What kills servers that do real work.
    Servers,
    /// The scenarios in QEMU, and the fuzzer, which together take as long as the others.
    Qemu,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Part::Servers => "crash matrix, races, systemd, deaths, poison and hangs",
            Part::Qemu => "scenarios in QEMU, fuzzing",
        }
    }
}

/// The other process, and where it writes.
pub struct Beside {
    part: Part,
    child: Child,
    output: PathBuf,
    result: PathBuf,
}

impl Beside {
    pub fn start(paths: &Paths, part: Part, options: &[&str]) -> Result<Beside> {
        let file = |what: &str| {
            let name = format!("fuse-restart-{part:?}-{}.{what}", std::process::id());
            std::env::temp_dir().join(name.to_lowercase())
        };
        let (output, result) = (file("log"), file("json"));
        let log =
            File::create(&output).with_context(|| format!("cannot create {}", output.display()))?;
        let child = Command::new(std::env::current_exe()?)
            .args(["test", "--beside"])
            .arg(format!("{part:?}").to_lowercase())
            .arg("--result")
            .arg(&result)
            .args(options)
            .env("FUSE_RESTART_REPO", &paths.repo)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot run this program again")?;
        ui::step(format!(
            "beside what follows, and shown after it: {}",
            part.name()
        ));
        Ok(Beside {
            part,
            child,
            output,
            result,
        })
    }

    /// Waits for it, shows what it said and adds what it found.
    pub fn join(mut self, tally: &mut Tally) {
        let name = self.part.name();
        ui::step(format!("waiting for: {name}"));
        let status = self.child.wait();
        let shown = File::open(&self.output).and_then(|mut f| io::copy(&mut f, &mut io::stdout()));
        let found = std::fs::read(&self.result)
            .context("no result")
            .and_then(|json| serde_json::from_slice(&json).context("its result"));
        match found {
            Ok(found) => tally.join(found),
            Err(e) => tally.fail(name, &format!("{e:#} ({status:?}, output {shown:?})")),
        }
        for file in [&self.output, &self.result] {
            let _ = std::fs::remove_file(file);
        }
    }
}
