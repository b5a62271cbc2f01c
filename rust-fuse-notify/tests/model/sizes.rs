// SPDX-License-Identifier: GPL-2.0

//! What is explored: who does what, and how often something goes wrong.

use super::seeds::Seed;
use super::state::{App, Budget, Core, Kernel, Numbers, Server, Slots, State, Store, FILES};
use rust_fuse_notify::proto::{phase::Machine, tally::Tally, window::Window};

/// One step of an application.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// Looks a name up, and uses what it finds.
    Lookup(u8),
    /// Creates a file, and uses it.
    Create(u8),
    /// Does something to the file that it uses.
    Touch,
    /// Uses it no more.
    Close,
}

/// What happens first when a server is replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Order {
    /// All inodes are replayed, then what was held is sent again. As it is.
    ReplayFirst,
    /// What was unanswered is sent again at once, as `FUSE_NOTIFY_RESEND` does. Only what comes
    /// later is held.
    ResendFirst,
}

/// One model.
#[derive(Clone, Debug)]
pub struct Size {
    pub name: &'static str,
    /// What it is there for.
    pub about: &'static str,
    /// Explored by every `cargo test`, without optimization.
    pub small: bool,
    pub scripts: &'static [&'static [Step]],
    /// The generation of each file at the start; zero if there is none yet.
    pub files: [u8; FILES],
    pub budget: Budget,
    /// Replays in flight at a time.
    pub window: u32,
    pub order: Order,
    pub seed: Option<Seed>,
}

impl Size {
    pub fn seeded(mut self, seed: Seed) -> Self {
        self.seed = Some(seed);
        self
    }

    pub fn ordered(mut self, order: Order) -> Self {
        self.order = order;
        self
    }

    /// A mount that nobody has used.
    pub fn start(&self) -> State {
        State {
            kernel: Kernel {
                connected: true,
                core: Core(Machine::new()),
                window: Slots(Window::new()),
                tally: Numbers(Tally::default()),
                kicked: false,
                pending: Vec::new(),
                held: Vec::new(),
                processing: Vec::new(),
                transit: Vec::new(),
                forgets: Vec::new(),
                evicting: Vec::new(),
                inodes: Vec::new(),
                slots: Vec::new(),
                report: None,
                place: None,
                walked: false,
                committed: 0,
                delivered: 0,
            },
            server: Server {
                alive: true,
                ..Server::default()
            },
            store: Store {
                gens: self.files,
                journal: Vec::new(),
                effects: Vec::new(),
            },
            apps: vec![
                App {
                    step: 0,
                    inode: None,
                    built: false,
                    req: None,
                };
                self.scripts.len()
            ],
            late: Vec::new(),
            left: self.budget,
            told: false,
            fault: None,
        }
    }
}

use Step::{Close, Create, Lookup, Touch};

const NONE: Budget = Budget {
    crashes: 0,
    keeper: false,
    extra: 0,
    wrong: 0,
    replaced: 0,
    errors: 0,
    kills: 0,
    given_back: 0,
    evictions: 0,
    closes: 0,
    probes: 0,
    aborts: 0,
};

/// # Panics
///
/// If there is none.
pub fn by_name(name: &str) -> Size {
    let mut all = sizes().into_iter();
    all.find(|s| s.name == name).expect("no such model")
}

/// All models. Each is explored whole.
pub fn sizes() -> Vec<Size> {
    let size = |name, about, scripts, files, budget| Size {
        name,
        about,
        small: !["verdicts", "again", "once", "evicted"].contains(&name),
        scripts,
        files,
        budget,
        window: 2,
        order: Order::ReplayFirst,
        seed: None,
    };
    vec![
        size(
            "orders",
            "one application; its file is replaced while no server runs",
            &[&[Lookup(0), Touch]],
            [1, 0],
            Budget {
                crashes: 1,
                replaced: 1,
                ..NONE
            },
        ),
        size(
            "twice",
            "one application; two crashes, also in the middle of a recovery; an error for no reason; a probe",
            &[&[Lookup(0), Touch]],
            [1, 0],
            Budget {
                crashes: 2,
                keeper: true,
                errors: 1,
                probes: 1,
                ..NONE
            },
        ),
        size(
            "counts",
            "lookups, evictions and FORGETs of two applications; one crash, the keeper speaks",
            &[&[Lookup(0), Close], &[Lookup(0), Touch]],
            [1, 0],
            Budget {
                crashes: 1,
                keeper: true,
                given_back: 1,
                evictions: 1,
                ..NONE
            },
        ),
        size(
            "verdicts",
            "RESTARTED in the middle of a recovery; errors for no reason; a file is replaced",
            &[&[Lookup(0), Touch], &[Lookup(1)]],
            [1, 1],
            Budget {
                crashes: 1,
                extra: 1,
                errors: 1,
                replaced: 1,
                ..NONE
            },
        ),
        size(
            "successor",
            "a file is replaced under its nodeid; one crash, an error for no reason",
            &[&[Lookup(0), Touch, Touch], &[Lookup(0), Touch, Close]],
            [1, 0],
            Budget {
                crashes: 1,
                replaced: 1,
                errors: 1,
                evictions: 1,
                ..NONE
            },
        ),
        size(
            "stranger",
            "a server of another file system in between; applications are killed, cloned devices closed, the connection aborted",
            &[&[Lookup(0), Touch], &[Lookup(0)]],
            [1, 0],
            Budget {
                crashes: 1,
                wrong: 1,
                kills: 1,
                closes: 1,
                aborts: 1,
                ..NONE
            },
        ),
        size(
            "again",
            "RESTARTED at any time, by anybody; one crash",
            &[&[Lookup(0), Touch], &[Lookup(1)]],
            [1, 1],
            Budget {
                crashes: 1,
                extra: 1,
                keeper: true,
                ..NONE
            },
        ),
        size(
            "once",
            "two applications change two files; two crashes",
            &[&[Create(0), Touch], &[Lookup(1), Touch]],
            [0, 1],
            Budget {
                crashes: 2,
                ..NONE
            },
        ),
        size(
            "evicted",
            "lookups, evictions and FORGETs of two applications; two crashes",
            &[&[Lookup(0), Close], &[Lookup(0), Touch]],
            [1, 0],
            Budget {
                crashes: 2,
                keeper: true,
                evictions: 1,
                ..NONE
            },
        ),
    ]
}
