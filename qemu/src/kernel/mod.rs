// SPDX-License-Identifier: GPL-2.0
//! From nothing to kernels: [`source`] gets the tree, [`series`] puts the
//! patches in and takes them out, [`flavor`] says which kernels there are,
//! [`config`] configures and verifies, [`build`] compiles and keeps the result
//! under a hash of everything that went in.

pub mod build;
pub mod config;
pub mod flavor;
pub mod generated;
pub mod series;
pub mod source;
pub mod tools;

use crate::paths::Paths;
use anyhow::Result;
use flavor::Flavor;
use std::path::PathBuf;

/// A kernel that is ready to boot.
#[derive(Clone, Debug)]
pub struct Built {
    pub name: &'static str,
    pub hash: String,
    pub dir: PathBuf,
    pub image: PathBuf,
}

/// From the cache, or built now.
pub fn ensure(paths: &Paths, flavor: Flavor) -> Result<Built> {
    if let Some(built) = build::quick(paths, flavor)? {
        return Ok(built);
    }
    build::build(paths, flavor)
}
