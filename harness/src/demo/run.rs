// SPDX-License-Identifier: GPL-2.0
//! One run of the demo, from the empty work directory to the numbers.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use nix::mount::{umount2, MntFlags};
use nix::sys::signal::Signal;

use super::held::Held;
use super::kept::{count, Kept};
use super::killer::{lock, Field, Killer, Plan};
use super::prober::{outages, Prober};
use super::report::{Column, Expectation};
use super::watchdog::Watchdog;
use super::workload::{check_programs, Workload};
use super::{source, Args, Backing};
use crate::keep::events::now_ns;

/// The random time from "serves again" to the next kill, in milliseconds.
const PAUSE_MS: (u64, u64) = (50, 5000);
const STOCK_PAUSE_MS: (u64, u64) = (50, 1500);
const STOCK_FILES: usize = 80;
const STOCK_LIMIT: u64 = 60;
/// Fewer, so that it comes to the second act within its limit.
const STOCK_KILLS: u32 = 8;
const LIMIT: u64 = 600;

pub fn run(args: &Args) -> Result<Column> {
    if !nix::unistd::geteuid().is_root() {
        bail!("the demo mounts file systems: run it as root, best in a guest (scripts/demo)");
    }
    check_programs()?;
    let from = source_tree(args)?;
    let seed = args.seed.unwrap_or_else(now_ns);
    let limit = args
        .time_limit
        .unwrap_or(if args.stock { STOCK_LIMIT } else { LIMIT });
    let files = args.files.or(args.stock.then_some(STOCK_FILES));

    let work = WorkDir::create(args)?;
    let size = source::fetch(&from, &work.path("source"), files)?;
    let kernel = nix::sys::utsname::uname()?
        .release()
        .to_string_lossy()
        .into_owned();
    println!(
        "kernel {kernel}, {} files ({} KiB) of {}, seed {seed}",
        size.files,
        size.bytes / 1024,
        from.display()
    );

    let mut column = Column {
        stock: args.stock,
        kernel,
        seed,
        files: size.files,
        bytes: size.bytes,
        ..Column::default()
    };
    let start = Instant::now();
    let kept = Kept::start(&work.dir, &work.backing, args.threads)?;
    let dog = Watchdog::start(Duration::from_secs(limit), kept.mountpoint.clone());
    let outcome = acts(args, seed, kept, &work, &dog, &mut column);
    dog.done();
    column.seconds = start.elapsed().as_secs_f64();
    // A cut explains the errors that it caused.
    column.cut = dog.why_cut().or(outcome.err().map(|e| format!("{e:#}")));
    column.judge(asked_kills(args));
    work.finish(args.keep_work_dir || (!column.stock && !column.passed()));
    Ok(column)
}

fn asked_kills(args: &Args) -> u32 {
    if args.stock {
        args.kills.min(STOCK_KILLS)
    } else {
        args.kills
    }
}

fn source_tree(args: &Args) -> Result<PathBuf> {
    let kernel = std::env::var_os("FUSE_RESTART_KERNEL_SOURCE").map(|k| Path::new(&k).join("fs"));
    args.source
        .clone()
        .or(kernel)
        .context("name the tree to copy with --source DIR, any tree of some hundred files will do")
}

fn acts(
    args: &Args,
    seed: u64,
    mut kept: Kept,
    work: &WorkDir,
    dog: &Arc<Watchdog>,
    column: &mut Column,
) -> Result<()> {
    kept.wait(dog, "the first server", |s| s.keeper.server_pid)?;
    let mountpoint = kept.mountpoint.clone();
    let mut held = Held::open(mountpoint.join("held")).context("opening files on the mount")?;
    let prober = Arc::new(Prober::start(mountpoint.join("probe")).context("starting the prober")?);
    let field = Arc::new(Mutex::new(Field::new(kept)));

    let first = first_act(args, seed, work, dog, &field, &prober, &mut held, column);
    let mut field = Arc::into_inner(field)
        .expect("the killer has ended")
        .into_inner()
        .expect("nobody panicked");
    let rest = first.and_then(|()| second_act(work, dog, &mut field, &prober, &mut held, column));

    // Whatever happened, these numbers are part of the result.
    let mut seen = Arc::into_inner(prober)
        .expect("the killer has ended")
        .stop();
    if let Some(cut) = dog.cut_at() {
        seen.until(cut);
    }
    let kills: Vec<u64> = field.kills.iter().map(|k| k.at_ns).collect();
    column.kills = kills.len() as u64;
    column.kills_in_flight = field.kills.iter().filter(|k| k.in_flight > 0).count() as u64;
    column.in_flight = field.kills.iter().map(|k| k.in_flight).sum();
    column.probe_operations = seen.operations.len() as u64;
    column.probe_errors = seen.errors.into_iter().map(|e| e.1).collect();
    column.outages_ns = outages(&kills, &seen.operations);
    drop(held);
    if let Some(status) = field.kept.status() {
        column.restarts = status.keeper.restarts;
        column.recovery = status.recovery.filter(|r| r.supported());
    }
    let stopped = field.kept.stop(dog);
    column.logged(&count(&field.kept.events()?), &kills);
    rest.and(stopped)
}

/// The workload, while the server is killed again and again.
#[allow(clippy::too_many_arguments)]
fn first_act(
    args: &Args,
    seed: u64,
    work: &WorkDir,
    dog: &Arc<Watchdog>,
    field: &Arc<Mutex<Field>>,
    prober: &Arc<Prober>,
    held: &mut Held,
    column: &mut Column,
) -> Result<()> {
    let mountpoint = lock(field).kept.mountpoint.clone();
    let kills = asked_kills(args);
    let plan = Plan {
        seed,
        pause_ms: if args.stock { STOCK_PAUSE_MS } else { PAUSE_MS },
        most: kills * 3 / 2,
    };
    let killer = Killer::start(field.clone(), prober.clone(), dog.clone(), plan);
    let mut workload = Workload {
        dog,
        source: work.path("source"),
        tree: mountpoint.join("tree"),
        scratch: work.path("scratch"),
        steps: Vec::new(),
    };
    let worked = workload.run().and_then(|mut ok| {
        while ok && killer.kills() < kills {
            ok = workload.check()?;
            column
                .held_wrong
                .extend(held.check("while it is killed", true));
        }
        Ok(())
    });
    column.steps = workload.steps;
    // In this order: the killer's reason is the deeper one.
    killer.stop()?;
    worked?;
    lock(field).wait_serving(dog, prober)?;
    column
        .held_wrong
        .extend(held.check("after the kills", true));
    println!("  {:<20} {}", "kills", lock(field).kills.len());
    Ok(())
}

/// Two files change while no server runs.
fn second_act(
    work: &WorkDir,
    dog: &Arc<Watchdog>,
    field: &mut Field,
    prober: &Prober,
    held: &mut Held,
    column: &mut Column,
) -> Result<()> {
    field.kept.signal(Signal::SIGUSR1)?;
    field
        .kept
        .wait(dog, "the keeper to hold restarts back", |s| {
            s.keeper.held_back.then_some(())
        })?;
    let server = field.wait_serving(dog, prober)?;
    field.kill(server)?;
    field.kept.wait(dog, "the server to be down", |s| {
        (s.keeper.keeper_state == "paused").then_some(())
    })?;
    held.tamper(&work.backing)?;
    field.kept.signal(Signal::SIGUSR2)?;
    field.wait_serving(dog, prober)?;
    let seen = held.after_tampering();
    column.tampered = seen
        .into_iter()
        .map(|(what, expected, came)| Expectation {
            what,
            expected,
            came,
        })
        .collect();
    column
        .held_wrong
        .extend(held.check("after the second act", false));
    println!("  {:<20} done", "second act");
    Ok(())
}

/// Everything the run needs on disk.
struct WorkDir {
    dir: PathBuf,
    backing: PathBuf,
    on_loop: bool,
}

impl WorkDir {
    fn create(args: &Args) -> Result<Self> {
        let base = fs::canonicalize(&args.work_dir)
            .with_context(|| format!("work directory {}", args.work_dir.display()))?;
        let dir = base.join(format!("fuse-restart-demo-{}", std::process::id()));
        fs::create_dir(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        fs::create_dir(dir.join("scratch"))?;
        let backing = dir.join("backing");
        fs::create_dir(&backing)?;
        let mut work = Self {
            dir,
            backing,
            on_loop: false,
        };
        if args.backing == Backing::Ext4 {
            work.mount_ext4()?;
        }
        Ok(work)
    }

    fn mount_ext4(&mut self) -> Result<()> {
        let image = self.path("ext4.img");
        fs::File::create(&image)?.set_len(512 << 20)?;
        tool(Command::new("mkfs.ext4").arg("-q").arg(&image))?;
        tool(
            Command::new("mount")
                .args(["-o", "loop"])
                .arg(&image)
                .arg(&self.backing),
        )?;
        self.on_loop = true;
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn finish(&self, keep: bool) {
        if self.on_loop {
            let _ = umount2(&self.backing, MntFlags::MNT_DETACH);
        }
        if keep {
            println!("kept for a look: {}", self.dir.display());
            return;
        }
        // Never into a mount that could not be taken away.
        if !is_mount(&self.path("mnt")) {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

fn is_mount(path: &Path) -> bool {
    !matches!(crate::keep::mount::mount_at(path), Ok(None))
}

fn tool(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .with_context(|| format!("{name} is needed for --backing ext4"))?;
    if !output.status.success() {
        bail!(
            "{name}: {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
