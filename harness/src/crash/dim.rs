// SPDX-License-Identifier: GPL-2.0
//! How the server runs in a case: threads, cache, and what is taken away from it.

use anyhow::{bail, Result};

/// One column of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dim {
    pub name: &'static str,
    pub threads: u16,
    /// A descriptor of its own for each thread.
    pub cloned: bool,
    pub writeback: bool,
}

pub const DIMS: [Dim; 6] = [
    dim("t1-wt", 1, false, false),
    dim("t1-wb", 1, false, true),
    dim("t4-wt", 4, false, false),
    dim("t4-wb", 4, false, true),
    dim("c4-wt", 4, true, false),
    dim("c4-wb", 4, true, true),
];

const fn dim(name: &'static str, threads: u16, cloned: bool, writeback: bool) -> Dim {
    Dim {
        name,
        threads,
        cloned,
        writeback,
    }
}

impl Dim {
    pub fn find(name: &str) -> Result<Dim> {
        match DIMS.iter().find(|dim| dim.name == name) {
            Some(dim) => Ok(*dim),
            None => bail!(
                "no dimension is called {name:?}; there are {}",
                DIMS.map(|dim| dim.name).join(", ")
            ),
        }
    }

    /// As many processes that there is something to do for several threads.
    pub fn procs(&self) -> usize {
        if self.threads == 1 {
            1
        } else {
            3
        }
    }

    /// Options of the server.
    pub fn options(&self) -> Vec<String> {
        // Nothing that is counted may depend on how long a case takes.
        let mut options = vec!["--timeout".into(), "3600".into()];
        options.extend(["--threads".into(), self.threads.to_string()]);
        options.extend(self.cloned.then(|| "--clone-fd".into()));
        options.extend(self.writeback.then(|| "--writeback".into()));
        options
    }
}

/// What the server is to do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    pub journal: bool,
    /// Without the signature the kernel only sends requests again, as one without the series does.
    pub sign: bool,
}

impl Mode {
    pub fn name(self) -> &'static str {
        match (self.journal, self.sign) {
            (true, true) => "whole",
            (false, true) => "journal-off",
            (true, false) => "resend-only",
            (false, false) => "journal-off, resend-only",
        }
    }

    pub fn whole(self) -> bool {
        self.journal && self.sign
    }

    /// How it is asked for.
    pub fn asked(self) -> &'static str {
        match (self.journal, self.sign) {
            (true, true) => "",
            (false, true) => " --journal off",
            (true, false) => " --resend-only",
            (false, false) => " --journal off --resend-only",
        }
    }

    pub fn options(self) -> Vec<String> {
        let mut options = Vec::new();
        options.extend((!self.journal).then(|| "--no-journal".to_owned()));
        options.extend((!self.sign).then(|| "--unsigned".to_owned()));
        options
    }
}
