// SPDX-License-Identifier: GPL-2.0
//! The shortest part of a history that is still not linearizable, to be read by people.
//!
//! Only what keeps the verdict true is left out: what came before the last moment at which no call was under way (the
//! trees that were possible then take its place), calls about other names, and calls that changed nothing. If the
//! rest is not linearizable, neither is the whole.

use std::collections::BTreeSet;

use super::judge::{judge, Verdict, Violation};
use super::model::State;
use super::op::{Op, Record};

pub struct Window {
    pub records: Vec<Record>,
    /// What the tree can be before the first of them.
    pub before: Vec<State>,
    pub violation: Violation,
}

/// Cuts a history of which `judge` said that it is not linearizable.
pub fn cut(records: &[Record], violation: Violation) -> Window {
    let end = records[violation.at].returned;
    let in_between = |r: &&Record| r.called > violation.since && r.called < end;
    let before = violation.before.clone();
    let mut window = Window {
        records: records.iter().filter(in_between).cloned().collect(),
        before,
        violation,
    };
    window.judge_again();
    window.only_its_names();
    let mut at = 0;
    while at < window.records.len() {
        let without = |n: &usize| *n != at;
        if !window.records[at].only_looks() || !window.keep(without) {
            at += 1;
        }
    }
    window.records.sort_by_key(|record| record.called);
    window.judge_again();
    window
}

impl Window {
    fn judge_again(&mut self) {
        if let Verdict::Not(violation) = judge(&self.records, &self.before) {
            self.violation = violation;
        }
    }

    /// Leaves out all others, if the rest is not linearizable either.
    fn keep(&mut self, those: impl Fn(&usize) -> bool) -> bool {
        let kept = (0..self.records.len()).filter(those);
        let kept: Vec<Record> = kept.map(|n| self.records[n].clone()).collect();
        let Verdict::Not(violation) = judge(&kept, &self.before) else {
            return false;
        };
        (self.records, self.violation) = (kept, violation);
        true
    }

    /// Leaves out the calls that have no name in common with the one that failed, directly or by others.
    fn only_its_names(&mut self) {
        let failed = self.records[self.violation.at].clone();
        let lists = |op: &Op| matches!(op, Op::List(_)) && *op != failed.op;
        let mut names: BTreeSet<_> = failed.op.names().into_iter().collect();
        loop {
            let before = names.len();
            for record in self.records.iter().filter(|r| !lists(&r.op)) {
                let its = record.op.names();
                if its.iter().any(|name| names.contains(name)) {
                    names.extend(its);
                }
            }
            if names.len() == before {
                break;
            }
        }
        let register = failed.op.register();
        let kept: Vec<bool> = self
            .records
            .iter()
            .map(|record| {
                let touches = record.op.names().iter().any(|name| names.contains(name));
                let same = register.is_some() && record.op.register() == register;
                (touches && !lists(&record.op)) || same
            })
            .collect();
        self.keep(|n| kept[*n]);
    }

    /// For people; `marks` are other things that happened, with their stamps.
    pub fn told(&self, marks: &[(u64, String)]) -> String {
        let failed = &self.records[self.violation.at];
        let mut text = format!(
            "    not linearizable: process {}: {} = {}; whatever the order, it gives {}\n",
            failed.process,
            failed.op,
            failed.got,
            self.violation.instead.join(" or ")
        );
        for state in self.before.iter().take(4) {
            text += &format!("    before: {state}\n");
        }
        if self.before.len() > 4 {
            text += &format!("    (and {} more)\n", self.before.len() - 4);
        }
        let first = self.records.iter().map(|r| r.called).min().unwrap_or(0);
        let last = self.records.iter().map(|r| r.returned).max().unwrap_or(0);
        // Those in between, and the last one before: what it left behind may only be noticed now.
        let earlier = marks.iter().rposition(|(at, _)| *at < first).unwrap_or(0);
        let mut lines: Vec<(u64, String)> = marks
            .iter()
            .skip(earlier)
            .filter(|(at, _)| *at <= last)
            .map(|(at, what)| (*at, format!("[{at:>5}]          {what}")))
            .collect();
        lines.extend(self.records.iter().map(|r| (r.called, r.to_string())));
        lines.sort();
        for (_, line) in lines {
            text += &format!("      {line}\n");
        }
        text
    }
}
