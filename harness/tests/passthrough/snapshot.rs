// SPDX-License-Identifier: GPL-2.0
//! A tree as text: everything about it that an application can see and that must be the same.

use std::ffi::{CString, OsStr};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// One line for each file below `root`, sorted.
pub fn of(root: &Path) -> String {
    let mut lines = Vec::new();
    add(root, Path::new(""), &mut lines);
    lines.sort();
    lines.join("\n")
}

fn add(root: &Path, relative: &Path, lines: &mut Vec<String>) {
    let path = root.join(relative);
    let meta = fs::symlink_metadata(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut line = format!(
        "{:?} mode {:o} owner {}:{} links {} rdev {:#x}",
        relative.display(),
        meta.mode(),
        meta.uid(),
        meta.gid(),
        meta.nlink(),
        meta.rdev()
    );
    if meta.is_file() {
        let content = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let sum = content.iter().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
            (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3)
        });
        line += &format!(" size {} sum {sum:x}", meta.len());
    }
    if meta.is_symlink() {
        line += &format!(" to {:?}", fs::read_link(&path).unwrap());
    }
    for (name, value) in xattrs(&path) {
        line += &format!(" {name}={value:x?}");
    }
    lines.push(line);
    if meta.is_dir() {
        for entry in fs::read_dir(&path).unwrap() {
            add(root, &relative.join(entry.unwrap().file_name()), lines);
        }
    }
}

/// The extended attributes of a file, sorted; labels of a security module are not compared.
pub fn xattrs(path: &Path) -> Vec<(String, Vec<u8>)> {
    let c = CString::new(path.as_os_str().as_bytes()).unwrap();
    let mut list = vec![0u8; 64 * 1024];
    // SAFETY: the string is NUL-terminated and the buffer writable for its length.
    let n = unsafe { libc::llistxattr(c.as_ptr(), list.as_mut_ptr().cast(), list.len()) };
    let Ok(n) = usize::try_from(n) else {
        return Vec::new();
    };
    let mut all: Vec<_> = list[..n]
        .split(|b| *b == 0)
        .filter(|name| !name.is_empty() && *name != b"security.selinux")
        .map(|name| {
            let shown = OsStr::from_bytes(name).to_string_lossy().into_owned();
            let name = CString::new(name).unwrap();
            let mut value = vec![0u8; 64 * 1024];
            // SAFETY: as above.
            let n = unsafe {
                libc::lgetxattr(
                    c.as_ptr(),
                    name.as_ptr(),
                    value.as_mut_ptr().cast(),
                    value.len(),
                )
            };
            value.truncate(usize::try_from(n).unwrap_or(0));
            (shown, value)
        })
        .collect();
    all.sort();
    all
}
