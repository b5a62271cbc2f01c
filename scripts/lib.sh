# SPDX-License-Identifier: GPL-2.0
# Builds fuse-restart-vm (see qemu/) and becomes it. Sourced by the scripts beside it.

FUSE_RESTART_REPO=$(cd "$(dirname "$0")/.." && pwd)
FUSE_RESTART_ARGV0=scripts/$(basename "$0")
export FUSE_RESTART_REPO FUSE_RESTART_ARGV0

if ! command -v cargo >/dev/null; then
	echo "$FUSE_RESTART_ARGV0: no cargo in PATH: install Rust first" >&2
	exit 125
fi

# Rust needs a linker; everything else is installed by the program itself.
if ! command -v cc >/dev/null; then
	if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
		echo "$FUSE_RESTART_ARGV0: installing gcc and libc6-dev (for cargo)" >&2
		{ apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev; } >&2
	else
		echo "$FUSE_RESTART_ARGV0: no C compiler (cc): install gcc and the C library's headers" >&2
		exit 125
	fi
fi

# become SUBCOMMAND ARGS...
become() {
	target=${CARGO_TARGET_DIR:-$FUSE_RESTART_REPO/target}
	(cd "$FUSE_RESTART_REPO" && cargo build --quiet --locked -p fuse-restart-vm) >&2 || exit 125
	case $target in /*) ;; *) target=$FUSE_RESTART_REPO/$target ;; esac
	exec "$target/debug/fuse-restart-vm" "$@"
}
