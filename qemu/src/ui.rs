// SPDX-License-Identifier: GPL-2.0
//! What the user sees meanwhile: one line a step on standard error, and a sign
//! of life from long commands, whose own output goes to a log file.

use anyhow::{bail, Context, Result};
use std::fs::File;
use std::io::{IsTerminal, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

static START: OnceLock<Instant> = OnceLock::new();

/// The name the user called us by (`scripts/vm` and so on).
pub fn program() -> String {
    std::env::var("FUSE_RESTART_ARGV0").unwrap_or_else(|_| "fuse-restart-vm".into())
}

/// One line: something is about to be done.
pub fn step(text: impl AsRef<str>) {
    let t = START.get_or_init(Instant::now).elapsed();
    eprintln!("[{:>7}] {}", clock(t), text.as_ref());
}

pub fn clock(t: Duration) -> String {
    let s = t.as_secs();
    if s < 60 {
        format!("{:.1}s", t.as_secs_f64())
    } else {
        format!("{}m{:02}s", s / 60, s % 60)
    }
}

/// Runs a command whose output goes to `log`; says every now and then that it
/// is alive, and shows the end of the log when it fails.
pub fn run_logged(cmd: &mut Command, log: &Path, what: &str) -> Result<()> {
    if let Some(dir) = log.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let out = File::options()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("cannot write the log {}", log.display()))?;
    let mut child = cmd
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(out)
        .spawn()
        .with_context(|| format!("cannot start {:?} ({what})", cmd.get_program()))?;
    let start = Instant::now();
    let tty = std::io::stderr().is_terminal();
    let every = Duration::from_secs(if tty { 1 } else { 30 });
    let mut next = every;
    let status = loop {
        if let Some(s) = child.try_wait()? {
            break s;
        }
        std::thread::sleep(Duration::from_millis(50));
        if start.elapsed() >= next {
            next = start.elapsed() + every;
            let line = format!(
                "          ... {what}, {} so far: {}",
                clock(start.elapsed()),
                last_line(log)
            );
            if tty {
                eprint!("\r\x1b[K{}", line.chars().take(110).collect::<String>());
            } else {
                eprintln!("{line}");
            }
            let _ = std::io::stderr().flush();
        }
    };
    if tty && start.elapsed() >= Duration::from_secs(1) {
        eprint!("\r\x1b[K");
    }
    if !status.success() {
        bail!(
            "{what} failed ({status}). The end of {}:\n{}",
            log.display(),
            tail(log, 40)
        );
    }
    Ok(())
}

fn last_line(log: &Path) -> String {
    tail(log, 1).trim().chars().take(70).collect()
}

/// The last lines of a file (looking at its last 64 KiB only).
pub fn tail(path: &Path, lines: usize) -> String {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut f = File::open(path)?;
        let len = f.metadata()?.len();
        f.seek(SeekFrom::Start(len.saturating_sub(64 * 1024)))?;
        let mut buf = Vec::new();
        f.read_to_end(&mut buf)?;
        Ok(buf)
    };
    let text = String::from_utf8_lossy(&read().unwrap_or_default()).into_owned();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_short() {
        assert_eq!(clock(Duration::from_millis(1234)), "1.2s");
        assert_eq!(clock(Duration::from_secs(605)), "10m05s");
    }

    #[test]
    fn a_failing_command_shows_its_last_words() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let e = run_logged(
            Command::new("sh").args(["-c", "echo first; echo last >&2; exit 3"]),
            &log,
            "trying",
        )
        .unwrap_err();
        let e = format!("{e:#}");
        assert!(
            e.contains("trying failed") && e.contains("first\nlast"),
            "{e}"
        );
        assert_eq!(tail(&log, 1), "last");
    }
}
