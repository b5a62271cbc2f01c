// SPDX-License-Identifier: GPL-2.0
//! Runs the command, relays its output, reaps whatever process 1 must reap,
//! and looks at what is left when it is over.

use super::{Job, OUT_FILE};
use crate::frame::{self, Kind, Status};
use anyhow::Result;
use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, OFlag};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{kill, killpg, Signal};
use nix::sys::wait::{waitpid, WaitPidFlag, WaitStatus};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// One of the command's outputs.
struct Source {
    file: File,
    kind: Kind,
    open: bool,
}

/// `alone`: we are process 1, and every process is the command's.
pub fn run(job: &Job, channel: &mut File, alone: bool) -> Result<Status> {
    let mut status = Status {
        tainted: [tainted(); 2],
        ..Status::default()
    };
    let (out_r, out_w) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    let (err_r, err_w) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    let spawned = Command::new(&job.argv[0])
        .args(&job.argv[1..])
        .current_dir(&job.cwd)
        .env_clear()
        .envs(job.env.iter().map(|(k, v)| (k, v)))
        .env("FUSE_RESTART_OUT", OUT_FILE)
        .stdin(Stdio::null())
        .stdout(out_w)
        .stderr(err_w)
        .process_group(0)
        .spawn();
    let child = match spawned {
        Ok(c) => Pid::from_raw(c.id() as i32),
        Err(e) => {
            // As a shell says it: 127 not found, 126 cannot be run.
            status.code = if e.kind() == std::io::ErrorKind::NotFound {
                127
            } else {
                126
            };
            status.error = Some(format!(
                "cannot run {} in {}: {e}",
                job.argv[0],
                job.cwd.display()
            ));
            return Ok(status);
        }
    };
    let mut sources = [source(out_r, Kind::Stdout)?, source(err_r, Kind::Stderr)?];
    status.code = loop {
        relay(&mut sources, channel, 20)?;
        if let Some(code) = reap(Some(child)) {
            break code;
        }
    };
    if alone {
        status.unkillable = end_everyone(&mut sources, channel)?;
    } else {
        end_group(child, &mut sources, channel)?;
    }
    if job.kmemleak {
        if let Some(leaks) = kmemleak(Path::new("/sys/kernel/debug/kmemleak")) {
            frame::write(channel, Kind::Report, leaks.as_bytes())?;
        }
    }
    if let Ok(mut f) = File::open(OUT_FILE) {
        let mut buf = vec![0; frame::MAX_PAYLOAD];
        loop {
            match f.read(&mut buf)? {
                0 => break,
                n => frame::write(channel, Kind::Out, &buf[..n])?,
            }
        }
    }
    status.tainted[1] = tainted();
    status.lockdep_off =
        lockdep_off(&fs::read_to_string("/proc/lockdep_stats").unwrap_or_default());
    Ok(status)
}

fn source(fd: OwnedFd, kind: Kind) -> Result<Source> {
    fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(Source {
        file: File::from(fd),
        kind,
        open: true,
    })
}

/// Passes on what there is, waiting `ms` at most for the first of it.
/// Returns whether any output is still open.
fn relay(sources: &mut [Source; 2], channel: &mut File, ms: u16) -> Result<bool> {
    let open: Vec<usize> = (0..2).filter(|i| sources[*i].open).collect();
    if open.is_empty() {
        std::thread::sleep(Duration::from_millis(ms.into()));
        return Ok(false);
    }
    let mut fds: Vec<PollFd> = open
        .iter()
        .map(|i| PollFd::new(sources[*i].file.as_fd(), PollFlags::POLLIN))
        .collect();
    match poll(&mut fds, PollTimeout::from(ms)) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(e) => return Err(e.into()),
    }
    let ready: Vec<usize> = open
        .iter()
        .zip(&fds)
        .filter(|(_, p)| p.any().unwrap_or(true))
        .map(|(i, _)| *i)
        .collect();
    drop(fds);
    let mut buf = [0u8; 16 * 1024];
    for i in ready {
        let s = &mut sources[i];
        match s.file.read(&mut buf) {
            Ok(0) => s.open = false,
            Ok(n) => frame::write(channel, s.kind, &buf[..n])?,
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(sources.iter().any(|s| s.open))
}

/// Collects every dead child; the status if `child` was among them.
fn reap(child: Option<Pid>) -> Option<i32> {
    let mut code = None;
    loop {
        let (pid, c) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, c)) => (pid, c),
            Ok(WaitStatus::Signaled(pid, sig, _)) => (pid, 128 + sig as i32),
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return code,
            Ok(_) | Err(_) => continue,
        };
        if Some(pid) == child {
            code = Some(c);
        }
    }
}

/// Kills what the command left running and passes on its last words. What
/// does not die within a while hangs in the kernel, and that is a defect.
fn end_everyone(sources: &mut [Source; 2], channel: &mut File) -> Result<Vec<String>> {
    let limit = Instant::now() + Duration::from_secs(20);
    let mut killed = false;
    loop {
        reap(None);
        let left = processes();
        let open = relay(sources, channel, 5)?;
        if left.is_empty() && !open {
            return Ok(vec![]);
        }
        if left.is_empty() {
            continue;
        }
        if !killed || !left.is_empty() {
            let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
            killed = true;
        }
        if Instant::now() > limit {
            // Who waits for whom: their kernel stacks, into the kernel's log.
            let _ = fs::write("/proc/sysrq-trigger", "w");
            return Ok(left.iter().map(|p| describe(*p)).collect());
        }
    }
}

/// Kills what is left of the command's process group and passes on its last
/// words; who has left the group is not waited for.
fn end_group(leader: Pid, sources: &mut [Source; 2], channel: &mut File) -> Result<()> {
    let _ = killpg(leader, Signal::SIGKILL);
    let limit = Instant::now() + Duration::from_secs(2);
    while relay(sources, channel, 50)? && Instant::now() < limit {}
    Ok(())
}

/// User processes other than ourselves (kernel threads have no command line
/// and no executable).
fn processes() -> Vec<i32> {
    let Ok(dir) = fs::read_dir("/proc") else {
        return vec![];
    };
    dir.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid| *pid != 1)
        .filter(|pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            is_live_user_process(&stat)
        })
        .collect()
}

/// From `/proc/PID/stat`: not a kernel thread (PF_KTHREAD), not a zombie.
fn is_live_user_process(stat: &str) -> bool {
    const PF_KTHREAD: u64 = 0x0020_0000;
    let Some((_, rest)) = stat.rsplit_once(") ") else {
        return false;
    };
    let f: Vec<&str> = rest.split(' ').collect();
    let flags: u64 = f.get(6).and_then(|v| v.parse().ok()).unwrap_or(PF_KTHREAD);
    flags & PF_KTHREAD == 0 && !matches!(f.first(), Some(&"Z") | Some(&"X"))
}

fn describe(pid: i32) -> String {
    let read = |what: &str| fs::read_to_string(format!("/proc/{pid}/{what}")).unwrap_or_default();
    let stack = read("stack");
    let top: Vec<&str> = stack
        .lines()
        .take(4)
        .map(|l| l.split(' ').next_back().unwrap_or(l))
        .collect();
    format!(
        "{pid} {} {} {}",
        read("comm").trim(),
        read("wchan").trim(),
        top.join(" < ")
    )
}

fn tainted() -> u64 {
    fs::read_to_string("/proc/sys/kernel/tainted")
        .ok()
        .and_then(|t| t.trim().parse().ok())
        .unwrap_or(0)
}

/// After its first report, or when its tables are full, lockdep is off for good.
fn lockdep_off(stats: &str) -> bool {
    stats.lines().any(|l| {
        let mut words = l.split_whitespace();
        words.next() == Some("debug_locks:") && words.next() == Some("0")
    })
}

/// Two scans, with the five seconds between them that kmemleak demands of an
/// object's age before it reports it.
fn kmemleak(path: &Path) -> Option<String> {
    const MIN_AGE: Duration = Duration::from_millis(5500);
    if !path.exists() {
        return None;
    }
    let scan = || {
        File::options()
            .write(true)
            .open(path)
            .and_then(|mut f| f.write_all(b"scan"))
    };
    scan().ok()?;
    std::thread::sleep(MIN_AGE);
    scan().ok()?;
    let text = fs::read_to_string(path).ok()?;
    (!text.trim().is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lockdep_says_whether_it_is_on() {
        assert!(!lockdep_off(
            " lock-classes:  900 [max: 8192]\n debug_locks:                             1\n"
        ));
        assert!(lockdep_off(" debug_locks:                             0\n"));
        assert!(!lockdep_off(""));
    }

    #[test]
    fn kernel_threads_and_zombies_do_not_count() {
        let kthread = "2 (kthreadd) S 0 0 0 0 -1 2129984 0 0";
        let user = "31 (a) b) S 1 31 31 0 -1 4194560 0 0";
        let zombie = "31 (cat) Z 1 31 31 0 -1 4194560 0 0";
        assert!(!is_live_user_process(kthread));
        assert!(is_live_user_process(user));
        assert!(!is_live_user_process(zombie));
        assert!(!is_live_user_process(""));
    }
}
