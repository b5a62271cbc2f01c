// SPDX-License-Identifier: GPL-2.0
//! Real programs as workloads. What they leave and say must not depend on when they run.

use super::generate::Draw;
use super::op::Op;

/// In the environment of each.
pub const VARIABLES: [(&str, &str); 7] = [
    ("GIT_CONFIG_NOSYSTEM", "1"),
    ("GIT_AUTHOR_NAME", "author"),
    ("GIT_AUTHOR_EMAIL", "author@example.org"),
    ("GIT_COMMITTER_NAME", "author"),
    ("GIT_COMMITTER_EMAIL", "author@example.org"),
    ("GIT_AUTHOR_DATE", "1000000000 +0000"),
    ("GIT_COMMITTER_DATE", "1000000000 +0000"),
];

/// The program that a focus of this name needs, if it needs one.
pub fn needed(focus: &str) -> Option<&'static str> {
    Some(match focus {
        "tar" => "tar",
        "cp" => "cp",
        "rsync" => "rsync",
        "git" => "git",
        "sqlite" => "sqlite3",
        "compile" => "cc",
        "fsx" => "fsx",
        _ => return None,
    })
}

/// Whether it is in the PATH.
pub fn is_there(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

pub fn tar(d: &mut Draw) {
    d.op(Op::Run(
        "tar --sort=name --mtime=@1000000000 -cf t.tar f0 f1 f2 d0 h0 h1 l0 a0; rm -rf x; mkdir x; \
         tar -C x -xpf t.tar; cmp x/f2 f2; ls x; tar -tvf t.tar | wc -l",
    ));
}

pub fn cp(d: &mut Draw) {
    d.op(Op::Run(
        "rm -rf y; mkdir y; cp -a f0 f1 d0 h0 h1 l0 a0 y/; cp --sparse=always f2 y/sparse; cp -r y z; \
         cmp y/sparse f2; ls z; mv z y/z; mv y/f0 y/f1; rm -r y/d0; ls y",
    ));
}

pub fn rsync(d: &mut Draw) {
    d.op(Op::Run(
        "rsync -aH f0 f1 d0 h0 h1 l0 v/; printf more >> f1; rsync -aH --checksum --delete f0 f1 d0 v/; ls v",
    ));
}

pub fn git(d: &mut Draw) {
    // The index remembers times and inode numbers, so it goes when it has been looked at.
    d.op(Op::Run(
        "rm -rf r; git init -q --template= -b main r; cd r; cp ../f0 ../f1 .; mkdir d; cp ../f2 d/; git add .; \
         git commit -qm one; git mv f0 d/g; printf more >> f1; git commit -qam two; git checkout -q -b other HEAD~1; \
         git checkout -q main; git gc -q; git fsck --strict 2>&1; git status --porcelain; git log --format=%H; \
         rm .git/index",
    ));
}

pub fn sqlite(d: &mut Draw) {
    let script = d.one_of(&[
        "sqlite3 db.delete 'pragma journal_mode=delete; create table if not exists t(a integer primary key, b); \
         begin; insert into t(b) values (1),(2),(3); commit; update t set b=b*7; delete from t where a=2; vacuum; \
         pragma integrity_check; select * from t'",
        "sqlite3 db.wal 'pragma journal_mode=wal; create table if not exists t(a integer primary key, b); \
         insert into t(b) values (zeroblob(5000)),(2),(3); update t set b=length(b); \
         pragma wal_checkpoint(truncate); insert into t(b) values (9); pragma integrity_check; select * from t'",
    ]);
    d.op(Op::Run(script));
}

pub fn fsx(d: &mut Draw) {
    // Reads what it wrote in every way there is; an error ends it with what it had done.
    let script = d.one_of(&[
        "printf '[opsize]\nmax = 20000\n[weights]\nclose_open = 1\ninvalidate = 1\nfsync = 1\nsendfile = 2\n\
         posix_fallocate = 2\npunch_hole = 2\ncopy_file_range = 3\n' > fsx.toml; \
         fsx -f fsx.toml -N 150 -S 1 fsx.data; rm fsx.toml",
        "printf 'nomsyncafterwrite = true\n[opsize]\nmax = 9000\n[weights]\nmapwrite = 20\nfdatasync = 2\n\
         posix_fadvise = 1\n' > fsx.toml; fsx -f fsx.toml -N 200 -S 2 fsx.data; rm fsx.toml",
        "fsx -N 150 -S 3 fsx.data",
    ]);
    d.op(Op::Run(script));
}

pub fn compile(d: &mut Draw) {
    d.op(Op::Run(
        "printf 'int f(int a) { return a + 1; }' > f.c; printf 'int f(int); int main(void) { return f(-1); }' > m.c; \
         cc -c f.c; cc -c m.c; ar rcD libf.a f.o; cc -o prog m.o libf.a -Wl,--build-id=none; ./prog; rm -f m.o; ls",
    ));
}
