// SPDX-License-Identifier: GPL-2.0
//! Runs scenarios one after the other, each in a process and a mount namespace of its own.
//!
//! A kernel under test may hang whoever touches it, so the runner touches nothing itself: it watches the
//! scenario's process under a time limit, and ends the scenario's connections through fusectl when it must.

use std::cell::RefCell;
use std::fs;
use std::io::{Read, Write};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use nix::mount::{mount, MsFlags};
use nix::sched::{unshare, CloneFlags};
use nix::sys::signal::{kill, sigaction, SaFlags, SigAction, SigHandler, SigSet, Signal};
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;
use serde::Serialize;

use super::{Args, Needs, Scenario};
use crate::raw::app::{describe, Proc};
use crate::raw::ctl::{self, Connection};
use crate::raw::env::{Env, SharedIds, Skip, Support};
use crate::raw::kit::{Config, Kit};
use crate::raw::wait::wait_for;
use crate::raw::wire::init;

#[derive(Serialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Pass,
    Fail,
    Skip,
}

#[derive(Serialize)]
struct Outcome {
    name: String,
    verdict: Verdict,
    reason: String,
    seconds: f64,
}

#[derive(Serialize)]
struct Summary<'a> {
    kernel: String,
    series: bool,
    seed: u64,
    passed: usize,
    failed: usize,
    skipped: usize,
    scenarios: &'a [Outcome],
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn on_signal(_: i32) {
    INTERRUPTED.store(true, Ordering::SeqCst);
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let chosen = choose(super::table(), &args.names)?;
    if args.list {
        for s in &chosen {
            println!(
                "{:<44} {:<8} {}",
                s.name,
                format!("{:?}", s.needs).to_lowercase(),
                s.guards
            );
        }
        return Ok(ExitCode::SUCCESS);
    }
    let seed = args.seed.unwrap_or_else(clock_seed);
    with_env(Duration::from_secs(args.patience), seed, |env| {
        run_chosen(args, &chosen, env)
    })
}

/// A seed for whoever names none.
pub fn clock_seed() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(1, |d| d.subsec_nanos().into())
}

pub fn kernel() -> Result<String> {
    let name = nix::sys::utsname::uname()?;
    Ok(name.release().to_string_lossy().into_owned())
}

/// Tells builds of kernel and program apart, of which results do not add up; the release is the same for all of them.
pub fn build() -> Result<String> {
    use std::hash::Hasher;
    let digest = |bytes: &[u8]| {
        let mut hasher = std::hash::DefaultHasher::new();
        hasher.write(bytes);
        hasher.finish()
    };
    let version = nix::sys::utsname::uname()?;
    let version = version.version().to_string_lossy().into_owned();
    // The build ID is in there.
    let notes = std::fs::read("/sys/kernel/notes").unwrap_or_default();
    let program = std::fs::read("/proc/self/exe").context("cannot read this program")?;
    Ok(format!(
        "{version}, notes {:016x}, program {:016x}",
        digest(&notes),
        digest(&program)
    ))
}

/// Whether somebody wants the run to end.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// Runs `run` in a private mount namespace, with everything that [`contained`] needs.
pub fn with_env(
    patience: Duration,
    seed: u64,
    run: impl FnOnce(&mut Env<'_>) -> Result<ExitCode>,
) -> Result<ExitCode> {
    private_namespace().context("scenarios need root (CAP_SYS_ADMIN) for their mounts")?;
    ctl::ensure_mounted()?;
    catch_signals()?;
    let ids = SharedIds::new()?;
    let scratch = Scratch::new()?;
    let mut env = Env {
        patience,
        seed,
        support: Support::default(),
        ids: &ids,
        scratch: &scratch.0,
        problems: RefCell::default(),
    };
    env.support = support(&env).context("cannot even mount a plain FUSE file system")?;
    ids.clear();
    run(&mut env)
}

fn run_chosen(args: &Args, chosen: &[Scenario], env: &mut Env<'_>) -> Result<ExitCode> {
    let seed = env.seed;
    let kernel = kernel()?;
    println!(
        "kernel {kernel}, {}, seed {seed}",
        if env.support.series {
            "with the series"
        } else {
            "without the series"
        }
    );

    let mut outcomes = Vec::new();
    for round in 0..args.repeat {
        // Every round another order; each is repeated alone by the seed it prints.
        env.seed = seed.wrapping_add(round.into());
        for scenario in chosen {
            let outcome = one(scenario, args, env);
            let text = match (outcome.verdict, outcome.reason.as_str()) {
                (Verdict::Pass, _) => format!("PASS {} ({:.2} s)", outcome.name, outcome.seconds),
                (Verdict::Fail, reason) => format!("FAIL {}: {reason}", outcome.name),
                (Verdict::Skip, reason) => format!("SKIP {} ({reason})", outcome.name),
            };
            println!("{text}");
            outcomes.push(outcome);
            if INTERRUPTED.load(Ordering::SeqCst) {
                bail!("interrupted");
            }
        }
    }
    let count = |v| outcomes.iter().filter(|o| o.verdict == v).count();
    let (passed, failed, skipped) = (
        count(Verdict::Pass),
        count(Verdict::Fail),
        count(Verdict::Skip),
    );
    if let Some(path) = &args.json {
        let summary = Summary {
            kernel,
            series: env.support.series,
            seed,
            passed,
            failed,
            skipped,
            scenarios: &outcomes,
        };
        let text = serde_json::to_string_pretty(&summary)? + "\n";
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    Ok(if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// A directory for mount points, gone at the end with the empty directories in it.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Scratch> {
        let made = nix::unistd::mkdtemp("/tmp/fuse-restart-scenario.XXXXXX")
            .context("no temporary directory")?;
        Ok(Scratch(fs::canonicalize(made)?))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Never recursively: something may be mounted in there that is not ours to empty.
        for entry in fs::read_dir(&self.0).into_iter().flatten().flatten() {
            let _ = fs::remove_dir(entry.path());
        }
        let _ = fs::remove_dir(&self.0);
    }
}

fn choose(all: Vec<Scenario>, names: &[String]) -> Result<Vec<Scenario>> {
    for name in names {
        if !all.iter().any(|s| s.name.starts_with(name.as_str())) {
            bail!("no scenario is called {name:?}; `fuse-restart scenario --list` shows them");
        }
    }
    // A name given in full means itself alone, even if others begin with it.
    let exact = |s: &Scenario, n: &String| *n == s.name;
    let wanted = |s: &Scenario, all: &[String]| {
        names
            .iter()
            .any(|n| exact(s, n) || (!all.contains(n) && s.name.starts_with(n.as_str())))
    };
    let known: Vec<String> = all.iter().map(|s| s.name.clone()).collect();
    Ok(all
        .into_iter()
        .filter(|s| names.is_empty() || wanted(s, &known))
        .collect())
}

fn private_namespace() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context("cannot make a private mount namespace")?;
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )
    .context("cannot make the mounts private")
}

pub fn catch_signals() -> Result<()> {
    let action = SigAction::new(
        SigHandler::Handler(on_signal),
        SaFlags::empty(),
        SigSet::empty(),
    );
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        // SAFETY: the handler only stores to an atomic.
        unsafe { sigaction(signal, &action) }.context("sigaction")?;
    }
    Ok(())
}

/// What the kernel offers in INIT.
fn support(env: &Env<'_>) -> Result<Support> {
    let kit = Kit::mount(env, Config::unsigned())?;
    Ok(Support {
        series: kit.offered & init::RESTARTABLE != 0,
        passthrough: kit.offered & init::PASSTHROUGH != 0,
    })
}

fn one(scenario: &Scenario, args: &Args, env: &Env<'_>) -> Outcome {
    let start = Instant::now();
    let missing = match scenario.needs {
        Needs::Series if !env.support.series => Some("this kernel does not offer FUSE_RESTARTABLE"),
        Needs::Stock if env.support.series => Some("only for kernels without the series"),
        _ => None,
    };
    let (verdict, reason) = match missing {
        Some(why) if scenario.needs == Needs::Series && args.require_series => {
            (Verdict::Fail, why.to_owned())
        }
        Some(why) if !args.run_anyway => (Verdict::Skip, why.to_owned()),
        _ => contained(scenario, env, Duration::from_secs(args.limit))
            .unwrap_or_else(|e| (Verdict::Fail, format!("the runner failed: {e:#}"))),
    };
    Outcome {
        name: scenario.name.clone(),
        verdict,
        reason,
        seconds: start.elapsed().as_secs_f64(),
    }
}

/// Runs the scenario in a child and cleans up behind it, whatever it does.
pub fn contained(scenario: &Scenario, env: &Env<'_>, limit: Duration) -> Result<(Verdict, String)> {
    env.ids.clear();
    let _ = std::io::stdout().flush();
    let (read, write) = nix::unistd::pipe().context("pipe")?;
    let mut child = Proc::spawn(&scenario.name, &[], || inside(scenario, env, write.into()))?;
    let ended = wait_interruptible(&child, limit)?;
    let mut reasons = Vec::new();
    if !ended {
        let why = if INTERRUPTED.load(Ordering::SeqCst) {
            "interrupted".to_owned()
        } else {
            format!("no end after {limit:?}")
        };
        reasons.push(format!("{why}\n{}", scene(&child, env)));
    }
    // Applications that are left hold the connection: abort first, then kill, or the kill itself may hang.
    crate::raw::trap::release();
    if !ended {
        abort_all(env);
    }
    let _ = kill(Pid::from_raw(-child.pid.as_raw()), Signal::SIGKILL);
    let status = child.wait(Duration::from_secs(5));
    for id in env.ids.all() {
        let conn = Connection { id };
        if wait_for("the connection to go", env.patience, || Ok(!conn.exists())).is_err() {
            reasons.push(format!(
                "connection {id} is still there after the scenario: waiting {:?}",
                conn.waiting().ok()
            ));
            let _ = conn.abort();
        }
    }
    let mut told = String::new();
    match status {
        Err(e) => reasons.push(format!("the scenario cannot be killed: {e:#}")),
        Ok(WaitStatus::Exited(_, 0)) | Ok(WaitStatus::Signaled(..)) if !ended => {}
        Ok(WaitStatus::Exited(_, 0)) => {
            fs::File::from(read).read_to_string(&mut told)?;
        }
        Ok(other) => reasons.push(format!("the scenario ended with {other:?}")),
    }
    if let Some(why) = told.strip_prefix("SKIP ").filter(|_| reasons.is_empty()) {
        return Ok((Verdict::Skip, why.to_owned()));
    }
    if let Some(why) = told.strip_prefix("FAIL ") {
        reasons.insert(0, why.to_owned());
    }
    if reasons.is_empty() && told == "PASS" {
        return Ok((Verdict::Pass, String::new()));
    }
    if reasons.is_empty() {
        reasons.push(format!("the scenario said {told:?}"));
    }
    reasons.push(format!("(seed {})", env.seed));
    Ok((Verdict::Fail, reasons.join("\n  ")))
}

fn wait_interruptible(child: &Proc, limit: Duration) -> Result<bool> {
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline && !INTERRUPTED.load(Ordering::SeqCst) {
        let left = deadline
            .saturating_duration_since(Instant::now())
            .min(Duration::from_millis(200));
        if child.ended_within(left)? {
            return Ok(true);
        }
    }
    child.ended()
}

/// The child's side: tell the verdict through the pipe and leave.
fn inside(scenario: &Scenario, env: &Env<'_>, tell: fs::File) -> i32 {
    let result = catch_unwind(AssertUnwindSafe(|| {
        let me = Pid::from_raw(0);
        nix::unistd::setpgid(me, me)?;
        private_namespace()?;
        (scenario.run)(env)
    }));
    let problems = env.problems.borrow().join("\n  ");
    let text = match result {
        Ok(Ok(())) if problems.is_empty() => "PASS".to_owned(),
        Ok(Ok(())) => format!("FAIL {problems}"),
        Ok(Err(e)) => match e.downcast_ref::<Skip>() {
            Some(skip) => format!("SKIP {skip}"),
            None if problems.is_empty() => format!("FAIL {e:#}"),
            None => format!("FAIL {e:#}\n  {problems}"),
        },
        Err(panic) => {
            let what = panic.downcast_ref::<String>().cloned();
            let what = what.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
            format!("FAIL panicked: {}", what.unwrap_or_default())
        }
    };
    i32::from((&tell).write_all(text.as_bytes()).is_err())
}

fn abort_all(env: &Env<'_>) {
    for id in env.ids.all() {
        let _ = Connection { id }.abort();
    }
}

/// What every task of the scenario does, and every connection of it.
fn scene(child: &Proc, env: &Env<'_>) -> String {
    let mut lines = Vec::new();
    for id in env.ids.all() {
        let conn = Connection { id };
        if conn.exists() {
            let recovery = conn.recovery().ok().flatten();
            let state = recovery.map_or("-".to_owned(), |r| r.state().to_owned());
            lines.push(format!(
                "    connection {id}: waiting {:?}, state {state}",
                conn.waiting().ok()
            ));
        }
    }
    let group = child.pid.as_raw().to_string();
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    for pid in pids.filter_map(|e| e.file_name().to_string_lossy().parse::<i32>().ok()) {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let in_group = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.split(' ').nth(2))
            == Some(group.as_str());
        if !in_group {
            continue;
        }
        let tasks = fs::read_dir(format!("/proc/{pid}/task"))
            .into_iter()
            .flatten()
            .flatten();
        for tid in tasks
            .filter_map(|e| e.file_name().to_string_lossy().parse::<i32>().ok())
            .take(8)
        {
            lines.push(format!("    {}", describe(tid)));
        }
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Vec<Scenario> {
        ["a/one", "a/one-more", "b/two"]
            .map(|n| Scenario::new(n, Needs::Nothing, "", |_| Ok(())))
            .into()
    }

    fn names(names: &[&str]) -> Result<Vec<String>> {
        let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        Ok(choose(table(), &names)?
            .into_iter()
            .map(|s| s.name)
            .collect())
    }

    #[test]
    fn scenarios_are_chosen_by_name_or_by_beginning() {
        assert_eq!(names(&[]).unwrap().len(), 3);
        assert_eq!(names(&["a/"]).unwrap(), ["a/one", "a/one-more"]);
        assert_eq!(
            names(&["a/one"]).unwrap(),
            ["a/one"],
            "a full name means itself alone"
        );
        assert!(
            names(&["c"]).is_err(),
            "a misspelt name is no success of zero scenarios"
        );
    }
}
