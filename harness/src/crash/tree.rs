// SPDX-License-Identifier: GPL-2.0
//! A whole tree as text, byte by byte: what must be the same at the end.

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::sys::stat::lstat;

use super::op::sum;
use super::shown::{xattr, xattr_names, Shown};

/// A line for each file below `root`. What cannot be read is told as such: it is a difference, not an end.
pub fn of(root: &Path, blocks: bool) -> Vec<String> {
    let mut lines = Vec::new();
    add(root, Path::new(""), &mut Shown::new(blocks), &mut lines);
    lines
}

fn add(root: &Path, relative: &Path, shown: &mut Shown, lines: &mut Vec<String>) {
    let path = root.join(relative);
    let name = relative.display();
    let st = match lstat(&path) {
        Ok(st) => st,
        Err(e) => return lines.push(format!("{name}: lstat: {e:?}")),
    };
    let mut line = format!("{name}: {}", shown.stat(&st));
    match st.st_mode & libc::S_IFMT {
        libc::S_IFREG => match fs::read(&path) {
            Ok(data) => line += &format!(" data {}:{:x}", data.len(), sum(&data)),
            Err(e) => line += &format!(" data: {e}"),
        },
        libc::S_IFLNK => line += &format!(" to {:?}", fs::read_link(&path).ok()),
        _ => {}
    }
    line += &attributes(&path);
    lines.push(line);
    if st.st_mode & libc::S_IFMT == libc::S_IFDIR {
        let below: Result<Vec<_>, _> = fs::read_dir(&path).and_then(Iterator::collect);
        match below {
            Ok(mut below) => {
                below.sort_by_key(|entry| entry.file_name());
                for entry in below {
                    add(root, &relative.join(entry.file_name()), shown, lines);
                }
            }
            Err(e) => lines.push(format!("{name}: readdir: {e}")),
        }
    }
}

fn attributes(path: &Path) -> String {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else {
        return String::new();
    };
    match xattr_names(&path) {
        Ok(names) => names
            .iter()
            .map(|name| format!(" {name:?}={:x?}", xattr(&path, name)))
            .collect(),
        Err(nix::errno::Errno::EOPNOTSUPP) => String::new(),
        Err(e) => format!(" listxattr: {e:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_trees_have_equal_texts_and_others_have_not() {
        let make = |text: &[u8], mode: u32| {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir(dir.path().join("d")).unwrap();
            fs::write(dir.path().join("d/f"), text).unwrap();
            fs::hard_link(dir.path().join("d/f"), dir.path().join("g")).unwrap();
            let permissions = std::os::unix::fs::PermissionsExt::from_mode(mode);
            fs::set_permissions(dir.path().join("g"), permissions).unwrap();
            let lines = of(dir.path(), false);
            // The root and the temporary directory of different machines may differ in what they are.
            lines[1..].to_vec()
        };
        let one = make(b"text", 0o600);
        assert_eq!(one.len(), 3, "{one:?}");
        assert_eq!(one, make(b"text", 0o600));
        assert_ne!(one, make(b"texT", 0o600));
        assert_ne!(one, make(b"text", 0o601));
        // Two names of one file are one inode.
        let inode = |line: &str| line.split(' ').nth(1).unwrap().to_owned();
        assert_eq!(inode(&one[1]), inode(&one[2]));
    }
}
