// SPDX-License-Identifier: GPL-2.0
//! Command lines. The scripts call `fuse-restart-vm vm ...` and so on.

use crate::kernel::{self, flavor::Flavor};
use crate::paths::Paths;
use crate::vm::{self, BackendName, KernelName};
use crate::{setup, suite, ui};
use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

#[derive(Parser)]
#[command(
    name = "fuse-restart-vm",
    version,
    about = "Builds the kernels and runs commands in guests that boot them"
)]
struct Cli {
    #[command(subcommand)]
    command: Sub,
}

#[derive(Subcommand)]
enum Sub {
    Vm(VmArgs),
    Kernel(KernelArgs),
    Test(suite::test::TestArgs),
    Mutants(suite::mutants::MutantsArgs),
    Scenarios(suite::table::TableArgs),
    Selftests(suite::selftests::SelftestsArgs),
    Demo(suite::demo::DemoArgs),
    Rfc(crate::rfc::RfcArgs),
    /// The guest's side, where the guest's init is not ours (virtme-ng).
    #[command(hide = true)]
    Guest,
}

/// Run COMMAND in a guest that boots a kernel of this project
///
/// The guest sees the host's files read-only at their own paths, so whatever is
/// installed or built here can be run there. COMMAND runs as root in the
/// current directory; /tmp, /run, /etc, /var, /mnt and HOME are writable and
/// forgotten at the end. Output and exit status are passed on.
///
/// Whatever COMMAND says, the run fails with status 121 when the guest's kernel
/// reported anything: WARNING, BUG, lockdep, KASAN, kmemleak, hung task, panic,
/// a failed KUnit test, a process that survives SIGKILL. 124: time limit; 125:
/// the guest could not be started or vanished.
///
/// A kernel that is not in the cache is built first (minutes, once).
///
/// Examples:
///   scripts/vm -- uname -a
///   scripts/vm --kernel debug -- target/debug/fuse-restart scenario run smoke
///   scripts/vm --backend qemu --out result.json -- sh -c 'date > $FUSE_RESTART_OUT'
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct VmArgs {
    #[arg(long, value_enum, default_value = "auto")]
    backend: BackendName,
    #[arg(long, value_enum, default_value = "patched")]
    kernel: KernelName,
    /// Memory in MiB [default: 2048; debug: 3072]
    #[arg(long, value_name = "M", value_parser = clap::value_parser!(u32).range(128..))]
    mem: Option<u32>,
    /// Processors [default: 2; with --icount: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=8))]
    cpus: Option<u32>,
    /// Kill the guest when COMMAND has run for this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    timeout: u64,
    /// Let virtual time follow the number of instructions executed (one
    /// emulated processor): for counting instructions, repeatably
    #[arg(long)]
    icount: bool,
    /// Store what COMMAND left in the file $FUSE_RESTART_OUT here
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Store the guest kernel's log here
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Set a variable for COMMAND, or pass one on. Passed on anyway: PATH, HOME,
    /// LANG, RUST_*, FUSE_RESTART_*, PROPTEST_*, CARGO_TARGET_DIR
    #[arg(long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Append to the kernel's command line
    #[arg(long, value_name = "WORD")]
    append: Vec<String>,
    /// Do not ask kmemleak at the end (debug kernel; saves about 10 seconds)
    #[arg(long)]
    no_kmemleak: bool,
    /// Do not say which kernel is booted how
    #[arg(long, short)]
    quiet: bool,
    #[arg(last = true, required = true, value_name = "COMMAND")]
    argv: Vec<String>,
}

/// Get the kernel's source, apply the series, configure, build, cache
///
/// Installs what building needs (Debian), fetches the package linux-source-7.3
/// by a private apt configuration (or takes the tree or tarball that
/// FUSE_RESTART_LINUX names), applies kernel-patches/7.3, configures from
/// qemu/config, checks that every symbol asked for is set, builds, and keeps the
/// result under a hash of all of that in FUSE_RESTART_CACHE
/// (~/.cache/fuse-restart).
///
/// From nothing on two cores: uml 7, stock 9, debug 14 minutes; patched two
/// after stock. What is in the cache takes a second.
#[derive(Args)]
#[command(verbatim_doc_comment, args_conflicts_with_subcommands = true)]
pub struct KernelArgs {
    #[command(subcommand)]
    command: Option<KernelSub>,
    /// Which kernels [default: uml stock patched]
    #[arg(value_enum, value_name = "KERNEL")]
    flavors: Vec<Flavor>,
}

#[derive(Subcommand)]
enum KernelSub {
    /// Only fetch and unpack the source; prints where it is
    Source,
    /// Print the directory of a kernel (kernel, config, System.map, vmlinux), building it if need be
    Path {
        #[arg(value_enum)]
        flavor: Flavor,
    },
    /// Only install what building, booting and testing need
    Setup,
    /// Compare the Rust files inside the patches with rust-fuse-notify/, or write them anew
    Series {
        /// Write them; without it differences are an error
        #[arg(long)]
        write: bool,
        /// Compare (the default)
        #[arg(long, conflicts_with = "write")]
        check: bool,
    },
}

pub fn run() -> Result<ExitCode> {
    let cli = Cli::parse();
    if let Sub::Guest = cli.command {
        return crate::guest::init::as_command();
    }
    let paths = Paths::find()?;
    match cli.command {
        Sub::Vm(a) => Ok(ExitCode::from(vm::run(&paths, &a.options())?)),
        Sub::Kernel(a) => a.run(&paths),
        Sub::Test(a) => suite::test::run(&paths, &a),
        Sub::Mutants(a) => suite::mutants::run(&paths, &a),
        Sub::Scenarios(a) => suite::table::run(&paths, &a),
        Sub::Selftests(a) => suite::selftests::run(&paths, &a),
        Sub::Demo(a) => suite::demo::run(&paths, &a),
        Sub::Rfc(a) => crate::rfc::run(&paths, &a),
        Sub::Guest => unreachable!("handled above"),
    }
}

impl VmArgs {
    fn options(self) -> vm::Options {
        vm::Options {
            backend: self.backend,
            kernel: self.kernel,
            mem: self.mem,
            cpus: self.cpus,
            timeout: Duration::from_secs(self.timeout),
            boot_timeout: vm::BOOT_TIMEOUT,
            icount: self.icount,
            out: self.out,
            log: self.log,
            env: self.env,
            append: self.append,
            kmemleak: !self.no_kmemleak,
            quiet: self.quiet,
            argv: self.argv,
        }
    }
}

impl KernelArgs {
    fn run(self, paths: &Paths) -> Result<ExitCode> {
        match self.command {
            Some(KernelSub::Source) => {
                println!("{}", kernel::source::get(paths, "")?.tree.display())
            }
            Some(KernelSub::Path { flavor }) => {
                println!("{}", kernel::ensure(paths, flavor)?.dir.display())
            }
            Some(KernelSub::Setup) => {
                use setup::Need;
                for need in [Need::Kernel, Need::Qemu, Need::Guest, Need::Selftests] {
                    setup::ensure(need)?;
                }
                ui::step("everything is installed");
            }
            Some(KernelSub::Series { write: true, .. }) => {
                let changed = kernel::generated::write(&paths.repo, &paths.patches())?;
                println!("{changed} patches written");
            }
            Some(KernelSub::Series { write: false, .. }) => {
                let wrong = kernel::generated::check(&paths.repo, &paths.patches())?;
                if !wrong.is_empty() {
                    anyhow::bail!(
                        "{}\n`scripts/kernel series --write` writes them anew",
                        wrong.join("\n")
                    );
                }
                println!("the patches carry what rust-fuse-notify/ has");
            }
            None => {
                let all = [Flavor::Uml, Flavor::Stock, Flavor::Patched];
                let flavors = if self.flavors.is_empty() {
                    all.to_vec()
                } else {
                    self.flavors
                };
                for f in flavors {
                    let k = kernel::ensure(paths, f)?;
                    println!("{} {}", f.name(), k.image.display());
                }
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(words: &str) -> Result<vm::Options, clap::Error> {
        let words = ["x", "vm"].into_iter().chain(words.split(' '));
        match Cli::try_parse_from(words)?.command {
            Sub::Vm(a) => Ok(a.options()),
            _ => panic!("not vm"),
        }
    }

    #[test]
    fn the_parser_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn the_command_begins_after_two_dashes() {
        let o =
            vm("--backend qemu --kernel stock --mem 512 --cpus 1 --timeout 9 -- ls --color -- x")
                .unwrap();
        assert_eq!(o.argv, ["ls", "--color", "--", "x"]);
        assert_eq!(
            (o.backend, o.kernel),
            (BackendName::Qemu, KernelName::Stock)
        );
        assert_eq!(
            (o.mem, o.cpus, o.timeout.as_secs()),
            (Some(512), Some(1), 9)
        );
        assert!(o.kmemleak && !o.icount);
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in [
            "ls",
            "--",
            "--backend bochs -- ls",
            "--mem 1 -- ls",
            "--cpus 0 -- ls",
            "--cpus 99 -- ls",
            "--timeout x -- ls",
        ] {
            assert!(vm(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn kernels_and_subcommands() {
        let k = |w: &str| match Cli::try_parse_from(
            ["x", "kernel"].into_iter().chain(w.split_whitespace()),
        )
        .map(|c| c.command)
        {
            Ok(Sub::Kernel(a)) => Some(a),
            _ => None,
        };
        assert!(k("").unwrap().flavors.is_empty());
        assert_eq!(
            k("uml uml-stock debug").unwrap().flavors,
            [Flavor::Uml, Flavor::UmlStock, Flavor::Debug]
        );
        assert!(matches!(
            k("path stock").unwrap().command,
            Some(KernelSub::Path {
                flavor: Flavor::Stock
            })
        ));
        assert!(k("bogus").is_none());
    }
}
