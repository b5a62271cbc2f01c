// SPDX-License-Identifier: GPL-2.0
//! Results, kept under a hash of everything that they depend on, so that a
//! second run is quick and one that was interrupted goes on.

use super::check::Check;
use super::messages::Message;
use crate::kernel::source::hex;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::PathBuf;

/// Raised when the way of checking changes in a way the key does not see.
const FORMAT: u32 = 1;

/// What a tool said about one state of the tree, before it is compared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Why it did not even get to its end.
    pub broken: Option<String>,
    /// There was nothing to check.
    pub nothing: bool,
    pub messages: Vec<Message>,
    /// For the reader; decides nothing.
    pub notes: Vec<String>,
    pub millis: u64,
}

impl Record {
    pub fn nothing() -> Record {
        Record {
            nothing: true,
            ..Record::of(vec![])
        }
    }

    pub fn of(messages: Vec<Message>) -> Record {
        Record {
            broken: None,
            nothing: false,
            messages,
            notes: vec![],
            millis: 0,
        }
    }

    pub fn broken(why: String) -> Record {
        Record {
            broken: Some(why),
            ..Record::of(vec![])
        }
    }
}

pub struct Store {
    dir: PathBuf,
    fresh: bool,
}

impl Store {
    /// With `fresh` nothing that is there is believed.
    pub fn open(dir: PathBuf, fresh: bool) -> Result<Store> {
        fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        Ok(Store { dir, fresh })
    }

    fn path(&self, check: Check, key: &str) -> PathBuf {
        let hash = hex(&Sha256::digest(format!("{FORMAT} {key}")));
        self.dir
            .join(format!("{}-{}.json", check.name(), &hash[..16]))
    }

    pub fn get(&self, check: Check, key: &str) -> Option<Record> {
        if self.fresh {
            return None;
        }
        serde_json::from_slice(&fs::read(self.path(check, key)).ok()?).ok()
    }

    pub fn put(&self, check: Check, key: &str, record: &Record) -> Result<()> {
        let path = self.path(check, key);
        let part = path.with_extension("part");
        fs::write(&part, serde_json::to_vec(record)?)?;
        Ok(fs::rename(part, path)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_found_under_their_key_only() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path().into(), false).unwrap();
        let record = Record::broken("no".into());
        store.put(Check::Module, "a", &record).unwrap();
        assert_eq!(store.get(Check::Module, "a"), Some(record));
        assert_eq!(store.get(Check::Module, "b"), None);
        assert_eq!(store.get(Check::Off, "a"), None);
        let fresh = Store::open(dir.path().into(), true).unwrap();
        assert_eq!(fresh.get(Check::Module, "a"), None);
        fs::write(store.path(Check::Module, "a"), "{").unwrap();
        assert_eq!(store.get(Check::Module, "a"), None, "damaged");
    }
}
