// SPDX-License-Identifier: GPL-2.0
//! Runs one command in a guest. The guest sees the host's files read-only at
//! their own paths, so there is no image to build: the command is found where
//! it is, and so are the libraries it needs.

pub mod accel;
pub mod qemu;
pub mod runner;
pub mod uml;
pub mod vng;

use crate::cargo_tool;
use crate::guest::{Channel, Job, JOB_KEY, MODULE_ENV, PORT};
use crate::kernel::flavor::Flavor;
use crate::paths::Paths;
use anyhow::{bail, Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// The kernel reported something: the run fails whatever the command said.
pub const EXIT_REPORT: u8 = 121;
/// The time limit was reached.
pub const EXIT_TIMEOUT: u8 = 124;
/// The guest could not be started or vanished.
pub const EXIT_RUNNER: u8 = 125;

/// Seconds on an idle machine; emulated on a busy one it can be a minute.
pub const BOOT_TIMEOUT: Duration = Duration::from_secs(240);

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum BackendName {
    /// User-mode Linux: boots in a second; patched and stock only.
    Uml,
    /// QEMU, with KVM where a guest really boots with it, else emulated.
    Qemu,
    /// virtme-ng from PyPI, put into a virtual environment on first use.
    Vng,
    /// uml for patched and stock, qemu for debug and --icount.
    Auto,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum KernelName {
    /// With the series.
    Patched,
    /// The same kernel without the series.
    Stock,
    /// With the series, KASAN, lockdep, kmemleak; QEMU only.
    Debug,
    /// With the series and points where tests stop tasks; its hunks can be
    /// taken out one by one. UML, or the debug kernel for qemu.
    Mutants,
    /// With the series, and fuse as a module that was loaded; QEMU only.
    Module,
    /// The same with KASAN, lockdep, kmemleak.
    DebugModule,
}

#[derive(Clone, Debug)]
pub struct Options {
    pub backend: BackendName,
    pub kernel: KernelName,
    pub mem: Option<u32>,
    pub cpus: Option<u32>,
    /// For the command, from its start.
    pub timeout: Duration,
    /// For the guest, until the command starts.
    pub boot_timeout: Duration,
    pub icount: bool,
    pub out: Option<PathBuf>,
    pub log: Option<PathBuf>,
    pub env: Vec<String>,
    pub append: Vec<String>,
    pub kmemleak: bool,
    pub quiet: bool,
    pub argv: Vec<String>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            backend: BackendName::Auto,
            kernel: KernelName::Patched,
            mem: None,
            cpus: None,
            timeout: Duration::from_secs(600),
            boot_timeout: BOOT_TIMEOUT,
            icount: false,
            out: None,
            log: None,
            env: vec![],
            append: vec![],
            kmemleak: true,
            quiet: false,
            argv: vec![],
        }
    }
}

/// Name of the line in the run directory, where it is a FIFO.
pub const FIFO: &str = "line";

/// What a backend must know to start a guest.
pub struct Guest<'a> {
    pub image: &'a Path,
    pub mem: u32,
    pub cpus: u32,
    pub icount: bool,
    pub run_dir: &'a Path,
    /// Kernel log goes here.
    pub log: &'a Path,
    pub exe: &'a Path,
    /// Descriptor of our end of the line, inherited by the guest's process.
    pub channel_fd: i32,
    pub append: &'a [String],
}

/// One way to boot a kernel.
pub trait Backend {
    fn describe(&self) -> String;
    fn channel(&self) -> Channel;
    fn power_off(&self) -> bool;
    /// Whether the line is a FIFO in the run directory instead of an inherited
    /// descriptor.
    fn fifo(&self) -> bool {
        false
    }
    fn command(&self, guest: &Guest) -> Result<Command>;
}

/// Which backend and which built kernel an invocation means.
pub fn resolve(
    backend: BackendName,
    kernel: KernelName,
    icount: bool,
) -> Result<(BackendName, Flavor)> {
    use {BackendName::*, KernelName::*};
    let backend = match backend {
        Auto if icount || matches!(kernel, Debug | Module | DebugModule) => Qemu,
        Auto => Uml,
        b => b,
    };
    let flavor = match (backend, kernel) {
        (Uml, _) if icount => {
            bail!("--icount counts the instructions of an emulated CPU: use --backend qemu")
        }
        (Uml, Debug) => bail!(
            "the debug kernel (KASAN, kmemleak) is for --backend qemu; UML has lockdep anyway"
        ),
        (Vng, _) if icount => bail!("--icount is for --backend qemu"),
        (Uml, Patched) => Flavor::Uml,
        (Uml, Stock) => Flavor::UmlStock,
        (Uml, Mutants) => Flavor::Mutants,
        (Uml, Module | DebugModule) => {
            bail!("UML cannot load modules with Rust in them: use --backend qemu")
        }
        (_, Module) => Flavor::Module,
        (_, DebugModule) => Flavor::DebugModule,
        (_, Patched) => Flavor::Patched,
        (_, Stock) => Flavor::Stock,
        (_, Debug) => Flavor::Debug,
        (_, Mutants) => Flavor::DebugMutants,
    };
    Ok((backend, flavor))
}

/// Everything on the kernel's command line that all backends share.
pub fn append(guest: &Guest) -> String {
    let mut words = vec![
        "loglevel=7".to_string(),
        "panic=-1".into(),
        format!("init={}", quote(guest.exe)),
        format!("{JOB_KEY}={}", quote(&guest.run_dir.join("job.json"))),
    ];
    words.extend(guest.append.iter().cloned());
    words.join(" ")
}

fn quote(path: &Path) -> String {
    let text = path.display().to_string();
    if text.contains(' ') {
        format!("\"{text}\"")
    } else {
        text
    }
}

/// The caller's environment that means something inside as well. Not all of
/// it: it is written to a file, and it may hold secrets.
pub fn job_env(
    vars: impl Iterator<Item = (String, String)>,
    extra: &[String],
) -> Result<Vec<(String, String)>> {
    const NAMES: &[&str] = &[
        "PATH", "LANG", "TERM", "TZ", "USER", "LOGNAME", "HOME", "CI",
    ];
    const PREFIXES: &[&str] = &[
        "LC_",
        "RUST_",
        "CARGO_TARGET_DIR",
        "FUSE_RESTART_",
        "PROPTEST_",
        "GIT_AUTHOR_",
        "GIT_COMMITTER_",
    ];
    let mut env: Vec<(String, String)> = vars
        .filter(|(k, _)| NAMES.contains(&k.as_str()) || PREFIXES.iter().any(|p| k.starts_with(p)))
        .collect();
    for e in extra {
        let (k, v) = match e.split_once('=') {
            Some((k, v)) => (k.to_string(), v.to_string()),
            None => (
                e.clone(),
                std::env::var(e).with_context(|| format!("--env {e}: not set here"))?,
            ),
        };
        env.retain(|(old, _)| *old != k);
        env.push((k, v));
    }
    let path = env.iter_mut().find(|(k, _)| k == "PATH");
    let system = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    match path {
        Some((_, p)) => *p = format!("{p}:{system}"),
        None => env.push(("PATH".into(), system.into())),
    }
    env.push(("TMPDIR".into(), "/tmp".into()));
    Ok(env)
}

/// Builds the kernel if need be, boots it, runs the command; gives the exit
/// status for our caller.
pub fn run(paths: &Paths, opts: &Options) -> Result<u8> {
    Ok(run_to_end(paths, opts)?.code)
}

/// The same, and how often the kernel complained.
pub fn run_to_end(paths: &Paths, opts: &Options) -> Result<runner::Ended> {
    let (backend, flavor) = resolve(opts.backend, opts.kernel, opts.icount)?;
    let kernel = crate::kernel::ensure(paths, flavor)?;
    let boxed: Box<dyn Backend> = match backend {
        BackendName::Uml => Box::new(uml::Uml),
        BackendName::Vng => Box::new(vng::Vng::set_up(paths)?),
        _ => Box::new(qemu::Qemu::choose(paths, &kernel)?),
    };
    let mut opts = opts.clone();
    for module in flavor.modules() {
        let name = Path::new(module).file_name().context("a module's name")?;
        let path = kernel.dir.join(name);
        opts.env.push(format!("{MODULE_ENV}={}", path.display()));
    }
    runner::run(paths, &opts, boxed.as_ref(), &kernel)
}

/// The job for the guest's init.
pub fn job(
    paths: &Paths,
    opts: &Options,
    backend: &dyn Backend,
    exe: &Path,
    run_dir: &Path,
) -> Result<Job> {
    let cwd = std::env::current_dir().context("the current directory")?;
    let mut env = job_env(std::env::vars(), &opts.env)?;
    if let Some((_, path)) = env.iter_mut().find(|(k, _)| k == "PATH") {
        *path += &format!(":{}", cargo_tool::directory(paths).display());
    }
    env.push(("FUSE_RESTART_GUEST".into(), backend.describe()));
    let home = std::env::var_os("HOME")
        .map(PathBuf::from)
        .unwrap_or_else(|| "/root".into());
    let mut keep = vec![
        paths.repo.clone(),
        cwd.clone(),
        paths.cache.clone(),
        run_dir.to_path_buf(),
    ];
    keep.extend(exe.parent().map(Path::to_path_buf));
    keep.extend(std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from));
    if let Some(parent) = Path::new(&opts.argv[0])
        .parent()
        .filter(|p| p.is_absolute())
    {
        keep.push(parent.to_path_buf());
    }
    Ok(Job {
        argv: opts.argv.clone(),
        cwd,
        env,
        home,
        keep,
        channel: backend.channel(),
        kmemleak: opts.kmemleak,
        power_off: backend.power_off(),
    })
}

/// The channel of every backend that has virtio.
pub fn virtio_channel() -> Channel {
    Channel::VirtioPort(PORT.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_takes_what_can_do_it() {
        use {BackendName::*, KernelName::*};
        assert_eq!(resolve(Auto, Patched, false).unwrap(), (Uml, Flavor::Uml));
        assert_eq!(
            resolve(Auto, Stock, false).unwrap(),
            (Uml, Flavor::UmlStock)
        );
        assert_eq!(resolve(Auto, Debug, false).unwrap(), (Qemu, Flavor::Debug));
        assert_eq!(
            resolve(Auto, Patched, true).unwrap(),
            (Qemu, Flavor::Patched)
        );
        assert_eq!(resolve(Vng, Stock, false).unwrap(), (Vng, Flavor::Stock));
        assert!(resolve(Uml, Debug, false).is_err());
        assert!(resolve(Uml, Patched, true).is_err());
    }

    #[test]
    fn secrets_stay_outside() {
        let vars = [
            ("PATH", "/x"),
            ("LC_ALL", "C"),
            ("API_TOKEN", "s3cret"),
            ("RUST_LOG", "debug"),
        ];
        let vars = vars.iter().map(|(k, v)| (k.to_string(), v.to_string()));
        let env = job_env(vars, &["A=1=2".into(), "RUST_LOG=info".into()]).unwrap();
        let get = |k: &str| env.iter().find(|(n, _)| n == k).map(|(_, v)| v.as_str());
        assert_eq!(get("API_TOKEN"), None);
        assert_eq!(get("LC_ALL"), Some("C"));
        assert_eq!(get("A"), Some("1=2"));
        assert_eq!(get("RUST_LOG"), Some("info"));
        assert!(
            get("PATH").unwrap().starts_with("/x:") && get("PATH").unwrap().contains("/usr/sbin")
        );
        assert!(job_env([].into_iter(), &["NOT_SET_ANYWHERE_1".into()]).is_err());
    }

    #[test]
    fn paths_with_spaces_are_quoted() {
        assert_eq!(quote(Path::new("/a/b")), "/a/b");
        assert_eq!(quote(Path::new("/a b")), "\"/a b\"");
    }
}
