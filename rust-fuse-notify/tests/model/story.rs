// SPDX-License-Identifier: GPL-2.0

//! A run, told step by step.

use super::check::Action;
use super::state::{Answer, Late, Op, Rid, State, Way};

fn op(op: Op) -> String {
    match op {
        Op::Lookup(file) => format!("LOOKUP of name {file}"),
        Op::Create(file) => format!("CREATE of name {file}"),
        Op::Touch { file, .. } => format!("WRITE to nodeid {file}"),
        Op::Replay { file: None, .. } => "replay of the root".into(),
        Op::Replay {
            file: Some(file),
            gen,
            nlookup,
        } => format!("replay of nodeid {file}, generation {gen}, count {nlookup}"),
        Op::Report {
            epoch,
            held,
            lowest_owed,
            ..
        } => format!("report of epoch {epoch}, {held} held, lowest {lowest_owed}"),
    }
}

fn answer(answer: Answer) -> String {
    match answer {
        Answer::Entry { file, gen } => format!("nodeid {file}, generation {gen}"),
        Answer::Done => "success".into(),
        Answer::Attr { gen, .. } => format!("attributes of generation {gen}"),
        Answer::NoEntry => "ENOENT".into(),
        Answer::Stale => "ESTALE".into(),
        Answer::Io => "EIO".into(),
        Answer::Void => "void".into(),
        Answer::Aborted => "ECONNABORTED".into(),
    }
}

fn request(s: &State, rid: Rid) -> String {
    let mut s = s.clone();
    let (_, what, _) = s.describe(rid);
    match rid {
        Rid::App(app) => format!("application {app}'s {}", op(what)),
        _ => format!("the {}", op(what)),
    }
}

fn own(s: &State, app: u8) -> String {
    match s.apps[usize::from(app)].req {
        Some(req) => op(req.op),
        None => "no request".into(),
    }
}

fn message(s: &State, index: usize) -> String {
    op(s.server.inbox[index].op)
}

/// What one step does.
pub fn tell(before: &State, action: Action, after: &State) -> String {
    let phase = |s: &State| s.phase().name().to_uppercase();
    match action {
        Action::Go(app) => match after.apps[usize::from(app)].req {
            Some(req) => format!("application {app} sends a {}, id {}", op(req.op), req.id()),
            None if after.apps[usize::from(app)].built => {
                format!("application {app} builds a request, and has yet to queue it")
            }
            None => format!("application {app} goes on"),
        },
        Action::Consume(app) => match before.apps[usize::from(app)].req.and_then(|r| r.answer) {
            Some(a) => format!(
                "application {app} gets the answer to its {}: {}",
                own(before, app),
                answer(a)
            ),
            None => format!("application {app} goes on"),
        },
        Action::GiveBack(app) => format!("application {app} gives its lookup back"),
        Action::Kill(app) => format!("application {app} is killed"),
        Action::Evict(key) => format!("the eviction of inode {key} begins"),
        Action::Evicted(index) => {
            format!(
                "it queues a FORGET of nodeid {}",
                before.kernel.evicting[index].file
            )
        }
        Action::Run if before.phase() == after.phase() => "the engine runs".into(),
        Action::Run => format!("the engine runs: {} -> {}", phase(before), phase(after)),
        Action::Dequeue => {
            format!(
                "a reader dequeues {}",
                request(before, before.kernel.pending[0])
            )
        }
        Action::Read { index, copied } | Action::Wrote { index, copied } => {
            let t = before.kernel.transit[index];
            let who = match (t.dying, t.way) {
                (true, Way::Read) => "a dying reader",
                (true, Way::Write) => "a dying writer",
                (false, Way::Read) => "the reader",
                (false, Way::Write) => "the writer",
            };
            let how = if copied {
                "has copied"
            } else {
                "could not copy"
            };
            match t.answer {
                Some(a) => format!(
                    "{who} {how} the answer to {}: {}",
                    request(before, t.rid),
                    answer(a)
                ),
                None => format!("{who} {how} {}", request(before, t.rid)),
            }
        }
        Action::ReadForget => {
            let f = before.kernel.forgets[0];
            format!(
                "the server reads a FORGET of nodeid {}, count {}",
                f.file, f.nlookup
            )
        }
        Action::Execute(index) => format!("the {} takes effect", message(before, index)),
        Action::Answer(index) => format!("the server answers the {}", message(before, index)),
        Action::AnswerReplay(index, say) => {
            format!("the server answers the {}: {say:?}", message(before, index))
        }
        Action::Commit => "the server writes COMMIT".into(),
        Action::Late(index) => match before.late[index] {
            Late::Reply(m) => format!("a thread of a dead server answers the {}", op(m.op)),
            Late::Commit(epoch) => format!("a thread of a dead server writes COMMIT of {epoch}"),
        },
        Action::Crash(_) => "the server dies".into(),
        Action::Exit => "the server gives up".into(),
        Action::Start { wrong: false } => {
            format!("the next server says RESTARTED: epoch {}", after.epoch())
        }
        Action::Start { wrong: true } => {
            format!(
                "a server of another file system says RESTARTED: epoch {}",
                after.epoch()
            )
        }
        Action::KeeperRestarted => format!("the keeper says RESTARTED: epoch {}", after.epoch()),
        Action::Restarted => format!("somebody says RESTARTED: epoch {}", after.epoch()),
        Action::CloseDevice => "a cloned device of the dead server is closed".into(),
        Action::Probe => format!("somebody writes COMMIT of {}", before.epoch()),
        Action::Abort => "the connection is aborted".into(),
        Action::Replace(file) => format!("nodeid {file} is given to another file"),
    }
}

/// A whole run, one step a line.
pub fn story(path: Vec<(State, Option<Action>)>) -> String {
    let mut lines = String::new();
    for (number, pair) in path.windows(2).enumerate() {
        let [(before, Some(action)), (after, _)] = pair else {
            break;
        };
        lines += &format!("{:3}. {}\n", number + 1, tell(before, *action, after));
    }
    lines
}
