// SPDX-License-Identifier: GPL-2.0
//! Many applications over a server that is killed thousands of times in a row, under memory pressure; then the
//! kernel's memory must be what it was.
//!
//! * [`server`] the server: a process that keeps its tree in memory shared with its successors
//! * [`measure`] what is counted before and after

mod measure;
mod server;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use serde::Serialize;

use crate::fuzz::shared::Shared;
use crate::raw::app::Proc;
use crate::raw::env::Env;
use crate::raw::kit::Kit;
use crate::raw::ops::{self, Done};
use crate::raw::wait::{wait_for, Rng};
use crate::scenario::runner;
use measure::Memory;

/// Kill a server thousands of times under many applications and memory pressure.
///
/// Each cycle kills the server at a random moment, waits for its end, and starts the next one, which recovers by itself:
/// a cycle has ended when that one has committed. One server in four is killed before, and is counted apart. No application may see an error or wrong data, no request may be older than the last recovery for longer than the
/// patience, and at the end slab objects and descriptors must be back where they were. Root and the series are needed.
///
/// Example: scripts/vm --kernel debug --timeout 7200 -- target/debug/fuse-restart stress --threads 24 --cycles 2000
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Application threads
    #[arg(long, value_name = "N", default_value_t = 24)]
    threads: usize,
    /// Times that the server is killed and has recovered
    #[arg(long, value_name = "N", default_value_t = 2000)]
    cycles: u64,
    /// Stop after so many seconds, whatever was done
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<u64>,
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Milliseconds that a server lives at most once it serves
    #[arg(long, value_name = "MS", default_value_t = 40)]
    life: u64,
    /// MiB that the memory hog touches again and again; 0: none
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    hog: usize,
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Seconds without any progress after which the run has failed
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    patience: u64,
}

#[derive(Serialize, Debug)]
struct Summary {
    kernel: String,
    seed: u64,
    threads: usize,
    kills: u64,
    recoveries: u64,
    /// Servers killed before they had committed.
    unfinished: u64,
    operations: u64,
    resent: u64,
    errors: u64,
    seconds: f64,
    before: Memory,
    after: Memory,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let seed = args.seed.unwrap_or_else(runner::clock_seed);
    runner::with_env(Duration::from_secs(args.patience), seed, |env| {
        ensure!(
            env.support.series,
            "this kernel does not offer FUSE_RESTARTABLE: boot one with the series (scripts/vm)"
        );
        // What is allocated once per boot shall not count.
        warm_up(env)?;
        let before = Memory::now()?;
        let mut summary = stress(args, env, before)?;
        summary.after = measure::settled(&summary.before, env.patience)?;
        report(args, &summary)
    })
}

/// A short run of the same kind.
fn warm_up(env: &Env<'_>) -> Result<()> {
    let args = Args {
        threads: 4,
        cycles: 5,
        seconds: None,
        seed: None,
        life: 20,
        hog: 0,
        json: None,
        patience: env.patience.as_secs(),
    };
    stress(&args, env, Memory::default())
        .context("warming up")
        .map(drop)
}

fn stress(args: &Args, env: &Env<'_>, before: Memory) -> Result<Summary> {
    println!(
        "{} threads, {} cycles, seed {}",
        args.threads, args.cycles, env.seed
    );
    let start = Instant::now();
    let kit = Kit::granted(env)?;
    let state = server::State::new(kit.config.identity);
    let shared = Shared::new()?;
    let mut server = Some(server::spawn(&kit, &state, false)?);
    let hog = (args.hog > 0).then(|| hog(args.hog, &kit)).transpose()?;
    // In a process of their own: a server must not inherit what they have open.
    let (mnt, threads) = (kit.mnt.clone(), args.threads);
    let mut apps = Proc::spawn("the applications", &[kit.dev.raw()], || {
        std::thread::scope(|scope| {
            for index in 0..threads {
                let base = mnt.join(format!("t{index}"));
                scope.spawn(move || application(index, &base, shared));
            }
        });
        0
    })?;
    let mut rng = Rng(env.seed);
    let recoveries = || {
        let numbers = kit.conn.recovery()?.context("no `recovery` file")?;
        numbers.get("total_recoveries")
    };
    let (mut kills, mut unfinished, mut recovered) = (0, 0, 0);
    // How long the last recovery took that was waited for.
    let mut took = Duration::from_millis(args.life);
    let mut told = Instant::now();
    let mut progress = (0, Instant::now());
    while recovered < args.cycles && !runner::interrupted() {
        if args.seconds.is_some_and(|s| start.elapsed().as_secs() >= s) {
            break;
        }
        // The first serves at once, the others recover.
        let patient = kills == 0 || !rng.next().is_multiple_of(4);
        if patient && kills > 0 {
            let begun = Instant::now();
            wait_for("the recovery", env.patience, || {
                Ok(recoveries()? > recovered)
            })
            .with_context(|| format!("after {kills} kills{}", kit.situation()))?;
            took = begun.elapsed();
        }
        let life = match patient {
            true => args.life,
            false => took.as_millis() as u64,
        };
        std::thread::sleep(Duration::from_millis(rng.next() % life.max(1)));
        server.take().context("no server")?.kill(env.patience)?;
        let now = recoveries()?;
        unfinished += u64::from(kills > 0 && now == recovered);
        kills += 1;
        recovered = now;
        server = Some(server::spawn(&kit, &state, true)?);
        if shared.wrong().is_some() {
            break;
        }
        let done = shared.counts().app_ops;
        if done > progress.0 {
            progress = (done, Instant::now());
        }
        ensure!(
            progress.1.elapsed() < env.patience,
            "no operation has ended for {:?}, after {kills} kills{}",
            progress.1.elapsed(),
            kit.situation()
        );
        if told.elapsed() > Duration::from_secs(20) {
            told = Instant::now();
            println!(
                "{kills} kills, {recovered} recoveries, {done} operations, {:.0} s",
                start.elapsed().as_secs_f64()
            );
        }
    }
    shared.stop();
    let code = apps
        .wait_code(env.patience)
        .context("a request is older than the last recovery")?;
    ensure!(code == 0, "the applications ended with {code}");
    drop(hog);
    let recovery = kit.conn.recovery()?.context("no `recovery` file")?;
    let get = |key: &str| recovery.get(key);
    ensure!(
        get("total_replayed")? == get("total_confirmed")? + get("total_revoked")?,
        "the totals do not add up: {recovery:?}"
    );
    wait_for("no request to be waiting", env.patience, || {
        Ok(kit.conn.waiting()? == 0)
    })?;
    server.context("no server")?.kill(env.patience)?;
    Ok(Summary {
        kernel: runner::kernel()?,
        seed: env.seed,
        threads: args.threads,
        kills,
        recoveries: get("total_recoveries")?,
        unfinished,
        operations: shared.counts().app_ops,
        resent: get("total_resent")?,
        errors: u64::from(shared.wrong().is_some()) + state.contradictions(),
        seconds: start.elapsed().as_secs_f64(),
        before,
        after: Memory::default(),
    })
}

/// Touches its memory again and again, and lets the kernel shrink its caches.
fn hog(mib: usize, kit: &Kit<'_>) -> Result<Proc> {
    Proc::spawn("the memory hog", &[kit.dev.raw()], move || loop {
        let mut memory = vec![0u8; mib << 20];
        for at in (0..memory.len()).step_by(4096) {
            memory[at] = 1;
        }
        std::hint::black_box(&memory);
        let _ = std::fs::write("/proc/sys/vm/drop_caches", "3");
        std::thread::sleep(Duration::from_millis(50));
    })
}

/// Makes, writes, reads and removes in a directory of its own, where every result is known.
fn application(index: usize, base: &Path, shared: &Shared) {
    let mut round = 0u64;
    let tell = |what: &str, done: Done<bool>| {
        shared.app_op();
        if done == Ok(true) {
            return true;
        }
        shared.is_wrong(index, 0, 0);
        println!("WRONG {}: {what} gave {done:?}", base.display());
        false
    };
    if !tell("mkdir", ops::mkdir(base).map(|()| true)) {
        return;
    }
    while !shared.stopped() {
        round += 1;
        let (a, b) = (base.join(format!("a{}", round % 50)), base.join("b"));
        let data = round.to_ne_bytes().repeat(1 + (round % 200) as usize);
        let fd = match ops::open(&a, OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL) {
            Ok(fd) => fd,
            Err(e) => {
                tell("create", Err(e));
                return;
            }
        };
        let fine = tell("write", ops::pwrite(fd, &data, 0).map(|n| n == data.len()))
            && tell("read", ops::pread(fd, data.len() + 1, 0).map(|d| d == data))
            && tell("close", ops::close(fd).map(|()| true))
            && tell(
                "rename",
                ops::rename(&a, &b, nix::fcntl::RenameFlags::empty()).map(|()| true),
            )
            && tell("read again", ops::read_file(&b).map(|d| d == data))
            && tell(
                "the old name",
                Ok(matches!(ops::stat(&a), Err(Errno::ENOENT))),
            )
            && tell("list", ops::listdir(base).map(|names| names == ["b"]))
            && tell("unlink", ops::unlink(&b).map(|()| true));
        if !fine {
            return;
        }
    }
}

fn report(args: &Args, summary: &Summary) -> Result<ExitCode> {
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(summary)? + "\n";
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    println!(
        "{} kills, {} recoveries, {} killed before COMMIT; {} operations of {} threads, {} resent, {} errors, {:.1} s",
        summary.kills,
        summary.recoveries,
        summary.unfinished,
        summary.operations,
        summary.threads,
        summary.resent,
        summary.errors,
        summary.seconds
    );
    println!("before: {:?}\nafter:  {:?}", summary.before, summary.after);
    let leaks = summary.after.leaks(&summary.before);
    for leak in &leaks {
        println!("LEAK: {leak}");
    }
    let fine = leaks.is_empty() && summary.errors == 0 && summary.operations > 0;
    Ok(if fine {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
