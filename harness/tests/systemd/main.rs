// SPDX-License-Identifier: GPL-2.0
//! `serve passthrough --mountpoint` as a unit of the real systemd, without a keeper; see Documentation/systemd.md.

mod manager;

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use manager::{missing, wait_for, Manager, UNIT};

const BINARY: &str = env!("CARGO_BIN_EXE_fuse-restart");

/// Applications that run until told to stop; none of their calls may fail, none of their data may be wrong.
fn under_load<T>(manager: &Manager, what: &str, work: impl FnOnce(&dyn Fn()) -> T) -> T {
    let mnt = manager.path("mnt/data");
    let stop = AtomicBool::new(false);
    let rounds: [_; 3] = std::array::from_fn(|_| AtomicU64::new(0));
    std::thread::scope(|scope| {
        let (stop, rounds) = (&stop, &rounds);
        let apps: Vec<_> = rounds
            .iter()
            .enumerate()
            .map(|(n, count)| {
                let dir = mnt.join(format!("app{n}"));
                scope.spawn(move || application(&dir, stop, count))
            })
            .collect();
        // Every application comes around twice: what it does now began after what was done before.
        let all_go_on = || {
            for (app, count) in apps.iter().zip(rounds) {
                let before = count.load(Ordering::Relaxed);
                wait_for(&format!("an application to go on after {what}"), || {
                    let gone_on = count.load(Ordering::Relaxed) >= before + 2;
                    (gone_on || app.is_finished()).then_some(())
                });
            }
        };
        all_go_on();
        let result = work(&all_go_on);
        stop.store(true, Ordering::Relaxed);
        for app in apps {
            app.join()
                .unwrap_or_else(|_| panic!("an application noticed: {what}"));
        }
        result
    })
}

fn application(dir: &Path, stop: &AtomicBool, rounds: &AtomicU64) {
    fs::create_dir_all(dir).unwrap();
    let mut open = fs::File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(dir.join("open"))
        .unwrap();
    for n in 0_u64.. {
        let (one, two) = (dir.join("one"), dir.join("two"));
        fs::write(&one, n.to_string()).unwrap();
        fs::rename(&one, &two).unwrap();
        assert_eq!(fs::read_to_string(&two).unwrap(), n.to_string());
        fs::remove_file(&two).unwrap();
        open.seek(SeekFrom::Start(0)).unwrap();
        open.write_all(&n.to_le_bytes()).unwrap();
        open.seek(SeekFrom::Start(0)).unwrap();
        let mut bytes = [0; 8];
        open.read_exact(&mut bytes).unwrap();
        assert_eq!(u64::from_le_bytes(bytes), n);
        rounds.fetch_add(1, Ordering::Relaxed);
        if stop.load(Ordering::Relaxed) {
            return;
        }
    }
}

/// The pid of a server that serves, other than `old`.
fn new_server(manager: &Manager, old: &str) -> String {
    wait_for("the next server", || {
        let pid = manager.property("MainPID");
        let serves = manager.property("ActiveState") == "active";
        (serves && pid != "0" && pid != old).then_some(pid)
    })
}

fn kill_server(manager: &Manager) -> String {
    end_server(manager, "KILL")
}

fn end_server(manager: &Manager, signal: &str) -> String {
    let old = manager.property("MainPID");
    manager.systemctl(&["kill", "--kill-whom=main", "-s", signal, UNIT]);
    new_server(manager, &old)
}

#[test]
fn the_mount_outlives_what_systemd_does_to_its_server() {
    if let Some(why) = missing() {
        eprintln!("SKIPPED: {why}");
        return;
    }
    let dir = PathBuf::from("/tmp/systemd-test");
    let manager = Manager::boot(&dir, Path::new(BINARY));
    manager.systemctl(&["start", UNIT]);
    assert_eq!(manager.property("NFileDescriptorStore"), "2");

    under_load(&manager, "kill -9", |all_go_on| {
        for _ in 0..2 {
            kill_server(&manager);
            all_go_on();
        }
    });
    eprintln!("kill -9: done");

    // An end by one of these is a success to systemd.
    for signal in ["TERM", "INT", "HUP"] {
        under_load(&manager, signal, |all_go_on| {
            end_server(&manager, signal);
            all_go_on();
        });
    }
    eprintln!("SIGTERM, SIGINT, SIGHUP: done");

    under_load(&manager, "systemctl restart", |all_go_on| {
        for _ in 0..2 {
            let old = manager.property("MainPID");
            manager.systemctl(&["restart", UNIT]);
            assert_ne!(manager.property("MainPID"), old);
            all_go_on();
        }
    });
    eprintln!("systemctl restart: done");

    // With those before, more than systemd's usual five in ten seconds. A slow machine takes longer, and would tell nothing.
    assert_eq!(manager.property("StartLimitIntervalUSec"), "0");
    under_load(&manager, "a crash loop", |_| {
        for _ in 0..6 {
            kill_server(&manager);
        }
    });
    eprintln!("crash loop: done");

    dies_early(&manager, &dir);
    eprintln!("crash loop before it is ready: done");

    upgrade(&manager, &dir);
    eprintln!("upgrade: done");

    stale(&manager);
    eprintln!("stale entries: done");

    assert!(manager
        .inside(&["umount", dir.join("mnt/data").to_str().unwrap()])
        .status
        .success());
    wait_for("the unit to end", || {
        (manager.property("ActiveState") == "inactive").then_some(())
    });
    assert_eq!(manager.property("Result"), "success");
}

fn replace(dir: &Path, by: &Path) {
    let new = dir.join("bin/new");
    fs::copy(by, &new).unwrap();
    fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
    fs::rename(&new, dir.join("bin/fuse-restart")).unwrap();
}

/// No instance comes as far as READY, until there is a better one: the applications wait, and nothing is lost.
///
/// A child of ours would wait, too: it has the files of the applications until it execs, and to close one is a request. So
/// one that was started before does it all.
fn dies_early(manager: &Manager, dir: &Path) {
    let dies = dir.join("dies");
    fs::write(&dies, "#!/bin/sh\nkill -9 $$\n").unwrap();
    fs::set_permissions(&dies, fs::Permissions::from_mode(0o755)).unwrap();
    let script = format!(
        "cd {}; show() {{ systemctl show -P $1 {UNIT}; }}
         enough=$(($(show NRestarts) + 7)); n=0; ok=yes
         cp dies bin/new && mv bin/new bin/fuse-restart
         systemctl kill --kill-whom=main -s KILL {UNIT}
         until test $(show NRestarts) -ge $enough; do
             n=$((n + 1)); test $n -lt 300 || {{ ok=no; break; }}; sleep 0.1
         done
         echo restarted 7 times: $ok, $(show NFileDescriptorStore) descriptors
         cp {} bin/new && mv bin/new bin/fuse-restart",
        dir.display(),
        BINARY
    );
    under_load(manager, "servers that die before they serve", |all_go_on| {
        let old = manager.property("MainPID");
        let out = manager.inside(&["sh", "-c", &script]);
        let said = String::from_utf8_lossy(&out.stdout).trim().to_owned();
        // First: or nobody ends.
        all_go_on();
        assert_eq!(said, "restarted 7 times: yes, 2 descriptors", "{out:?}");
        new_server(manager, &old);
    });
}

/// As a package does it: the new binary gets the name of the old one, tests itself, and only then the old one goes.
fn upgrade(manager: &Manager, dir: &Path) {
    let binary = dir.join("bin/fuse-restart");
    let replace = |by: &Path| replace(dir, by);
    let step = |options: &str| {
        format!(
            "{} serve passthrough --self-test --replacing $(systemctl show -P MainPID {UNIT}) {options} {} && \
             systemctl restart {UNIT}",
            binary.display(),
            dir.join("srv/data").display()
        )
    };
    let step_with = |options| manager.inside(&["sh", "-c", &step(options)]);
    let exe = |pid: &str| {
        let link = manager.inside(&["readlink", &format!("/proc/{pid}/exe")]);
        String::from_utf8_lossy(&link.stdout).trim().to_owned()
    };
    under_load(manager, "an upgrade", |all_go_on| {
        let old = manager.property("MainPID");
        let broken = dir.join("broken");
        fs::write(&broken, "#!/bin/sh\nexit 1\n").unwrap();
        replace(&broken);
        assert!(!step_with("").status.success());
        all_go_on();
        assert_eq!(manager.property("MainPID"), old, "the old one goes on");
        assert!(exe(&old).ends_with(" (deleted)"), "{}", exe(&old));

        replace(Path::new(BINARY));
        // It works, but not with what the kernel was told at the mount.
        let out = step_with("--writeback");
        assert!(!out.status.success());
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(said.contains("answers INIT otherwise"), "{said}");
        all_go_on();
        assert_eq!(manager.property("MainPID"), old, "the old one goes on");

        let out = step_with("");
        assert!(out.status.success(), "{out:?}");
        let new = manager.property("MainPID");
        assert_ne!(new, old);
        assert_eq!(exe(&new), binary.display().to_string());
        all_go_on();
    });
}

/// The connection ends while its server does not run: the entries in the store are of no use any more.
fn stale(manager: &Manager) {
    let file = manager.path("mnt/data/file");
    fs::write(&file, "kept").unwrap();
    let old = manager.property("MainPID");
    manager.systemctl(&["kill", "--kill-whom=main", "-s", "STOP", UNIT]);
    let mut aborted = 0;
    for connection in fs::read_dir("/sys/fs/fuse/connections").unwrap().flatten() {
        fs::write(connection.path().join("abort"), "1").unwrap();
        aborted += 1;
    }
    assert_eq!(aborted, 1);
    manager.systemctl(&["kill", "--kill-whom=main", "-s", "KILL", UNIT]);
    new_server(manager, &old);
    assert_eq!(fs::read_to_string(&file).unwrap(), "kept");
    assert_eq!(manager.property("NFileDescriptorStore"), "2");
    // And that mount is as good as the first one.
    under_load(manager, "kill -9 on the fresh mount", |all_go_on| {
        kill_server(manager);
        all_go_on();
    });
}
