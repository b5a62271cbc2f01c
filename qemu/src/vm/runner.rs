// SPDX-License-Identifier: GPL-2.0
//! Starts a guest, passes on what comes over the line, ends it at the time
//! limit or on Ctrl-C, and judges the kernel's log.

use super::{Backend, Guest, Options, EXIT_REPORT, EXIT_RUNNER, EXIT_TIMEOUT};
use crate::frame::{Decoder, Kind, Status};
use crate::kernel::Built;
use crate::paths::Paths;
use crate::{splat, ui};
use anyhow::{Context, Result};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{killpg, sigaction, SaFlags, SigAction, SigHandler, SigSet, Signal};
use nix::sys::socket::{socketpair, AddressFamily, SockFlag, SockType};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

/// After the status has come, the guest has this long to power off.
const POWER_OFF: Duration = Duration::from_secs(20);
/// Run directories of failed runs that are kept for reading.
const KEEP_RUNS: usize = 20;

static SIGNAL: AtomicI32 = AtomicI32::new(0);

extern "C" fn on_signal(sig: i32) {
    SIGNAL.store(sig, Ordering::SeqCst);
}

#[derive(Debug, PartialEq, Eq)]
pub enum End {
    Status(Status),
    /// The guest's process ended before the command's status came.
    Vanished(String),
    TimeLimit,
    /// It did not even come to the command.
    NoBoot,
    Signal(i32),
}

#[derive(Debug)]
pub struct Outcome {
    pub end: End,
    /// What the kernel or a checker said, ready to print.
    pub reports: Vec<String>,
    /// How many there are: headlines in the kernel's log, leaks, and the rest of `reports`.
    pub complaints: usize,
    /// The guest came to the command.
    pub began: bool,
    pub log_tail: String,
}

impl Outcome {
    /// A report beats everything, then the way it ended.
    pub fn exit_code(&self) -> u8 {
        match &self.end {
            _ if !self.reports.is_empty() => EXIT_REPORT,
            End::Status(s) => s.code.clamp(0, 255) as u8,
            End::Vanished(_) => EXIT_RUNNER,
            End::TimeLimit => EXIT_TIMEOUT,
            End::NoBoot => EXIT_RUNNER,
            End::Signal(s) => 128u8.saturating_add(*s as u8),
        }
    }
}

/// How a run ended, for who wants more than its status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    pub code: u8,
    /// Of the kernel and its checkers.
    pub complaints: usize,
    /// The guest came to the command: what went wrong before cannot come from that.
    pub began: bool,
}

/// Boots, runs, prints what is to be said, keeps the log of a failed run.
pub fn run(paths: &Paths, opts: &Options, backend: &dyn Backend, kernel: &Built) -> Result<Ended> {
    if !opts.quiet {
        let limit = ui::clock(opts.timeout);
        eprintln!(
            "vm: {} kernel {}, {}, limit {limit}",
            kernel.name,
            kernel.hash,
            backend.describe()
        );
    }
    let outcome = boot(paths, opts, backend, kernel)?;
    for r in &outcome.reports {
        eprintln!("vm: {r}");
    }
    match &outcome.end {
        End::Status(s) => {
            if let Some(e) = &s.error {
                eprintln!("vm: {e}");
            }
        }
        End::Vanished(how) => {
            eprintln!("vm: the guest ended ({how}) before the command did. The end of its log:\n{}", outcome.log_tail)
        }
        End::TimeLimit => eprintln!(
            "vm: time limit of {} reached (--timeout); the guest was killed. The end of its log:\n{}",
            ui::clock(opts.timeout),
            outcome.log_tail
        ),
        End::NoBoot => eprintln!(
            "vm: the guest was not up after {}, and was killed. The end of its log:\n{}",
            ui::clock(opts.boot_timeout),
            outcome.log_tail
        ),
        End::Signal(s) => eprintln!("vm: signal {s}: the guest was killed"),
    }
    Ok(Ended {
        code: outcome.exit_code(),
        complaints: outcome.complaints,
        began: outcome.began,
    })
}

/// The same without a word.
pub fn boot(
    paths: &Paths,
    opts: &Options,
    backend: &dyn Backend,
    kernel: &Built,
) -> Result<Outcome> {
    catch_signals()?;
    let run_dir = RunDir::new(paths)?;
    let exe = own_binary(std::env::current_exe().context("my own path")?)?;
    let job = super::job(paths, opts, backend, &exe, &run_dir.path)?;
    fs::write(
        run_dir.path.join("job.json"),
        serde_json::to_vec_pretty(&job)?,
    )?;
    let log = run_dir.path.join("kernel.log");
    let (ours, theirs) = line(backend, &run_dir.path)?;
    let fd = theirs.as_ref().map_or(-1, |t| t.as_raw_fd());
    let guest = Guest {
        image: &kernel.image,
        mem: opts
            .mem
            .unwrap_or(if kernel.name == "debug" { 3072 } else { 2048 }),
        cpus: if opts.icount {
            1
        } else {
            opts.cpus.unwrap_or(2)
        },
        icount: opts.icount,
        run_dir: &run_dir.path,
        log: &log,
        exe: &exe,
        channel_fd: fd,
        append: &opts.append,
    };
    let mut command = backend.command(&guest)?;
    let console = File::options().create(true).append(true).open(&log)?;
    command
        .stdin(Stdio::null())
        .stdout(console.try_clone()?)
        .stderr(console)
        .process_group(0);
    // SAFETY: only async-signal-safe calls between fork and exec.
    unsafe {
        command.pre_exec(move || {
            // The guest must not outlive a runner that was killed itself.
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            if fd >= 0 && libc::fcntl(fd, libc::F_SETFD, 0) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let mut child = Running(
        command
            .spawn()
            .with_context(|| format!("cannot start {:?}", command.get_program()))?,
    );
    drop(theirs);
    let mut line = Line {
        file: ours,
        decoder: Decoder::default(),
        out: Sink::new(opts.out.as_deref()),
        reports: vec![],
        ready: false,
    };
    let end = line.follow(&mut child.0, opts)?;
    if matches!(end, End::Status(_)) {
        child.wait_for(POWER_OFF);
    }
    drop(child);
    line.out.finish()?;
    let text = String::from_utf8_lossy(&fs::read(&log).unwrap_or_default()).into_owned();
    if let Some(to) = &opts.log {
        fs::write(to, &text).with_context(|| format!("--log {}", to.display()))?;
    }
    let outcome = Outcome {
        began: line.ready,
        ..judge(end, &text, line.reports, &log)
    };
    if outcome.exit_code() == 0 || opts.quiet {
        run_dir.remove();
    }
    Ok(outcome)
}

/// The guest's init is this program, under its own name.
fn own_binary(path: PathBuf) -> Result<PathBuf> {
    anyhow::ensure!(
        path.exists(),
        "this program was replaced while it ran (built anew?), so no guest can start it: {}; run the command again",
        path.display()
    );
    Ok(path)
}

/// Our end of the line, and the guest's if it inherits one.
fn line(backend: &dyn Backend, run_dir: &Path) -> Result<(File, Option<OwnedFd>)> {
    if backend.fifo() {
        let path = run_dir.join(super::FIFO);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600))?;
        // For writing too, so that opening does not wait for the other side.
        return Ok((File::options().read(true).write(true).open(&path)?, None));
    }
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::Stream,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    Ok((File::from(ours), Some(theirs)))
}

fn judge(end: End, log: &str, checkers: Vec<String>, log_path: &Path) -> Outcome {
    let mut reports = Vec::new();
    let mut more_headlines = 0;
    if let Some(s) = splat::find(log) {
        more_headlines = s.headlines.len() - 1;
        let more = match s.headlines.len() {
            1 => String::new(),
            n => format!(
                "\n({n} headlines in all; the whole log: {})",
                log_path.display()
            ),
        };
        reports.push(format!("the guest's kernel reported:\n{}{more}", s.text));
    }
    for c in checkers {
        reports.push(format!("kmemleak found unreferenced objects:\n{c}"));
    }
    if let End::Status(s) = &end {
        if !s.unkillable.is_empty() {
            reports.push(format!(
                "processes hang in the guest's kernel, they survived SIGKILL:\n  {}\nTheir stacks are in {}",
                s.unkillable.join("\n  "),
                log_path.display()
            ));
        }
        if s.lockdep_off && reports.is_empty() {
            reports.push(format!(
                "lockdep has switched itself off, so it checked nothing; see {}",
                log_path.display()
            ));
        }
        if reports.is_empty() {
            reports.extend(splat::taint(s.tainted[0], s.tainted[1]));
        }
    }
    let lines: Vec<&str> = log.lines().collect();
    let log_tail = lines[lines.len().saturating_sub(30)..].join("\n");
    Outcome {
        end,
        complaints: reports.len() + more_headlines,
        began: true,
        reports,
        log_tail,
    }
}

/// The runner's end of the line.
struct Line {
    file: File,
    decoder: Decoder,
    out: Sink,
    reports: Vec<String>,
    ready: bool,
}

impl Line {
    fn follow(&mut self, child: &mut Child, opts: &Options) -> Result<End> {
        let mut deadline = Instant::now() + opts.boot_timeout;
        let mut was_ready = false;
        let mut exited = None;
        loop {
            let sig = SIGNAL.load(Ordering::SeqCst);
            if sig != 0 {
                return Ok(End::Signal(sig));
            }
            if self.ready && !was_ready {
                was_ready = true;
                deadline = Instant::now() + opts.timeout;
            }
            if Instant::now() >= deadline {
                return Ok(if was_ready {
                    End::TimeLimit
                } else {
                    End::NoBoot
                });
            }
            let readable = {
                let mut fds = [PollFd::new(self.file.as_fd(), PollFlags::POLLIN)];
                // A dead child's last frames are still in the socket.
                let ms = if exited.is_some() { 0u16 } else { 50 };
                matches!(poll(&mut fds, PollTimeout::from(ms)), Ok(n) if n > 0)
            };
            if readable {
                let mut buf = [0u8; 64 * 1024];
                let n = match self.file.read(&mut buf) {
                    Ok(n) => n,
                    Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                    Err(_) => 0,
                };
                self.decoder.push(&buf[..n]);
                match self.frames() {
                    Ok(Some(status)) => return Ok(End::Status(status)),
                    Ok(None) => {}
                    Err(e) => return Ok(End::Vanished(e)),
                }
                if n > 0 {
                    continue;
                }
            }
            if let Some(how) = exited {
                return Ok(End::Vanished(how));
            }
            exited = child.try_wait()?.map(|s| s.to_string());
            if readable && exited.is_none() {
                // End of file, but the process still shuts down.
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }

    fn frames(&mut self) -> Result<Option<Status>, String> {
        while let Some((kind, payload)) = self.decoder.next()? {
            match kind {
                Kind::Ready => self.ready = true,
                Kind::Stdout => pass(&mut std::io::stdout(), &payload),
                Kind::Stderr => pass(&mut std::io::stderr(), &payload),
                Kind::Out => self.out.push(&payload),
                Kind::Report => match self.reports.last_mut() {
                    Some(r) => r.push_str(&String::from_utf8_lossy(&payload)),
                    None => self
                        .reports
                        .push(String::from_utf8_lossy(&payload).into_owned()),
                },
                Kind::Status => {
                    return serde_json::from_slice(&payload)
                        .map(Some)
                        .map_err(|e| format!("bad status from the guest: {e}"))
                }
            }
        }
        Ok(None)
    }
}

/// A reader that has gone away (`| head`) is no reason to lose the status.
fn pass(to: &mut dyn Write, bytes: &[u8]) {
    let _ = to.write_all(bytes).and_then(|()| to.flush());
}

/// Where the command's result file goes.
struct Sink {
    to: Option<PathBuf>,
    bytes: Option<Vec<u8>>,
}

impl Sink {
    fn new(to: Option<&Path>) -> Sink {
        Sink {
            to: to.map(Path::to_path_buf),
            bytes: None,
        }
    }

    fn push(&mut self, bytes: &[u8]) {
        if self.to.is_some() {
            self.bytes.get_or_insert_default().extend_from_slice(bytes);
        }
    }

    fn finish(self: &mut Sink) -> Result<()> {
        match (&self.to, &self.bytes) {
            (Some(to), Some(bytes)) => {
                fs::write(to, bytes).with_context(|| format!("--out {}", to.display()))
            }
            (Some(to), None) => {
                eprintln!(
                    "vm: the command left nothing at $FUSE_RESTART_OUT: {} is not written",
                    to.display()
                );
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// A guest's process with all its helpers; dropping it ends them.
struct Running(Child);

impl Running {
    fn wait_for(&mut self, limit: Duration) {
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline && matches!(self.0.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Its own process group: UML has a process for each of the guest's.
        let _ = killpg(Pid::from_raw(self.0.id() as i32), Signal::SIGKILL);
        let _ = self.0.wait();
    }
}

fn catch_signals() -> Result<()> {
    let action = SigAction::new(
        SigHandler::Handler(on_signal),
        SaFlags::empty(),
        SigSet::empty(),
    );
    for sig in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler only stores to an atomic.
        unsafe { sigaction(sig, &action)? };
    }
    Ok(())
}

struct RunDir {
    path: PathBuf,
}

impl RunDir {
    fn new(paths: &Paths) -> Result<RunDir> {
        let all = paths.cache_dir("run")?;
        prune(&all, KEEP_RUNS);
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        let path = all.join(format!("{:x}-{}", now.as_micros(), std::process::id()));
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        Ok(RunDir { path })
    }

    fn remove(&self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Removes the oldest run directories whose runner is gone.
fn prune(all: &Path, keep: usize) {
    let Ok(dir) = fs::read_dir(all) else { return };
    let mut old: Vec<PathBuf> = dir
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| {
            let pid = p
                .file_name()
                .and_then(|n| n.to_str()?.rsplit('-').next()?.parse::<i32>().ok());
            pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
        })
        .collect();
    old.sort();
    for p in old.iter().take(old.len().saturating_sub(keep)) {
        let _ = fs::remove_dir_all(p);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(code: i32) -> End {
        End::Status(Status {
            code,
            ..Status::default()
        })
    }

    #[test]
    fn a_report_beats_a_good_status() {
        let log = "[    1.0] WARNING: x at y\n";
        assert_eq!(
            judge(status(0), log, vec![], Path::new("l")).exit_code(),
            EXIT_REPORT
        );
        assert_eq!(
            judge(status(0), "quiet", vec![], Path::new("l")).exit_code(),
            0
        );
        assert_eq!(
            judge(status(3), "quiet", vec![], Path::new("l")).exit_code(),
            3
        );
        assert_eq!(
            judge(status(0), "", vec!["unreferenced".into()], Path::new("l")).exit_code(),
            EXIT_REPORT
        );
        assert_eq!(
            judge(End::TimeLimit, "", vec![], Path::new("l")).exit_code(),
            EXIT_TIMEOUT
        );
        assert_eq!(
            judge(End::Vanished("x".into()), "", vec![], Path::new("l")).exit_code(),
            EXIT_RUNNER
        );
        assert_eq!(
            judge(End::Signal(2), "", vec![], Path::new("l")).exit_code(),
            130
        );
    }

    #[test]
    fn who_was_replaced_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let there = dir.path().join("vm");
        fs::write(&there, "").unwrap();
        assert_eq!(own_binary(there.clone()).unwrap(), there);
        let gone = own_binary(dir.path().join("vm (deleted)")).unwrap_err();
        assert!(gone.to_string().contains("was replaced"), "{gone}");
    }

    #[test]
    fn hangs_and_taints_are_reports() {
        let hang = End::Status(Status {
            unkillable: vec!["7 cat".into()],
            ..Status::default()
        });
        assert_eq!(
            judge(hang, "", vec![], Path::new("l")).exit_code(),
            EXIT_REPORT
        );
        let off = End::Status(Status {
            lockdep_off: true,
            ..Status::default()
        });
        assert_eq!(
            judge(off, "", vec![], Path::new("l")).exit_code(),
            EXIT_REPORT
        );
        let taint = End::Status(Status {
            tainted: [0, 512],
            ..Status::default()
        });
        assert_eq!(
            judge(taint, "", vec![], Path::new("l")).exit_code(),
            EXIT_REPORT
        );
    }

    #[test]
    fn only_the_oldest_dead_runs_go() {
        let dir = tempfile::tempdir().unwrap();
        for (i, pid) in ["999999991", "999999992", "999999993"].iter().enumerate() {
            fs::create_dir(dir.path().join(format!("{i}-{pid}"))).unwrap();
        }
        let mine = dir.path().join(format!("0-{}", std::process::id()));
        fs::create_dir(&mine).unwrap();
        prune(dir.path(), 1);
        let mut left: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        left.sort();
        assert_eq!(left.len(), 2, "{left:?}");
        assert!(mine.exists());
    }
}
