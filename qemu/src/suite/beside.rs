// SPDX-License-Identifier: GPL-2.0
//! The part of `scripts/test` that runs beside the scenarios, in a process of its own: its output is kept back until the
//! end, or the two would be mixed.

use super::test::Tally;
use crate::paths::Paths;
use crate::ui;
use anyhow::{Context, Result};
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

const NAME: &str = "crash matrix, races, systemd, poison and hangs";

/// The other process, and where it writes.
pub struct Beside {
    child: Child,
    output: PathBuf,
    result: PathBuf,
}

impl Beside {
    pub fn start(paths: &Paths) -> Result<Beside> {
        let file = |what: &str| {
            let name = format!("fuse-restart-beside-{}.{what}", std::process::id());
            std::env::temp_dir().join(name)
        };
        let (output, result) = (file("log"), file("json"));
        let log =
            File::create(&output).with_context(|| format!("cannot create {}", output.display()))?;
        let child = Command::new(std::env::current_exe()?)
            .args(["test", "--beside"])
            .arg(&result)
            .env("FUSE_RESTART_REPO", &paths.repo)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot run this program again")?;
        ui::step(format!("beside what follows, and shown after it: {NAME}"));
        Ok(Beside {
            child,
            output,
            result,
        })
    }

    /// Waits for it, shows what it said and adds what it found.
    pub fn join(mut self, tally: &mut Tally) {
        ui::step(format!("waiting for: {NAME}"));
        let status = self.child.wait();
        let shown = File::open(&self.output).and_then(|mut f| io::copy(&mut f, &mut io::stdout()));
        let found = std::fs::read(&self.result)
            .context("no result")
            .and_then(|json| serde_json::from_slice(&json).context("its result"));
        match found {
            Ok(found) => tally.join(found),
            Err(e) => tally.fail(NAME, &format!("{e:#} ({status:?}, output {shown:?})")),
        }
        for file in [&self.output, &self.result] {
            let _ = std::fs::remove_file(file);
        }
    }
}
