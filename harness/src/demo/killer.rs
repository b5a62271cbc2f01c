// SPDX-License-Identifier: GPL-2.0
//! Kills the server at random moments, each time after it serves again.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use super::kept::Kept;
use super::prober::Prober;
use super::rng::Rng;
use super::watchdog::Watchdog;
use crate::fusectl;
use crate::keep::events::now_ns;

/// For so long a kill looks for a request in flight.
const LOOK_FOR_A_REQUEST: Duration = Duration::from_millis(50);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kill {
    pub at_ns: u64,
    /// Requests that applications waited for at that moment.
    pub in_flight: u64,
}

/// The mount and the kills so far; the killer and the main thread take turns.
pub struct Field {
    pub kept: Kept,
    pub kills: Vec<Kill>,
    /// The instance that was killed last.
    dead: Option<i32>,
}

impl Field {
    pub fn new(kept: Kept) -> Self {
        Self {
            kept,
            kills: Vec::new(),
            dead: None,
        }
    }

    /// Waits until a server answers applications, as the keeper, the kernel and the prober see it; gives its pid.
    pub fn wait_serving(&mut self, dog: &Watchdog, prober: &Prober) -> Result<i32> {
        let (recoveries, dead) = (self.kills.len() as u64, self.dead);
        let since = self.kills.last().map_or(0, |k| k.at_ns);
        self.kept.wait(dog, "a server that serves", |status| {
            let pid = status.keeper.server_pid.filter(|p| Some(*p) != dead)?;
            let kernel_says_so = match &status.recovery {
                Some(r) if r.supported() => r.serving() && r.get("total_recoveries") >= recoveries,
                _ => true,
            };
            (kernel_says_so && prober.answered_since(since)).then_some(pid)
        })
    }

    pub fn kill(&mut self, pid: i32) -> Result<Kill> {
        let connection = self
            .kept
            .status()
            .context("the keeper's status is gone")?
            .keeper
            .connection;
        // A random moment, moved to the next one (if there is one soon) at which somebody waits for an answer.
        let (mut in_flight, start) = (0, Instant::now());
        while in_flight == 0 && start.elapsed() < LOOK_FOR_A_REQUEST {
            in_flight = fusectl::waiting(connection).unwrap_or(0);
        }
        let kill_now = Kill {
            at_ns: now_ns(),
            in_flight,
        };
        kill(Pid::from_raw(pid), Signal::SIGKILL)
            .with_context(|| format!("the server (pid {pid}) was gone before it was killed"))?;
        self.kills.push(kill_now);
        self.dead = Some(pid);
        Ok(kill_now)
    }
}

/// When to kill.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub seed: u64,
    /// From "serves again" to the next kill: a random time between these.
    pub pause_ms: (u64, u64),
    /// No more kills than this, so that a slow machine comes to an end as well.
    pub most: u32,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    kills: AtomicU32,
}

pub struct Killer {
    shared: Arc<Shared>,
    thread: JoinHandle<Result<()>>,
}

impl Killer {
    pub fn start(
        field: Arc<Mutex<Field>>,
        prober: Arc<Prober>,
        dog: Arc<Watchdog>,
        plan: Plan,
    ) -> Self {
        let shared = Arc::new(Shared::default());
        let ours = shared.clone();
        let mut rng = Rng::new(plan.seed);
        let thread = std::thread::spawn(move || -> Result<()> {
            let going_on = || !ours.stop.load(Ordering::Acquire) && dog.why_cut().is_none();
            while going_on() && ours.kills.load(Ordering::Acquire) < plan.most {
                let pid = lock(&field)
                    .wait_serving(&dog, &prober)
                    .inspect_err(|e| dog.cut(&format!("{e:#}")))?;
                // Not a wait for anything: this is the random moment.
                let moment = rng.between(plan.pause_ms.0 * 1000, plan.pause_ms.1 * 1000);
                let moment = Duration::from_micros(moment);
                std::thread::sleep(moment);
                if ours.stop.load(Ordering::Acquire) {
                    break;
                }
                lock(&field)
                    .kill(pid)
                    .inspect_err(|e| dog.cut(&format!("{e:#}")))?;
                ours.kills.fetch_add(1, Ordering::AcqRel);
            }
            Ok(())
        });
        Self { shared, thread }
    }

    pub fn kills(&self) -> u32 {
        self.shared.kills.load(Ordering::Acquire)
    }

    /// Ends it; the last victim may still be recovering.
    pub fn stop(self) -> Result<()> {
        self.shared.stop.store(true, Ordering::Release);
        self.thread.join().expect("the killer does not panic")
    }
}

pub fn lock(field: &Mutex<Field>) -> std::sync::MutexGuard<'_, Field> {
    field.lock().expect("nobody panics with the field locked")
}
