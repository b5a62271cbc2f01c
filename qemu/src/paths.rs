// SPDX-License-Identifier: GPL-2.0
//! Where things are: the repository, and the cache outside of it.

use anyhow::{bail, Context, Result};
use std::path::{Path, PathBuf};

#[derive(Clone, Debug)]
pub struct Paths {
    pub repo: PathBuf,
    pub cache: PathBuf,
}

impl Paths {
    /// The repository is the one the script lies in (it says so in
    /// `FUSE_RESTART_REPO`), else the one around the current directory.
    pub fn find() -> Result<Paths> {
        let repo = match std::env::var_os("FUSE_RESTART_REPO") {
            Some(r) => PathBuf::from(r),
            None => around(&std::env::current_dir()?)?,
        };
        let repo = repo
            .canonicalize()
            .with_context(|| format!("repository {}", repo.display()))?;
        let cache = match std::env::var_os("FUSE_RESTART_CACHE") {
            Some(c) if !c.is_empty() => PathBuf::from(c),
            _ => {
                let home = std::env::var_os("HOME").filter(|h| !h.is_empty()).context(
                    "neither FUSE_RESTART_CACHE nor HOME is set: set one, kernels are kept there",
                )?;
                Path::new(&home).join(".cache/fuse-restart")
            }
        };
        std::fs::create_dir_all(&cache).with_context(|| {
            format!(
                "cannot make the cache directory {}; set FUSE_RESTART_CACHE",
                cache.display()
            )
        })?;
        let cache = cache.canonicalize()?;
        Ok(Paths { repo, cache })
    }

    pub fn config(&self, name: &str) -> PathBuf {
        self.repo.join("qemu/config").join(format!("{name}.config"))
    }

    pub fn patches(&self) -> PathBuf {
        self.repo.join("kernel-patches/7.3")
    }

    /// Made on demand.
    pub fn cache_dir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.cache.join(name);
        std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        Ok(dir)
    }
}

fn around(start: &Path) -> Result<PathBuf> {
    match start
        .ancestors()
        .find(|d| d.join("qemu/config/common.config").is_file())
    {
        Some(d) => Ok(d.to_path_buf()),
        None => bail!(
            "{} is not inside the repository; run it by scripts/",
            start.display()
        ),
    }
}
