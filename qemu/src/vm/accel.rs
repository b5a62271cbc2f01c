// SPDX-License-Identifier: GPL-2.0
//! Whether KVM may be used. That `/dev/kvm` opens says little: there are
//! machines where a virtual machine can be created and never gets anywhere. So
//! a guest must have booted with it here, within seconds; then, or if it did
//! not, that is remembered for this host kernel and this QEMU.

use super::{qemu::Qemu, runner, BackendName, Options};
use crate::kernel::Built;
use crate::paths::Paths;
use anyhow::Result;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(15);

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Memory {
    host: String,
    kvm_boots: bool,
}

pub fn kvm_boots(paths: &Paths, kernel: &Built) -> Result<bool> {
    if std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_err()
    {
        return Ok(false);
    }
    let file = paths.cache.join("accel.json");
    let host = host_id();
    if let Some(known) = recall(&file, &host) {
        return Ok(known);
    }
    crate::ui::step(format!(
        "/dev/kvm is there; trying to boot with it ({}s at most, once)",
        LIMIT.as_secs()
    ));
    let opts = Options {
        backend: BackendName::Qemu,
        mem: Some(512),
        timeout: LIMIT,
        boot_timeout: LIMIT,
        kmemleak: false,
        quiet: true,
        argv: vec!["/bin/true".into()],
        ..Options::default()
    };
    let kvm_boots = matches!(runner::boot(paths, &opts, &Qemu { kvm: true }, kernel), Ok(o) if o.exit_code() == 0);
    crate::ui::step(if kvm_boots {
        "KVM works"
    } else {
        "no guest boots with KVM here: emulating (TCG)"
    });
    std::fs::write(&file, serde_json::to_vec(&Memory { host, kvm_boots })?)?;
    Ok(kvm_boots)
}

fn recall(file: &Path, host: &str) -> Option<bool> {
    let memory: Memory = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
    (memory.host == host).then_some(memory.kvm_boots)
}

fn host_id() -> String {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let qemu = Command::new(super::qemu::QEMU).arg("--version").output();
    let qemu = qemu
        .map(|o| String::from_utf8_lossy(&o.stdout).into_owned())
        .unwrap_or_default();
    format!(
        "{} {}",
        release.trim(),
        qemu.lines().next().unwrap_or_default()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_host_kernel_or_qemu_asks_again() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("accel.json");
        assert_eq!(recall(&file, "a"), None);
        let m = Memory {
            host: "a".into(),
            kvm_boots: false,
        };
        std::fs::write(&file, serde_json::to_vec(&m).unwrap()).unwrap();
        assert_eq!(recall(&file, "a"), Some(false));
        assert_eq!(recall(&file, "b"), None);
        std::fs::write(&file, "nonsense").unwrap();
        assert_eq!(recall(&file, "a"), None);
    }
}
