// SPDX-License-Identifier: GPL-2.0
//! Do the guests do what everything else relies on? Each of these boots.

use super::test::Tally;
use crate::paths::Paths;
use anyhow::{ensure, Result};
use std::process::{Command, Output, Stdio};

pub fn run(paths: &Paths, tally: &mut Tally, debug_kernel: bool) {
    let mut guests: Vec<&[&str]> = vec![&["--backend", "uml"], &["--backend", "qemu"]];
    if debug_kernel {
        guests.push(&["--backend", "qemu", "--kernel", "debug"]);
    }
    for g in guests {
        let name = g
            .iter()
            .filter(|w| !w.starts_with("--"))
            .copied()
            .collect::<Vec<_>>()
            .join(" ");
        let run = |command: &str| vm(paths, g, command);
        // The first time this also finds out whether KVM works, and says so.
        tally.check(&format!("{name}: it boots"), || {
            let out = run("true")?;
            ensure!(out.status.success(), "{out:?}");
            Ok(())
        });
        tally.check(
            &format!("{name}: outputs and exit status come through, unmixed"),
            || passes_through(&run),
        );
        tally.check(
            &format!("{name}: a place to work: file handles, attributes, loop, namespaces"),
            || workplace(&run),
        );
        tally.check(
            &format!("{name}: the host's files stay as they are"),
            || read_only(paths, &run),
        );
        tally.check(&format!("{name}: a kernel warning fails the run"), || {
            caught(
                &run("echo WARNING > /sys/kernel/debug/provoke-crash/DIRECT; echo went on"),
                "WARNING: ",
            )
        });
        tally.check(&format!("{name}: a kernel panic fails the run"), || {
            caught(
                &run("echo PANIC > /sys/kernel/debug/provoke-crash/DIRECT"),
                "Kernel panic",
            )
        });
        tally.check(
            &format!("{name}: a command without end meets its time limit"),
            || {
                let o = vm(
                    paths,
                    &[g, &["--timeout", "5"]].concat(),
                    "echo before; exec sleep 1000",
                )?;
                ensure!(
                    o.status.code() == Some(124) && out(&o) == "before\n",
                    "{o:?}"
                );
                Ok(())
            },
        );
    }
    tally.check("a result file comes out", || {
        let dir = std::env::temp_dir().join(format!("fuse-restart-smoke-{}", std::process::id()));
        let file = dir.display().to_string();
        let o = vm(
            paths,
            &["--out", &file],
            "printf %s result > $FUSE_RESTART_OUT",
        )?;
        let got = std::fs::read_to_string(&dir);
        let _ = std::fs::remove_file(&dir);
        ensure!(
            o.status.success() && got.as_deref().ok() == Some("result"),
            "{got:?} {o:?}"
        );
        Ok(())
    });
}

fn vm(paths: &Paths, options: &[&str], command: &str) -> Result<Output> {
    let out = Command::new(std::env::current_exe()?)
        .args(["vm", "--quiet", "--no-kmemleak"])
        .args(options)
        .args(["--", "sh", "-c", command])
        .env("FUSE_RESTART_REPO", &paths.repo)
        .current_dir(&paths.repo)
        .stdin(Stdio::null())
        .output()?;
    Ok(out)
}

fn out(o: &Output) -> String {
    String::from_utf8_lossy(&o.stdout).into_owned()
}

fn passes_through(run: &dyn Fn(&str) -> Result<Output>) -> Result<()> {
    let o = run("pwd; echo bad >&2; id -u; exit 42")?;
    let here = std::env::current_dir()?;
    let _ = here;
    ensure!(
        o.status.code() == Some(42),
        "status {:?}, wanted 42: {o:?}",
        o.status.code()
    );
    ensure!(
        out(&o).ends_with("\n0\n") && out(&o).lines().count() == 2,
        "stdout: {:?}",
        out(&o)
    );
    ensure!(
        String::from_utf8_lossy(&o.stderr) == "bad\n",
        "stderr: {:?}",
        String::from_utf8_lossy(&o.stderr)
    );
    Ok(())
}

fn workplace(run: &dyn Fn(&str) -> Result<Output>) -> Result<()> {
    let o = run("set -e; cd /tmp; echo x > f; setfattr -n user.a -v b f; getfattr -n user.a f >/dev/null
        ls /sys/fs/fuse/connections /sys/kernel/tracing/events/fuse >/dev/null; test -c /dev/fuse; test -c /dev/cuse
        truncate -s 32M img; mkfs.ext4 -q img; mkdir m; mount -o loop img m; echo y > m/f; umount m
        unshare -Ur true; unshare -m true; unshare -p -f true
        mkdir /sys/fs/cgroup/x; echo 0 > /sys/fs/cgroup/x/cgroup.procs
        touch \"$HOME\"/.written /mnt/x; test -c /dev/ptmx; test -d /dev/shm; echo done")?;
    ensure!(o.status.success() && out(&o) == "done\n", "{o:?}");
    Ok(())
}

fn read_only(paths: &Paths, run: &dyn Fn(&str) -> Result<Output>) -> Result<()> {
    let probe = paths.repo.join("scripts").join(".written-by-a-guest");
    let o = run("touch scripts/.written-by-a-guest; ls Cargo.toml")?;
    let leaked = probe.exists();
    let _ = std::fs::remove_file(&probe);
    ensure!(!leaked, "a guest wrote to {}", probe.display());
    ensure!(o.status.success() && out(&o) == "Cargo.toml\n", "{o:?}");
    Ok(())
}

fn caught(o: &Result<Output>, headline: &str) -> Result<()> {
    let o = o.as_ref().map_err(|e| anyhow::anyhow!("{e:#}"))?;
    let err = String::from_utf8_lossy(&o.stderr);
    ensure!(
        o.status.code() == Some(121),
        "status {:?}, wanted 121: {o:?}",
        o.status.code()
    );
    ensure!(err.contains(headline), "the report is not printed: {err}");
    Ok(())
}
