// SPDX-License-Identifier: GPL-2.0
//! Starts one instance of the server with the descriptors it is to adopt (the `LISTEN_FDS` protocol).
//!
//! `LISTEN_PID` must be the pid of the process that reads it, which only exists after fork(2), where nothing may be
//! allocated any more. So the environment is built before, with room for the digits, and the child fills them in.

use std::ffi::{CString, OsStr, OsString};
use std::io::Read;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::time::Instant;

use anyhow::{anyhow, Context, Result};
use nix::fcntl::OFlag;
use nix::sys::wait::waitpid;
use nix::unistd::{fork, pipe2, ForkResult, Pid};

/// As sd_listen_fds(3) has it: the first descriptor handed on.
const FIRST_FD: RawFd = 3;
const FD_NAMES: &str = "LISTEN_FDNAMES=fusedev:fusestate";
const PID_KEY: &str = "LISTEN_PID=";
const PID_DIGITS: usize = 10;

/// A running (or dead, not yet reaped) server.
#[derive(Debug)]
pub struct Instance {
    pub pid: Pid,
    pub pidfd: OwnedFd,
    pub started: Instant,
}

/// The command line of the server, ready for execvp(3).
pub struct Program {
    argv: Vec<CString>,
    /// Added to our own environment.
    variables: Vec<(&'static str, String)>,
}

impl Program {
    pub fn new(words: &[OsString]) -> Result<Self> {
        let argv = words
            .iter()
            .map(|w| {
                CString::new(w.as_bytes())
                    .map_err(|_| anyhow!("a NUL byte in the server's arguments"))
            })
            .collect::<Result<Vec<_>>>()?;
        if argv.is_empty() {
            anyhow::bail!("no server given; name it after `--`");
        }
        Ok(Self {
            argv,
            variables: Vec::new(),
        })
    }

    pub fn with_variable(mut self, name: &'static str, value: String) -> Self {
        self.variables.push((name, value));
        self
    }

    pub fn name(&self) -> String {
        self.argv[0].to_string_lossy().into_owned()
    }

    /// Starts it in a process group (and cgroup, if one is given) of its own.
    pub fn start(
        &self,
        device: BorrowedFd,
        state: BorrowedFd,
        cgroup: Option<BorrowedFd>,
    ) -> Result<Instance> {
        if let Some(instance) = self.try_start(device, state, cgroup)? {
            return Ok(instance);
        }
        // Killed at birth: should the cgroup be to blame (see `Remains::new_cgroup`), it goes without.
        self.try_start(device, state, None)?
            .ok_or_else(|| anyhow!("the server {:?} was killed before it started", self.name()))
    }

    /// None: something killed the child before it came to exec.
    fn try_start(
        &self,
        device: BorrowedFd,
        state: BorrowedFd,
        cgroup: Option<BorrowedFd>,
    ) -> Result<Option<Instance>> {
        let argv = null_terminated(&self.argv);
        let (environment, pid_digits) = environment(&self.variables);
        let envp = null_terminated(&environment);
        // Says how far the child came: READY, then the errno if exec failed; closed by a successful exec.
        let (said, say) = pipe2(OFlag::O_CLOEXEC).context("pipe for starting the server")?;

        // SAFETY: the child only makes async-signal-safe calls until it execs or exits (see `child`).
        let (pid, pidfd) = match unsafe { fork_into(cgroup) }? {
            Forked::Child => child(&argv, &envp, pid_digits, [device, state], &say),
            Forked::Parent(pid, pidfd) => (pid, pidfd),
        };
        drop(say);
        let mut words = Vec::new();
        std::fs::File::from(said)
            .read_to_end(&mut words)
            .context("waiting for the server to start")?;
        if words == READY {
            let started = Instant::now();
            return Ok(Some(Instance {
                pid,
                pidfd,
                started,
            }));
        }
        let _ = waitpid(pid, None);
        let Some(errno) = words.get(READY.len()..).and_then(|w| w.try_into().ok()) else {
            return Ok(None);
        };
        let error = std::io::Error::from_raw_os_error(i32::from_ne_bytes(errno));
        Err(anyhow!(
            "cannot start the server {:?}: {error}; give its full path after `--`, and see that it is executable",
            self.name()
        ))
    }
}

/// What a child says when all that is left is exec.
const READY: &[u8] = b"x";

/// As in <linux/sched.h>; the constant of the libc crate is too narrow for it.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

enum Forked {
    Child,
    Parent(Pid, OwnedFd),
}

/// fork(2), the child being born in `cgroup` (a directory) if that is possible.
///
/// Born there, because moving a running process waits for an RCU grace period (20 ms and more), and every application
/// would wait with it. If the cgroup refuses, the process group and the parentage still find what is left of a server.
///
/// # Safety
/// As for fork(2): the child may only make async-signal-safe calls.
unsafe fn fork_into(cgroup: Option<BorrowedFd>) -> Result<Forked> {
    if let Some(cgroup) = cgroup {
        let mut pidfd: RawFd = -1;
        // SAFETY: all zeros is a valid value of this plain struct.
        let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
        args.flags = libc::CLONE_PIDFD as u64 | CLONE_INTO_CGROUP;
        args.pidfd = &raw mut pidfd as u64;
        args.exit_signal = libc::SIGCHLD as u64;
        args.cgroup = cgroup.as_raw_fd() as u64;
        // SAFETY: without CLONE_VM this is a fork; `args` and what it points to live until it returns.
        let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of_val(&args)) };
        match pid {
            0 => return Ok(Forked::Child),
            // SAFETY: the kernel has just made this descriptor for us.
            1.. => {
                return Ok(Forked::Parent(Pid::from_raw(pid as i32), unsafe {
                    OwnedFd::from_raw_fd(pidfd)
                }))
            }
            _ => {}
        }
    }
    // SAFETY: the caller's promise.
    match unsafe { fork() }.context("cannot fork the server")? {
        ForkResult::Child => Ok(Forked::Child),
        // Nobody has reaped the child, so the pid still names it, dead or alive.
        ForkResult::Parent { child } => Ok(Forked::Parent(child, pidfd_open(child)?)),
    }
}

pub(super) fn pidfd_open(pid: Pid) -> Result<OwnedFd> {
    // SAFETY: plain system call; a descriptor that it returns is new and ours (and always close-on-exec).
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    if fd < 0 {
        let e = std::io::Error::last_os_error();
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        let _ = waitpid(pid, None);
        return Err(anyhow!(
            "pidfd_open of the server (pid {pid}): {e}; the keeper needs Linux 5.3 or later"
        ));
    }
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Our environment without what a keeper above us handed *us*, plus the protocol; and where the pid's digits go.
fn environment(added: &[(&'static str, String)]) -> (Vec<CString>, *mut u8) {
    let ours = |name: &OsStr| {
        name.as_bytes().starts_with(b"LISTEN_") || added.iter().any(|(key, _)| name == *key)
    };
    let mut vars: Vec<CString> = std::env::vars_os()
        .filter(|(name, _)| !ours(name))
        .filter_map(|(name, value)| {
            CString::new([name.as_bytes(), b"=", value.as_bytes()].concat()).ok()
        })
        .collect();
    for (name, value) in added {
        vars.extend(CString::new(format!("{name}={value}")).ok());
    }
    vars.push(CString::new("LISTEN_FDS=2").expect("no NUL"));
    vars.push(CString::new(FD_NAMES).expect("no NUL"));
    let pid = CString::new(format!("{PID_KEY}{}", "0".repeat(PID_DIGITS))).expect("no NUL");
    // The heap block of a CString does not move when the CString does.
    let digits = pid
        .as_ptr()
        .cast_mut()
        .cast::<u8>()
        .wrapping_add(PID_KEY.len());
    vars.push(pid);
    (vars, digits)
}

fn null_terminated(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings
        .iter()
        .map(|s| s.as_ptr())
        .chain([std::ptr::null()])
        .collect()
}

/// Between fork and exec: no allocation, no lock, no panic.
fn child(
    argv: &[*const libc::c_char],
    envp: &[*const libc::c_char],
    pid_digits: *mut u8,
    hand_on: [BorrowedFd; 2],
    say: &OwnedFd,
) -> ! {
    // SAFETY: every call is async-signal-safe and every pointer was made before the fork by `start`, which still
    // holds what they point to in this copy of the address space.
    unsafe {
        libc::setpgid(0, 0);
        write_pid(pid_digits, libc::getpid());

        // The keeper takes its signals from a signalfd: unblock them; Rust ignores SIGPIPE: undo that.
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);

        // First out of the way of 3 and 4, then to them; dup2 clears close-on-exec. Nothing else is handed on.
        let say = libc::fcntl(say.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 10);
        let high = hand_on.map(|fd| libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 10));
        let mut ok = say >= 0;
        for (i, fd) in high.into_iter().enumerate() {
            ok = ok && fd >= 0 && libc::dup2(fd, FIRST_FD + i as RawFd) >= 0;
        }
        if ok {
            // Descriptors that the keeper itself was started with; an old kernel without the call hands them on.
            libc::syscall(
                libc::SYS_close_range,
                FIRST_FD + 2,
                u32::MAX,
                libc::CLOSE_RANGE_CLOEXEC,
            );
            libc::write(say, READY.as_ptr().cast(), READY.len());
            libc::execvpe(argv[0], argv.as_ptr(), envp.as_ptr());
        }
        let errno = (*libc::__errno_location()).to_ne_bytes();
        libc::write(say, errno.as_ptr().cast(), errno.len());
        libc::_exit(127)
    }
}

/// Writes `pid` in decimal, NUL-terminated, over the `PID_DIGITS` zeros that were prepared.
///
/// # Safety
/// `at` must point to `PID_DIGITS + 1` writable bytes.
unsafe fn write_pid(at: *mut u8, pid: libc::pid_t) {
    let mut divisor = 1_000_000_000;
    let mut length = 0;
    while divisor > 0 {
        let digit = (pid / divisor % 10) as u8;
        if digit != 0 || length > 0 || divisor == 1 {
            // SAFETY: `length` is below PID_DIGITS, as there are ten divisors.
            unsafe { *at.add(length) = b'0' + digit };
            length += 1;
        }
        divisor /= 10;
    }
    // SAFETY: `length` is at most PID_DIGITS.
    unsafe { *at.add(length) = 0 };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Seek, SeekFrom};
    use std::os::fd::AsFd;

    #[test]
    fn pids_in_decimal() {
        for pid in [1, 10, 999, 32768, 4_194_304, i32::MAX] {
            let mut room = [b'0'; PID_DIGITS + 1];
            // SAFETY: the array has PID_DIGITS + 1 bytes.
            unsafe { write_pid(room.as_mut_ptr(), pid) };
            let text = std::ffi::CStr::from_bytes_until_nul(&room).unwrap();
            assert_eq!(text.to_str().unwrap(), pid.to_string());
        }
    }

    #[test]
    fn the_child_gets_what_the_protocol_promises() {
        // The child says its pid, its group, the variables and its open descriptors into "device" (a plain file here).
        let mut device = tempfile::tempfile().unwrap();
        let state = tempfile::tempfile().unwrap();
        // A descriptor without close-on-exec, as a careless parent leaves them.
        let leaked = tempfile::tempfile().unwrap();
        // SAFETY: `leaked` is open.
        let high = unsafe { libc::fcntl(leaked.as_raw_fd(), libc::F_DUPFD, 20) };
        assert!(high >= 20);
        let script = r#"{ echo "$$ $LISTEN_PID $LISTEN_FDS $LISTEN_FDNAMES"; ls -x -w 999 /proc/$$/fd; } >&3"#;
        let program = Program::new(&["sh", "-c", script].map(OsString::from)).unwrap();
        let instance = program.start(device.as_fd(), state.as_fd(), None).unwrap();
        assert!(waitpid(instance.pid, None).is_ok());
        // SAFETY: made above.
        unsafe { libc::close(high) };

        let mut said = String::new();
        device.seek(SeekFrom::Start(0)).unwrap();
        File::read_to_string(&mut device, &mut said).unwrap();
        let pid = instance.pid;
        let lines: Vec<_> = said.lines().collect();
        assert_eq!(lines[0], format!("{pid} {pid} 2 fusedev:fusestate"));
        let descriptors: Vec<u32> = lines[1]
            .split_whitespace()
            .map(|w| w.parse().unwrap())
            .collect();
        // sh may keep one of its own (the redirection's saved stdout) at 10 or above.
        assert!(
            descriptors.iter().all(|fd| *fd <= 4 || *fd == 10),
            "handed on too many: {descriptors:?}"
        );
        assert!(
            [0, 1, 2, 3, 4].iter().all(|fd| descriptors.contains(fd)),
            "{descriptors:?}"
        );
    }

    #[test]
    fn a_missing_program_is_one_clear_error() {
        let file = tempfile::tempfile().unwrap();
        let program = Program::new(&["/no/such/server".into()]).unwrap();
        let error = program
            .start(file.as_fd(), file.as_fd(), None)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("/no/such/server") && error.contains("No such file"),
            "{error}"
        );
    }
}
