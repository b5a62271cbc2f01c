// SPDX-License-Identifier: GPL-2.0
//! Process 1 of a guest. It must never return: the kernel panics if it does.

use super::{command, mounts, Channel, Job, JOB_KEY, MODULE_ENV};
use crate::frame::{self, Kind, Status};
use anyhow::{bail, Context, Result};
use nix::sys::reboot::{reboot, RebootMode};
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

pub fn main() -> ! {
    let mut power_off = false;
    if let Err(e) = guest(&mut power_off) {
        // Nobody else can hear us: the kernel's log is all there is.
        let text = format!("fuse-restart-vm: init: {e:#}\n");
        if fs::write("/dev/kmsg", &text).is_err() {
            eprint!("{text}");
        }
    }
    // SAFETY: no memory is involved; sync(2) cannot fail.
    unsafe { libc::sync() };
    let mode = if power_off {
        RebootMode::RB_POWER_OFF
    } else {
        RebootMode::RB_AUTOBOOT
    };
    let _ = reboot(mode);
    loop {
        std::thread::park();
    }
}

/// The same in a guest that somebody else has set up: no mounts, no power-off.
pub fn as_command() -> Result<std::process::ExitCode> {
    let job = read_job()?;
    let mut channel = open_channel(&job.channel)?;
    frame::write(&mut channel, Kind::Ready, b"")?;
    let status = command::run(&job, &mut channel, false)?;
    frame::write(&mut channel, Kind::Status, &serde_json::to_vec(&status)?)?;
    Ok(std::process::ExitCode::SUCCESS)
}

fn read_job() -> Result<Job> {
    let cmdline = fs::read_to_string("/proc/cmdline").context("/proc/cmdline")?;
    let path = job_path(&cmdline).with_context(|| format!("no {JOB_KEY}= in {cmdline:?}"))?;
    serde_json::from_slice(&fs::read(&path).with_context(|| path.display().to_string())?)
        .with_context(|| path.display().to_string())
}

fn guest(power_off: &mut bool) -> Result<()> {
    mounts::early()?;
    let job = read_job()?;
    *power_off = job.power_off;
    let mut channel = open_channel(&job.channel)?;
    let status = match prepare(&job) {
        Ok(notes) => {
            for n in notes {
                frame::write(
                    &mut channel,
                    Kind::Stderr,
                    format!("vm: guest: {n}\n").as_bytes(),
                )?;
            }
            frame::write(&mut channel, Kind::Ready, b"")?;
            command::run(&job, &mut channel, true)?
        }
        Err(e) => Status {
            code: i32::from(crate::vm::EXIT_RUNNER),
            error: Some(format!("{e:#}")),
            ..Status::default()
        },
    };
    frame::write(&mut channel, Kind::Status, &serde_json::to_vec(&status)?)?;
    // SAFETY: the descriptor is open; for a port that is no tty this fails, harmlessly.
    unsafe { libc::tcdrain(channel.as_raw_fd()) };
    Ok(())
}

fn prepare(job: &Job) -> Result<Vec<String>> {
    for (_, module) in job.env.iter().filter(|(key, _)| key == MODULE_ENV) {
        load(Path::new(module))?;
    }
    let mut notes = mounts::late(job)?;
    let _ = nix::unistd::sethostname("fuse-restart");
    if let Err(e) = loopback_up() {
        notes.push(format!("no loopback network: {e:#}"));
    }
    use nix::sys::resource::{setrlimit, Resource};
    let _ = setrlimit(Resource::RLIMIT_NOFILE, 1 << 20, 1 << 20);
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, libc::RLIM_INFINITY);
    Ok(notes)
}

fn load(module: &Path) -> Result<()> {
    let file = File::open(module).with_context(|| module.display().to_string())?;
    nix::kmod::finit_module(&file, c"", nix::kmod::ModuleInitFlags::empty())
        .with_context(|| format!("cannot load {}", module.display()))
}

/// The job file's path from the kernel command line (quoted if it has spaces).
fn job_path(cmdline: &str) -> Option<PathBuf> {
    let key = format!("{JOB_KEY}=");
    let rest = &cmdline[cmdline.find(&key)? + key.len()..];
    let end = match rest.strip_prefix('"') {
        Some(quoted) => return quoted.split('"').next().map(PathBuf::from),
        None => rest.find(char::is_whitespace).unwrap_or(rest.len()),
    };
    Some(PathBuf::from(&rest[..end]))
}

pub fn open_channel(channel: &Channel) -> Result<File> {
    let path = match channel {
        Channel::Tty(p) => p.clone(),
        Channel::VirtioPort(name) => port_device(Path::new("/sys/class/virtio-ports"), name)?,
    };
    let file = File::options()
        .read(true)
        .write(true)
        .open(&path)
        .with_context(|| format!("the line to the runner, {}", path.display()))?;
    if matches!(channel, Channel::Tty(_)) {
        use nix::sys::termios;
        let mut t = termios::tcgetattr(&file)?;
        termios::cfmakeraw(&mut t);
        termios::tcsetattr(&file, termios::SetArg::TCSANOW, &t)?;
    }
    Ok(file)
}

fn port_device(class: &Path, name: &str) -> Result<PathBuf> {
    for entry in fs::read_dir(class).with_context(|| class.display().to_string())? {
        let entry = entry?;
        let found = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if found.trim() == name {
            return Ok(Path::new("/dev").join(entry.file_name()));
        }
    }
    bail!("no virtio port named {name} in {}", class.display())
}

fn loopback_up() -> Result<()> {
    // SAFETY: plain socket and ioctls on a zeroed, correctly sized ifreq.
    unsafe {
        let s = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        if s < 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        let mut req: libc::ifreq = std::mem::zeroed();
        req.ifr_name[0] = b'l' as libc::c_char;
        req.ifr_name[1] = b'o' as libc::c_char;
        req.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        let r = libc::ioctl(s, libc::SIOCSIFFLAGS, &req);
        let e = std::io::Error::last_os_error();
        libc::close(s);
        if r < 0 {
            return Err(e.into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_job_is_found_on_the_command_line() {
        let p = |s: &str| job_path(s).map(|p| p.display().to_string());
        assert_eq!(
            p("ro quiet fuse_restart_job=/a/b.json init=/x\n").unwrap(),
            "/a/b.json"
        );
        assert_eq!(p("fuse_restart_job=/a").unwrap(), "/a");
        assert_eq!(p("fuse_restart_job=\"/a b/c\" ro").unwrap(), "/a b/c");
        assert_eq!(p("ro quiet"), None);
    }

    #[test]
    fn a_port_is_found_by_name() {
        let dir = tempfile::tempdir().unwrap();
        for (dev, name) in [("vport0p0", "com.example"), ("vport0p1", "fuse-restart")] {
            fs::create_dir(dir.path().join(dev)).unwrap();
            fs::write(dir.path().join(dev).join("name"), format!("{name}\n")).unwrap();
        }
        assert_eq!(
            port_device(dir.path(), "fuse-restart").unwrap(),
            Path::new("/dev/vport0p1")
        );
        assert!(port_device(dir.path(), "nobody").is_err());
    }
}
