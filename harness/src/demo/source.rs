// SPDX-License-Identifier: GPL-2.0
//! The tree to copy, fetched to the work directory first: reading it is not what the demo is about.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};

/// How much was fetched.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Size {
    pub files: u64,
    pub bytes: u64,
}

/// Copies at most `limit` files of `from`, taken evenly from the sorted list, so that few files still have many
/// directories.
pub fn fetch(from: &Path, to: &Path, limit: Option<usize>) -> Result<Size> {
    let mut all = Vec::new();
    list(from, Path::new(""), &mut all)
        .with_context(|| format!("source tree {}", from.display()))?;
    if all.is_empty() {
        bail!(
            "source tree {} has no files in it; name another one with --source",
            from.display()
        );
    }
    let mut size = Size::default();
    for path in evenly(&all, limit.unwrap_or(usize::MAX)) {
        let target = to.join(path);
        fs::create_dir_all(target.parent().expect("below `to`"))?;
        // Links are followed by nobody: what is copied is what a reader of the tree sees as a file.
        size.bytes += fs::copy(from.join(path), &target).with_context(|| {
            format!(
                "copying {} to {}",
                from.join(path).display(),
                target.display()
            )
        })?;
        size.files += 1;
    }
    Ok(size)
}

fn list(root: &Path, below: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    let mut entries = fs::read_dir(root.join(below))?.collect::<std::io::Result<Vec<_>>>()?;
    entries.sort_by_key(|e| e.file_name());
    for entry in entries {
        let path = below.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            list(root, &path, found)?;
        } else if kind.is_file() {
            found.push(path);
        }
    }
    Ok(())
}

fn evenly(all: &[PathBuf], limit: usize) -> impl Iterator<Item = &PathBuf> {
    let count = limit.min(all.len());
    (0..count).map(move |i| &all[i * all.len() / count])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_tree() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("from");
        for i in 0..10 {
            fs::create_dir_all(from.join(format!("d{i}"))).unwrap();
            fs::write(from.join(format!("d{i}/f")), [b'x'; 7]).unwrap();
        }
        let all = fetch(&from, &dir.path().join("all"), None).unwrap();
        assert_eq!(
            all,
            Size {
                files: 10,
                bytes: 70
            }
        );
        let few = fetch(&from, &dir.path().join("few"), Some(3)).unwrap();
        assert_eq!(
            few,
            Size {
                files: 3,
                bytes: 21
            }
        );
        assert!(dir.path().join("few/d0/f").exists() && dir.path().join("few/d6/f").exists());
        assert!(fetch(&dir.path().join("none"), &dir.path().join("x"), None).is_err());
        fs::create_dir(dir.path().join("empty")).unwrap();
        let error = fetch(&dir.path().join("empty"), &dir.path().join("x"), None).unwrap_err();
        assert!(error.to_string().contains("no files"));
    }
}
