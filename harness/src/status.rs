// SPDX-License-Identifier: GPL-2.0
//! `fuse-restart status`: what the keeper says of a mount, together with what the kernel says of its recoveries.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{bail, Context, Result};
use serde::{Deserialize, Serialize};

use crate::fusectl::{self, Recovery};
use crate::keep::mount;
use crate::keep::status_file::{self, Status};

/// Say how a kept mount is doing.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
The first lines are the keeper's (pid of the server, restarts), the others the kernel's: `state`, `epoch`, and the
counts of the last recovery.  `replayed` inodes are those that the new server was shown; `confirmed` ones go on,
`revoked` ones answer EIO.  On a kernel without the series the state is `unknown`.")]
pub struct Args {
    /// As one JSON object
    #[arg(long)]
    json: bool,

    /// Where the file system is mounted
    mountpoint: PathBuf,
}

/// Both views of one mount.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    #[serde(flatten)]
    pub keeper: Status,
    /// None: the kernel has no such numbers; `note` says why.
    pub recovery: Option<Recovery>,
    pub note: Option<String>,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let report = read(&args.mountpoint)?;
    let text = if args.json {
        serde_json::to_string(&report)? + "\n"
    } else {
        render(&report)
    };
    match io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(e).context("writing to stdout"),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// Never touches the mounted file system: its server may be dead.
pub fn read(mountpoint: &Path) -> Result<Report> {
    let absolute = mount::resolve(mountpoint)?;
    let keeper = keeper_status(&absolute)?;
    let (recovery, note) = match fusectl::ensure_mounted() {
        Err(e) => (None, Some(e)),
        Ok(()) => match fusectl::recovery(keeper.connection) {
            Ok(Some(r)) if r.supported() => (Some(r), None),
            Ok(Some(r)) => (Some(r), Some("the server did not sign the restart contract".into())),
            Ok(None) => (None, Some("this kernel cannot restart FUSE servers: unanswered requests are resent, nothing is replayed".into())),
            Err(e) => (None, Some(e.to_string())),
        },
    };
    Ok(Report {
        keeper,
        recovery,
        note,
    })
}

fn keeper_status(mountpoint: &Path) -> Result<Status> {
    let shown = mountpoint.display();
    let Some((path, text)) = status_file::find(mountpoint) else {
        let name = status_file::file_name(mountpoint);
        let places = status_file::directories();
        let there = mount::mount_at(mountpoint).context("reading /proc/self/mountinfo")?;
        match there {
            None => bail!("nothing is mounted on {shown}; start a keeper: fuse-restart keep --mountpoint {shown} -- SERVER"),
            Some(m) => bail!(
                "{shown} (type {}) is not kept by fuse-restart, or by another user; no {name} in {}",
                m.fstype,
                places.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ")
            ),
        }
    };
    let status: Status = serde_json::from_slice(&text)
        .with_context(|| format!("status file {} is damaged; remove it", path.display()))?;
    let alive = status.keeper_lives();
    if !alive || !mount::still_mounted(mountpoint, status.connection) {
        bail!(
            "{} is left over from a keeper (pid {}) that {}; remove it, and if a dead mount is on {shown}: umount -l {shown}",
            path.display(),
            status.keeper_pid,
            if alive { "no longer has that mount" } else { "is dead" }
        );
    }
    Ok(status)
}

fn render(report: &Report) -> String {
    let keeper = &report.keeper;
    let or_dash = |v: Option<String>| v.unwrap_or_else(|| "-".into());
    let state = report
        .recovery
        .as_ref()
        .map_or("unknown", |r| r.state.as_str());
    let mut lines = vec![
        ("mountpoint", keeper.mountpoint.clone()),
        ("keeper_pid", keeper.keeper_pid.to_string()),
        ("keeper_state", keeper.keeper_state.clone()),
        (
            "server_pid",
            or_dash(keeper.server_pid.map(|p| p.to_string())),
        ),
        ("server_command", keeper.server_command.clone()),
        ("restarts", keeper.restarts.to_string()),
        ("last_exit", or_dash(keeper.last_exit.clone())),
        (
            "last_notification",
            or_dash(keeper.last_notification.clone()),
        ),
        ("connection", keeper.connection.to_string()),
        ("state", state.to_owned()),
    ];
    if let Some(recovery) = &report.recovery {
        // The kernel's own order is lost in the map; these come first, the rest by name.
        let first = ["epoch", "replayed", "confirmed", "revoked", "held"];
        lines.extend(
            first
                .iter()
                .filter(|k| recovery.numbers.contains_key(**k))
                .map(|k| (*k, recovery.get(k).to_string())),
        );
        let rest = recovery
            .numbers
            .iter()
            .filter(|(k, _)| !first.contains(&k.as_str()));
        lines.extend(rest.map(|(k, v)| (k.as_str(), v.to_string())));
    }
    if let Some(note) = &report.note {
        lines.push(("note", note.clone()));
    }
    lines
        .iter()
        .map(|(k, v)| format!("{k:<18} {v}\n"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(recovery: Option<&str>) -> Report {
        let keeper = Status {
            mountpoint: "/m".into(),
            keeper_pid: 1,
            keeper_state: "running".into(),
            held_back: false,
            server_pid: None,
            server_command: "s".into(),
            restarts: 3,
            deaths: 3,
            last_exit: None,
            connection: 4,
            last_notification: None,
        };
        Report {
            keeper,
            recovery: recovery.map(|t| Recovery::parse(t).unwrap()),
            note: None,
        }
    }

    #[test]
    fn what_is_printed() {
        let text = render(&report(Some(
            "state held\nepoch 2\nheld 5\nreplayed 7\ntotal_void 1\n",
        )));
        let get = |key: &str| {
            text.lines()
                .find_map(|l| l.split_once(' ').filter(|(k, _)| *k == key))
                .map(|(_, v)| v.trim().to_owned())
        };
        assert_eq!(get("state").as_deref(), Some("held"));
        assert_eq!(get("replayed").as_deref(), Some("7"));
        assert_eq!(get("total_void").as_deref(), Some("1"));
        assert_eq!(get("server_pid").as_deref(), Some("-"));
        assert!(render(&report(None)).contains("unknown"));
    }

    #[test]
    fn json_has_both_views_in_one_object() {
        let json = serde_json::to_value(report(Some("state held\nepoch 2\n"))).unwrap();
        assert_eq!(json["restarts"], 3);
        assert_eq!(json["recovery"]["state"], "held");
        assert_eq!(json["recovery"]["epoch"], 2);
    }

    #[test]
    fn nothing_mounted_is_said() {
        let error = read(Path::new("/no/such/mount")).unwrap_err().to_string();
        assert!(
            error.contains("nothing is mounted on /no/such/mount"),
            "{error}"
        );
        let error = read(Path::new("/proc")).unwrap_err().to_string();
        assert!(error.contains("not kept by fuse-restart"), "{error}");
    }
}
