// SPDX-License-Identifier: GPL-2.0
//! Which case: everything about it in one word that a shell can hold, so that it can be repeated alone.
//!
//! `t4-wb/rename-over/7/rename.renameat2:3+recover.replay:2`: four threads and write-back; the workload of the focus
//! `rename-over` in round 7 of the seed; the server dies when it reaches `rename.renameat2` for the third time, and the
//! next instance when it reaches `recover.replay` for the second.
//!
//! With the focus `many` all points are armed from the start, and every one that is reached is a death, of whichever
//! instance. With the focus `keeper` it is not the server that dies there but the keeper that has started it.

use std::fmt;
use std::str::FromStr;

use anyhow::{bail, Context, Result};

use super::dim::Dim;

/// A workload: what all cases of a group have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    pub dim: Dim,
    /// Name of a focus, or `adopt`, `keeper`, `many`, `mixed`, `twice`.
    pub focus: String,
    pub round: u64,
}

/// Where one instance dies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kill {
    /// `opcode.point`
    pub point: String,
    /// 1: at the first reach.
    pub nth: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    pub group: Group,
    /// None: a run without a crash.
    pub kills: Vec<Kill>,
}

/// The deaths of one run.
#[derive(Clone, Copy)]
pub struct Deaths<'a> {
    pub kills: &'a [Kill],
    /// All are armed from the start, and those that are not reached do not matter if one is. Else each death arms the
    /// next, and all have to come.
    pub together: bool,
    /// Not the server dies but its keeper; another one keeps that.
    pub keeper: bool,
}

impl Deaths<'_> {
    pub const NONE: Deaths<'static> = Deaths {
        kills: &[],
        together: false,
        keeper: false,
    };
}

impl Case {
    pub fn deaths(&self) -> Deaths<'_> {
        Deaths {
            kills: &self.kills,
            together: self.group.focus == MANY,
            keeper: self.group.focus == KEEPER,
        }
    }
}

/// The focus whose cases have many deaths.
pub const MANY: &str = "many";
/// The focus in whose cases the keeper dies.
pub const KEEPER: &str = "keeper";

impl Kill {
    pub fn new(point: &str, nth: u64) -> Kill {
        Kill {
            point: point.to_owned(),
            nth,
        }
    }

    /// Opcode and point.
    pub fn parts(&self) -> (&str, &str) {
        self.point.split_once('.').unwrap_or((&self.point, ""))
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.dim.name, self.focus, self.round)
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/", self.group)?;
        let kills = self.kills.iter().map(|k| format!("{}:{}", k.point, k.nth));
        f.write_str(&kills.collect::<Vec<_>>().join("+"))
    }
}

impl FromStr for Case {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Case> {
        let parts: Vec<&str> = text.splitn(4, '/').collect();
        let [dim, focus, round, kills] = parts[..] else {
            bail!("{text:?} is no case; one looks like t1-wt/mkdir/0/mkdir.mkdirat:1");
        };
        let kill = |text: &str| -> Result<Kill> {
            let (point, nth) = text
                .split_once(':')
                .with_context(|| format!("{text:?} does not say at which reach"))?;
            let nth = nth
                .parse()
                .with_context(|| format!("{nth:?} is no number"))?;
            anyhow::ensure!(
                nth > 0,
                "points are reached for the first time, not the 0th"
            );
            anyhow::ensure!(point.contains('.'), "{point:?} is not OPCODE.POINT");
            Ok(Kill::new(point, nth))
        };
        let kills = kills.split('+').filter(|kill| !kill.is_empty());
        Ok(Case {
            group: Group {
                dim: Dim::find(dim)?,
                focus: focus.to_owned(),
                round: round
                    .parse()
                    .with_context(|| format!("{round:?} is no round"))?,
            },
            kills: kills.map(kill).collect::<Result<_>>()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_is_read_again() {
        for text in [
            "t1-wt/mkdir/0/mkdir.mkdirat:1",
            "c4-wb/rename-over/17/rename.renameat2:3+recover.replay:2",
            "t4-wt/mixed/2/",
            "t4-wt/keeper/2/write.intent:1+recover.end:1",
            "t1-wb/many/0/write.start:7+mkdir.reply:2+recover.replay:9",
        ] {
            assert_eq!(text.parse::<Case>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "t1-wt/mkdir/0",
            "t9/mkdir/0/a.b:1",
            "t1-wt/mkdir/0/a.b",
            "t1-wt/mkdir/0/a.b:0",
        ] {
            assert!(text.parse::<Case>().is_err(), "{text}");
        }
    }
}
