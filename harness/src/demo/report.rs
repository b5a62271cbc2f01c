// SPDX-License-Identifier: GPL-2.0
//! The result of a run: its numbers, whether they add up, and the table.

use std::fmt::Write as _;
use std::io::Write as _;

use serde::{Deserialize, Serialize};

use super::held::Held;
use super::kept::Logged;
use super::prober::percentile;
use super::workload::Step;
use crate::fusectl::Recovery;

/// One run.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Column {
    pub stock: bool,
    pub kernel: String,
    pub seed: u64,
    pub files: u64,
    pub bytes: u64,
    pub seconds: f64,
    /// Why it did not come to its own end.
    pub cut: Option<String>,
    pub steps: Vec<Step>,
    pub kills: u64,
    /// Kills while an application waited for a request, and the sum of such requests.
    pub kills_in_flight: u64,
    pub in_flight: u64,
    pub restarts: u64,
    /// The kernel's counts at the end; none on a kernel without the series.
    pub recovery: Option<Recovery>,
    pub keeper: KeeperCounts,
    pub probe_operations: u64,
    pub probe_errors: Vec<String>,
    pub outages_ns: Vec<u64>,
    pub outage_p50_ns: Option<u64>,
    pub outage_p99_ns: Option<u64>,
    pub outage_max_ns: Option<u64>,
    /// What was wrong with descriptors that must go on.
    pub held_wrong: Vec<String>,
    pub tampered: Vec<Expectation>,
    pub checks: Vec<Check>,
}

/// What the keeper's log says.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct KeeperCounts {
    pub starts: u64,
    pub deaths: u64,
    pub restarted: u64,
    pub resent: u64,
    pub refused: u64,
    /// Over all recoveries but the last, which the kernel's totals must contain: the counts found at each death.
    pub replayed: u64,
    pub confirmed: u64,
    pub revoked: u64,
    /// The fewest inodes that one recovery replayed.
    pub fewest_replayed: Option<u64>,
    /// From a kill until the kernel was told, and until the next server ran; the median.
    pub told_p50_ns: Option<u64>,
    pub started_p50_ns: Option<u64>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Expectation {
    pub what: String,
    pub expected: String,
    pub came: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Check {
    pub what: String,
    pub ok: bool,
    pub detail: String,
}

impl Column {
    pub fn passed(&self) -> bool {
        self.cut.is_none() && !self.checks.is_empty() && self.checks.iter().all(|c| c.ok)
    }

    /// `kills`: their moments, in the same order as the log has the deaths.
    pub fn logged(&mut self, logged: &Logged, kills: &[u64]) {
        let after_kill = |moments: &[u64]| {
            let pairs = moments.iter().zip(kills);
            let delays: Vec<u64> = pairs.map(|(m, k)| m.saturating_sub(*k)).collect();
            percentile(&delays, 50)
        };
        let sum = |key: &str| {
            logged
                .recoveries
                .iter()
                .filter(|r| r.get("total_recoveries") > 0)
                .map(|r| r.get(key))
                .sum()
        };
        let fewest = logged
            .recoveries
            .iter()
            .filter(|r| r.get("total_recoveries") > 0)
            .map(|r| r.get("replayed"))
            .min();
        self.keeper = KeeperCounts {
            starts: logged.starts,
            deaths: logged.deaths,
            restarted: logged.restarted,
            resent: logged.resent,
            refused: logged.refused,
            replayed: sum("replayed"),
            confirmed: sum("confirmed"),
            revoked: sum("revoked"),
            fewest_replayed: fewest,
            told_p50_ns: after_kill(&logged.told_at),
            started_p50_ns: after_kill(&logged.started_at),
        };
    }

    /// Do the counts of workload, keeper and kernel add up? `asked`: so many kills at least.
    pub fn judge(&mut self, asked: u32) {
        self.outage_p50_ns = percentile(&self.outages_ns, 50);
        self.outage_p99_ns = percentile(&self.outages_ns, 99);
        self.outage_max_ns = percentile(&self.outages_ns, 100);
        self.checks = self.nothing_failed();
        // A run that was cut short has nothing to count; it has not passed whatever it has seen.
        if self.cut.is_none() {
            self.checks.extend(self.common_counts(asked));
            if !self.stock {
                self.checks.extend(self.recovery_checks());
            }
        }
    }

    fn nothing_failed(&self) -> Vec<Check> {
        let failed: Vec<_> = self
            .steps
            .iter()
            .filter(|s| !s.ok)
            .map(|s| format!("{}: {}", s.name, s.detail))
            .collect();
        let tampered: Vec<_> = self
            .tampered
            .iter()
            .filter(|t| t.expected != t.came)
            .map(|t| format!("{}: expected {}, got {}", t.what, t.expected, t.came))
            .collect();
        vec![
            none("no command failed", &failed),
            none(
                "every small operation was done exactly once",
                &self.probe_errors,
            ),
            none("open descriptors went on", &self.held_wrong),
            none("what changed was refused, and nothing else", &tampered),
        ]
    }

    fn common_counts(&self, asked: u32) -> Vec<Check> {
        vec![
            check(
                "the workload ran",
                !self.steps.is_empty(),
                "it did not start",
            ),
            // The second act has a kill of its own.
            check(
                &format!("at least {asked} kills and one more"),
                self.kills > asked.into(),
                &format!("{}", self.kills),
            ),
            check(
                "most kills met a waiting request",
                self.kills_in_flight * 2 >= self.kills,
                &format!("{} of {}", self.kills_in_flight, self.kills),
            ),
            check(
                "every kill was seen by the prober",
                self.outages_ns.len() as u64 == self.kills
                    && self.outages_ns.iter().all(|o| *o > 0),
                &format!("{:?}", self.outages_ns),
            ),
            check(
                "files were changed behind a dead server",
                !self.tampered.is_empty(),
                "it did not come to that",
            ),
            equal(
                "deaths in the keeper's log = kills",
                self.keeper.deaths,
                self.kills,
            ),
            equal("restarts of the keeper = kills", self.restarts, self.kills),
            equal(
                "servers started = kills + 1",
                self.keeper.starts,
                self.kills + 1,
            ),
        ]
    }

    fn recovery_checks(&self) -> Vec<Check> {
        let Some(kernel) = &self.recovery else {
            return vec![check(
                "the kernel recovers connections",
                false,
                "no file `recovery`: a kernel without the series, or a server that did not sign",
            )];
        };
        let total = |key: &str| kernel.get(&format!("total_{key}"));
        let keeper = &self.keeper;
        vec![
            check(
                "the kernel serves at the end",
                kernel.serving(),
                &kernel.state,
            ),
            equal(
                "recoveries of the kernel = kills",
                total("recoveries"),
                self.kills,
            ),
            equal(
                "the kernel accepted every notification of the keeper",
                keeper.restarted,
                self.kills,
            ),
            // The keeper's notification, and then the server's own, which voids it.
            equal("epoch = 2 x kills", kernel.get("epoch"), 2 * self.kills),
            equal(
                "replayed = confirmed + revoked",
                total("replayed"),
                total("confirmed") + total("revoked"),
            ),
            equal(
                "revoked = the changed files",
                total("revoked"),
                Held::TO_BE_REVOKED,
            ),
            // At each death the log shows the recovery before; the kernel itself shows the last one.
            equal(
                "replayed, summed over all recoveries",
                keeper.replayed + kernel.get("replayed"),
                total("replayed"),
            ),
            equal(
                "confirmed, summed over all recoveries",
                keeper.confirmed + kernel.get("confirmed"),
                total("confirmed"),
            ),
            equal(
                "revoked, summed over all recoveries",
                keeper.revoked + kernel.get("revoked"),
                total("revoked"),
            ),
            check(
                "each recovery replayed at least what was open all the time",
                keeper
                    .fewest_replayed
                    .is_some_and(|n| n.min(kernel.get("replayed")) >= Held::PINNED),
                &format!("{:?}", keeper.fewest_replayed),
            ),
            check(
                "requests were resent",
                total("resent") > 0 || self.in_flight == 0,
                "none, though requests were in flight",
            ),
        ]
    }
}

fn check(what: &str, ok: bool, detail: &str) -> Check {
    let detail = if ok { String::new() } else { detail.to_owned() };
    Check {
        what: what.to_owned(),
        ok,
        detail,
    }
}

fn equal(what: &str, found: u64, expected: u64) -> Check {
    check(
        what,
        found == expected,
        &format!("{found}, expected {expected}"),
    )
}

fn none(what: &str, wrong: &[String]) -> Check {
    let more = wrong.len().saturating_sub(3);
    let mut detail = wrong.iter().take(3).cloned().collect::<Vec<_>>().join("; ");
    if more > 0 {
        let _ = write!(detail, "; and {more} more");
    }
    check(what, wrong.is_empty(), &detail)
}

/// The table, one column a run, and below it what did not add up.
pub fn print(columns: &[Column]) {
    let _ = std::io::stdout().write_all(render(columns).as_bytes());
}

fn render(columns: &[Column]) -> String {
    let mut out = String::from("\n");
    let rows: Vec<Vec<(&str, String)>> = columns.iter().map(rows).collect();
    let label = rows.iter().flatten().map(|r| r.0.len()).max().unwrap_or(0);
    let width = rows
        .iter()
        .flatten()
        .map(|r| r.1.chars().count())
        .max()
        .unwrap_or(0)
        .max(20);
    for i in 0..rows.first().map_or(0, Vec::len) {
        let _ = write!(out, "{:<label$}", rows[0][i].0);
        for column in &rows {
            let _ = write!(out, "  {:>width$}", column[i].1);
        }
        out.push('\n');
    }
    for column in columns {
        let _ = write!(out, "\n{}: ", title(column));
        if let Some(why) = &column.cut {
            let _ = write!(out, "cut short: {why}\n  ");
        }
        let wrong: Vec<_> = column.checks.iter().filter(|c| !c.ok).collect();
        if wrong.is_empty() {
            let _ = writeln!(out, "{} checks, all hold", column.checks.len());
        } else {
            let _ = writeln!(
                out,
                "{} of {} checks do not hold:",
                wrong.len(),
                column.checks.len()
            );
        }
        for check in wrong {
            let _ = writeln!(out, "  {}: {}", check.what, check.detail);
        }
    }
    out
}

fn title(column: &Column) -> &'static str {
    match column.stock {
        true => "RESEND alone",
        false => "with the series",
    }
}

fn rows(c: &Column) -> Vec<(&'static str, String)> {
    let dash = || "-".to_owned();
    let kernel = |key: &str| {
        c.recovery
            .as_ref()
            .map_or_else(dash, |r| r.get(key).to_string())
    };
    let ms = |ns: Option<u64>| ns.map_or_else(dash, |ns| format!("{:.1} ms", ns as f64 / 1e6));
    let failed = c.steps.iter().filter(|s| !s.ok).count();
    // The last run of each kind of step; "-" if there was none.
    let step = |name: &str| {
        c.steps
            .iter()
            .rfind(|s| s.name == name)
            .map_or_else(dash, |s| if s.ok { "ok".into() } else { "FAILED".into() })
    };
    let tampered = c.tampered.iter().filter(|t| t.expected == t.came).count();
    vec![
        ("", title(c).into()),
        ("kernel", c.kernel.clone()),
        ("files, KiB", format!("{}, {}", c.files, c.bytes / 1024)),
        ("commands, failed", format!("{}, {failed}", c.steps.len())),
        ("tree equals its source", step("read back by hash")),
        ("git fsck --strict", step("git fsck")),
        ("kills of the server", c.kills.to_string()),
        (
            "  with requests waiting",
            format!("{} ({} requests)", c.kills_in_flight, c.in_flight),
        ),
        (
            "recoveries",
            c.recovery.as_ref().map_or_else(
                || format!("{} (resend only)", c.keeper.resent),
                |r| r.get("total_recoveries").to_string(),
            ),
        ),
        ("inodes replayed", kernel("total_replayed")),
        ("  confirmed", kernel("total_confirmed")),
        ("  revoked", kernel("total_revoked")),
        ("requests resent", kernel("total_resent")),
        (
            "small operations, errors",
            format!("{}, {}", c.probe_operations, c.probe_errors.len()),
        ),
        ("outage seen by it, p50", ms(c.outage_p50_ns)),
        ("  p99", ms(c.outage_p99_ns)),
        ("  max", ms(c.outage_max_ns)),
        ("kernel told after, p50", ms(c.keeper.told_p50_ns)),
        ("next server runs after, p50", ms(c.keeper.started_p50_ns)),
        (
            "open descriptors that broke",
            c.held_wrong.len().to_string(),
        ),
        (
            "changed files refused as promised",
            format!("{tampered} of {}", c.tampered.len()),
        ),
        ("seed", c.seed.to_string()),
        ("seconds", format!("{:.1}", c.seconds)),
        (
            "result",
            if c.passed() {
                "all counts add up".into()
            } else {
                "NOT as promised".into()
            },
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run in which everything adds up.
    fn good() -> Column {
        let text =
            "state serving\nepoch 42\nreplayed 30\nconfirmed 28\nrevoked 2\ntotal_recoveries 21\n\
                    total_replayed 630\ntotal_confirmed 628\ntotal_revoked 2\ntotal_resent 25\n";
        let step = Step {
            name: "tar".into(),
            ok: true,
            seconds: 1.0,
            detail: String::new(),
        };
        let expectation = Expectation {
            what: "read".into(),
            expected: "EIO".into(),
            came: "EIO".into(),
        };
        Column {
            kills: 21,
            kills_in_flight: 20,
            in_flight: 25,
            restarts: 21,
            steps: vec![step],
            recovery: Recovery::parse(text),
            keeper: KeeperCounts {
                starts: 22,
                deaths: 21,
                restarted: 21,
                replayed: 600,
                confirmed: 600,
                fewest_replayed: Some(30),
                ..KeeperCounts::default()
            },
            outages_ns: (1..=21).collect(),
            tampered: vec![expectation],
            ..Column::default()
        }
    }

    fn passes(change: impl FnOnce(&mut Column)) -> bool {
        let mut column = good();
        change(&mut column);
        column.judge(20);
        column.passed()
    }

    fn kernel(c: &mut Column, key: &str, value: u64) {
        c.recovery
            .as_mut()
            .unwrap()
            .numbers
            .insert(key.into(), value);
    }

    #[test]
    fn a_good_run_passes() {
        assert!(passes(|_| {}));
    }

    #[test]
    fn every_number_that_does_not_add_up_is_a_failure() {
        type Change = fn(&mut Column);
        let changes: [(&str, Change); 25] = [
            ("too few kills", |c| c.kills = 20),
            ("one death more", |c| c.keeper.deaths += 1),
            ("one start more", |c| c.keeper.starts += 1),
            ("one restart less", |c| c.restarts -= 1),
            ("a refused notification", |c| c.keeper.restarted -= 1),
            ("one recovery less", |c| kernel(c, "total_recoveries", 20)),
            ("an epoch too many", |c| kernel(c, "epoch", 43)),
            // The others of these are changed so that they agree: exactly one check can see it.
            ("a replay without verdict", |c| {
                kernel(c, "total_replayed", 631);
                kernel(c, "replayed", 31);
            }),
            ("one revoked too many", |c| {
                kernel(c, "total_revoked", 3);
                kernel(c, "revoked", 3);
                kernel(c, "total_confirmed", 627);
                kernel(c, "confirmed", 27);
            }),
            ("none revoked", |c| {
                kernel(c, "total_revoked", 0);
                kernel(c, "revoked", 0);
                kernel(c, "total_confirmed", 630);
                kernel(c, "confirmed", 30);
            }),
            ("totals that are no sums", |c| c.keeper.replayed += 1),
            ("confirmed that is no sum", |c| c.keeper.confirmed += 1),
            ("revoked that is no sum", |c| c.keeper.revoked += 1),
            ("a recovery that showed too few", |c| {
                c.keeper.fewest_replayed = Some(3)
            }),
            ("the last recovery showed too few", |c| {
                kernel(c, "replayed", 3);
                kernel(c, "total_replayed", 603)
            }),
            ("nothing resent", |c| kernel(c, "total_resent", 0)),
            ("not serving", |c| {
                c.recovery.as_mut().unwrap().state = "held".into()
            }),
            ("no recovery at all", |c| c.recovery = None),
            ("a failed command", |c| c.steps[0].ok = false),
            ("no command", |c| c.steps.clear()),
            ("an operation done twice", |c| {
                c.probe_errors.push("EEXIST".into())
            }),
            ("a kill that nobody saw", |c| c.outages_ns[3] = 0),
            ("a broken descriptor", |c| c.held_wrong.push("EIO".into())),
            ("a successor that was read", |c| {
                c.tampered[0].came = "ok".into()
            }),
            ("cut short", |c| c.cut = Some("time".into())),
        ];
        for (name, change) in changes {
            assert!(!passes(change), "{name} must be a failure");
        }
        assert!(!passes(|c| c.tampered.clear()), "no second act");
        assert!(
            !passes(|c| c.kills_in_flight = 3),
            "killed while nothing went on"
        );
    }

    #[test]
    fn without_the_series_the_kernels_counts_are_not_asked_for() {
        assert!(passes(|c| {
            c.stock = true;
            c.recovery = None;
        }));
    }

    #[test]
    fn both_columns_are_printed_and_what_is_wrong_is_said() {
        let (mut a, mut b) = (good(), good());
        (b.stock, b.recovery, b.cut) = (true, None, Some("not done within its 60 s".into()));
        a.judge(20);
        b.judge(20);
        let text = render(&[a.clone(), b]);
        assert!(text.contains("with the series") && text.contains("RESEND alone"));
        assert!(text.contains("not done within its 60 s"));
        let lengths: Vec<_> = text
            .lines()
            .skip(1)
            .take_while(|l| !l.is_empty())
            .map(|l| l.chars().count())
            .collect();
        assert!(
            lengths.len() > 15 && lengths.iter().all(|l| *l == lengths[0]),
            "{text}"
        );
        let back: Column = serde_json::from_str(&serde_json::to_string(&a).unwrap()).unwrap();
        assert!(back.passed());
    }
}
